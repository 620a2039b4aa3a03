//! A part of a device as a device of its own.

use crate::device::{BlockDevice, Limits, MapExtent, ZeroMode};
use crate::error::{Error, Kind, Result};
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

/// `[start, start + len)` of a device. It cannot grow.
pub struct Window {
    inner: Arc<dyn BlockDevice>,
    start: u64,
    len: u64,
}

impl Window {
    /// Shows `len` bytes from `start` of `inner`; to its end if `len` is `None`.
    ///
    /// # Errors
    /// `InvalidOption` when the window is empty, reaches beyond the device or does not consist of whole sectors.
    pub fn new(inner: Arc<dyn BlockDevice>, start: u64, len: Option<u64>) -> Result<Self> {
        let limits = inner.limits();
        let sector = u64::from(limits.sector);
        let left = limits.size.checked_sub(start).filter(|l| *l > 0).ok_or_else(|| {
            Error::new(
                Kind::InvalidOption,
                format!("an offset of {start} lies beyond the end of the disk, which has {} bytes", limits.size),
            )
        })?;
        let len = len.unwrap_or(left);
        if len == 0 || len > left {
            return Err(Error::new(
                Kind::InvalidOption,
                format!("{len} bytes from {start} are not inside the disk, which has {} bytes", limits.size),
            ));
        }
        if !start.is_multiple_of(sector) || !len.is_multiple_of(sector) {
            return Err(Error::new(
                Kind::InvalidOption,
                format!("offset {start} and size {len} should be multiples of the sector ({sector} bytes)"),
            ));
        }
        Ok(Self { inner, start, len })
    }

    fn shift(&self, at: u64, len: u64) -> Result<u64> {
        match at.checked_add(len) {
            Some(end) if end <= self.len => Ok(self.start + at),
            _ => Err(Error::new(Kind::OutOfBounds, format!("{len} bytes at {at} reach beyond the end of the device ({} bytes)", self.len))),
        }
    }
}

impl BlockDevice for Window {
    fn limits(&self) -> Limits {
        let inner = self.inner.limits();
        // Discards in units of the image need the window to begin at one.
        let granularity = if self.start.is_multiple_of(inner.granularity) { inner.granularity } else { u64::from(inner.sector) };
        Limits { size: self.len, granularity, ..inner }
    }

    fn read(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> Result<()> {
        let at = self.shift(at, crate::segments::total_mut(bufs))?;
        self.inner.read(bufs, at)
    }

    fn try_read(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> Result<bool> {
        let at = self.shift(at, crate::segments::total_mut(bufs))?;
        self.inner.try_read(bufs, at)
    }

    fn write(&self, bufs: &[IoSlice<'_>], at: u64) -> Result<()> {
        self.inner.write(bufs, self.shift(at, crate::segments::total(bufs))?)
    }

    fn zero(&self, at: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.inner.zero(self.shift(at, len)?, len, mode)
    }

    fn discard(&self, at: u64, len: u64) -> Result<()> {
        self.inner.discard(self.shift(at, len)?, len)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn map(&self, at: u64, len: u64) -> Result<MapExtent> {
        self.inner.map(self.shift(at, len)?, len)
    }
}
