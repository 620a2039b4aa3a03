//! Looking for damage in sparse extents, and mending it.
//!
//! Mended without loss: redundant tables that lag behind, two grains in one place (one gets a copy of its own), an entry that leads nowhere where its copy
//! leads somewhere. Otherwise such an entry is given up.

use super::descriptor::SECTOR;
use super::image::Vmdk;
use super::layout::Bytes;
use super::sparse::{Grain, Sparse};
use crate::error::{Error, Kind, Result};
use crate::format::CheckReport;
use crate::space::copy;
use crate::writeback::Stage;
use std::collections::BTreeSet;

/// How often an extent is looked at again after something was mended.
const MAX_PASSES: usize = 4;

/// What was found in one extent.
#[derive(Default)]
struct Findings {
    /// Byte offset, grain.
    grains: Vec<(u64, u64)>,
    /// Grains whose entries lead nowhere.
    lost: Vec<u64>,
    /// Grains that lie over others, and where.
    shared: Vec<(u64, u64)>,
    /// Directories, and numbers of their entries that lead to no table of their own.
    tables: Vec<(u64, u64)>,
    /// Entries of redundant tables that differ.
    behind: u64,
}

impl Vmdk {
    pub(super) fn look_for_damage(&self, repair: bool) -> Result<CheckReport> {
        if repair && !self.writable {
            return Err(Error::new(Kind::ReadOnly, "the image is open read-only, or cannot be written to, and is not repaired"));
        }
        let mut report = CheckReport::default();
        for piece in &self.pieces {
            let Bytes::Sparse(number) = piece.bytes else { continue };
            let extent = self.extent(number)?;
            // What is mended may show what could not be seen before.
            for _ in 0..MAX_PASSES {
                let mut now = CheckReport::default();
                let found = self.examine(extent, &mut now)?;
                let (units, encoded) = (now.allocated_units, now.encoded_units);
                if repair && piece.writable && now.corruptions + now.leaks > 0 {
                    if !found.tables.is_empty() {
                        // Tables first: the rest is seen again, as it is then.
                        (now.corruptions, now.leaks) = (found.tables.len() as u64, 0);
                    }
                    self.mend(extent, found, &mut now)?;
                }
                report.corruptions += now.corruptions;
                report.leaks += now.leaks;
                report.corruptions_fixed += now.corruptions_fixed;
                report.leaks_fixed += now.leaks_fixed;
                now.notes.into_iter().for_each(|note| report.note(note));
                if now.corruptions_fixed + now.leaks_fixed == 0 {
                    report.allocated_units += units;
                    report.encoded_units += encoded;
                    break;
                }
            }
        }
        Ok(report)
    }

    fn examine(&self, extent: &Sparse, report: &mut CheckReport) -> Result<Findings> {
        let mut found = self.look_at(extent, report)?;
        self.overlaps(extent, &mut found, report);
        if found.behind > 0 {
            report.leak(format!("{} entries of the redundant grain tables differ from those in use", found.behind));
        }
        Ok(found)
    }

    /// Goes through all tables of an extent.
    fn look_at(&self, extent: &Sparse, report: &mut CheckReport) -> Result<Findings> {
        let mut found = Findings::default();
        let len = extent.file().len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
        for number in 0..extent.header.directory_len {
            let mut sound = [None; 2];
            for (at, sound) in std::iter::once(extent.header.directory_at).chain(extent.header.redundant_at).zip(&mut sound) {
                match extent.table(&self.pages, at, number) {
                    Ok(table) => *sound = table,
                    Err(error) if error.kind() == Kind::Corrupt => {
                        report.corruption(error.to_string());
                        found.tables.push((at, number));
                    }
                    Err(error) => return Err(error),
                }
            }
            let [first, second] = sound;
            if let (Some(first), Some(second)) = (first, second)
                && first != second
            {
                let read = |at| self.pages.read(extent.store, at, extent.table_len());
                found.behind += read(first)?.chunks_exact(4).zip(read(second)?.chunks_exact(4)).filter(|(a, b)| a != b).count() as u64;
            }
            let Some(table) = first else { continue };
            self.each_entry(extent, number, table, |index, _, entry| {
                match extent.grain(entry) {
                    Some(Grain::Data(at)) if at < len => found.grains.push((at, index)),
                    Some(Grain::Absent | Grain::Zero) => {}
                    other => {
                        let where_to = if other.is_some() { "beyond the end of the file" } else { "where it cannot be" };
                        report.corruption(format!("grain {index} lies {where_to} (entry {entry:#x})"));
                        found.lost.push(index);
                    }
                }
                report.allocated_units += 1;
                report.encoded_units += u64::from(extent.header.compressed);
                Ok(())
            })?;
        }
        Ok(found)
    }

