//! Looking for damage in dynamic and differencing images, and mending it.
//!
//! Mended without loss: footers, a file that was cut inside a block (the rest reads as zeros), two blocks in one place (one gets a copy of its own). An
//! entry that leads nowhere is given up.

use super::footer::SECTOR;
use super::sparse::{ABSENT, Sparse};
use crate::error::{Error, Kind, Result};
use crate::format::CheckReport;
use crate::space::copy;
use std::sync::atomic::Ordering;

impl Sparse {
    pub(super) fn look_for_damage(&self, repair: bool) -> Result<CheckReport> {
        if repair && !self.writable {
            return Err(Error::new(Kind::ReadOnly, "the image is open read-only and cannot be repaired"));
        }
        let mut report = CheckReport::default();
        let (end, damaged) = {
            let footers = self.footers.lock();
            (footers.end, [footers.end_damage.clone(), footers.start_damage.clone()])
        };
        // There are two for just that reason.
        damaged.iter().flatten().for_each(|what| report.note(format!("{what}; the other footer is in use")));
        let file_len = self.store()?.len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
        let (mut found, mut lost) = (Vec::new(), Vec::new());
        self.each_present(|index, block| {
            match block {
                Ok(block) if block.at < file_len => found.push((block.at, index)),
                Ok(block) => {
                    report.corruption(format!("block {index} lies at {:#x}, beyond the end of the file", block.at));
                    lost.push(index);
                }
                Err(error) => {
                    report.corruption(error.to_string());
                    lost.push(index);
                }
            }
            Ok(())
        })?;
        report.allocated_units = found.len() as u64;
        found.sort_unstable();
        let (mut sound, mut shared, mut stop) = (Vec::with_capacity(found.len()), Vec::new(), 0);
        for (at, index) in found {
            if at < stop {
                report.corruption(format!("block {index} lies over another block, at {at:#x}"));
                shared.push((at, index));
            } else {
                stop = at.saturating_add(self.block_len());
                sound.push((at, self.block_len()));
            }
        }
        // A file without a footer may end inside a sector, where the footer does not belong.
        let cut = stop > end.min(file_len);
        if cut {
            report.corruption(format!(
                "the last block ends at {stop}, behind the place of the footer ({end}) or the end of the file ({file_len})"
            ));
        }
        if !repair || (!cut && lost.is_empty() && shared.is_empty() && damaged.iter().flatten().next().is_none()) {
            return Ok(report);
        }
        if cut {
            let mut footers = self.footers.lock();
            footers.end = stop.next_multiple_of(SECTOR);
            self.writeback.write_through(0, footers.end, footers.footer.bytes())?;
            footers.end_damage = None;
            self.file_len.store(footers.end + SECTOR, Ordering::Relaxed);
            report.corruptions_fixed += 1;
            report.note("what the file lacked at its end reads as zeros now");
        }
        self.mend_footers()?;
        let layout = self.layout.read();
        for index in lost {
            layout.table.publish(index, ABSENT)?;
            report.corruptions_fixed += 1;
        }
        let end = self.footers.lock().end;
        let mut space =
            self.space_between(&layout, sound, end).map_err(|at| Error::corrupt("structures of the file overlap").at_offset(at))?;
        // Their bytes are still to be read.
        for (at, _) in &shared {
            space.take_at(*at, self.block_len());
        }
        report.note(format!("{} bytes between the blocks of the file are free", space.free()));
        *self.space.lock() = Some(space);
        for (at, index) in shared {
            let taken = self.allocate(self.block_len())?;
            copy(&**self.store()?, at, taken.at, self.block_len())?;
            self.writeback.wrote_data(0);
            layout.table.publish(index, taken.at / SECTOR)?;
            report.corruptions_fixed += 1;
        }
        Ok(report)
    }
}
