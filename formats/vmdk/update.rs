//! Changes: new grains, zeroed and discarded ones, and the space that they take and free.

use super::descriptor::SECTOR;
use super::header::Scheme;
use super::image::Vmdk;
use super::layout::{Bytes, Piece};
use super::slots::{Slots, Taken};
use super::sparse::{Grain, Sparse};
use crate::device::ZeroMode;
use crate::error::{Error, Kind, Result};
use crate::format::Placement;
use crate::writeback::{Freed, Stage};

/// The most grains of one placement.
const MAX_PLACEMENT: u64 = 256;
/// The numbers of sectors have 32 bits: no grain begins behind, in bytes.
const MAX_FILE: u64 = SECTOR << 32;

impl Vmdk {
    /// Before the first change: finds the free space, brings the redundant tables up to date, and changes the content id.
    pub(super) fn begin_changes(&self) -> Result<()> {
        for piece in self.pieces.iter().filter(|piece| piece.writable) {
            let Bytes::Sparse(number) = piece.bytes else { continue };
            let extent = self.extent(number)?;
            let mut slots = extent.slots.lock();
            if slots.is_none() {
                *slots = Some(self.find_slots(extent).map_err(|e| {
                    extent.explain(e.context("nothing is written to this image (check shows all damage, and repairs what can be)"))
                })?);
            }
            self.mend_redundant(extent)?;
        }
        self.change_cid()
    }

    /// The byte offsets of table `number` and of its copy.
    pub(super) fn tables(&self, extent: &Sparse, number: u64) -> Result<(Option<u64>, Option<u64>)> {
        let first = extent.table(&self.pages, extent.header.directory_at, number)?;
        let second = match extent.header.redundant_at {
            Some(at) => extent.table(&self.pages, at, number)?,
            None => None,
        };
        Ok((first, second))
    }

    /// The tables that the directories lead to, as far as they do: byte offset, directory, number; in this order.
    pub(super) fn sound_tables(&self, extent: &Sparse) -> Vec<(u64, u64, u64)> {
        let mut tables = Vec::new();
        for directory in std::iter::once(extent.header.directory_at).chain(extent.header.redundant_at) {
            let all = (0..extent.header.directory_len).map(|number| (extent.table(&self.pages, directory, number), number));
            tables.extend(all.filter_map(|(table, number)| Some((table.ok().flatten()?, directory, number))));
        }
        tables.sort_unstable();
        tables
    }

    /// Calls `look` with the number of every grain whose entry is not 0, its entry's place, and the entry.
    pub(super) fn each_entry(
        &self,
        extent: &Sparse,
        number: u64,
        table: u64,
        mut look: impl FnMut(u64, u64, u64) -> Result<()>,
    ) -> Result<()> {
        let first = number * extent.header.per_table;
        let count = extent.header.per_table.min(extent.grains().saturating_sub(first));
        let width = extent.header.scheme.width();
        let bytes = self.pages.read(extent.store, table, count * width)?;
        for (place, entry) in bytes.chunks_exact(width as usize).enumerate() {
            let entry = extent.decode(entry);
            if entry != 0 {
                look(first + place as u64, table + place as u64 * width, entry)?;
            }
        }
        Ok(())
    }

