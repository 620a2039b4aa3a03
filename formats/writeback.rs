//! The ordered write-back buffer: every change of metadata of every format passes through here.
//!
//! A format says what depends on what; this says when to sync. Two kinds of writes:
//! - [`reserve`](WriteBack::reserve): harmless on its own (a raised refcount, a fresh table nobody points to yet). May reach the file at any time.
//! - [`publish`](WriteBack::publish): makes something visible (a table entry). Reaches the file only after a sync of all data and
//!   all reserving writes that were made before it.
//!
//! Reads of metadata must come through [`read`](WriteBack::read), which shows the file as it will be.
//!
//! # A drain
//! Writes are collected in groups. [`drain`](WriteBack::drain) closes the current group and writes its reservations, syncs, writes its publications,
//! syncs: nothing published is ever on disk without what it refers to. Without publications one sync serves. A format with a log of its own
//! gets the publications to log first ([`Format::log`]). Freed space of the group is then durable-free; [`Format::reclaim`] receives it when, in
//! addition, every I/O that may hold an old mapping has ended ([`Grace`]).
//!
//! # After an error
//! A failed write leaves the group pending and the drain can be repeated (disk full). A failed sync cannot be repeated honestly, since the kernel may
//! have dropped the pages it could not write: the buffer is then failed for good, and so is every later change and flush.

mod pages;
#[cfg(test)]
mod tests;

use crate::error::{Error, Kind, Result};
use crate::format::Format;
use crate::grace::{Entered, Grace};
use crate::redo::{self, RedoLog};
use crate::store::Store;
use pages::Pages;
use parking_lot::Mutex;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Space that nothing refers to any more. Meaning of the fields is the format's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freed {
    /// Which of the format's stores.
    pub store: usize,
    /// Byte offset.
    pub at: u64,
    /// Bytes.
    pub len: u64,
}

/// Which side of the barrier a write of metadata belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Before the barrier: harmless on its own.
    Reserve,
    /// After it: refers to what is before.
    Publish,
}

/// Pending bytes above which the engine drains without being asked, in bytes of memory.
pub const PENDING_LIMIT: usize = 8 << 20;

/// One group: all changes between two drains.
#[derive(Default)]
struct Group {
    number: u64,
    reserve: Pages,
    publish: Pages,
    freed: Vec<Freed>,
}

impl Group {
    fn memory(&self) -> usize {
        self.reserve.memory() + self.publish.memory() + self.freed.len() * size_of::<Freed>()
    }
}

#[derive(Default)]
struct State {
    current: Group,
    /// The group being written, still to be seen by reads.
    draining: Option<Group>,
    /// Groups that have left memory for the file; a read of the file that spans a change of this must be repeated.
    drained: u64,
    /// Free and durable; waits for its grace period. With the stamp taken after the change became visible.
    quarantine: Vec<(u64, Vec<Freed>)>,
}

/// The buffer of one open image; see the module's text.
pub struct WriteBack {
    stores: Vec<Arc<dyn Store>>,
    dirty: Vec<AtomicBool>,
    /// Held while a store is synced: who finds its data covered by somebody else's sync waits for that to end.
    syncing: Vec<Mutex<()>>,
    state: Mutex<State>,
    /// Held for the length of a drain: one at a time.
    drain: Mutex<()>,
    drains_started: AtomicU64,
    /// The start number of the latest drain that succeeded.
    drains_done: AtomicU64,
    failed: AtomicBool,
    grace: Grace,
    redo: Box<dyn RedoLog>,
}

impl WriteBack {
    /// A buffer over a format's stores, in the order of [`Format::stores`].
    pub fn new(stores: Vec<Arc<dyn Store>>, redo: Box<dyn RedoLog>) -> Self {
        // What somebody else wrote before us may not be durable: the first flush syncs whatever happens.
        let dirty = stores.iter().map(|_| AtomicBool::new(true)).collect();
        let syncing = stores.iter().map(|_| Mutex::default()).collect();
        Self {
            stores,
            dirty,
            syncing,
            state: Mutex::default(),
            drain: Mutex::default(),
            drains_started: AtomicU64::new(0),
            drains_done: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            grace: Grace::default(),
            redo,
        }
    }

    /// A buffer that mirrors nothing: for images opened read-only, tools and tests.
    pub fn unmirrored(stores: Vec<Arc<dyn Store>>) -> Self {
        Self::new(stores, Box::new(redo::None))
    }

    /// The stores it writes to.
    pub fn stores(&self) -> &[Arc<dyn Store>] {
        &self.stores
    }

    fn store(&self, index: usize) -> Result<&Arc<dyn Store>> {
        self.stores.get(index).ok_or_else(|| Error::new(Kind::Io, format!("there is no store {index}")))
    }

