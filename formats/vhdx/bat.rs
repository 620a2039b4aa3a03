//! The block allocation table: its geometry and its entries.

use super::header::MIB;
use super::metadata::Metadata;
use super::region::Region;
use crate::error::{Error, Result};
use crate::table::{Table, Width};
use crate::writeback::WriteBack;
use std::sync::Arc;

/// Sectors whose bits fill one sector bitmap block of 1 MiB.
const SECTORS_PER_BITMAP: u64 = 1 << 23;
/// Size of an entry, in bytes.
pub(super) const ENTRY: u64 = 8;

/// Where the entries of blocks are ([MS-VHDX] 2.5).
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    /// Bytes in a payload block.
    pub(super) block: u64,
    /// Bytes in a logical sector.
    pub(super) sector: u64,
    pub(super) has_parent: bool,
    /// Payload blocks per sector bitmap block; a power of two, at least 16.
    pub(super) chunk_ratio: u64,
}

impl Geometry {
    pub(super) fn new(metadata: &Metadata) -> Self {
        let sector = u64::from(metadata.sector);
        Self { block: metadata.block, sector, has_parent: metadata.has_parent, chunk_ratio: SECTORS_PER_BITMAP * sector / metadata.block }
    }

    /// Payload blocks of a disk of `size` bytes.
    pub(super) fn blocks(&self, size: u64) -> u64 {
        size.div_ceil(self.block)
    }

    /// Entries that a disk of `size` bytes needs.
    pub(super) fn entries(&self, size: u64) -> u64 {
        let blocks = self.blocks(size);
        if self.has_parent {
            blocks.div_ceil(self.chunk_ratio) * (self.chunk_ratio + 1)
        } else {
            blocks + blocks.saturating_sub(1) / self.chunk_ratio
        }
    }

    /// Index of a payload block's entry: one bitmap entry follows every chunk.
    pub(super) fn payload(&self, block: u64) -> u64 {
        block + block / self.chunk_ratio
    }

    /// Index of the entry of the bitmap that `block`'s bits are in.
    pub(super) fn bitmap(&self, block: u64) -> u64 {
        let chunk = block / self.chunk_ratio;
        (chunk + 1) * self.chunk_ratio + chunk
    }

    /// The payload block of an entry, or `None` for a bitmap's.
    pub(super) fn block_of(&self, index: u64) -> Option<u64> {
        let (chunk, place) = (index / (self.chunk_ratio + 1), index % (self.chunk_ratio + 1));
        (place < self.chunk_ratio).then_some(chunk * self.chunk_ratio + place)
    }

    /// Bytes of a payload block's bits.
    pub(super) fn bitmap_bytes(&self) -> u64 {
        self.block / self.sector / 8
    }

    /// Where in its bitmap block a payload block's bits begin, in bytes.
    pub(super) fn bits_at(&self, block: u64) -> u64 {
        block % self.chunk_ratio * self.bitmap_bytes()
    }
}

/// State of a payload block, with the byte offset of its space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Payload {
    /// The parent's bytes; without a parent zeros.
    NotPresent,
    /// Reads as zeros: undefined, zero or unmapped.
    Zero,
    /// In the file.
    Full(u64),
    /// The bitmap says which sectors are in the file and which are the parent's.
    Partial(u64),
}

/// An entry as it is in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(pub(super) u64);

impl Entry {
    pub(super) const NOT_PRESENT: Self = Self(0);
    pub(super) const ZERO: Self = Self(2);
    pub(super) const UNMAPPED: Self = Self(3);

    pub(super) fn full(at: u64) -> Self {
        Self(at | 6)
    }

    pub(super) fn partial(at: u64) -> Self {
        Self(at | 7)
    }

    /// Byte offset, whatever the state; whole MiB.
    pub(super) fn at(self) -> u64 {
        self.0 & !(MIB - 1)
    }

    /// As a payload block's. `None`: no state that there is.
    pub(super) fn payload(self) -> Option<Payload> {
        match self.0 & 7 {
            0 => Some(Payload::NotPresent),
            // 5 is what draft 0.95 of the specification called 3.
            1 | 2 | 3 | 5 => Some(Payload::Zero),
            6 => Some(Payload::Full(self.at())),
            7 => Some(Payload::Partial(self.at())),
            _ => None,
        }
    }

    /// As a sector bitmap block's: its byte offset if it is there. `None`: no state that there is.
    pub(super) fn bitmap(self) -> Option<Option<u64>> {
        match self.0 & 7 {
            0 => Some(None),
            6 => Some(Some(self.at())),
            _ => None,
        }
    }
}

/// The table.
pub(super) struct Bat {
    region: Region,
    table: Table,
}

impl Bat {
    /// The table in `region`, of which `entries` are in use.
    pub(super) fn new(writeback: Arc<WriteBack>, region: Region, entries: u64) -> Result<Self> {
        // A region is less than 4 GiB.
        if entries > region.len / ENTRY {
            return Err(Error::corrupt(format!(
                "the block allocation table has room for {} entries; the disk needs {entries}",
                region.len / ENTRY
            ))
            .at_offset(region.at));
        }
        Ok(Self { region, table: Table::new(writeback, region.at, entries, Width::Le64) })
    }

    pub(super) fn region(&self) -> Region {
        self.region
    }

    /// An entry as it is going to be in the file.
    pub(super) fn get(&self, index: u64) -> Result<Entry> {
        self.table.get(index).map(Entry)
    }

    /// Changes an entry; see [`Table::publish`].
    pub(super) fn publish(&self, index: u64, entry: Entry) -> Result<()> {
        self.table.publish(index, entry.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(block: u64, sector: u64, has_parent: bool) -> Geometry {
        Geometry { block, sector, has_parent, chunk_ratio: SECTORS_PER_BITMAP * sector / block }
    }

    #[test]
    fn bitmap_entries_follow_each_chunk() {
        let g = geometry(1 << 20, 512, false);
        assert_eq!(g.chunk_ratio, 4096);
        assert_eq!((g.payload(4095), g.bitmap(0), g.payload(4096)), (4095, 4096, 4097));
        assert_eq!(g.entries(4 << 30), 4096);
        assert_eq!(g.entries((4 << 30) + 1), 4098);
        assert_eq!(geometry(1 << 20, 512, true).entries(1), 4097);
        assert_eq!(geometry(256 << 20, 512, false).chunk_ratio, 16);
        assert_eq!(geometry(1 << 20, 4096, false).chunk_ratio, 32768);
        for block in [0, 1, 4095, 4096, 8191, 8192, 1 << 26] {
            assert_eq!(g.block_of(g.payload(block)), Some(block));
            assert_eq!(g.block_of(g.bitmap(block)), None);
        }
    }
}