    /// What of an extent's file is in use, from what the tables say.
    pub(super) fn find_slots(&self, extent: &Sparse) -> Result<Slots> {
        let header = &extent.header;
        let len = extent.file().len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
        if len > MAX_FILE {
            return Err(Error::unsupported(format!("a sparse extent of {len} bytes; the longest that can be written to has {MAX_FILE}")));
        }
        let mut slots: Option<Slots> = None;
        let mut tables = vec![(0, SECTOR)];
        tables.extend(header.descriptor);
        tables.extend(
            std::iter::once(header.directory_at).chain(header.redundant_at).map(|at| (at, header.directory_len * header.scheme.width())),
        );
        let mut grain_tables = Vec::new();
        for number in 0..header.directory_len {
            for directory in std::iter::once(header.directory_at).chain(header.redundant_at) {
                grain_tables.extend(extent.table(&self.pages, directory, number)?.map(|at| (at, directory, number)));
            }
        }
        grain_tables.sort_unstable();
        if let Some((at, ..)) = extent.tables_over_others(&grain_tables).first() {
            return Err(Error::corrupt("a grain table lies over another one").at_offset(*at));
        }
        tables.extend(grain_tables.into_iter().map(|(at, ..)| (at, extent.table_len())));
        // Grains that are not where a place begins.
        let mut odd = Vec::new();
        for number in 0..header.directory_len {
            let Some(table) = extent.table(&self.pages, header.directory_at, number)? else { continue };
            self.each_entry(extent, number, table, |index, place, entry| {
                let wrong = |what: &str| Err(Error::corrupt(format!("the grain table places grain {index} {what}")).at_offset(place));
                let at = match extent.grain(entry) {
                    None => return wrong("where it cannot be"),
                    Some(Grain::Data(at)) if at >= len => return wrong("beyond the end of the file"),
                    Some(Grain::Data(at)) => at,
                    Some(_) => return Ok(()),
                };
                let slots = slots.get_or_insert_with(|| Slots::new(len, header.grain, at));
                if !slots.is_place(at) {
                    odd.push(at);
                } else if slots.take_range(at, header.grain) {
                    return wrong("over another grain");
                }
                Ok(())
            })?;
        }
        let mut slots = slots.unwrap_or_else(|| Slots::new(len, header.grain, 0));
        // A grain takes all of its place.
        if let Some((at, _)) = tables.iter().find(|(at, len)| slots.touches(*at, *len)) {
            return Err(Error::corrupt("a grain lies over the header, the descriptor, a directory or a table").at_offset(*at));
        }
        odd.sort_unstable();
        let mut stop = 0;
        for &at in &odd {
            let end = at.saturating_add(header.grain);
            if at < stop
                || slots.touches(at, header.grain)
                || tables.iter().any(|(start, len)| *start < end && at < start.saturating_add(*len))
            {
                return Err(Error::corrupt("a grain lies over another one, or over a structure of the file").at_offset(at));
            }
            stop = end;
        }
        for at in odd {
            slots.reach(at.saturating_add(header.grain));
            slots.take_range(at, header.grain);
        }
        for (at, len) in tables.into_iter().chain([(0, header.overhead)]) {
            slots.take_range(at, len);
        }
        Ok(slots)
    }

    /// Makes the redundant tables say what the others do, as far as a power cut kept them from it.
    pub(super) fn mend_redundant(&self, extent: &Sparse) -> Result<u64> {
        let mut mended = 0;
        if extent.header.redundant_at.is_none() {
            return Ok(0);
        }
        for number in 0..extent.header.directory_len {
            let (Some(first), Some(second)) = self.tables(extent, number)? else { continue };
            let (right, copy) =
                (self.pages.read(extent.store, first, extent.table_len())?, self.pages.read(extent.store, second, extent.table_len())?);
            if first != second && right != copy {
                let differ = right.chunks_exact(4).zip(copy.chunks_exact(4)).filter(|(a, b)| a != b).count();
                mended += differ as u64;
                self.pages.put(Stage::Publish, extent.store, second, &right)?;
            }
        }
        Ok(mended)
    }

    /// Up to `want` grains' space, inside the file.
    pub(super) fn allocate(&self, extent: &Sparse, want: u64) -> Result<Taken> {
        let mut slots = extent.slots.lock();
        let slots = slots.as_mut().ok_or_else(|| Error::new(Kind::ReadOnly, "nothing may be changed yet"))?;
        let taken = slots
            .take(want, MAX_FILE)
            .ok_or_else(|| extent.explain(Error::new(Kind::NoSpace, "the file would become longer than a sparse extent can be (2 TiB)")))?;
        if taken.fresh {
            // Under the lock: two extensions must not cut each other.
            let end = slots.end();
            if let Err(error) = extent.extend(end) {
                slots.give(taken.at, taken.count * extent.header.grain);
                return Err(extent.explain(error));
            }
            self.writeback.wrote_data(extent.store);
        }
        Ok(taken)
    }

    fn give(&self, extent: &Sparse, at: u64, len: u64) {
        if let Some(slots) = extent.slots.lock().as_mut() {
            slots.give(at, len);
        }
    }

    /// Makes space that was used before read as zeros; `false`: the store cannot.
    fn zeroed(&self, extent: &Sparse, taken: Taken) -> Result<bool> {
        let len = taken.count * extent.header.grain;
        if taken.fresh {
            return Ok(true);
        }
        let done = extent.file().zero(taken.at, len).map_err(|e| {
            self.give(extent, taken.at, len);
            extent.explain(Error::io("cannot zero reused space", e).at_offset(taken.at))
        })?;
        self.writeback.wrote_data(extent.store);
        Ok(done)
    }

