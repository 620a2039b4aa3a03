//! The active L1 table in memory: one [`Slot`] an entry, which also holds the L2 table that is loaded for it.
//!
//! Slots are made where they are needed, in chunks, and never move or go away: an image's growth and its readers do not wait for each other. What
//! lies on disk is the business of those who change entries.

use super::entry::{Geometry, MAX_L1_BYTES, OFFSET};
use super::l2::L2Table;
use crate::error::{Error, Result};
use crate::writeback::WriteBack;
use parking_lot::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// Slots in a chunk.
const CHUNK: usize = 512;
/// Chunks in a group.
const GROUP: usize = 128;
/// Groups that the largest table has.
const GROUPS: usize = (MAX_L1_BYTES / 8) as usize / (CHUNK * GROUP);
/// How much of the table is read at once, in bytes.
const READ_STEP: u64 = 1 << 20;

/// One entry of the L1 table.
#[derive(Debug, Default)]
pub(super) struct Slot {
    /// The entry as the file will have it.
    entry: AtomicU64,
    /// The L2 table, if one is loaded. Whoever changes an entry of a table holds this shared, so that the table he changes is the one that
    /// others see; whoever puts another table here holds it exclusively.
    pub table: RwLock<Option<Arc<L2Table>>>,
}

impl Slot {
    /// The entry.
    pub fn entry(&self) -> u64 {
        self.entry.load(Ordering::Acquire)
    }

    /// Host offset of the L2 table; 0: there is none.
    pub fn table_at(&self) -> u64 {
        self.entry() & OFFSET
    }

    /// Changes the entry. To be called with `table` held exclusively.
    pub fn set_entry(&self, raw: u64) {
        self.entry.store(raw, Ordering::Release);
    }
}

type Chunk = Box<[Slot]>;

/// The active L1 table.
#[derive(Debug)]
pub(super) struct L1 {
    groups: [OnceLock<Box<[OnceLock<Chunk>]>>; GROUPS],
    entries: AtomicU64,
    at: AtomicU64,
}

impl L1 {
    /// Reads the table of `entries` entries at `at`. Memory is taken for what is not zero.
    pub fn read(writeback: &WriteBack, at: u64, entries: u64, file_len: u64) -> Result<Self> {
        let table = Self { groups: [const { OnceLock::new() }; GROUPS], entries: AtomicU64::new(entries), at: AtomicU64::new(at) };
        // A file that was cut off before its L1 table must not pass for an empty disk.
        if entries > 0 && at >= file_len {
            return Err(Error::corrupt(format!("the L1 table lies beyond the end of the file, which has {file_len} bytes")).at_offset(at));
        }
        // What of the table is beyond the end is zeros.
        let len = (entries * 8).min(file_len.saturating_sub(at).next_multiple_of(8));
        let mut done = 0;
        let mut buf = Vec::new();
        while done < len {
            buf.resize(usize::try_from((len - done).min(READ_STEP)).unwrap_or(0), 0);
            writeback.read(0, at + done, &mut buf)?;
            for (i, raw) in buf.chunks_exact(8).enumerate() {
                let raw = super::header::be64(raw, 0);
                if raw != 0 {
                    table.slot_for(done / 8 + i as u64).set_entry(raw);
                }
            }
            done += buf.len() as u64;
        }
        Ok(table)
    }

    /// Number of entries.
    pub fn entries(&self) -> u64 {
        self.entries.load(Ordering::Acquire)
    }

    /// Host offset of the table in bytes.
    pub fn at(&self) -> u64 {
        self.at.load(Ordering::Acquire)
    }

    /// The table has grown, and perhaps moved. The caller excludes changes of entries.
    pub fn moved(&self, at: u64, entries: u64) {
        self.at.store(at, Ordering::Release);
        self.entries.store(entries, Ordering::Release);
    }

    /// The slot of an entry; `None`: the entry is zero and was never anything else.
    pub fn slot(&self, index: u64) -> Option<&Slot> {
        let (group, chunk, slot) = split(index);
        self.groups.get(group)?.get()?.get(chunk)?.get()?.get(slot)
    }

    /// The slot of an entry, made if need be. `index` is less than the largest number of entries.
    pub fn slot_for(&self, index: u64) -> &Slot {
        let (group, chunk, slot) = split(index);
        let group = self.groups[group].get_or_init(|| std::iter::repeat_with(OnceLock::new).take(GROUP).collect());
        &group[chunk].get_or_init(|| std::iter::repeat_with(Slot::default).take(CHUNK).collect())[slot]
    }

    /// The first index from `from` on, below `end`, whose entry has a table; else `end`.
    pub fn next_used(&self, from: u64, end: u64) -> u64 {
        self.next(from, end, |slot| slot.table_at() != 0)
    }

    /// The first index from `from` on, below `end`, whose slot is one of those that are `wanted`; else `end`.
    fn next(&self, from: u64, end: u64, wanted: impl Fn(&Slot) -> bool) -> u64 {
        let mut index = from;
        while index < end {
            let (group, chunk, _) = split(index);
            let Some(chunks) = self.groups.get(group).and_then(OnceLock::get) else {
                index = (index / (CHUNK * GROUP) as u64 + 1) * (CHUNK * GROUP) as u64;
                continue;
            };
            let Some(slots) = chunks.get(chunk).and_then(OnceLock::get) else {
                index = (index / CHUNK as u64 + 1) * CHUNK as u64;
                continue;
            };
            let first = (index % CHUNK as u64) as usize;
            match slots.iter().skip(first).position(&wanted) {
                Some(ahead) => return (index + ahead as u64).min(end),
                None => index += (CHUNK - first) as u64,
            }
        }
        end
    }

    /// Indices of all entries that have a table.
    pub fn used(&self) -> impl Iterator<Item = u64> + '_ {
        self.all(|slot| slot.table_at() != 0)
    }

    /// Indices of all entries that are not zero, if only by bits that mean nothing without a table.
    pub fn not_zero(&self) -> impl Iterator<Item = u64> + '_ {
        self.all(|slot| slot.entry() != 0)
    }

    fn all(&self, wanted: impl Fn(&Slot) -> bool) -> impl Iterator<Item = u64> {
        let end = self.entries();
        let mut index = 0;
        std::iter::from_fn(move || {
            let found = self.next(index, end, &wanted);
            index = found + 1;
            (found < end).then_some(found)
        })
    }

    /// The table as it is to be in the file.
    pub fn to_bytes(&self, entries: u64) -> Vec<u8> {
        (0..entries).flat_map(|i| self.slot(i).map_or(0, Slot::entry).to_be_bytes()).collect()
    }
}

fn split(index: u64) -> (usize, usize, usize) {
    let index = usize::try_from(index).unwrap_or(usize::MAX);
    (index / (CHUNK * GROUP), index / CHUNK % GROUP, index % CHUNK)
}

/// Index of the L1 entry for a guest offset.
pub(super) fn index(geometry: Geometry, at: u64) -> u64 {
    at >> geometry.table_bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_is_used() {
        let table = L1 { groups: [const { OnceLock::new() }; GROUPS], entries: AtomicU64::new(MAX_L1_BYTES / 8), at: AtomicU64::new(0) };
        for index in [0, 511, 512, 65_536, 4_194_303] {
            table.slot_for(index).set_entry(0x10000);
        }
        assert_eq!(table.used().collect::<Vec<_>>(), [0, 511, 512, 65_536, 4_194_303]);
        assert!(table.slot(70_000_000).is_none());
        assert_eq!(table.next_used(513, 600), 600);
    }
}
