//! L2 tables in memory, in slices that are loaded when they are first looked at, and the limit on how many there are.
//!
//! A standard entry is one atomic number: readers take no lock that is held over I/O. Of an extended one, a bitmap is the second half: the two are read
//! and changed together, under a lock of the slice that is held for that alone. A table's slices are never unloaded one by one: once a slice is
//! there, it is what the file will have for as long as the table hangs in its [`Slot`](super::l1::Slot).

use super::entry::{Geometry, Raw};
use super::l1::L1;
use crate::error::Result;
use crate::writeback::WriteBack;
use parking_lot::{Mutex, RwLock};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// Entries in a slice: 4 KiB of the table, or 8 KiB if they are extended.
pub(super) const SLICE: usize = 512;

/// A part of an L2 table.
#[derive(Debug)]
pub(super) struct Slice {
    entries: Box<[AtomicU64]>,
    /// The second halves of extended entries. Held while an entry is read or changed; empty where entries are standard.
    bitmaps: RwLock<Box<[u64]>>,
    /// One bit an entry: its cluster was found to belong to nothing else, and may be written in place.
    verified: Box<[AtomicU64]>,
}

impl Slice {
    fn new(geometry: Geometry, bytes: &[u8]) -> Self {
        let raws = || bytes.chunks_exact(geometry.entry_size() as usize).map(Raw::decode);
        let entries: Box<[AtomicU64]> = raws().map(|raw| AtomicU64::new(raw.entry)).collect();
        let bitmaps = if geometry.extended { raws().map(|raw| raw.bitmap).collect() } else { Box::default() };
        let verified = (0..entries.len().div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { entries, bitmaps: RwLock::new(bitmaps), verified }
    }

    fn get(&self, geometry: Geometry, index: usize) -> Option<Raw> {
        let entry = self.entries.get(index)?;
        if !geometry.extended {
            return Some(Raw { entry: entry.load(Ordering::Acquire), bitmap: 0 });
        }
        let bitmaps = self.bitmaps.read();
        Some(Raw { entry: entry.load(Ordering::Acquire), bitmap: *bitmaps.get(index)? })
    }

    fn set(&self, geometry: Geometry, index: usize, raw: Raw) {
        let Some(entry) = self.entries.get(index) else { return };
        if !geometry.extended {
            entry.store(raw.entry, Ordering::Release);
            return;
        }
        let mut bitmaps = self.bitmaps.write();
        entry.store(raw.entry, Ordering::Release);
        if let Some(bitmap) = bitmaps.get_mut(index) {
            *bitmap = raw.bitmap;
        }
    }
}

/// An L2 table.
#[derive(Debug)]
pub(super) struct L2Table {
    /// Host offset in bytes.
    pub at: u64,
    geometry: Geometry,
    slices: Box<[OnceLock<Slice>]>,
    entries: usize,
    /// Looked at since the clock hand last passed.
    used: AtomicBool,
    /// Found to belong to nothing else, and may be changed where it is.
    pub owned: AtomicBool,
    loaded: Arc<AtomicUsize>,
}

impl L2Table {
    fn slices_of(geometry: Geometry) -> usize {
        (geometry.l2_entries() as usize).div_ceil(SLICE)
    }

    fn overhead(geometry: Geometry) -> usize {
        size_of::<Self>() + Self::slices_of(geometry) * size_of::<OnceLock<Slice>>()
    }

    /// Entry number `index`; `None`: its slice is not loaded.
    pub fn entry(&self, index: usize) -> Option<Raw> {
        self.slices.get(index / SLICE)?.get()?.get(self.geometry, index % SLICE)
    }

    /// Host offset of an entry in bytes.
    pub fn place(&self, index: usize) -> u64 {
        self.at + index as u64 * self.geometry.entry_size()
    }

    /// The first of the entries whose slice is not loaded.
    pub fn missing(&self, indices: &Range<usize>) -> Option<usize> {
        let slices = indices.start / SLICE..indices.end.div_ceil(SLICE);
        let missing = slices.into_iter().find(|s| self.slices.get(*s).is_some_and(|s| s.get().is_none()))?;
        Some((missing * SLICE).max(indices.start))
    }

    /// Whether the cluster of the entry may be written in place, as far as is known.
    pub fn verified(&self, index: usize) -> bool {
        let bits = self.slices.get(index / SLICE).and_then(OnceLock::get).and_then(|s| s.verified.get(index % SLICE / 64));
        bits.is_some_and(|b| b.load(Ordering::Acquire) >> (index % 64) & 1 == 1)
    }

