//! Changes of dynamic and differencing images: new blocks, zeroed and discarded ones, and the space that they take and free.

use super::footer::SECTOR;
use super::header::ENTRY;
use super::sparse::{ABSENT, Block, Layout, Sparse};
use crate::bitmap::BitOrder;
use crate::device::ZeroMode;
use crate::error::{Error, Kind, Result};
use crate::format::Placement;
use crate::space::{Space, Taken};
use crate::writeback::{Freed, Stage};
use std::sync::atomic::Ordering;

/// What a placement is for ([`Placement::token`]): sectors of a block that is there.
const SECTORS: u64 = 0;
/// A new block.
const NEW: u64 = 1;

/// Behind the table some programs keep things of their own (Xen a map of complete blocks); what lies so near to it is not free, in bytes.
const FOREIGN: u64 = 256 << 10;

impl Sparse {
    /// Before the first change: finds the free space and mends the footers.
    pub(super) fn begin_changes(&self) -> Result<()> {
        let layout = self.layout.read();
        let mut space = self.space.lock();
        if space.is_none() {
            *space = Some(self.find_space(&layout)?);
        }
        self.mend_footers()
    }

    /// Puts back a footer that is missing or damaged.
    pub(super) fn mend_footers(&self) -> Result<()> {
        let mut footers = self.footers.lock();
        if footers.end_damage.is_some() {
            self.writeback.write_through(0, footers.end, footers.footer.bytes())?;
            footers.end_damage = None;
        }
        if footers.start_damage.is_some() {
            self.writeback.write_through(0, 0, footers.footer.bytes())?;
            footers.start_damage = None;
        }
        Ok(())
    }

    /// Calls `look` for every entry of the disk whose block is there.
    pub(super) fn each_present(&self, mut look: impl FnMut(u64, Result<Block>) -> Result<()>) -> Result<()> {
        let layout = self.layout.read();
        for index in 0..self.size.load(Ordering::Acquire).div_ceil(self.block) {
            if let Some(found) = self.find(&layout, index).transpose() {
                look(index, found)?;
            }
        }
        Ok(())
    }

    /// The free space, from what the table uses.
    fn find_space(&self, layout: &Layout) -> Result<Space> {
        let end = self.footers.lock().end;
        let there = end.min(self.store()?.len().map_err(|e| Error::io("cannot find out the length of the file", e))?);
        let mut blocks = Vec::new();
        for index in 0..self.size.load(Ordering::Acquire).div_ceil(self.block) {
            let Some(block) = self.find(layout, index).map_err(|e| e.context("nothing is written to this image"))? else { continue };
            if block.at.saturating_add(self.block_len()) > there {
                return Err(Error::corrupt(format!(
                    "block {index} reaches beyond the end of the file; nothing is written to this image (check shows all damage, and repairs what can be)"
                ))
                .at_offset(layout.table.place(index)));
            }
            match blocks.last_mut() {
                Some((at, len)) if *at + *len == block.at => *len += self.block_len(),
                _ => blocks.push((block.at, self.block_len())),
            }
        }
        self.space_between(layout, blocks, end).map_err(|at| {
            Error::corrupt("two blocks of the image are in one place of the file; nothing is written to it (check shows all damage)")
                .at_offset(at)
        })
    }

    /// The space between `blocks`, or the byte offset of an overlap.
    pub(super) fn space_between(&self, layout: &Layout, mut blocks: Vec<(u64, u64)>, end: u64) -> Result<Space, u64> {
        let first = blocks.iter().map(|(at, _)| *at).min().unwrap_or(end);
        let table = (layout.header.table_at, (layout.header.entries * ENTRY).next_multiple_of(SECTOR));
        let header = (layout.header.at, super::header::LEN);
        let (late, early): (Vec<_>, Vec<_>) =
            layout.header.locators.iter().copied().chain([table, header]).partition(|(at, _)| *at >= first);
        // Where the first blocks were, as far as it is not near those structures.
        let own = early.iter().map(|(at, len)| at.saturating_add(*len)).max().unwrap_or(0).saturating_add(FOREIGN);
        let room = first.saturating_sub(own) / self.block_len() * self.block_len();
        blocks.push((0, first - room));
        let mut space = Space::new(&mut blocks, end).map_err(|o| o.at)?;
        for (at, len) in late {
            // Whole sectors; what does not lie in a gap overlaps a block, and `find` knows the structures that must not.
            let start = at - at % SECTOR;
            space.take_at(start, (at + len).next_multiple_of(SECTOR) - start);
        }
        Ok(space)
    }

