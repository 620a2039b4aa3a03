//! The end of a file as the place of new units, for formats that keep no record of free space and whose units stay where they are (VDI, QED, Parallels,
//! version 1 of qcow).
//!
//! What is zeroed or discarded keeps its place and becomes a hole of the host's file, so that nothing is ever freed but what a failed write had taken, or
//! what a cut had left unused. The file is extended to the end of whatever is handed out, since other programs take a unit that is not whole for damage.

use crate::device::ZeroMode;
use crate::error::{Error, Kind, Result};
use crate::format::{Extent, Place};
use crate::space::{Overlap, Space, Taken};
use crate::store::Store;
use crate::writeback::WriteBack;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The first store of an image, and the space in it.
pub(crate) struct Tail {
    writeback: Arc<WriteBack>,
    /// Known from the first change on.
    space: Mutex<Option<Space>>,
    /// Length of the file when last looked at, in bytes.
    file_len: AtomicU64,
    /// The host has not yet said that it cannot give space back.
    can_punch: AtomicBool,
}

/// An error for a unit that the file should hold and does not.
pub(crate) fn cut_short(at: u64) -> Error {
    Error::corrupt("the file has been cut short: data that it should hold lie beyond its end").at_offset(at)
}

impl Tail {
    pub(crate) fn new(writeback: Arc<WriteBack>) -> Self {
        Self { writeback, space: Mutex::new(None), file_len: AtomicU64::new(0), can_punch: AtomicBool::new(true) }
    }

    pub(crate) fn store(&self) -> Result<&Arc<dyn Store>> {
        self.writeback.stores().first().ok_or_else(|| Error::corrupt("the image has no file"))
    }

    /// Length of the file in bytes, looked at now.
    pub(crate) fn file_len(&self) -> Result<u64> {
        let len = self.store()?.len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
        self.file_len.store(len, Ordering::Relaxed);
        Ok(len)
    }

    /// Of `len` bytes at `at`, how many are in the file.
    pub(crate) fn in_file(&self, at: u64, len: u64) -> Result<u64> {
        let inside = |file_len: u64| file_len.saturating_sub(at).min(len);
        let known = inside(self.file_len.load(Ordering::Relaxed));
        if known == len { Ok(known) } else { Ok(inside(self.file_len()?)) }
    }

    /// The extent of bytes that are in the file as they are.
    pub(crate) fn data(&self, at: u64, len: u64, in_place: bool) -> Result<Extent> {
        match self.in_file(at, len)? {
            0 => Err(cut_short(at)),
            len => Ok(Extent { len, place: Place::Data { store: 0, at, in_place } }),
        }
    }

    /// Whether the space is known.
    pub(crate) fn is_known(&self) -> bool {
        self.space.lock().is_some()
    }

    /// Takes note of what is used; the rest before `end`, and all that lies behind, is free.
    pub(crate) fn begin(&self, mut used: Vec<(u64, u64)>, end: u64) -> Result<(), Overlap> {
        let space = Space::new(&mut used, end)?;
        *self.space.lock() = Some(space);
        Ok(())
    }

    /// Space for `len` bytes that ends before `limit`, inside the file.
    pub(crate) fn take(&self, len: u64, limit: u64) -> Result<Taken> {
        let mut space = self.space.lock();
        let space = space.as_mut().ok_or_else(|| Error::new(Kind::ReadOnly, "nothing may be changed yet"))?;
        let full = || Error::new(Kind::NoSpace, "the file would become longer than the format allows");
        let taken = space.take(len).ok_or_else(full)?;
        let end = taken.at.saturating_add(len);
        if end > limit {
            space.give(taken.at, len, false);
            return Err(full());
        }
        // Under the lock: two extensions must not cut each other. What is free before the end may have been lost with it.
        let extended = match self.in_file(taken.at, len) {
            Ok(there) if there == len && !taken.fresh => Ok(false),
            Ok(_) => self.store()?.set_len(end).map(|()| true).map_err(|e| Error::io(format!("cannot extend the file to {end} bytes"), e)),
            Err(error) => Err(error),
        };
        if extended.inspect_err(|_| space.give(taken.at, len, false))? {
            self.file_len.fetch_max(end, Ordering::Relaxed);
            self.writeback.wrote_data(0);
        }
        Ok(taken)
    }

    /// Gives back what was taken for a write that came to nothing.
    pub(crate) fn give(&self, at: u64, len: u64) {
        if let Some(space) = self.space.lock().as_mut() {
            space.give(at, len, false);
        }
    }

    /// Takes exactly this run, if all of it is free.
    pub(crate) fn take_at(&self, at: u64, len: u64) -> bool {
        self.space.lock().as_mut().is_some_and(|space| space.take_at(at, len))
    }

    /// Cuts the file off at `end`: nothing that is used lies behind.
    pub(crate) fn cut(&self, end: u64) -> Result<()> {
        self.store()?.set_len(end).map_err(|e| Error::io("cannot shorten the file", e))?;
        self.writeback.wrote_data(0);
        self.file_len()?;
        Ok(())
    }

    /// Whether the host can give space back, as far as is known.
    pub(crate) fn can_punch(&self) -> bool {
        self.can_punch.load(Ordering::Relaxed)
    }

    /// Makes a unit read as zeros where it is, without writing zeros. `false`: the host cannot.
    pub(crate) fn clear(&self, at: u64, len: u64, mode: ZeroMode) -> Result<bool> {
        let store = self.store()?;
        let fail = |e| Error::io("cannot zero", e).at_offset(at);
        let done = match mode {
            ZeroMode::KeepAllocated => store.zero(at, len).map_err(fail)?,
            ZeroMode::MayUnmap => store.punch(at, len).map_err(fail)? || store.zero(at, len).map_err(fail)?,
            ZeroMode::OnlyIfCheap => store.zero(at, len).map_err(fail)? || store.punch(at, len).map_err(fail)?,
        };
        self.writeback.wrote_data(0);
        Ok(done)
    }

    /// Gives a unit's space back to the host. `false`: the host cannot.
    pub(crate) fn punch(&self, at: u64, len: u64) -> Result<bool> {
        let done = self.store()?.punch(at, len).map_err(|e| Error::io("cannot deallocate", e).at_offset(at))?;
        self.writeback.wrote_data(0);
        if !done {
            self.can_punch.store(false, Ordering::Relaxed);
        }
        Ok(done)
    }
}
