//! Looking for damage, and mending it: entries that lead nowhere, two blocks in one place, a wrong count of blocks.

use super::Vdi;
use crate::error::{Error, Kind, Result};
use crate::format::CheckReport;

impl Vdi {
    pub(super) fn look_for_damage(&self, repair: bool) -> Result<CheckReport> {
        if repair && !self.flat.writable {
            return Err(Error::new(Kind::ReadOnly, "the image is open read-only and cannot be repaired"));
        }
        let mut report = CheckReport::default();
        let findings = self.flat.inspect(&mut report)?;
        let allocated = self.state.lock().allocated;
        let used = findings.sound.len() as u64;
        // Behind the last block another program would put its next one.
        let next = self.flat.last_entry(&findings).map_or(0, |last| last + 1);
        if allocated < next {
            report.corruption(format!("the header counts {allocated} blocks, but there is one in place {}", next - 1));
        } else if allocated > used {
            report.leaks += allocated - used;
            report.note(format!("the header counts {allocated} blocks, {used} of them are used"));
        }
        if !repair || (report.corruptions == 0 && report.leaks == 0) {
            return Ok(report);
        }
        self.flat.mend(findings, self.counted_end(), &mut report)?;
        let before = self.state.lock().allocated;
        self.recount()?;
        // Now what is counted and not used.
        self.flat.writeback.drain(self)?;
        let end = self.flat.close_gaps(&mut report)?;
        self.flat.writeback.drain(self)?;
        let count = (end - self.flat.meaning.base) / self.flat.meaning.step;
        self.put_count(count)?;
        self.flat.writeback.drain(self)?;
        self.state.lock().allocated = count;
        self.flat.tail.cut(end)?;
        self.flat.find_space_anew(end)?;
        report.corruptions_fixed += u64::from(before < next);
        report.leaks_fixed = report.leaks;
        Ok(report)
    }

    /// Has the header count the last block.
    fn recount(&self) -> Result<()> {
        let findings = self.flat.inspect(&mut CheckReport::default())?;
        self.count(self.flat.last_entry(&findings).map_or(0, |last| last + 1))
    }
}