    /// Remembers that the cluster of the entry may be written in place, or not.
    pub fn set_verified(&self, index: usize, yes: bool) {
        if let Some(bits) = self.slices.get(index / SLICE).and_then(OnceLock::get).and_then(|s| s.verified.get(index % SLICE / 64)) {
            let bit = 1 << (index % 64);
            if yes {
                bits.fetch_or(bit, Ordering::AcqRel);
            } else {
                bits.fetch_and(!bit, Ordering::AcqRel);
            }
        }
    }

    /// Changes an entry in memory. The slot's lock is held shared and the slice is loaded.
    pub fn set_entry(&self, index: usize, raw: Raw) {
        if let Some(slice) = self.slices.get(index / SLICE).and_then(OnceLock::get) {
            slice.set(self.geometry, index % SLICE, raw);
        }
    }

    /// Notes that the table is in use.
    pub fn touch(&self) {
        // Mostly set already: a load is cheaper than a store to a shared line.
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }

    /// Loads the slice of an entry. No lock is held.
    pub fn load(&self, writeback: &WriteBack, index: usize) -> Result<()> {
        let number = index / SLICE;
        let Some(slice) = self.slices.get(number) else { return Ok(()) };
        if slice.get().is_none() {
            let count = SLICE.min(self.entries - number * SLICE);
            let mut bytes = vec![0; count * self.geometry.entry_size() as usize];
            writeback.read(0, self.place(number * SLICE), &mut bytes)?;
            // Somebody else may have been first, and changed it since: then his is the truth.
            if slice.set(Slice::new(self.geometry, &bytes)).is_ok() {
                self.loaded.fetch_add(bytes.len(), Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn memory(&self) -> usize {
        self.slices.iter().filter_map(OnceLock::get).map(|s| s.entries.len()).sum::<usize>() * self.geometry.entry_size() as usize
    }
}

impl Drop for L2Table {
    fn drop(&mut self) {
        self.loaded.fetch_sub(self.memory(), Ordering::Relaxed);
    }
}

/// Keeps the memory of L2 tables bounded: a clock over the loaded ones.
#[derive(Debug)]
pub(super) struct L2Cache {
    geometry: Geometry,
    budget: usize,
    loaded: Arc<AtomicUsize>,
    clock: Mutex<Clock>,
}

#[derive(Debug, Default)]
struct Clock {
    /// L1 indices of the slots that hold tables.
    slots: Vec<u32>,
    hand: usize,
}

impl L2Cache {
    /// A cache of about `budget` bytes.
    pub fn new(geometry: Geometry, budget: usize) -> Self {
        Self { geometry, budget, loaded: Arc::default(), clock: Mutex::default() }
    }

    /// A table that is not loaded yet.
    pub fn table(&self, at: u64) -> Arc<L2Table> {
        let slices = std::iter::repeat_with(OnceLock::new).take(L2Table::slices_of(self.geometry)).collect();
        Arc::new(L2Table {
            at,
            geometry: self.geometry,
            slices,
            entries: self.geometry.l2_entries() as usize,
            used: AtomicBool::new(true),
            owned: AtomicBool::new(false),
            loaded: self.loaded.clone(),
        })
    }

    /// Lets go of all tables. Nothing else goes on.
    pub fn clear(&self, l1: &L1) {
        let mut clock = self.clock.lock();
        for slot in clock.slots.drain(..).filter_map(|i| l1.slot(u64::from(i))) {
            *slot.table.write() = None;
        }
        clock.hand = 0;
    }

    /// A table was hung into the slot of that index, which was empty. No slot's lock is held. Lets go of others if there are too many.
    pub fn installed(&self, l1: &L1, index: u64) {
        let mut clock = self.clock.lock();
        clock.slots.push(u32::try_from(index).unwrap_or(u32::MAX));
        let overhead = L2Table::overhead(self.geometry);
        let mut steps = clock.slots.len() * 2;
        while steps > 0 && clock.slots.len() > 2 && self.loaded.load(Ordering::Relaxed) + clock.slots.len() * overhead > self.budget {
            steps -= 1;
            if clock.hand >= clock.slots.len() {
                clock.hand = 0;
            }
            let hand = clock.hand;
            let Some(slot) = clock.slots.get(hand).and_then(|i| l1.slot(u64::from(*i))) else { break };
            // One that is being changed is in use.
            let evicted = slot.table.try_write().is_some_and(|mut table| match &*table {
                Some(loaded) if loaded.used.swap(false, Ordering::Relaxed) => false,
                _ => {
                    *table = None;
                    true
                }
            });
            if evicted {
                clock.slots.swap_remove(hand);
            } else {
                clock.hand += 1;
            }
        }
    }
}
