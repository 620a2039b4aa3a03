//! VHD images of fixed size: the disk, then the footer.

use super::footer::{Footer, Footers, MAX_SIZE, SECTOR};
use crate::device::ZeroMode;
use crate::error::{Error, Result};
use crate::format::{CheckReport, Extent, Format, FormatLimits, Place};
use crate::space::clear;
use crate::store::Store;
use crate::writeback::WriteBack;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Unit of locking, in bytes.
const UNIT: u64 = 1 << 20;

/// An open fixed VHD.
pub(super) struct Fixed {
    writeback: Arc<WriteBack>,
    writable: bool,
    footer: Mutex<Footer>,
    size: AtomicU64,
}

impl Fixed {
    pub(super) fn open(writeback: Arc<WriteBack>, footers: Footers, writable: bool) -> Result<Self> {
        let (size, end) = (footers.footer.size(), footers.end);
        // The geometry may say more than there is, if it was rounded up.
        let size = if size > end && footers.footer.current_size() <= end { footers.footer.current_size() } else { size };
        if size > end {
            return Err(Error::corrupt(format!("the file holds {end} bytes of a disk of {size}: it has been cut short")).at_offset(end));
        }
        if size > MAX_SIZE || !size.is_multiple_of(SECTOR) {
            return Err(Error::corrupt(format!("a disk of {size} bytes; allowed are multiples of {SECTOR} up to 2040 GiB")).at_offset(end));
        }
        Ok(Self { writeback, writable, footer: Mutex::new(footers.footer), size: AtomicU64::new(size) })
    }

    fn store(&self) -> Result<&Arc<dyn Store>> {
        self.writeback.stores().first().ok_or_else(|| Error::corrupt("the image has no file"))
    }
}

impl Format for Fixed {
    fn name(&self) -> &'static str {
        super::NAME
    }

    fn limits(&self) -> FormatLimits {
        FormatLimits {
            size: self.size.load(Ordering::Acquire),
            sector: SECTOR as u32,
            physical_sector: SECTOR as u32,
            unit: UNIT,
            read_only: !self.writable,
            cheap_zero: true,
            can_discard: false,
            thin: false,
            holes_are_zeros: true,
        }
    }

    fn stores(&self) -> &[Arc<dyn Store>] {
        self.writeback.stores()
    }

    fn map(&self, at: u64, want: u64) -> Result<Extent> {
        let len = want.min(self.size.load(Ordering::Acquire).saturating_sub(at));
        Ok(Extent { len, place: Place::Data { store: 0, at, in_place: self.writable } })
    }

    fn zero(&self, at: u64, len: u64, _mode: ZeroMode) -> Result<u64> {
        let done = self.store()?.zero(at, len).map_err(|e| Error::io("cannot zero", e).at_offset(at))?;
        self.writeback.wrote_data(0);
        Ok(if done { len } else { 0 })
    }

    fn grow(&self, size: u64) -> Result<()> {
        super::check_new_size(size)?;
        let mut footer = self.footer.lock();
        let (old, new) = (self.size.load(Ordering::Acquire), footer.with_size(size));
        let store = self.store()?;
        let file_len = store.len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
        store.set_len(size.saturating_add(SECTOR)).map_err(|e| Error::io(format!("cannot extend the file to {size} bytes"), e))?;
        self.writeback.write_through(0, size, new.bytes())?;
        *footer = new;
        // The old footer, and what else lay behind the old end, is part of the disk now.
        clear(&**store, old, file_len.min(size).saturating_sub(old))?;
        self.writeback.wrote_data(0);
        self.writeback.sync()?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn check(&self, _repair: bool) -> Result<CheckReport> {
        // Had the footer been damaged, the image would not be open.
        Ok(CheckReport::default())
    }

    fn identity(&self) -> Option<String> {
        Some(self.footer.lock().uuid().to_string())
    }

    fn describe(&self) -> serde_json::Value {
        super::describe(&self.footer.lock(), "fixed")
    }
}
