//! Changes: the first one, new blocks, zeroed and discarded ones, and the space that they take and free.

use super::Vhdx;
use super::bat::{ENTRY, Entry, Payload};
use super::header::{Headers, MIB};
use super::{Layout, region};
use crate::bitmap::BitOrder;
use crate::device::ZeroMode;
use crate::error::{Error, Kind, Result};
use crate::format::Placement;
use crate::space::{Space, Taken};
use crate::writeback::{Freed, Stage};
use std::sync::atomic::Ordering;
use uuid::Uuid;

/// What a placement is for ([`Placement::token`]).
const IN_PLACE: u64 = 0;
const SECTORS: u64 = 1;
const FULL: u64 = 2;
const PARTIAL: u64 = 3;

/// How much of the table is read at once, in bytes.
const SCAN: u64 = 64 << 10;

impl Vhdx {
    /// Before the first change: finds the free space, gives the file and its contents new identifiers, mends a damaged copy of header or region table.
    pub(super) fn begin_changes(&self) -> Result<()> {
        let mut headers = self.headers.lock();
        headers.need_log()?;
        let layout = self.layout.read();
        let mut space = self.space.lock();
        if space.is_none() {
            *space = Some(self.find_space(&layout)?);
        }
        self.renew(&mut headers, &layout, true)
    }

    /// Gives the file a new identifier, and its `contents` too if they are going to change; mends a damaged copy of header or region table.
    pub(super) fn renew(&self, headers: &mut Headers, layout: &Layout, contents: bool) -> Result<()> {
        headers.update(&self.writeback, |h| {
            h.file_write = Uuid::new_v4();
            if contents {
                h.data_write = Uuid::new_v4();
            }
        })?;
        match layout.regions.damaged_at {
            Some(at) => self.writeback.publish(0, at, layout.regions.table()),
            None => Ok(()),
        }
    }

    /// Calls `look` with the index and value of every entry that is not 0.
    pub(super) fn scan(&self, layout: &Layout, mut look: impl FnMut(u64, Entry) -> Result<()>) -> Result<()> {
        let total = self.geometry.entries(self.size.load(Ordering::Acquire)) * ENTRY;
        let mut bytes = vec![0; SCAN as usize];
        let mut done = 0;
        while done < total {
            let at = layout.bat.region().at + done;
            // A hole reads as zeros: nothing is there. (What is pending is not in the file yet; a scan is made when nothing is.)
            if let Ok(Some((len, false))) = self.store()?.hole_or_data(at) {
                let skip = len - len % ENTRY;
                if skip > 0 {
                    done = done.saturating_add(skip);
                    continue;
                }
            }
            let count = SCAN.min(total - done);
            let bytes = bytes.get_mut(..count as usize).unwrap_or_default();
            self.writeback.read(0, at, bytes)?;
            for (index, entry) in bytes.chunks_exact(ENTRY as usize).enumerate() {
                let entry = Entry(entry.try_into().map_or(0, u64::from_le_bytes));
                if entry.0 != 0 {
                    look(done / ENTRY + index as u64, entry)?;
                }
            }
            done += count;
        }
        Ok(())
    }

    /// The free space, from what the table uses.
    pub(super) fn find_space(&self, layout: &Layout) -> Result<Space> {
        let file_len = self.store()?.len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
        let end = file_len.next_multiple_of(MIB);
        let mut used: Vec<(u64, u64)> = layout.regions.fixed.iter().map(|r| (r.at, r.len)).collect();
        let mut stale = Vec::new();
        let unfit = |what: &str, index: u64| {
            let at = layout.bat.region().at + index * ENTRY;
            Error::corrupt(format!(
                "the allocation table {what}; nothing is written to this image (check shows all damage, and repairs what can be)"
            ))
            .at_offset(at)
        };
        self.scan(layout, |index, entry| {
            let (place, len) = match self.geometry.block_of(index) {
                Some(block) => match self.payload(layout, block).map_err(|e| e.context("nothing is written to this image"))? {
                    Payload::Full(at) | Payload::Partial(at) => (at, self.geometry.block),
                    Payload::Zero | Payload::NotPresent => {
                        // An undefined or unmapped block may still name its old space, where others may look for its old contents.
                        if matches!(entry.0 & 7, 1 | 3 | 5) && entry.at() != 0 {
                            stale.push(entry.at());
                        }
                        return Ok(());
                    }
                },
                // Without a parent there are no bitmaps, whatever a careless writer left here.
                None if !self.geometry.has_parent => return Ok(()),
                None => match entry.bitmap() {
                    Some(Some(at)) => (at, MIB),
                    Some(None) => return Ok(()),
                    None => return Err(unfit("has an unknown state of a sector bitmap", index)),
                },
            };
            if place.checked_add(len).is_none_or(|stop| stop > end) {
                return Err(unfit("names space beyond the end of the file", index));
            }
            match used.last_mut() {
                Some((at, so_far)) if at.checked_add(*so_far) == Some(place) => *so_far += len,
                _ => used.push((place, len)),
            }
            Ok(())
        })?;
        let mut space = Space::new(&mut used, end).map_err(|overlap| {
            Error::corrupt("two blocks of the image are in one place of the file; nothing is written to it (check shows all damage)")
                .at_offset(overlap.at)
        })?;
        for at in stale {
            space.take_at(at, self.geometry.block);
        }
        Ok(space)
    }