    /// The sparse extent that is to be changed at byte `at` of the disk.
    fn changing(&self, at: u64) -> Result<(&Piece, &Sparse)> {
        let piece = self.piece(at)?;
        match piece.bytes {
            Bytes::Sparse(number) if piece.writable => Ok((piece, self.extent(number)?)),
            Bytes::Zero => {
                Err(Error::new(Kind::ReadOnly, "this part of the disk consists of zeros, and has no file that could be written to"))
            }
            _ => Err(Error::new(Kind::ReadOnly, "this part of the disk is marked as read-only in the descriptor")),
        }
    }

    pub(super) fn place(&self, at: u64, len: u64) -> Result<Placement> {
        let (piece, extent) = self.changing(at)?;
        let grain = extent.header.grain;
        let (index, stop) = ((at - piece.start) / grain, at.saturating_add(len).min(piece.end));
        let want = (stop - piece.start).div_ceil(grain) - index;
        let (found, run) = extent.lookup(&self.pages, index, want.min(MAX_PLACEMENT))?;
        if matches!(found, Grain::Data(_)) {
            return Err(Error::new(Kind::ReadOnly, "the grain is not to be replaced"));
        }
        self.ensure_table(extent, index / extent.header.per_table)?;
        let taken = self.allocate(extent, run.min(want))?;
        let start = piece.start + index * grain;
        let end = start.saturating_add(taken.count * grain).min(piece.end);
        // What is written as a whole needs no zeros before.
        let whole = start == at && end <= stop;
        let zeroed = if whole { taken.fresh } else { self.zeroed(extent, taken)? };
        Ok(Placement { at: start, len: end - start, store: extent.store, host: taken.at, zeroed, token: 0 })
    }

    pub(super) fn publish_placement(&self, placement: &Placement) -> Result<()> {
        let (piece, extent) = self.changing(placement.at)?;
        let grain = extent.header.grain;
        self.publish_grains(extent, (placement.at - piece.start) / grain, placement.host, placement.len.div_ceil(grain))
    }

    /// Makes grains that lie next to each other at `host` visible.
    pub(super) fn publish_grains(&self, extent: &Sparse, index: u64, host: u64, count: u64) -> Result<()> {
        let entries = (0..count).map(|n| (host + n * extent.header.grain) / SECTOR);
        let entries = entries.map(|sector| u32::try_from(sector).map_err(|_| Error::corrupt("a grain beyond 2 TiB")));
        self.publish_entries(extent, index, &entries.collect::<Result<Vec<u32>>>()?)
    }

    /// Changes entries of one table, and of its copy.
    pub(super) fn publish_entries(&self, extent: &Sparse, index: u64, entries: &[u32]) -> Result<()> {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        let (first, second) = self.tables(extent, index / extent.header.per_table)?;
        let first = first.ok_or_else(|| Error::corrupt(format!("there is no table for grain {index}")))?;
        self.pages.put(Stage::Publish, extent.store, extent.table_entry(first, index), &bytes)?;
        match second.filter(|second| *second != first) {
            Some(second) => self.pages.put(Stage::Publish, extent.store, extent.table_entry(second, index), &bytes),
            None => Ok(()),
        }
    }

    /// Makes a table, and its copy, where there is none yet.
    fn ensure_table(&self, extent: &Sparse, number: u64) -> Result<()> {
        let header = &extent.header;
        if extent.table(&self.pages, header.directory_at, number)?.is_some() {
            return Ok(());
        }
        let _one = extent.new_table.lock();
        let (first, second) = self.tables(extent, number)?;
        if first.is_some() {
            return Ok(());
        }
        let len = extent.table_len().next_multiple_of(SECTOR);
        // Whole places, so that grains stay where they are in theirs.
        let both = (2 * len).div_ceil(header.grain);
        let taken = self.allocate(extent, both)?;
        let room = taken.count * header.grain;
        if room < 2 * len {
            // Only ever with grains of 4 KiB or less and a fragmented file.
            self.give(extent, taken.at, room);
            return Err(extent.explain(Error::new(Kind::NoSpace, "there is no room for another grain table next to the others")));
        }
        let copy_at = second.unwrap_or(taken.at + len);
        let zeros = vec![0; usize::try_from(len).unwrap_or(0)];
        self.pages.put(Stage::Reserve, extent.store, taken.at, &zeros)?;
        let entry = |at: u64| ((at / SECTOR) as u32).to_le_bytes();
        if let Some(directory) = header.redundant_at {
            if second.is_none() {
                self.pages.put(Stage::Reserve, extent.store, copy_at, &zeros)?;
                self.pages.put(Stage::Publish, extent.store, extent.directory_entry(directory, number), &entry(copy_at))?;
            } else {
                self.pages.put(Stage::Publish, extent.store, copy_at, &zeros)?;
            }
        }
        self.pages.put(Stage::Publish, extent.store, extent.directory_entry(header.directory_at, number), &entry(taken.at))
    }

