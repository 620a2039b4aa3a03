//! Walking through lists of buffers piece by piece, without copying and, up to 16 buffers, without allocating.

use smallvec::SmallVec;
use std::io::{IoSlice, IoSliceMut};

/// A few buffers to write from.
pub type Parts<'a> = SmallVec<[IoSlice<'a>; 16]>;
/// A few buffers to read into.
pub type PartsMut<'a> = SmallVec<[IoSliceMut<'a>; 16]>;

/// Length of all buffers, in bytes.
pub fn total(bufs: &[IoSlice<'_>]) -> u64 {
    bufs.iter().map(|b| b.len() as u64).sum()
}

/// Length of all buffers, in bytes.
pub fn total_mut(bufs: &[IoSliceMut<'_>]) -> u64 {
    bufs.iter().map(|b| b.len() as u64).sum()
}

/// A position in a list of buffers to read into.
#[derive(Debug)]
pub struct CursorMut<'a, 'b> {
    bufs: &'a mut [IoSliceMut<'b>],
    index: usize,
    skip: usize,
}

impl<'a, 'b> CursorMut<'a, 'b> {
    /// At the start.
    pub fn new(bufs: &'a mut [IoSliceMut<'b>]) -> Self {
        Self { bufs, index: 0, skip: 0 }
    }

    /// The next `len` bytes (fewer at the end), moving past them.
    pub fn take(&mut self, len: u64) -> PartsMut<'_> {
        let mut parts = PartsMut::new();
        let mut left = usize::try_from(len).unwrap_or(usize::MAX);
        let (mut index, mut skip) = (self.index, self.skip);
        for buf in self.bufs[self.index..].iter_mut() {
            if left == 0 {
                break;
            }
            let count = left.min(buf.len() - skip);
            if count > 0 {
                let full = skip + count == buf.len();
                parts.push(IoSliceMut::new(&mut buf[skip..skip + count]));
                left -= count;
                if !full {
                    skip += count;
                    break;
                }
            }
            index += 1;
            skip = 0;
        }
        (self.index, self.skip) = (index, skip);
        parts
    }

    /// Fills the next `len` bytes with zeros.
    pub fn zero(&mut self, len: u64) {
        for part in &mut self.take(len) {
            part.fill(0);
        }
    }

    /// Fills the next bytes from `bytes`.
    pub fn copy_from(&mut self, mut bytes: &[u8]) {
        for part in &mut self.take(bytes.len() as u64) {
            let (now, later) = bytes.split_at(part.len().min(bytes.len()));
            part[..now.len()].copy_from_slice(now);
            bytes = later;
        }
    }
}

/// A position in a list of buffers to write from.
#[derive(Clone, Debug)]
pub struct Cursor<'a, 'b> {
    bufs: &'a [IoSlice<'b>],
    index: usize,
    skip: usize,
}

impl<'a, 'b> Cursor<'a, 'b> {
    /// At the start.
    pub fn new(bufs: &'a [IoSlice<'b>]) -> Self {
        Self { bufs, index: 0, skip: 0 }
    }

    /// The next `len` bytes (fewer at the end), moving past them.
    pub fn take(&mut self, len: u64) -> Parts<'a> {
        let mut parts = Parts::new();
        let mut left = usize::try_from(len).unwrap_or(usize::MAX);
        while left > 0 && self.index < self.bufs.len() {
            let buf = &self.bufs[self.index];
            let count = left.min(buf.len() - self.skip);
            if count > 0 {
                parts.push(IoSlice::new(&buf[self.skip..self.skip + count]));
            }
            left -= count;
            self.skip += count;
            if self.skip == buf.len() {
                self.index += 1;
                self.skip = 0;
            }
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn takes_are_consecutive(lens in prop::collection::vec(0usize..20, 0..12), takes in prop::collection::vec(0u64..40, 0..12)) {
            let total: usize = lens.iter().sum();
            let mut storage: Vec<u8> = (0..total).map(|i| i as u8).collect();
            let expected = storage.clone();
            let mut rest = storage.as_mut_slice();
            let mut bufs = Vec::new();
            for len in &lens {
                let (now, later) = rest.split_at_mut(*len);
                bufs.push(IoSliceMut::new(now));
                rest = later;
            }
            let mut seen = Vec::new();
            let mut cursor = CursorMut::new(&mut bufs);
            for take in &takes {
                cursor.take(*take).iter().for_each(|p| seen.extend_from_slice(p));
            }
            let want = (takes.iter().sum::<u64>() as usize).min(total);
            prop_assert_eq!(&seen[..], &expected[..want]);

            let mut rest = &expected[..];
            let mut bufs = Vec::new();
            for len in &lens {
                let (now, later) = rest.split_at(*len);
                bufs.push(IoSlice::new(now));
                rest = later;
            }
            let mut cursor = Cursor::new(&bufs);
            let mut seen = Vec::new();
            for take in &takes {
                cursor.take(*take).iter().for_each(|p| seen.extend_from_slice(p));
            }
            prop_assert_eq!(&seen[..], &expected[..want]);
        }
    }
}