    /// Space for a structure of `len` bytes, inside the file.
    pub(super) fn allocate(&self, len: u64) -> Result<Taken> {
        let store = self.store()?;
        let mut space = self.space.lock();
        let space = space.as_mut().ok_or_else(|| Error::new(Kind::ReadOnly, "nothing may be changed yet"))?;
        let taken = space.take(len).ok_or_else(|| Error::new(Kind::NoSpace, "the file would become longer than files can be"))?;
        // Free space inside the file may be its last MiB, of which only a part is there.
        let needed = if taken.fresh { space.end() } else { taken.at.saturating_add(len) };
        if taken.fresh || needed > self.file_len.load(Ordering::Relaxed) {
            // Under the lock: two extensions must not cut each other.
            let extended = match store.len() {
                Ok(len) if len >= needed && !taken.fresh => Ok(()),
                Ok(_) => store.set_len(needed),
                Err(error) => Err(error),
            };
            if let Err(error) = extended {
                space.give(taken.at, len, false);
                return Err(Error::io(format!("cannot extend the file to {needed} bytes"), error));
            }
            self.file_len.fetch_max(needed, Ordering::Relaxed);
            self.writeback.wrote_data(0);
        }
        Ok(taken)
    }

    fn give(&self, at: u64, len: u64, zeroed: bool) {
        if let Some(space) = self.space.lock().as_mut() {
            space.give(at, len, zeroed);
        }
    }

    /// Makes taken space read as zeros, if that is cheap. Whether it does.
    fn zero_taken(&self, taken: Taken, len: u64) -> Result<bool> {
        let zeroed =
            taken.zeroed || self.store()?.zero(taken.at, len).map_err(|e| Error::io("cannot zero reused space", e).at_offset(taken.at))?;
        self.writeback.wrote_data(0);
        Ok(zeroed)
    }

    pub(super) fn place(&self, at: u64, len: u64) -> Result<Placement> {
        let layout = self.layout.read();
        let size = self.size.load(Ordering::Acquire);
        self.place_before(&layout, at, len, size)
    }

    /// Like [`Self::place`] in the last block, also behind the end of the disk.
    pub(super) fn place_sectors(&self, layout: &Layout, at: u64, len: u64) -> Result<Placement> {
        self.place_before(layout, at, len, u64::MAX)
    }

    fn place_before(&self, layout: &Layout, at: u64, len: u64, size: u64) -> Result<Placement> {
        let block = at / self.geometry.block;
        let start = block * self.geometry.block;
        let end = start.saturating_add(self.geometry.block).min(size);
        let stop = at.saturating_add(len).min(end);
        let sector = self.geometry.sector;
        let (from, to) = (at - at % sector, stop.next_multiple_of(sector).min(end));
        let placement = |at: u64, end: u64, host: u64, zeroed: bool, token: u64| Placement {
            at,
            len: end - at,
            store: 0,
            host: host + (at - start),
            zeroed,
            token,
        };
        match self.payload(layout, block)? {
            Payload::Full(host) => Ok(placement(from, to, host, false, IN_PLACE)),
            Payload::Partial(host) => Ok(placement(from, to, host, false, SECTORS)),
            Payload::NotPresent if self.geometry.has_parent => {
                let taken = self.allocate(self.geometry.block)?;
                if at == start && stop == end {
                    return Ok(placement(start, end, taken.at, taken.zeroed, FULL));
                }
                // What is not written stays the parent's: nobody sees what the space holds there.
                Ok(placement(from, to, taken.at, taken.zeroed, PARTIAL))
            }
            Payload::NotPresent | Payload::Zero => {
                let taken = self.allocate(self.geometry.block)?;
                let zeroed =
                    self.zero_taken(taken, self.geometry.block).inspect_err(|_| self.give(taken.at, self.geometry.block, false))?;
                Ok(placement(start, end, taken.at, zeroed, FULL))
            }
        }
    }

    /// The block that a placement is in, the byte offset of that block's space, and the placement's first sector in it.
    fn placed(&self, placement: &Placement) -> (u64, u64, u64) {
        let (block, inside) = (placement.at / self.geometry.block, placement.at % self.geometry.block);
        (block, placement.host - inside, inside / self.geometry.sector)
    }

    pub(super) fn publish_placement(&self, placement: &Placement) -> Result<()> {
        self.publish_placed(&self.layout.read(), placement)
    }