    pub(super) fn cancel_placement(&self, placement: &Placement) {
        if let Ok((_, extent)) = self.changing(placement.at) {
            self.give(extent, placement.host, placement.len.next_multiple_of(extent.header.grain));
        }
    }

    /// Makes a range of whole units read as zeros, as far as that is possible without writing them; returns how much from its start was done.
    pub(super) fn clear(&self, at: u64, len: u64, mode: ZeroMode, punch: bool) -> Result<u64> {
        let end = at.saturating_add(len);
        let mut here = at;
        while here < end {
            let piece = self.piece(here)?;
            let stop = end.min(piece.end);
            let done = match piece.bytes {
                Bytes::Zero => stop - here,
                _ if !piece.writable => 0,
                Bytes::Hidden => 0,
                Bytes::Flat { store, at } => {
                    let (host, count) = (at.saturating_add(here - piece.start), stop - here);
                    let file = self.store(store)?;
                    let done = if punch { file.punch(host, count) } else { file.zero(host, count) };
                    self.writeback.wrote_data(store);
                    if done.map_err(|e| Error::io("cannot zero", e).at_offset(host))? { count } else { 0 }
                }
                Bytes::Sparse(number) => self.clear_grains(piece, self.extent(number)?, (here, stop), mode)?,
            };
            if done == 0 {
                break;
            }
            here += done;
        }
        Ok(here - at)
    }

    /// Clears a first part of a range of whole grains; returns how much, or 0 if it cannot.
    fn clear_grains(&self, piece: &Piece, extent: &Sparse, (at, stop): (u64, u64), mode: ZeroMode) -> Result<u64> {
        let grain = extent.header.grain;
        let index = (at - piece.start) / grain;
        let want = (stop - piece.start).div_ceil(grain) - index;
        let (found, run) = extent.lookup(&self.pages, index, want)?;
        // How the tables can say that there are zeros: by a word of its own, or, without a parent, by saying nothing.
        let word = match extent.header.scheme {
            Scheme::Hosted { zeroed: true } => Some(1),
            _ if !self.has_parent => Some(0),
            _ => None,
        };
        let done = match (found, word) {
            (Grain::Zero, _) => run,
            (Grain::Absent, _) if !self.has_parent => run,
            (Grain::Absent, Some(word)) => {
                self.ensure_table(extent, index / extent.header.per_table)?;
                self.publish_entries(extent, index, &vec![word; usize::try_from(run).unwrap_or(0)])?;
                run
            }
            // Grains of zeros, which take no space where files can have holes.
            (Grain::Absent, None) => {
                self.ensure_table(extent, index / extent.header.per_table)?;
                let taken = self.allocate(extent, run.min(MAX_PLACEMENT))?;
                if !self.zeroed(extent, taken)? {
                    self.give(extent, taken.at, taken.count * grain);
                    return Ok(0);
                }
                self.publish_grains(extent, index, taken.at, taken.count)?;
                taken.count
            }
            (Grain::Data(host), Some(word)) if mode != ZeroMode::KeepAllocated => {
                self.publish_entries(extent, index, &vec![word; usize::try_from(run).unwrap_or(0)])?;
                self.writeback.release(Freed { store: extent.store, at: host, len: run * grain });
                run
            }
            (Grain::Data(host), _) => {
                let fail = |e| extent.explain(Error::io("cannot zero", e).at_offset(host));
                let cleared = match word {
                    None if mode == ZeroMode::MayUnmap => extent.file().punch(host, run * grain),
                    _ => extent.file().zero(host, run * grain),
                };
                self.writeback.wrote_data(extent.store);
                if !cleared.map_err(fail)? {
                    return Ok(0);
                }
                run
            }
        };
        Ok((piece.start + (index + done) * grain).min(stop) - at)
    }

    /// Space that nobody can reach any more.
    pub(super) fn reclaim_space(&self, freed: &[Freed]) -> Result<()> {
        for run in freed {
            let Some(extent) = self.sparse.iter().find(|s| s.store == run.store) else { continue };
            // The file system gets it back until it is used again. A failure is no more than space not given back.
            let _ = extent.file().punch(run.at, run.len);
            self.give(extent, run.at, run.len);
        }
        Ok(())
    }
}
