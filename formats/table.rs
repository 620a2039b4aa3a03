//! A flat table of fixed-width entries in a file (a block allocation table), with its pages in memory.
//!
//! Pages come into memory when they are first looked at and stay: an entry changes in memory when it is published, so that looking one up takes no lock.

use crate::error::{Error, Result};
use crate::writeback::WriteBack;
use smallvec::SmallVec;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// Entries in a page of memory.
const PAGE: usize = 512;

/// How entries are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    /// 8 bytes, little-endian.
    Le64,
    /// 8 bytes, big-endian.
    Be64,
    /// 4 bytes, little-endian.
    Le32,
    /// 4 bytes, big-endian.
    Be32,
}

impl Width {
    /// Bytes of an entry.
    pub(crate) fn bytes(self) -> u64 {
        match self {
            Self::Le64 | Self::Be64 => 8,
            Self::Le32 | Self::Be32 => 4,
        }
    }

    /// An entry from its bytes; 0 if there are too few.
    pub(crate) fn decode(self, bytes: &[u8]) -> u64 {
        match self {
            Self::Le64 => bytes.try_into().map_or(0, u64::from_le_bytes),
            Self::Be64 => bytes.try_into().map_or(0, u64::from_be_bytes),
            Self::Le32 => bytes.try_into().map_or(0, |b| u64::from(u32::from_le_bytes(b))),
            Self::Be32 => bytes.try_into().map_or(0, |b| u64::from(u32::from_be_bytes(b))),
        }
    }

    /// The bytes of an entry.
    pub(crate) fn encode(self, entry: u64) -> SmallVec<[u8; 8]> {
        match self {
            Self::Le64 => SmallVec::from_slice(&entry.to_le_bytes()),
            Self::Be64 => SmallVec::from_slice(&entry.to_be_bytes()),
            Self::Le32 => SmallVec::from_slice(&(entry as u32).to_le_bytes()),
            Self::Be32 => SmallVec::from_slice(&(entry as u32).to_be_bytes()),
        }
    }
}

type Page = [AtomicU64; PAGE];

/// The table.
pub(crate) struct Table {
    writeback: Arc<WriteBack>,
    /// Byte offset in the first store.
    at: u64,
    width: Width,
    pages: Vec<OnceLock<Box<Page>>>,
}

impl Table {
    /// Of `entries` entries at byte offset `at` of the first store. The caller has bounded both.
    pub(crate) fn new(writeback: Arc<WriteBack>, at: u64, entries: u64, width: Width) -> Self {
        let count = usize::try_from(entries.div_ceil(PAGE as u64)).unwrap_or(0);
        Self { writeback, at, width, pages: (0..count).map(|_| OnceLock::new()).collect() }
    }

    /// Byte offset of an entry.
    pub(crate) fn place(&self, index: u64) -> u64 {
        self.at.saturating_add(index.saturating_mul(self.width.bytes()))
    }

    fn slot(&self, index: u64) -> Result<&AtomicU64> {
        let outside = || Error::corrupt(format!("there is no entry {index} in the block allocation table")).at_offset(self.at);
        let number = index / PAGE as u64;
        let page = usize::try_from(number).ok().and_then(|n| self.pages.get(n)).ok_or_else(outside)?;
        let page = match page.get() {
            Some(page) => page,
            None => {
                let mut bytes = [0; PAGE * 8];
                let width = self.width.bytes() as usize;
                let bytes = bytes.get_mut(..PAGE * width).unwrap_or_default();
                self.writeback.read(0, self.place(number * PAGE as u64), bytes)?;
                let mut entries = bytes.chunks_exact(width);
                let loaded: Box<Page> =
                    Box::new(std::array::from_fn(|_| AtomicU64::new(entries.next().map_or(0, |e| self.width.decode(e)))));
                // Whoever is first wins; nobody has published to this page before it was in memory (see `publish`).
                page.get_or_init(|| loaded)
            }
        };
        page.get((index % PAGE as u64) as usize).ok_or_else(outside)
    }

    /// An entry as it is going to be in the file, with what was [noted](Self::note) of it.
    pub(crate) fn get(&self, index: u64) -> Result<u64> {
        Ok(self.slot(index)?.load(Ordering::Acquire))
    }

    /// Changes an entry, in the buffer and for all who look it up from here on. The caller holds what keeps others from changing the same one.
    pub(crate) fn publish(&self, index: u64, entry: u64) -> Result<()> {
        // In memory before it is published, or a slower load of the page could bring the old entry back.
        let slot = self.slot(index)?;
        self.writeback.publish(0, self.place(index), &self.width.encode(entry))?;
        slot.store(entry, Ordering::Release);
        Ok(())
    }

    /// Keeps `noted`, in memory only, instead of `seen`, if the entry is that still.
    pub(crate) fn note(&self, index: u64, seen: u64, noted: u64) -> Result<()> {
        let _ = self.slot(index)?.compare_exchange(seen, noted, Ordering::AcqRel, Ordering::Relaxed);
        Ok(())
    }
}