    /// Finds grains that lie over others or over tables.
    fn overlaps(&self, extent: &Sparse, found: &mut Findings, report: &mut CheckReport) {
        // Those of compressed grains are as long as they are.
        let grain = if extent.header.compressed { SECTOR } else { extent.header.grain };
        let tables = self.sound_tables(extent);
        for (table, directory, number) in extent.tables_over_others(&tables) {
            report.corruption(format!("grain table {number} lies over another one, at {table:#x}"));
            found.tables.push((directory, number));
        }
        found.grains.sort_unstable();
        let mut stop = 0;
        for &(at, index) in &found.grains {
            let next = tables.partition_point(|(start, ..)| start.saturating_add(extent.table_len()) <= at);
            if tables.get(next).is_some_and(|(start, ..)| *start < at.saturating_add(grain)) || extent.touches_fixed(at, grain) {
                report.corruption(format!("grain {index} lies over a grain table or the directory, at {at:#x}"));
                found.lost.push(index);
            } else if at < stop {
                report.corruption(format!("grain {index} lies over another grain, at {at:#x}"));
                found.shared.push((at, index));
            } else {
                stop = at.saturating_add(grain);
            }
        }
    }

    fn mend(&self, extent: &Sparse, found: Findings, report: &mut CheckReport) -> Result<()> {
        let header = &extent.header;
        if !(found.tables.is_empty() && found.lost.is_empty() && found.shared.is_empty()) {
            self.change_cid()?;
        }
        let broken: BTreeSet<(u64, u64)> = found.tables.iter().copied().collect();
        for &(directory, number) in &found.tables {
            let other = std::iter::once(header.directory_at).chain(header.redundant_at).find(|at| *at != directory);
            let sound = other.filter(|other| !broken.contains(&(*other, number)));
            let copy = sound.and_then(|at| extent.table(&self.pages, at, number).ok().flatten());
            // Both directories may refer to one table; the next new one makes another.
            let entry = copy.map_or(0, |at| (at / SECTOR) as u32);
            self.pages.put(Stage::Publish, extent.store, extent.directory_entry(directory, number), &entry.to_le_bytes())?;
            report.corruptions_fixed += 1;
            report.note(match copy {
                Some(_) => format!("entry {number} of a grain directory was taken from the other one"),
                None => format!("grain table {number} was given up"),
            });
        }
        if !broken.is_empty() {
            return Ok(());
        }
        for index in found.lost {
            self.publish_entries(extent, index, &[0])?;
            report.corruptions_fixed += 1;
            report.note(format!("grain {index} was given up"));
        }
        if found.behind > 0 {
            self.mend_redundant(extent)?;
            report.leaks_fixed += 1;
        }
        for (at, index) in found.shared {
            let to = self.room_for_copy(extent)?;
            copy(extent.file(), at, to, header.grain)?;
            self.writeback.wrote_data(extent.store);
            self.publish_grains(extent, index, to, 1)?;
            report.corruptions_fixed += 1;
        }
        Ok(())
    }

    /// Space for a grain: behind the end as long as what is free is not known.
    fn room_for_copy(&self, extent: &Sparse) -> Result<u64> {
        if extent.slots.lock().is_some() {
            return Ok(self.allocate(extent, 1)?.at);
        }
        let len = extent.file().len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
        let at = len.next_multiple_of(extent.header.grain);
        extent.extend(at.saturating_add(extent.header.grain))?;
        Ok(at)
    }
}
