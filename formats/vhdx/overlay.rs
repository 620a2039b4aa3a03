//! A log replayed into memory, over a file that is only read.

use super::log::{SECTOR, Target};
use crate::error::Result;
use crate::store::Store;
use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::Arc;

/// A read-only store: a file with changes laid over it.
pub(super) struct Overlay {
    file: Arc<dyn Store>,
    /// Sectors by their byte offset. They lie over `zeros`.
    sectors: BTreeMap<u64, Box<[u8; SECTOR]>>,
    /// Start and end of runs of zeros; disjoint.
    zeros: BTreeMap<u64, u64>,
    len: u64,
}

impl Overlay {
    pub(super) fn new(file: Arc<dyn Store>) -> io::Result<Self> {
        let len = file.len()?;
        Ok(Self { file, sectors: BTreeMap::new(), zeros: BTreeMap::new(), len })
    }

    /// Whether any change touches `[at, end)`.
    fn touches(&self, at: u64, end: u64) -> bool {
        let first = at - at % SECTOR as u64;
        self.sectors.range(first..end.max(first)).next().is_some()
            || self.zeros.range(..end).next_back().is_some_and(|(_, zero_end)| *zero_end > at)
    }

    /// Lays the changes over `buf`, which was read at `at`.
    fn patch(&self, at: u64, buf: &mut [u8]) {
        let end = at.saturating_add(buf.len() as u64);
        let mut lay = |start: u64, stop: u64, bytes: Option<&[u8]>| {
            let (from, to) = (start.max(at), stop.min(end));
            if from >= to {
                return;
            }
            let into = (from - at) as usize..(to - at) as usize;
            let Some(into) = buf.get_mut(into) else { return };
            match bytes.and_then(|b| b.get((from - start) as usize..(to - start) as usize)) {
                Some(bytes) => into.copy_from_slice(bytes),
                None => into.fill(0),
            }
        };
        for (start, stop) in self.zeros.range(..end).rev() {
            if *stop <= at {
                break;
            }
            lay(*start, *stop, None);
        }
        let first = at - at % SECTOR as u64;
        for (start, sector) in self.sectors.range(first..end.max(first)) {
            lay(*start, start.saturating_add(SECTOR as u64), Some(&sector[..]));
        }
    }
}

impl Target for Overlay {
    fn zero(&mut self, at: u64, len: u64) -> Result<()> {
        let (mut start, mut end) = (at, at.saturating_add(len));
        if start >= end {
            return Ok(());
        }
        let covered: Vec<u64> = self.sectors.range(start..end).map(|(s, _)| *s).collect();
        for sector in covered {
            self.sectors.remove(&sector);
        }
        // One run of those that it touches.
        while let Some((s, e)) = self.zeros.range(..=end).next_back().map(|(s, e)| (*s, *e))
            && e >= start
        {
            self.zeros.remove(&s);
            (start, end) = (start.min(s), end.max(e));
        }
        self.zeros.insert(start, end);
        self.len = self.len.max(at.saturating_add(len));
        Ok(())
    }

    fn write(&mut self, at: u64, sector: Box<[u8; SECTOR]>) -> Result<()> {
        self.sectors.insert(at, sector);
        self.len = self.len.max(at.saturating_add(SECTOR as u64));
        Ok(())
    }

    fn extend(&mut self, len: u64) -> Result<()> {
        self.len = self.len.max(len);
        Ok(())
    }
}

fn read_only() -> io::Error {
    io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "the file is open read-only")
}

impl Store for Overlay {
    fn read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> io::Result<usize> {
        let want: usize = bufs.iter().map(|b| b.len()).sum();
        if !self.touches(at, at.saturating_add(want as u64)) {
            return self.file.read_at(bufs, at);
        }
        let there = usize::try_from(self.len.saturating_sub(at)).unwrap_or(usize::MAX).min(want);
        let mut bytes = vec![0; there];
        self.file.read_zero_filled(&mut bytes, at)?;
        self.patch(at, &mut bytes);
        let mut rest = &bytes[..];
        for buf in bufs {
            let (now, later) = rest.split_at(buf.len().min(rest.len()));
            if let Some(into) = buf.get_mut(..now.len()) {
                into.copy_from_slice(now);
            }
            rest = later;
        }
        Ok(there)
    }

    fn try_read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> io::Result<Option<usize>> {
        let want: usize = bufs.iter().map(|b| b.len()).sum();
        if self.touches(at, at.saturating_add(want as u64)) { Ok(None) } else { self.file.try_read_at(bufs, at) }
    }

    fn write_at(&self, _bufs: &[IoSlice<'_>], _at: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn punch(&self, _at: u64, _len: u64) -> io::Result<bool> {
        Err(read_only())
    }

    fn zero(&self, _at: u64, _len: u64) -> io::Result<bool> {
        Err(read_only())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn path(&self) -> Option<&Path> {
        self.file.path()
    }
}
