//! Looking for damage, and mending it.
//!
//! What is mended so that no byte is lost: copies of header and region table, a file that was cut inside a block, two blocks in one place (one gets a copy of its
//! own). What is mended by giving up bytes that cannot be found any more: entries that lead nowhere.

use super::bat::{ENTRY, Entry, Payload};
use super::header::MIB;
use super::{Layout, Vhdx};
use crate::error::{Error, Kind, Result};
use crate::format::CheckReport;
use crate::space::{Space, copy};
use std::sync::atomic::Ordering;

/// Something in the file that an entry of the table leads to.
#[derive(Clone, Copy)]
struct Structure {
    at: u64,
    len: u64,
    index: u64,
}

/// What a look at the table found.
#[derive(Default)]
struct Findings {
    sound: Vec<Structure>,
    /// Entries that lead nowhere.
    lost: Vec<u64>,
    /// Structures that lie over others.
    shared: Vec<Structure>,
    /// Where undefined or unmapped blocks may still have their old contents.
    stale: Vec<u64>,
    /// How long the file should be, in bytes.
    needed_len: u64,
}

impl Vhdx {
    pub(super) fn look_for_damage(&self, repair: bool) -> Result<CheckReport> {
        if repair && !self.writable {
            return Err(Error::new(Kind::ReadOnly, "the image is open read-only and cannot be repaired"));
        }
        let mut report = CheckReport::default();
        let layout = self.layout.read();
        let file_len = self.store()?.len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
        // Copies are there to be damaged: by a cut while they are written.
        let damaged = [self.headers.lock().damage.clone(), layout.regions.damage.clone()];
        damaged.iter().flatten().for_each(|what| report.note(format!("{what}; the other one is in use")));
        if self.replayed {
            report.note("the image was not closed cleanly; its log has been replayed");
        }
        let mut findings = self.examine(&layout, file_len, &mut report)?;
        let cut = findings.needed_len > file_len;
        if cut {
            report.corruption(format!("the file is {file_len} bytes long; its last block ends at {}", findings.needed_len));
        }
        if repair && (cut || !findings.lost.is_empty() || !findings.shared.is_empty() || damaged.iter().flatten().next().is_some()) {
            self.mend(&layout, &mut findings, cut, &mut report)?;
        }
        Ok(report)
    }

    fn examine(&self, layout: &Layout, file_len: u64, report: &mut CheckReport) -> Result<Findings> {
        let mut findings = Findings::default();
        self.scan(layout, |index, entry| {
            let Some(block) = self.geometry.block_of(index) else {
                if !self.geometry.has_parent {
                    return Ok(());
                }
                match entry.bitmap() {
                    Some(None) => {}
                    Some(Some(at)) if !layout.regions.touches_fixed(at, MIB) && at < file_len => {
                        findings.sound.push(Structure { at, len: MIB, index })
                    }
                    _ => {
                        report.corruption(format!(
                            "the entry of sector bitmap {} leads nowhere ({:#x})",
                            index / (self.geometry.chunk_ratio + 1),
                            entry.0
                        ));
                        findings.lost.push(index);
                    }
                }
                return Ok(());
            };
            let mut lost = |why: String, report: &mut CheckReport| {
                report.corruption(why);
                findings.lost.push(index);
            };
            match self.payload(layout, block) {
                Err(error) => lost(error.to_string(), report),
                Ok(Payload::Full(at) | Payload::Partial(at)) if at >= file_len => {
                    lost(format!("block {block} lies at {at:#x}, beyond the end of the file"), report);
                }
                Ok(Payload::Partial(_))
                    if self.bits_of(layout, block).map_or(true, |at| at.saturating_sub(self.geometry.bits_at(block)) >= file_len) =>
                {
                    lost(format!("block {block} is partially present, and the bitmap that says which part is missing"), report);
                }
                Ok(Payload::Full(at) | Payload::Partial(at)) => {
                    report.allocated_units += 1;
                    findings.sound.push(Structure { at, len: self.geometry.block, index });
                }
                Ok(Payload::Zero) => {
                    report.allocated_units += 1;
                    if entry.at() != 0 && entry.0 & 7 != Entry::ZERO.0 {
                        findings.stale.push(entry.at());
                    }
                }
                Ok(Payload::NotPresent) => {}
            }
            Ok(())
        })?;
        findings.sound.sort_unstable_by_key(|s| (s.at, s.index));
        let mut end = 0;
        let mut sound = Vec::with_capacity(findings.sound.len());
        for structure in std::mem::take(&mut findings.sound) {
            if structure.at < end {
                report.corruption(format!("{} lies over another structure, at {:#x}", self.named(structure.index), structure.at));
                findings.shared.push(structure);
            } else {
                end = structure.at.saturating_add(structure.len);
                sound.push(structure);
            }
        }
        findings.sound = sound;
        findings.needed_len = end;
        Ok(findings)
    }

    fn named(&self, index: u64) -> String {
        match self.geometry.block_of(index) {
            Some(block) => format!("block {block}"),
            None => format!("sector bitmap {}", index / (self.geometry.chunk_ratio + 1)),
        }
    }

    fn mend(&self, layout: &Layout, findings: &mut Findings, cut: bool, report: &mut CheckReport) -> Result<()> {
        let contents = cut || !findings.lost.is_empty() || !findings.shared.is_empty();
        let mut headers = self.headers.lock();
        headers.need_log()?;
        self.renew(&mut headers, layout, contents)?;
        drop(headers);
        if cut {
            let len = findings.needed_len.next_multiple_of(MIB);
            self.store()?.set_len(len).map_err(|e| Error::io(format!("cannot extend the file to {len} bytes"), e))?;
            self.file_len.store(len, Ordering::Relaxed);
            self.writeback.wrote_data(0);
            report.corruptions_fixed += 1;
            report.note("what the file lacked at its end reads as zeros now");
        }
        for index in &findings.lost {
            // With a parent the old bytes would show again, of no particular time; zeros would be no better.
            layout.bat.publish(*index, Entry::NOT_PRESENT)?;
            report.corruptions_fixed += 1;
        }
        let end = self.store()?.len().map_err(|e| Error::io("cannot find out the length of the file", e))?.next_multiple_of(MIB);
        let fixed = layout.regions.fixed.iter().map(|r| (r.at, r.len));
        let mut used: Vec<(u64, u64)> = fixed.chain(findings.sound.iter().map(|s| (s.at, s.len))).collect();
        let mut space = Space::new(&mut used, end).map_err(|o| Error::corrupt("structures of the file overlap").at_offset(o.at))?;
        // Their bytes are still to be read.
        for structure in &findings.shared {
            space.take_at(structure.at, structure.len);
        }
        for at in &findings.stale {
            space.take_at(*at, self.geometry.block);
        }
        report.note(format!("{} bytes between the structures of the file are free", space.free()));
        *self.space.lock() = Some(space);
        for structure in std::mem::take(&mut findings.shared) {
            let taken = self.allocate(structure.len)?;
            copy(&**self.store()?, structure.at, taken.at, structure.len)?;
            self.writeback.wrote_data(0);
            let state = layout.bat.get(structure.index)?.0 & 7;
            layout.bat.publish(structure.index, Entry(taken.at | state))?;
            report.corruptions_fixed += 1;
        }
        Ok(())
    }
}

/// An entry fits in what a sector is divided into: none is ever torn.
const _: () = assert!(512 % ENTRY == 0);