    /// Space for `len` bytes (whole sectors), inside the file; the footer behind it if it is at the end.
    pub(super) fn allocate(&self, len: u64) -> Result<Taken> {
        let mut space = self.space.lock();
        let space = space.as_mut().ok_or_else(|| Error::new(Kind::ReadOnly, "nothing may be changed yet"))?;
        let full = || Error::new(Kind::NoSpace, "the file would become longer than a VHD can be (2 TiB)");
        let taken = space.take(len).ok_or_else(full)?;
        if taken.fresh {
            let end = space.end();
            let undo = |space: &mut Space, error: Error| {
                space.untake(taken, len);
                error
            };
            if end / SECTOR >= ABSENT {
                return Err(undo(space, full()));
            }
            // Under the lock: two extensions must not cut each other, nor exchange their footers.
            let file_len = end.saturating_add(SECTOR);
            if let Err(error) = self.store()?.set_len(file_len) {
                return Err(undo(space, Error::io(format!("cannot extend the file to {file_len} bytes"), error)));
            }
            self.file_len.fetch_max(file_len, Ordering::Relaxed);
            self.writeback.wrote_data(0);
            let mut footers = self.footers.lock();
            footers.end = end;
            self.writeback.reserve(0, end, footers.footer.bytes())?;
        }
        Ok(taken)
    }

    fn give(&self, at: u64, zeroed: bool) {
        if let Some(space) = self.space.lock().as_mut() {
            space.give(at, self.block_len(), zeroed);
        }
    }

    /// A block's space, and whether its data read as zeros.
    fn allocate_block(&self, zero: bool) -> Result<(u64, bool)> {
        let taken = self.allocate(self.block_len())?;
        // Where the file ended there is the old footer, but that is in the bitmap's place.
        let zeroed = taken.zeroed
            || zero
                && self.store()?.zero(taken.at, self.block_len()).map_err(|e| {
                    self.give(taken.at, false);
                    Error::io("cannot zero reused space", e).at_offset(taken.at)
                })?;
        self.writeback.wrote_data(0);
        Ok((taken.at, zeroed))
    }

    pub(super) fn place(&self, at: u64, len: u64) -> Result<Placement> {
        let layout = self.layout.read();
        let index = at / self.block;
        let start = index * self.block;
        let end = start.saturating_add(self.block).min(self.size.load(Ordering::Acquire));
        let stop = at.saturating_add(len).min(end);
        let (from, to) = (at - at % SECTOR, stop.next_multiple_of(SECTOR).min(end));
        let placement = |at: u64, end: u64, host: u64, zeroed: bool, token: u64| Placement {
            at,
            len: end - at,
            store: 0,
            host: host + self.bitmap_len + (at - start),
            zeroed,
            token,
        };
        match self.find(&layout, index)? {
            Some(block) => Ok(placement(from, to, block.at, false, SECTORS)),
            // Only what is written is the child's.
            None if self.differencing => {
                let (host, zeroed) = self.allocate_block(false)?;
                Ok(placement(from, to, host, zeroed, NEW))
            }
            None => {
                let (host, zeroed) = self.allocate_block(true)?;
                Ok(placement(start, end, host, zeroed, NEW))
            }
        }
    }

    /// The block that a placement is in, the byte offset of that block's space, and the placement's first sector in it.
    fn placed(&self, placement: &Placement) -> (u64, u64, u64) {
        let (index, inside) = (placement.at / self.block, placement.at % self.block);
        (index, placement.host - inside - self.bitmap_len, inside / SECTOR)
    }

