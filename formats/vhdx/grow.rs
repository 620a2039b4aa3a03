//! Growing the disk: a longer allocation table, elsewhere if there is no room where it is, and zeros behind the old end.

use super::bat::{Bat, ENTRY, Entry, Payload};
use super::header::MIB;
use super::metadata::Metadata;
use super::region::{COPIES, Region, Regions};
use super::{Layout, Vhdx};
use crate::error::{Error, Kind, Result};
use crate::space::clear;
use crate::writeback::Freed;
use std::sync::atomic::Ordering;

/// How much of a table is copied or compared at once, in bytes.
const STEP: u64 = 64 << 10;

impl Vhdx {
    /// Called alone: nothing is changed meanwhile, but there are readers.
    pub(super) fn grow_to(&self, size: u64) -> Result<()> {
        if size > Metadata::MAX_SIZE || !size.is_multiple_of(self.geometry.sector) {
            return Err(Error::new(
                Kind::InvalidOption,
                format!("a disk of {size} bytes: a VHDX has a multiple of {} bytes, at most 64 TiB", self.geometry.sector),
            ));
        }
        let old = self.size.load(Ordering::Acquire);
        let entries = self.geometry.entries(size);
        // What is pending concerns the old table.
        self.writeback.drain(self)?;
        let (regions, freed) = self.room_for(entries)?;
        let bat = Bat::new(self.writeback.clone(), regions.bat, entries)?;
        self.clear_new_entries(regions.bat, old, size)?;
        let table = regions.table().to_vec();
        if freed.is_some() {
            self.writeback.publish(0, COPIES[0], &table)?;
        }
        // From here on the first copy of the region table and we agree, whatever else fails.
        *self.layout.write() = Layout { regions, bat };
        if let Some(old) = freed {
            self.writeback.publish(0, COPIES[1], &table)?;
            self.writeback.release(Freed { store: 0, at: old.at, len: old.len });
        }
        self.zero_tail(&self.layout.read(), old)?;
        self.writeback.publish(0, self.metadata.size_at, &size.to_le_bytes())?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Regions in which the table has room for `entries`, and what the old table leaves behind if it had to move. A moved table is in the file, and nothing
    /// refers to it yet.
    fn room_for(&self, entries: u64) -> Result<(Regions, Option<Region>)> {
        let layout = self.layout.read();
        let old = layout.bat.region();
        if entries * ENTRY <= old.len {
            return Ok((layout.regions.clone(), None));
        }
        let len = (entries * ENTRY).next_multiple_of(MIB);
        let taken = self.allocate(len)?;
        let store = self.store()?;
        let mut bytes = vec![0; STEP as usize];
        let mut done = 0;
        while done < len {
            let count = STEP.min(len - done);
            let bytes = bytes.get_mut(..count as usize).unwrap_or_default();
            bytes.fill(0);
            if done < old.len {
                self.writeback.read(0, old.at + done, bytes)?;
            }
            if !taken.zeroed || bytes.iter().any(|b| *b != 0) {
                store
                    .write_all_at(bytes, taken.at + done)
                    .map_err(|e| Error::io("cannot write the new allocation table", e).at_offset(taken.at + done))?;
            }
            done += count;
        }
        self.writeback.wrote_data(0);
        let regions = layout.regions.with_bat(Region { at: taken.at, len }, &self.headers.lock().current)?;
        Ok((regions, Some(old)))
    }

    /// The entries between the old end and the new one: absent, or zero where a parent might show.
    fn clear_new_entries(&self, table: Region, old: u64, size: u64) -> Result<()> {
        let (old_end, end) = (self.geometry.entries(old), self.geometry.entries(size));
        let mut index = old_end;
        // In a differencing image the last chunk has its entries already.
        if self.geometry.has_parent {
            index = self.geometry.payload(self.geometry.blocks(old));
        }
        while index < end {
            let count = (STEP / ENTRY).min(end - index);
            let at = table.at + index * ENTRY;
            let mut now = vec![0; (count * ENTRY) as usize];
            self.writeback.read(0, at, &mut now)?;
            let mut wanted = vec![0; now.len()];
            if self.geometry.has_parent {
                for (place, entry) in (index..).zip(wanted.chunks_exact_mut(ENTRY as usize)) {
                    match self.geometry.block_of(place) {
                        Some(_) => entry.copy_from_slice(&Entry::ZERO.0.to_le_bytes()),
                        // The bitmap of the chunk that the old end is in.
                        None if place < old_end => {
                            let here = ((place - index) * ENTRY) as usize;
                            entry.copy_from_slice(now.get(here..here + ENTRY as usize).unwrap_or(&[0; ENTRY as usize]));
                        }
                        None => {}
                    }
                }
            }
            if now != wanted {
                // Behind the end of the disk: harmless until the size changes.
                self.writeback.reserve(0, at, &wanted)?;
                if self.writeback.over_limit() {
                    self.writeback.drain(self)?;
                }
            }
            index += count;
        }
        Ok(())
    }

    /// Has the part of the last block that lies behind the old end read as zeros.
    fn zero_tail(&self, layout: &Layout, old: u64) -> Result<()> {
        let inside = old % self.geometry.block;
        if inside == 0 {
            return Ok(());
        }
        let block = old / self.geometry.block;
        let len = self.geometry.block - inside;
        match self.payload(layout, block)? {
            Payload::Zero => Ok(()),
            Payload::NotPresent if !self.geometry.has_parent => Ok(()),
            Payload::Full(host) => self.write_zeros(host + inside, len),
            // The parent may be longer than this disk was.
            Payload::Partial(_) | Payload::NotPresent => {
                let placement = self.place_sectors(layout, old, len)?;
                self.write_zeros(placement.host, placement.len)?;
                self.publish_placed(layout, &placement)
            }
        }
    }

    /// Makes a range of the file read as zeros.
    pub(super) fn write_zeros(&self, at: u64, len: u64) -> Result<()> {
        clear(&**self.store()?, at, len)?;
        self.writeback.wrote_data(0);
        Ok(())
    }
}
