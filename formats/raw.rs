//! Raw images: the file is the disk.

use crate::device::ZeroMode;
use crate::error::{Error, Kind, Result};
use crate::format::{Extent, Format, FormatLimits, Place};
use crate::store::Store;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Holes of file systems come in blocks of this size, in bytes.
const UNIT: u64 = 4096;
const SECTOR: u64 = 512;

/// A raw image. A file whose length is no multiple of a sector reads as zeros up to the end of its last one.
pub struct Raw {
    stores: [Arc<dyn Store>; 1],
    size: AtomicU64,
    writable: bool,
    /// The host has not yet said that it cannot give space back.
    can_punch: AtomicBool,
}

impl Raw {
    /// A raw image in `store`.
    ///
    /// # Errors
    /// The host's, when the length cannot be found out.
    pub fn open(store: Arc<dyn Store>, writable: bool) -> Result<Self> {
        let len = store.len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
        let size = len.checked_next_multiple_of(SECTOR).filter(|s| *s <= i64::MAX as u64);
        let size = size.ok_or_else(|| Error::new(Kind::InvalidOption, format!("a file of {len} bytes is too large")))?;
        Ok(Self { stores: [store], size: AtomicU64::new(size), writable, can_punch: AtomicBool::new(true) })
    }

    /// Runs `change` on the part of a range that lies inside the file.
    fn inside(&self, at: u64, len: u64, change: impl FnOnce(&dyn Store, u64) -> std::io::Result<bool>) -> Result<u64> {
        let store = &*self.stores[0];
        let end = store.len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
        let inside = end.saturating_sub(at).min(len);
        let done = inside == 0 || change(store, inside).map_err(|e| Error::io("cannot deallocate", e).at_offset(at))?;
        Ok(if done { len } else { 0 })
    }
}

impl Format for Raw {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn limits(&self) -> FormatLimits {
        FormatLimits {
            size: self.size.load(Ordering::Acquire),
            sector: 512,
            physical_sector: 4096,
            unit: UNIT,
            read_only: !self.writable,
            cheap_zero: true,
            can_discard: self.can_punch.load(Ordering::Relaxed),
            thin: true,
            holes_are_zeros: true,
        }
    }

    fn stores(&self) -> &[Arc<dyn Store>] {
        &self.stores
    }

    fn map(&self, at: u64, want: u64) -> Result<Extent> {
        Ok(Extent { len: want, place: Place::Data { store: 0, at, in_place: true } })
    }

    fn zero(&self, at: u64, len: u64, mode: ZeroMode) -> Result<u64> {
        let done = self.inside(
            at,
            len,
            |store, inside| if mode == ZeroMode::MayUnmap { store.punch(at, inside) } else { store.zero(at, inside) },
        )?;
        // Where the file system cannot keep the space without writing it, a hole is still cheap.
        if done == 0 && mode == ZeroMode::OnlyIfCheap { self.inside(at, len, |store, inside| store.punch(at, inside)) } else { Ok(done) }
    }

    fn discard(&self, at: u64, len: u64) -> Result<u64> {
        let done = self.inside(at, len, |store, inside| store.punch(at, inside))?;
        // Block devices refuse parts of their sectors.
        if done == 0 && at.is_multiple_of(UNIT) && len.is_multiple_of(UNIT) {
            self.can_punch.store(false, Ordering::Relaxed);
        }
        Ok(done)
    }

    fn grow(&self, size: u64) -> Result<()> {
        if !size.is_multiple_of(SECTOR) {
            return Err(Error::new(Kind::InvalidOption, format!("{size} is no multiple of {SECTOR}")));
        }
        let store = &self.stores[0];
        store.set_len(size).map_err(|e| Error::io(format!("cannot extend the file to {size} bytes"), e))?;
        store.sync().map_err(|e| Error::io("cannot sync the longer file", e))?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}
