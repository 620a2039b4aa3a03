//! The engine: one open image, as a [`BlockDevice`].
//!
//! A [`Format`] says where bytes live; this moves them: `image/read.rs` and `image/write.rs` hold the only read and write loops of the crate. Here are
//! the parts they share, and the life of an image: first write, flush, growth, close.
//!
//! # Locks, in order
//! 1. [`RangeLocks`]: a write in place holds its units shared; whatever changes their mapping holds them exclusively. Readers hold none.
//! 2. [`WriteBack::enter`]: held by every read and write from before the first `map` until the bytes have been moved.
//! 3. The format's own locks, never held while data are moved.
//!
//! A drain (flush) is run with none of these held.

mod guard;
mod read;
mod write;

use crate::cache::Cache;
use crate::compressed::StreamKind;
use crate::device::{BlockDevice, Limits, MapExtent, ZeroMode};
use crate::error::{Error, Kind, Result};
use crate::format::{CheckReport, Format, Place};
use crate::ranges::RangeLocks;
use crate::segments::{CursorMut, total, total_mut};
use crate::store::Store;
use crate::writeback::WriteBack;
use guard::Change;
pub use guard::RawGuard;
use parking_lot::{Mutex, RwLock};
use std::io::{IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What an image is made of; see [`Image::new`].
pub struct Parts {
    /// The driver of the open file.
    pub format: Arc<dyn Format>,
    /// The buffer that the format puts its metadata into.
    pub writeback: Arc<WriteBack>,
    /// What shows through where the format says [`Place::Parent`].
    pub parent: Option<Arc<Image>>,
    /// Where decoded units are kept.
    pub cache: Arc<Cache>,
    /// The file, for messages.
    pub path: PathBuf,
    /// Discards are passed to the format; otherwise they do nothing.
    pub discard: bool,
    /// For a raw image whose format was guessed: refuses writes that would make it look like another format.
    pub guard: Option<RawGuard>,
}

/// An open image.
pub struct Image {
    format: Arc<dyn Format>,
    writeback: Arc<WriteBack>,
    parent: Option<Arc<Image>>,
    cache: Arc<Cache>,
    path: PathBuf,
    discard: bool,
    guard: Option<RawGuard>,
    ranges: RangeLocks,
    /// The compressed stream that the file is, if it is one.
    stream: Option<StreamKind>,
    /// This image's name in the cache.
    id: u64,
    size: AtomicU64,
    unit: u64,
    sector: u32,
    physical_sector: u32,
    read_only: bool,
    /// The format has been told of the first change.
    changed: AtomicBool,
    first_change: Mutex<()>,
    /// Held shared by every change and flush; exclusively by close, growth and check.
    life: RwLock<Life>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    Open,
    Closed,
}

impl Image {
    /// Puts an image together. The caller has opened and checked the parts ([`crate::open()`] does).
    ///
    /// # Errors
    /// `Corrupt` when the format's limits make no sense.
    pub fn new(parts: Parts) -> Result<Self> {
        let limits = parts.format.limits();
        if !limits.unit.is_power_of_two() || !matches!(limits.sector, 512 | 4096) || limits.size > i64::MAX as u64 {
            return Err(Error::corrupt(format!(
                "impossible geometry: size {}, sector {}, unit {}",
                limits.size, limits.sector, limits.unit
            ))
            .at_path(&parts.path));
        }
        // A format that has no sector size of its own serves the sectors that the image below it was made for.
        let below = parts.parent.as_ref().map(|parent| (parent.sector, parent.physical_sector)).unwrap_or_default();
        Ok(Self {
            sector: limits.sector.max(below.0),
            physical_sector: limits.physical_sector.max(below.1),
            size: AtomicU64::new(limits.size),
            unit: limits.unit,
            read_only: limits.read_only,
            format: parts.format,
            writeback: parts.writeback,
            parent: parts.parent,
            cache: parts.cache,
            path: parts.path,
            discard: parts.discard,
            guard: parts.guard,
            ranges: RangeLocks::default(),
            stream: None,
            id: Cache::new_owner(),
            changed: AtomicBool::new(false),
            first_change: Mutex::new(()),
            life: RwLock::new(Life::Open),
        })
    }

    /// Notes that the image lies in a compressed stream.
    #[must_use]
    pub fn in_stream(mut self, stream: Option<StreamKind>) -> Self {
        self.stream = stream;
        self
    }

    /// The compressed stream that the file is, if it is one.
    pub fn stream(&self) -> Option<StreamKind> {
        self.stream
    }

    /// The format's driver.
    pub fn format(&self) -> &dyn Format {
        &*self.format
    }

    /// The image below, if any.
    pub fn parent(&self) -> Option<&Arc<Image>> {
        self.parent.as_ref()
    }

    /// The file it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Looks at all metadata, and mends them if asked. Nothing else may be done with the image meanwhile (calls wait).
    pub fn check(&self, repair: bool) -> Result<CheckReport> {
        let _alone = self.life.write();
        self.writeback.drain(&*self.format)?;
        let report = self.format.check(repair).map_err(|e| e.at_path(&self.path))?;
        self.writeback.drain(&*self.format)?;
        Ok(report)
    }

    /// Flushes and marks the file as cleanly closed; later changes fail. Also done when the last reference is dropped.
    ///
    /// # Errors
    /// The host's. The image is then still open, and the close can be tried again.
    pub fn close(&self) -> Result<()> {
        let mut life = self.life.write();
        if *life == Life::Closed {
            return Ok(());
        }
        if !self.read_only {
            self.flush_held()?;
            self.format.close().map_err(|e| e.at_path(&self.path))?;
            self.writeback.drain(&*self.format).map_err(|e| e.at_path(&self.path))?;
        }
        *life = Life::Closed;
        Ok(())
    }

    /// Flushes while `life` is held.
    fn flush_held(&self) -> Result<()> {
        self.format.flush()?;
        self.writeback.drain(&*self.format).map_err(|e| e.at_path(&self.path))
    }

    fn check_range(&self, at: u64, len: u64) -> Result<()> {
        let size = self.size();
        match at.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::new(Kind::OutOfBounds, format!("{len} bytes at {at} reach beyond the end of the device ({size} bytes)"))),
        }
    }

    /// To be called, with `life` held, before the first change of anything.
    fn begin_change(&self, life: Life) -> Result<()> {
        if self.read_only {
            return Err(Error::new(Kind::ReadOnly, "the image is open read-only").at_path(&self.path));
        }
        if life == Life::Closed {
            return Err(Error::new(Kind::ReadOnly, "the image is closed").at_path(&self.path));
        }
        self.writeback.check_usable().map_err(|e| e.at_path(&self.path))?;
        if self.changed.load(Ordering::Acquire) {
            return Ok(());
        }
        let _one = self.first_change.lock();
        if !self.changed.load(Ordering::Acquire) {
            self.format.first_write().map_err(|e| e.at_path(&self.path))?;
            self.changed.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Runs a change of guest data past the guard of a raw image whose format was guessed.
    fn guarded(&self, what: &Change<'_>, at: u64, change: impl FnOnce() -> Result<()>) -> Result<()> {
        match &self.guard {
            Some(guard) => {
                let file_len = self.store(0)?.len().map_err(|e| self.io_error("cannot find out the length of the file", e, 0, 0))?;
                let read = |buf: &mut [u8], at| self.read(&mut [IoSliceMut::new(buf)], at);
                guard.pass(what, at, file_len, self.size(), read, change).map_err(|e| e.at_path(&self.path))
            }
            None => change(),
        }
    }

    fn stores(&self) -> &[Arc<dyn Store>] {
        self.format.stores()
    }

    fn store(&self, index: usize) -> Result<&Arc<dyn Store>> {
        self.stores().get(index).ok_or_else(|| Error::corrupt(format!("the format named file {index} of {}", self.stores().len())))
    }

    /// The units that `[at, at + len)` touches.
    fn units(&self, at: u64, len: u64) -> (u64, u64) {
        let start = at & !(self.unit - 1);
        let end = at.saturating_add(len).checked_next_multiple_of(self.unit).unwrap_or(u64::MAX);
        (start, end)
    }

    /// A host error with its place.
    fn io_error(&self, what: &str, error: std::io::Error, store: usize, at: u64) -> Error {
        let error = Error::io(what, error).at_offset(at);
        match self.stores().get(store).and_then(|s| s.path()) {
            Some(path) => error.at_path(path),
            None => error.at_path(&self.path),
        }
    }
}

impl BlockDevice for Image {
    fn limits(&self) -> Limits {
        let limits = self.format.limits();
        let can_discard = self.discard && limits.can_discard && !self.read_only;
        Limits {
            size: self.size(),
            sector: self.sector,
            physical_sector: self.physical_sector,
            granularity: limits.unit,
            read_only: self.read_only,
            can_discard,
            discard_zeroes: can_discard,
            cheap_zero: limits.cheap_zero && !self.read_only,
            thin: limits.thin,
        }
    }

    fn read(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> Result<()> {
        let len = total_mut(bufs);
        self.check_range(at, len)?;
        self.read_chain(&mut CursorMut::new(bufs), at, len)
    }

    fn try_read(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> Result<bool> {
        self.check_range(at, total_mut(bufs))?;
        self.try_read_data(bufs, at)
    }

    fn write(&self, bufs: &[IoSlice<'_>], at: u64) -> Result<()> {
        self.check_range(at, total(bufs))?;
        {
            let life = self.life.read();
            self.begin_change(*life)?;
            self.guarded(&Change::Bytes(bufs), at, || self.write_data(bufs, at))?;
        }
        self.drain_if_full()
    }

    fn zero(&self, at: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.check_range(at, len)?;
        {
            let life = self.life.read();
            self.begin_change(*life)?;
            self.guarded(&Change::Zeros(len), at, || self.zero_range(at, len, mode))?;
        }
        self.drain_if_full()
    }

    fn discard(&self, at: u64, len: u64) -> Result<()> {
        self.check_range(at, len)?;
        {
            let life = self.life.read();
            self.begin_change(*life)?;
            if !self.discard || !self.format.limits().can_discard {
                return Ok(());
            }
            self.guarded(&Change::Zeros(len), at, || self.discard_range(at, len))?;
        }
        self.drain_if_full()
    }

    fn flush(&self) -> Result<()> {
        let life = self.life.read();
        if self.read_only || *life == Life::Closed {
            return Ok(());
        }
        self.flush_held()
    }

    fn map(&self, at: u64, len: u64) -> Result<MapExtent> {
        self.check_range(at, len)?;
        if len == 0 {
            return Err(Error::new(Kind::OutOfBounds, "an empty range has no extents"));
        }
        self.map_chain(at, len, 0)
    }

    fn grow(&self, size: u64) -> Result<()> {
        let life = self.life.write();
        self.begin_change(*life)?;
        let old = self.size();
        if size < old {
            return Err(Error::new(Kind::InvalidOption, format!("the image is {old} bytes: shrinking it to {size} would lose data"))
                .at_path(&self.path));
        }
        if size > old {
            if let Some(guard) = &self.guard {
                guard.grow(old, size, |buf, at| self.read(&mut [IoSliceMut::new(buf)], at)).map_err(|e| e.at_path(&self.path))?;
            }
            self.format.grow(size).map_err(|e| e.at_path(&self.path))?;
            let new = self.format.limits().size;
            self.size.store(new, Ordering::Release);
            // What lies beyond the old end in its last unit, and in the parent, was never meant to be seen.
            let below = self.parent.as_ref().map_or(0, |p| p.size());
            let end = below.max(old.checked_next_multiple_of(self.unit).unwrap_or(new)).min(new);
            if end > old {
                self.zero_range(old, end - old, ZeroMode::MayUnmap).inspect_err(|_| self.size.store(old, Ordering::Release))?;
            }
            self.flush_held()?;
        }
        Ok(())
    }
}

impl Image {
    /// Keeps the memory of pending metadata bounded.
    fn drain_if_full(&self) -> Result<()> {
        if self.writeback.over_limit() {
            self.writeback.drain(&*self.format).map_err(|e| e.at_path(&self.path))?;
        }
        Ok(())
    }

    /// The state of the first run at `at`, through the chain.
    fn map_chain(&self, at: u64, len: u64, depth: u32) -> Result<MapExtent> {
        let _io = self.writeback.enter();
        let extent = self.format.map(at, len)?;
        let plain = MapExtent { len: extent.len, allocated: true, zero: false, encoded: false, depth, offset: None };
        match extent.place {
            Place::Data { store, at: host, .. } => {
                let hole = if self.format.limits().holes_are_zeros {
                    self.store(store)?.hole_or_data(host).map_err(|e| self.io_error("cannot look for holes", e, store, host))?
                } else {
                    None
                };
                Ok(match hole {
                    Some((run, data)) => MapExtent { len: extent.len.min(run), zero: !data, allocated: data, offset: Some(host), ..plain },
                    None => MapExtent { offset: Some(host), ..plain },
                })
            }
            Place::Zero { reserved } => Ok(MapExtent { allocated: reserved, zero: true, ..plain }),
            Place::Encoded { .. } => Ok(MapExtent { encoded: true, ..plain }),
            Place::Parent => match &self.parent {
                Some(parent) if at < parent.size() => parent.map_chain(at, extent.len.min(parent.size() - at), depth + 1),
                _ => Ok(MapExtent { allocated: false, zero: true, ..plain }),
            },
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::error!(image = %self.path.display(), error = %error.chain(), "the image could not be closed cleanly");
        }
        self.cache.forget(self.id);
    }
}
