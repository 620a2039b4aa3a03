//! A device that makes cheap zeros of writes that hold nothing but zeros.

use crate::device::{BlockDevice, Limits, MapExtent, ZeroMode};
use crate::error::Result;
use crate::segments::total;
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

/// Writes of zeros become [`BlockDevice::zero`]; everything else is passed on.
pub struct ZeroDetector {
    inner: Arc<dyn BlockDevice>,
    mode: ZeroMode,
}

impl ZeroDetector {
    /// Over `inner`; `unmap`: the space of zeros may be given back.
    pub fn new(inner: Arc<dyn BlockDevice>, unmap: bool) -> Self {
        Self { inner, mode: if unmap { ZeroMode::MayUnmap } else { ZeroMode::KeepAllocated } }
    }
}

fn all_zero(bufs: &[IoSlice<'_>]) -> bool {
    // Most data betray themselves in their first bytes; the rest is compared with itself, shifted by one.
    bufs.iter().all(|buf| match buf.split_first() {
        None => true,
        Some((first, rest)) => *first == 0 && buf.get(..rest.len()) == Some(rest),
    })
}

impl BlockDevice for ZeroDetector {
    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn read(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> Result<()> {
        self.inner.read(bufs, at)
    }

    fn try_read(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> Result<bool> {
        self.inner.try_read(bufs, at)
    }

    fn write(&self, bufs: &[IoSlice<'_>], at: u64) -> Result<()> {
        if all_zero(bufs) { self.inner.zero(at, total(bufs), self.mode) } else { self.inner.write(bufs, at) }
    }

    fn zero(&self, at: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.inner.zero(at, len, mode)
    }

    fn discard(&self, at: u64, len: u64) -> Result<()> {
        self.inner.discard(at, len)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn map(&self, at: u64, len: u64) -> Result<MapExtent> {
        self.inner.map(at, len)
    }

    fn grow(&self, size: u64) -> Result<()> {
        self.inner.grow(size)
    }
}

#[cfg(test)]
mod tests {
    use super::all_zero;
    use std::io::IoSlice;

    #[test]
    fn zeros_are_found_in_all_buffers() {
        let zeros = [0; 700];
        let mut other = zeros;
        assert!(all_zero(&[IoSlice::new(&zeros), IoSlice::new(&[]), IoSlice::new(&zeros[..1])]));
        for at in [0, 1, 350, 699] {
            other[at] = 1;
            assert!(!all_zero(&[IoSlice::new(&zeros), IoSlice::new(&other)]), "{at}");
            other[at] = 0;
        }
    }
}
