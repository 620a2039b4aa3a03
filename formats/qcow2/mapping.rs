//! From guest offsets to places: the lookup that every read and write begins with.
//!
//! A hot lookup takes one shared lock, of the L1 slot, and allocates nothing; no lock is held over I/O. A run ends where its table or the part of it that
//! is loaded ends.

use super::Qcow2;
use super::entry::{Entry, Raw, SUBCLUSTERS};
use super::l1::{self, Slot};
use super::l2::L2Table;
use super::write::Raws;
use crate::error::{Error, Kind, Result};
use crate::format::{Extent, Place, Unit};
use std::ops::Range;
use std::sync::atomic::Ordering;

/// A run within a table, in the making.
enum Run {
    Data { host: u64, in_place: bool },
    Zero { reserved: bool },
    Parent,
}

impl Qcow2 {
    /// See [`Format::map`](crate::format::Format::map).
    pub(super) fn map_run(&self, at: u64, want: u64) -> Result<Extent> {
        let size = self.size();
        if at >= size {
            return Err(Error::new(Kind::OutOfBounds, format!("byte {at} lies beyond the end of the image ({size} bytes)")));
        }
        let want = want.min(size - at);
        let slot_index = l1::index(self.geometry, at);
        let Some(slot) = self.l1.slot(slot_index).filter(|s| s.table_at() != 0) else {
            return Ok(self.unmapped(at, want, slot_index));
        };
        let index = self.geometry.l2_index(at);
        self.with_table(slot, slot_index, index..index + 1, |table| self.run_in(table, index, at, want))
    }

    /// A run of L1 entries that have no table.
    fn unmapped(&self, at: u64, want: u64, slot_index: u64) -> Extent {
        let bits = self.geometry.table_bits();
        let last = (at + (want - 1)) >> bits;
        let end = self.l1.next_used(slot_index + 1, last + 1);
        // The first byte of a used entry is at most `at + want - 1`: no overflow.
        let len = if end > last { want } else { (end << bits) - at };
        Extent { len, place: Place::Parent }
    }

    /// Calls `look` with the table of the slot, whose entries `indices` are loaded, under the slot's shared lock.
    pub(super) fn with_table<R>(
        &self,
        slot: &Slot,
        slot_index: u64,
        indices: Range<usize>,
        look: impl FnOnce(&L2Table) -> Result<R>,
    ) -> Result<R> {
        loop {
            let missing = {
                let guard = slot.table.read();
                match &*guard {
                    Some(table) => match table.missing(&indices) {
                        None => {
                            table.touch();
                            return look(table);
                        }
                        Some(index) => Some((table.clone(), index)),
                    },
                    None => None,
                }
            };
            match missing {
                Some((table, index)) => table.load(&self.writeback, index)?,
                None => self.install(slot, slot_index)?,
            }
        }
    }

    /// Hangs a table that is not loaded yet into a slot whose entry has one.
    fn install(&self, slot: &Slot, slot_index: u64) -> Result<()> {
        {
            let mut hung = slot.table.write();
            if hung.is_some() {
                return Ok(());
            }
            *hung = Some(self.l2.table(self.check_l1_entry(slot.entry(), slot_index)?));
        }
        self.l2.installed(&self.l1, slot_index);
        Ok(())
    }

    /// The L2 table's offset, if the entry makes sense.
    pub(super) fn check_l1_entry(&self, raw: u64, slot_index: u64) -> Result<u64> {
        let at = raw & super::entry::OFFSET;
        if raw & super::entry::L1_RESERVED != 0 || !self.geometry.aligned(at) || at == 0 {
            return Err(self.damage(format!("L1 entry {slot_index} is impossible: {raw:#018x}"), self.l1.at() + slot_index * 8));
        }
        Ok(at)
    }

