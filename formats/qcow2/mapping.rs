//! From guest offsets to places: the lookup that every read and write begins with.
//!
//! A hot lookup takes one shared lock, of the L1 slot, and allocates nothing; no lock is held over I/O. A run ends where its table or the part of it that
//! is loaded ends.

use super::Qcow2;
use super::entry::Entry;
use super::l1::{self, Slot};
use super::l2::L2Table;
use crate::error::{Error, Kind, Result};
use crate::format::{Extent, Place, Unit};
use std::ops::ControlFlow;

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
        self.with_table(slot, slot_index, index, |table| self.run_in(table, index, at, want))
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

    /// Calls `look` with the table of the slot, whose entry `index` is loaded, under the slot's shared lock.
    pub(super) fn with_table<R>(&self, slot: &Slot, slot_index: u64, index: usize, look: impl FnOnce(&L2Table) -> Result<R>) -> Result<R> {
        loop {
            let table = {
                let guard = slot.table.read();
                match &*guard {
                    Some(table) if table.entry(index).is_some() => {
                        table.touch();
                        return look(table);
                    }
                    Some(table) => Some(table.clone()),
                    None => None,
                }
            };
            match table {
                Some(table) => table.load(&self.writeback, index)?,
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
        let (entry, verified) = self.entry_in(table, index)?;
        let run = match entry {
            Entry::Compressed { host, len } => {
                let unit = Unit { id: host, aux: len, decoded_len: cluster as u32 };
                return Ok(Extent { len: want.min(cluster - skip), place: Place::Encoded { unit, skip } });
            }
            Entry::Data { host, copied } => Run::Data { host, in_place: copied && verified },
            Entry::Zero { host, .. } => Run::Zero { reserved: host.is_some() },
            Entry::Unallocated => Run::Parent,
        };
        let mut len = cluster - skip;
        let mut next = index + 1;
        while len < want && (next as u64) < self.geometry.l2_entries() && table.entry(next).is_some() {
            // An impossible entry is reported when it is reached.
            let Ok((entry, verified)) = self.entry_in(table, next) else { break };
            if self.continues(&run, entry, verified, skip + len).is_break() {
                break;
            }
            len += cluster;
            next += 1;
        }
        let place = match run {
            Run::Data { host, in_place } => Place::Data { store: 0, at: host + skip, in_place },
            Run::Zero { reserved } => Place::Zero { reserved },
            Run::Parent => Place::Parent,
        };
        Ok(Extent { len: len.min(want), place })
    }

    /// Whether an entry continues a run that began `ahead` bytes before it.
    fn continues(&self, run: &Run, entry: Entry, verified: bool, ahead: u64) -> ControlFlow<()> {
        let same = match (run, entry) {
            (Run::Data { host, in_place }, Entry::Data { host: next, copied }) => next == host + ahead && *in_place == (copied && verified),
            (Run::Zero { reserved }, Entry::Zero { host, .. }) => *reserved == host.is_some(),
            (Run::Parent, Entry::Unallocated) => true,
            _ => false,
        };
        if same { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    /// What a loaded entry says, and whether its cluster may be written in place.
    fn entry_in(&self, table: &L2Table, index: usize) -> Result<(Entry, bool)> {
        let raw = table.entry(index).unwrap_or(0);
        let entry = self.geometry.l2_entry(raw).map_err(|e| self.damage(e.to_string(), table.at + index as u64 * 8))?;
        Ok((entry, table.verified(index)))
    }

    /// The raw entries of `count` clusters from guest offset `at` on, within one table.
    pub(super) fn raw_entries(&self, at: u64, count: usize) -> Result<Vec<u64>> {
        let slot_index = l1::index(self.geometry, at);
        let first = self.geometry.l2_index(at);
        let Some(slot) = self.l1.slot(slot_index).filter(|s| s.table_at() != 0) else { return Ok(vec![0; count]) };
        (first..first + count).map(|i| self.with_table(slot, slot_index, i, |t| Ok(t.entry(i).unwrap_or(0)))).collect()
    }
}