    /// Marks an I/O that holds mappings; see [`Grace`].
    pub fn enter(&self) -> Entered<'_> {
        self.grace.enter()
    }

    /// Any store may have been changed by other means than writes of data (space given back, ranges zeroed). Call after the change and before it is
    /// acknowledged.
    pub fn changed_data(&self) {
        (0..self.dirty.len()).for_each(|store| self.wrote_data(store));
    }

    /// Guest data were written straight to a store. Call after the write and before it is acknowledged or committed.
    pub fn wrote_data(&self, store: usize) {
        if let Some(dirty) = self.dirty.get(store) {
            // Mostly set already: a load is cheaper than a store to a shared line.
            if !dirty.load(Ordering::SeqCst) {
                dirty.store(true, Ordering::SeqCst);
            }
        }
    }

    /// Reads metadata as they will be in the file; zeros beyond its end.
    pub fn read(&self, store: usize, at: u64, buf: &mut [u8]) -> Result<()> {
        let file = self.store(store)?;
        loop {
            let drained = self.state.lock().drained;
            file.read_zero_filled(buf, at).map_err(|e| self.io_error("cannot read metadata", e, store, at))?;
            let state = self.state.lock();
            if state.drained != drained {
                continue;
            }
            if let Some(group) = &state.draining {
                group.reserve.patch(store, at, buf);
                group.publish.patch(store, at, buf);
            }
            state.current.reserve.patch(store, at, buf);
            state.current.publish.patch(store, at, buf);
            return Ok(());
        }
    }

    /// A write that is harmless on its own. Nothing that is reachable in the file may depend on the bytes' old value.
    pub fn reserve(&self, store: usize, at: u64, bytes: &[u8]) -> Result<()> {
        self.put(Stage::Reserve, store, at, bytes)
    }

    /// A write that refers to data and reservations made before this call.
    pub fn publish(&self, store: usize, at: u64, bytes: &[u8]) -> Result<()> {
        self.put(Stage::Publish, store, at, bytes)
    }

    /// Space that the publications made so far have freed. Comes back through [`Format::reclaim`].
    pub fn release(&self, freed: Freed) {
        self.state.lock().current.freed.push(freed);
    }

    /// Writes and syncs at once, for headers that must change before anything else does. Never for bytes with a pending write.
    pub fn write_through(&self, store: usize, at: u64, bytes: &[u8]) -> Result<()> {
        self.check_usable()?;
        let file = self.store(store)?;
        file.write_all_at(bytes, at).map_err(|e| self.io_error("cannot write metadata", e, store, at))?;
        self.wrote_data(store);
        self.sync_store(store)
    }

    /// Makes what has been written to the stores durable; what is pending here stays. For formats that write a log of their own.
    pub fn sync(&self) -> Result<()> {
        self.check_usable()?;
        self.sync_all()
    }

    fn put(&self, stage: Stage, store: usize, at: u64, bytes: &[u8]) -> Result<()> {
        self.check_usable()?;
        self.store(store)?;
        let mut state = self.state.lock();
        let group = state.current.number;
        // A reservation reaches the file before the publications of its group: one over a pending publication would be lost.
        debug_assert!(
            stage == Stage::Publish || !state.current.publish.touches(store, at, bytes.len()),
            "a reservation of {} bytes at {at:#x} over a publication that is still pending",
            bytes.len()
        );
        // Under the lock, so that the mirror has the order of the buffer.
        self.redo
            .append(group, stage, store, at, bytes)
            .map_err(|e| Error::io("cannot write the redo log that protects acknowledged writes from the death of this process", e))?;
        let pages = match stage {
            Stage::Reserve => &mut state.current.reserve,
            Stage::Publish => &mut state.current.publish,
        };
        pages.put(store, at, bytes);
        Ok(())
    }

    /// The buffer holds more than it should: time for a drain.
    pub fn over_limit(&self) -> bool {
        self.state.lock().current.memory() > PENDING_LIMIT
    }

    /// A sync has failed: what reached the disk is unknown, and nothing may be changed any more.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    /// Fails once a sync has failed.
    pub(crate) fn check_usable(&self) -> Result<()> {
        if self.has_failed() {
            return Err(Error::new(
                Kind::Io,
                "the host failed to write this image to disk earlier; what reached it is unknown, so nothing more is written (close the image, see to the host's storage, then check the image)",
            ));
        }
        Ok(())
    }

    /// Makes all that was written before the call durable; see the module's text.
    ///
    /// # Errors
    /// `NoSpace` or `Io` from the host. After a failed write a later drain tries again; after a failed sync there is no later.
    pub fn drain(&self, format: &dyn Format) -> Result<()> {
        self.check_usable()?;
        let seen = self.drains_started.load(Ordering::SeqCst);
        let lock = self.drain.lock();
        // A drain that began after our call did our work.
        if self.drains_done.load(Ordering::SeqCst) > seen {
            return Ok(());
        }
        let mine = self.drains_started.fetch_add(1, Ordering::SeqCst) + 1;
        self.check_usable()?;
        {
            let mut state = self.state.lock();
            let number = state.current.number + 1;
            let group = std::mem::replace(&mut state.current, Group { number, ..Group::default() });
            state.draining = Some(group);
        }
        let result = self.write_group(format);
        let mut state = self.state.lock();
        let Some(group) = state.draining.take() else { return result };
        match result {
            Ok(()) => {
                state.drained += 1;
                // Still under the lock: nobody appends to the mirror between the question and the answer.
                let empty = state.current.reserve.is_empty() && state.current.publish.is_empty();
                match self.redo.durable(group.number, empty) {
                    Ok(()) if group.freed.is_empty() => {}
                    Ok(()) => {
                        let stamp = self.grace.stamp();
                        state.quarantine.push((stamp, group.freed));
                    }
                    Err(error) => {
                        // The log still holds writes to the freed space: made again after it was reused, they would destroy what is there then.
                        tracing::warn!(%error, "the redo log could not be shortened");
                        state.current.freed.extend(group.freed);
                    }
                }
            }
            Err(error) => {
                // Older first, then what came meanwhile.
                let newer = std::mem::replace(&mut state.current, group);
                state.current.number = newer.number;
                state.current.reserve.overlay(newer.reserve);
                state.current.publish.overlay(newer.publish);
                state.current.freed.extend(newer.freed);
                return Err(error);
            }
        }
        drop(state);
        self.drains_done.store(mine, Ordering::SeqCst);
        // What the drain promises is kept: space that cannot be given back is a leak, not a flush that failed.
        if let Err(error) = self.reclaim(format) {
            tracing::warn!(error = %error.chain(), "space that was freed cannot be given back; check with repair can");
        }
        drop(lock);
        Ok(())
    }

    fn write_group(&self, format: &dyn Format) -> Result<()> {
        let (reserve, publish) = {
            let state = self.state.lock();
            let Some(group) = &state.draining else { return Ok(()) };
            (group.reserve.runs(), group.publish.runs())
        };
        self.write_runs(&reserve)?;
        self.sync_all()?;
        if !publish.is_empty() {
            if format.log(&publish)? {
                self.sync_all()?;
                self.write_runs(&publish)?;
            } else {
                self.write_runs(&publish)?;
                self.sync_all()?;
            }
        }
        Ok(())
    }

    fn write_runs(&self, runs: &[MetaWrite]) -> Result<()> {
        for run in runs {
            let file = self.store(run.store)?;
            file.write_all_at(&run.bytes, run.at).map_err(|e| self.io_error("cannot write metadata", e, run.store, run.at))?;
            self.wrote_data(run.store);
        }
        Ok(())
    }

    fn sync_all(&self) -> Result<()> {
        (0..self.stores.len()).try_for_each(|store| self.sync_store(store))
    }

    fn sync_store(&self, store: usize) -> Result<()> {
        let (Some(dirty), Some(file)) = (self.dirty.get(store), self.stores.get(store)) else { return Ok(()) };
        let _one = self.syncing.get(store).map(|s| s.lock());
        // Cleared first: a write that completes from here on sets it again and is the next sync's.
        if !dirty.swap(false, Ordering::SeqCst) {
            // Whoever synced it last may have failed.
            return self.check_usable();
        }
        file.sync().map_err(|e| {
            self.failed.store(true, Ordering::SeqCst);
            self.io_error("the host could not make written data durable", e, store, 0)
        })
    }

    /// Hands back what is out of everybody's reach.
    fn reclaim(&self, format: &dyn Format) -> Result<()> {
        let now = self.grace.advance();
        let mut ready = Vec::new();
        self.state.lock().quarantine.retain_mut(|(stamp, freed)| {
            let passed = Grace::passed(*stamp, now);
            if passed {
                ready.append(freed);
            }
            !passed
        });
        if ready.is_empty() { Ok(()) } else { format.reclaim(&ready) }
    }

    fn io_error(&self, what: &str, source: io::Error, store: usize, at: u64) -> Error {
        let error = Error::io(what, source).at_offset(at);
        match self.stores.get(store).and_then(|s| s.path()) {
            Some(path) => error.at_path(path),
            None => error,
        }
    }
}

/// A contiguous write of metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaWrite {
    /// Which of the format's stores.
    pub store: usize,
    /// Byte offset.
    pub at: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}
