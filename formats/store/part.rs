//! A part of a store as a read-only store of its own.

use super::Store;
use smallvec::SmallVec;
use std::io::{self, IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::Arc;

/// `len` bytes from `at` of a store.
pub(crate) struct PartStore {
    inner: Arc<dyn Store>,
    at: u64,
    len: u64,
}

impl PartStore {
    /// The caller has bounded the range by the store's length.
    pub(crate) fn new(inner: Arc<dyn Store>, at: u64, len: u64) -> Self {
        Self { inner, at, len }
    }

    /// Runs `read` with as much of `bufs` as there are bytes from `at` on.
    fn bounded<T>(
        &self,
        bufs: &mut [IoSliceMut<'_>],
        at: u64,
        read: impl FnOnce(&mut [IoSliceMut<'_>], u64) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut left = usize::try_from(self.len.saturating_sub(at)).unwrap_or(usize::MAX);
        let mut parts: SmallVec<[IoSliceMut<'_>; 16]> = SmallVec::new();
        for buf in bufs {
            let count = buf.len().min(left);
            left -= count;
            parts.push(IoSliceMut::new(buf.get_mut(..count).unwrap_or_default()));
        }
        read(&mut parts, self.at.saturating_add(at.min(self.len)))
    }
}

impl Store for PartStore {
    fn read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> io::Result<usize> {
        self.bounded(bufs, at, |parts, at| self.inner.read_at(parts, at))
    }

    fn try_read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> io::Result<Option<usize>> {
        self.bounded(bufs, at, |parts, at| self.inner.try_read_at(parts, at))
    }

    fn write_at(&self, _: &[IoSlice<'_>], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn punch(&self, _: u64, _: u64) -> io::Result<bool> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn zero(&self, _: u64, _: u64) -> io::Result<bool> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn hole_or_data(&self, at: u64) -> io::Result<Option<(u64, bool)>> {
        if at >= self.len {
            return Ok(None);
        }
        let found = self.inner.hole_or_data(self.at.saturating_add(at))?;
        Ok(found.map(|(run, data)| (run.min(self.len - at), data)))
    }

    fn path(&self) -> Option<&Path> {
        self.inner.path()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    #[test]
    fn reads_end_with_the_part() {
        let part = PartStore::new(Arc::new(MemoryStore::new((0..100).collect())), 10, 20);
        let (mut a, mut b) = ([0xEE; 3], [0xEE; 30]);
        assert_eq!(part.read_at(&mut [IoSliceMut::new(&mut a), IoSliceMut::new(&mut b)], 5).unwrap(), 15);
        assert_eq!((a, b[11], b[12]), ([15, 16, 17], 29, 0xEE));
        assert_eq!(part.read_at(&mut [IoSliceMut::new(&mut a)], 20).unwrap(), 0);
        assert_eq!(part.read_at(&mut [IoSliceMut::new(&mut a)], u64::MAX).unwrap(), 0);
    }
}