    pub(super) fn publish_placed(&self, layout: &Layout, placement: &Placement) -> Result<()> {
        let (block, host, first) = self.placed(placement);
        let count = placement.len.div_ceil(self.geometry.sector);
        let index = self.geometry.payload(block);
        match placement.token {
            SECTORS => self.bitmaps.set(self.bits_of(layout, block)?, first, count),
            FULL => layout.bat.publish(index, Entry::full(host)),
            PARTIAL => {
                self.need_bitmap(layout, block)?;
                // All bits of the block: what they were means nothing, since it was not partially present.
                let mut bits = vec![0; self.geometry.bitmap_bytes() as usize];
                BitOrder::LsbFirst.set(&mut bits, first, count);
                self.bitmaps.replace(Stage::Publish, self.bits_of(layout, block)?, &bits)?;
                layout.bat.publish(index, Entry::partial(host))
            }
            _ => Ok(()),
        }
    }

    /// Sees to it that there is a sector bitmap for a block.
    fn need_bitmap(&self, layout: &Layout, block: u64) -> Result<()> {
        let index = self.geometry.bitmap(block);
        // Blocks of one chunk may be changed by several threads.
        let _one = self.new_bitmap.lock();
        match layout.bat.get(index)?.bitmap() {
            Some(Some(_)) => Ok(()),
            None => {
                Err(Error::corrupt("the entry of a sector bitmap has an unknown state").at_offset(layout.bat.region().at + index * ENTRY))
            }
            Some(None) => {
                let taken = self.allocate(MIB)?;
                // Not that anybody looks at the bits of other blocks.
                self.zero_taken(taken, MIB)?;
                layout.bat.publish(index, Entry::full(taken.at))
            }
        }
    }

    pub(super) fn cancel_placement(&self, placement: &Placement) {
        if matches!(placement.token, FULL | PARTIAL) {
            let (_, host, _) = self.placed(placement);
            self.give(host, self.geometry.block, false);
        }
    }

    /// Frees the space of whole blocks and has them read as zeros. `to` is what becomes of their entries when there is no parent to hide.
    fn unmap(&self, layout: &Layout, block: u64, payload: Payload, to: Entry) -> Result<()> {
        let index = self.geometry.payload(block);
        let to = if self.geometry.has_parent { Entry::ZERO } else { to };
        match payload {
            Payload::Zero => {}
            Payload::NotPresent if !self.geometry.has_parent => {}
            Payload::NotPresent => layout.bat.publish(index, to)?,
            Payload::Full(at) | Payload::Partial(at) => {
                layout.bat.publish(index, to)?;
                self.writeback.release(Freed { store: 0, at, len: self.geometry.block });
            }
        }
        Ok(())
    }

    /// Runs `change` for each whole block of a range, until one is not done; returns how many bytes were.
    fn each_block(&self, at: u64, len: u64, mut change: impl FnMut(&Layout, u64, Payload) -> Result<bool>) -> Result<u64> {
        let layout = self.layout.read();
        let end = at.saturating_add(len);
        let mut here = at;
        while here < end {
            let block = here / self.geometry.block;
            let payload = self.payload(&layout, block)?;
            if !change(&layout, block, payload)? {
                break;
            }
            here = (block + 1).saturating_mul(self.geometry.block).min(end);
        }
        Ok(here - at)
    }

    pub(super) fn zero_blocks(&self, at: u64, len: u64, mode: ZeroMode) -> Result<u64> {
        let keep = mode == ZeroMode::KeepAllocated || self.metadata.fixed;
        self.each_block(at, len, |layout, block, payload| {
            if let (true, Payload::Full(host) | Payload::Partial(host)) = (keep, payload) {
                let done = self.store()?.zero(host, self.geometry.block).map_err(|e| Error::io("cannot zero", e).at_offset(host))?;
                self.writeback.wrote_data(0);
                if done && matches!(payload, Payload::Partial(_)) {
                    layout.bat.publish(self.geometry.payload(block), Entry::full(host))?;
                }
                return Ok(done);
            }
            self.unmap(layout, block, payload, Entry::ZERO)?;
            Ok(true)
        })
    }

    pub(super) fn discard_blocks(&self, at: u64, len: u64) -> Result<u64> {
        if self.metadata.fixed {
            return Ok(0);
        }
        self.each_block(at, len, |layout, block, payload| {
            self.unmap(layout, block, payload, Entry::UNMAPPED)?;
            Ok(true)
        })
    }

    /// Space that nobody can reach any more.
    pub(super) fn reclaim_space(&self, freed: &[Freed]) -> Result<()> {
        for run in freed {
            // The file system gets it back until it is used again. A failure is no more than space not given back.
            let punched = self.store()?.punch(run.at, run.len).unwrap_or(false);
            self.give(run.at, run.len, punched);
        }
        Ok(())
    }

    /// The size of a copy of the region table fits in a log entry of the smallest log.
    const _TABLE_FITS: () = assert!(region::LEN / super::log::SECTOR < 126);
}