    /// The run from entry `index` on.
    fn run_in(&self, table: &L2Table, index: usize, at: u64, want: u64) -> Result<Extent> {
        let cluster = self.geometry.cluster_size();
        let skip = self.geometry.in_cluster(at);
        let changeable = self.refcounts.is_some() && !self.damaged.load(Ordering::Acquire);
        let (entry, verified) = self.entry_in(table, index, at)?;
        let run = match entry {
            Entry::Compressed { host, len } => {
                let unit = Unit { id: host, aux: len, decoded_len: cluster as u32 };
                return Ok(Extent { len: want.min(cluster - skip), place: Place::Encoded { unit, skip } });
            }
            Entry::Parts { host, copied, there, zero } => {
                return Ok(self.run_of_parts(host, copied && verified && changeable, there, zero, skip, want));
            }
            Entry::Data { host, copied } => Run::Data { host, in_place: copied && verified && changeable },
            Entry::Zero { host, .. } => Run::Zero { reserved: host.is_some() },
            Entry::Unallocated => Run::Parent,
        };
        let mut len = cluster - skip;
        let mut next = index + 1;
        while len < want && (next as u64) < self.geometry.l2_entries() && table.entry(next).is_some() {
            // An impossible entry is reported when it is reached.
            let Ok((entry, verified)) = self.entry_in(table, next, at + len) else { break };
            if !continues(&run, entry, verified && changeable, skip + len) {
                break;
            }
            len += cluster;
            next += 1;
        }
        let place = match run {
            Run::Data { host, in_place } => Place::Data { store: self.geometry.data_store(), at: host + skip, in_place },
            Run::Zero { reserved } => Place::Zero { reserved },
            Run::Parent => Place::Parent,
        };
        Ok(Extent { len: len.min(want), place })
    }

    /// The run of subclusters of one kind from `skip` bytes after the start of a cluster on.
    fn run_of_parts(&self, host: Option<u64>, in_place: bool, there: u32, zero: u32, skip: u64, want: u64) -> Extent {
        let bits = self.geometry.part_bits();
        let first = (skip >> bits) as u32;
        let kind = |part: u32| (there >> part & 1, zero >> part & 1);
        let end = (first..SUBCLUSTERS).find(|part| kind(*part) != kind(first)).unwrap_or(SUBCLUSTERS);
        let place = match (kind(first), host) {
            ((1, _), Some(host)) => Place::Data { store: self.geometry.data_store(), at: host + skip, in_place },
            ((_, 1), host) => Place::Zero { reserved: host.is_some() },
            _ => Place::Parent,
        };
        Extent { len: ((u64::from(end) << bits) - skip).min(want), place }
    }

    /// What a loaded entry says, and whether its cluster may be written in place. `at` is a guest offset in its cluster.
    fn entry_in(&self, table: &L2Table, index: usize, at: u64) -> Result<(Entry, bool)> {
        let raw = table.entry(index).unwrap_or_default();
        let entry = self.l2_entry_at(raw, at).map_err(|e| self.damage(e.to_string(), table.place(index)))?;
        Ok((entry, table.verified(index)))
    }

    /// What the entry for the cluster of guest offset `at` says.
    pub(super) fn l2_entry_at(&self, raw: Raw, at: u64) -> Result<Entry> {
        let entry = self.geometry.l2_entry(raw)?;
        match entry.host() {
            Some(host) if self.geometry.data_file && host != at - self.geometry.in_cluster(at) => Err(Error::corrupt(format!(
                "the data of guest offset {:#x} are said to be at {host:#x} of the data file, where they cannot be",
                at - self.geometry.in_cluster(at)
            ))),
            _ => Ok(entry),
        }
    }

    /// `count` raw entries from `first` on of the table of an L1 entry that has one.
    pub(super) fn raw_entries(&self, slot_index: u64, first: usize, count: usize) -> Result<Raws> {
        let indices = first..first + count;
        self.with_table(self.l1.slot_for(slot_index), slot_index, indices.clone(), |table| {
            Ok(indices.map(|i| table.entry(i).unwrap_or_default()).collect())
        })
    }
}

/// Whether an entry continues a run that began `ahead` bytes before it.
fn continues(run: &Run, entry: Entry, may_change: bool, ahead: u64) -> bool {
    match (run, entry) {
        (Run::Data { host, in_place }, Entry::Data { host: next, copied }) => next == host + ahead && *in_place == (copied && may_change),
        (Run::Zero { reserved }, Entry::Zero { host, .. }) => *reserved == host.is_some(),
        (Run::Parent, Entry::Unallocated) => true,
        _ => false,
    }
}
