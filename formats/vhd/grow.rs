//! Growing a dynamic image: a longer table, elsewhere if there is no room where it is, then the footers with the new size.

use super::footer::SECTOR;
use super::header::{ENTRY, Header};
use super::sparse::{Layout, Sparse};
use crate::error::{Error, Result};
use crate::space::clear;
use crate::table::{Table, Width};
use std::sync::atomic::Ordering;

/// The longest table that is made, in bytes; with blocks of the usual size it would do for 32 TiB.
const MAX_TABLE: u64 = 64 << 20;

impl Sparse {
    /// Called alone: nothing is changed meanwhile, but there are readers.
    pub(super) fn grow_to(&self, size: u64) -> Result<()> {
        if self.differencing {
            // An absent block always shows the parent, and a parent can be longer than its child.
            return Err(Error::unsupported("a differencing VHD cannot grow: its format has no way to keep a longer parent from showing"));
        }
        super::check_new_size(size)?;
        let old = self.size.load(Ordering::Acquire);
        let needed = size.div_ceil(self.block);
        if needed.saturating_mul(ENTRY) > MAX_TABLE {
            return Err(Error::unsupported(format!("blocks of {} bytes are too small for a disk of that size", self.block)));
        }
        self.writeback.drain(self)?;
        let old_header = self.layout.read().header.clone();
        let header = if needed <= old_header.entries { old_header.clone() } else { self.longer_table(&old_header, needed)? };
        // Entries between the two ends may hold anything.
        let first = old.div_ceil(self.block);
        let absent = vec![
            0xFF;
            usize::try_from((needed - first) * ENTRY)
                .map_err(|_| Error::unsupported("the allocation table would be too long"))?
        ];
        self.writeback.write_through(0, header.table_at + first * ENTRY, &absent)?;
        self.clear_tail(old)?;
        self.writeback.sync()?;
        self.writeback.write_through(0, header.at, header.first_sector())?;
        *self.layout.write() = Layout { table: Table::new(self.writeback.clone(), header.table_at, needed, Width::Be32), header };
        let mut footers = self.footers.lock();
        let footer = footers.footer.with_size(size);
        self.writeback.write_through(0, footers.end, footer.bytes())?;
        footers.footer = footer;
        self.writeback.write_through(0, 0, footers.footer.bytes())?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// A header with room for `needed` entries: where the table is, if nothing follows it so soon, or at a new place, to which it has been copied.
    fn longer_table(&self, header: &Header, needed: u64) -> Result<Header> {
        let end = header.table_at + needed * ENTRY;
        let mut next = self.footers.lock().end;
        self.each_present(|_, block| {
            next = next.min(block?.at.max(header.table_at));
            Ok(())
        })?;
        let structures = header.locators.iter().map(|(at, _)| *at).chain([header.at]).filter(|at| *at > header.table_at);
        next = structures.fold(next, u64::min);
        // Other programs keep things of their own there: only the table's own last sector is known to be padding.
        let padding = (header.table_at + header.entries * ENTRY).next_multiple_of(SECTOR);
        if end <= next.min(padding) {
            return header.with_table(header.table_at, needed);
        }
        let len = (needed * ENTRY).next_multiple_of(SECTOR);
        let taken = self.allocate(len)?;
        let mut table = vec![0xFF; usize::try_from(len).map_err(|_| Error::unsupported("the allocation table would be too long"))?];
        let own = usize::try_from(header.entries * ENTRY).unwrap_or(usize::MAX).min(table.len());
        self.writeback.read(0, header.table_at, table.get_mut(..own).unwrap_or_default())?;
        // The footer behind it first: it is pending since the allocation.
        self.writeback.drain(self)?;
        self.writeback.write_through(0, taken.at, &table)?;
        header.with_table(taken.at, needed)
    }

    /// Has the part of the last block that lies behind the old end read as zeros.
    fn clear_tail(&self, old: u64) -> Result<()> {
        let inside = old % self.block;
        let layout = self.layout.read();
        if inside > 0
            && let Some(block) = self.find(&layout, old / self.block)?
        {
            clear(&**self.store()?, block.at + self.bitmap_len + inside, self.block - inside)?;
            self.writeback.wrote_data(0);
        }
        Ok(())
    }
}