    pub(super) fn publish_placement(&self, placement: &Placement) -> Result<()> {
        let layout = self.layout.read();
        let (index, host, first) = self.placed(placement);
        let count = placement.len.div_ceil(SECTOR);
        match placement.token {
            SECTORS => self.bitmaps.set(host, first, count),
            NEW if self.differencing => self.publish_block(&layout, index, host, first, count),
            // Without a parent the whole block is the image's from the start, as other programs have it.
            _ => self.publish_block(&layout, index, host, 0, self.block / SECTOR),
        }
    }

    /// Makes a new block visible, with these bits of its bitmap set.
    pub(super) fn publish_block(&self, layout: &Layout, index: u64, host: u64, first: u64, count: u64) -> Result<()> {
        let mut bits = vec![0; self.bitmap_len as usize];
        BitOrder::MsbFirst.set(&mut bits, first, count);
        self.bitmaps.replace(Stage::Reserve, host, &bits)?;
        layout.table.publish(index, host / SECTOR)
    }

    pub(super) fn cancel_placement(&self, placement: &Placement) {
        if placement.token == NEW {
            let (_, host, _) = self.placed(placement);
            self.give(host, false);
        }
    }

    /// Runs `change` for each whole block of a range, until one is not done; returns how many bytes were.
    fn each_block(&self, at: u64, len: u64, mut change: impl FnMut(&Layout, u64, Option<Block>) -> Result<bool>) -> Result<u64> {
        let layout = self.layout.read();
        let end = at.saturating_add(len);
        let mut here = at;
        while here < end {
            let index = here / self.block;
            if !change(&layout, index, self.find(&layout, index)?)? {
                break;
            }
            here = (index + 1).saturating_mul(self.block).min(end);
        }
        Ok(here - at)
    }

    /// Frees a block: it reads as zeros, since there is no parent.
    fn free(&self, layout: &Layout, index: u64, block: Block) -> Result<()> {
        layout.table.publish(index, ABSENT)?;
        self.writeback.release(Freed { store: 0, at: block.at, len: self.block_len() });
        Ok(())
    }

    /// Marks all of a block as the image's, after `clear` made its data zeros; not if it could not.
    fn keep_as_zeros(&self, block: Block, clear: impl FnOnce(u64, u64) -> std::io::Result<bool>) -> Result<bool> {
        let at = block.at + self.bitmap_len;
        let cleared = clear(at, self.block).map_err(|e| Error::io("cannot zero", e).at_offset(at))?;
        self.writeback.wrote_data(0);
        if cleared {
            self.bitmaps.set(block.at, 0, self.block / SECTOR)?;
        }
        Ok(cleared)
    }

    pub(super) fn zero_blocks(&self, at: u64, len: u64, mode: ZeroMode) -> Result<u64> {
        let store = self.store()?;
        self.each_block(at, len, |layout, index, block| match block {
            Some(block) if self.differencing || mode == ZeroMode::KeepAllocated => self.keep_as_zeros(block, |at, len| store.zero(at, len)),
            Some(block) => self.free(layout, index, block).map(|()| true),
            None if !self.differencing => Ok(true),
            // The format has no word for zeros that hide a parent: a block of them, which takes no space where files can have holes.
            None => {
                let (host, zeroed) = self.allocate_block(true)?;
                if !zeroed {
                    self.give(host, false);
                    return Ok(false);
                }
                self.publish_block(layout, index, host, 0, self.block / SECTOR)?;
                Ok(true)
            }
        })
    }

    pub(super) fn discard_blocks(&self, at: u64, len: u64) -> Result<u64> {
        let store = self.store()?;
        self.each_block(at, len, |layout, index, block| match block {
            Some(block) if self.differencing => self.keep_as_zeros(block, |at, len| store.punch(at, len)),
            Some(block) => self.free(layout, index, block).map(|()| true),
            None => Ok(!self.differencing),
        })
    }

    /// Space that nobody can reach any more.
    pub(super) fn reclaim_space(&self, freed: &[Freed]) -> Result<()> {
        for run in freed {
            // The file system gets it back until it is used again. A failure is no more than space not given back.
            let punched = self.store()?.punch(run.at, run.len).unwrap_or(false);
            if let Some(space) = self.space.lock().as_mut() {
                space.give(run.at, run.len, punched);
            }
        }
        Ok(())
    }
}
