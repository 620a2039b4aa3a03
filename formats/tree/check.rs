//! Looking for damage in images of two levels of tables, and mending it.
//!
//! Mended without loss: a file that was cut inside its last cluster (the rest reads as zeros), two clusters in one place (one gets a copy of its own). Entries
//! that lead nowhere are given up. A table that lies over something else cannot be mended.

use super::{Cluster, Top, Tree};
use crate::error::{Error, Kind, Result};
use crate::format::CheckReport;
use crate::space::copy;

/// How much of a table is read at once, in bytes.
const STEP: u64 = 64 << 10;

/// What a run of the file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    /// The header or a table.
    Table,
    /// A guest cluster, and the byte offset of its entry.
    Data(u64),
    /// A compressed one.
    Encoded,
}

/// What a look at all tables has found.
#[derive(Default)]
struct Findings {
    used: Vec<(u64, u64, What)>,
    /// Byte offset of data that lie over other data, and of their entry.
    shared: Vec<(u64, u64)>,
    /// Byte offsets of entries of clusters that lead nowhere.
    lost: Vec<u64>,
    /// First-level entries that do.
    lost_tables: Vec<u64>,
    /// Where the last run ends.
    end: u64,
    /// Bytes of clusters and tables, each counted once.
    bytes: u64,
}

impl Tree {
    fn inspect(&self, top: &Top, report: &mut CheckReport) -> Result<Findings> {
        let file_len = self.tail.file_len()?;
        let mut found = Findings { used: vec![(0, self.shape.first, What::Table)], ..Findings::default() };
        let top_len = top.entries.saturating_mul(self.shape.width.bytes());
        if top.at >= self.shape.first {
            found.used.push((top.at, top_len, What::Table));
        }
        for slot in 0..top.entries {
            match self.table_at(top, slot) {
                Ok(None) => {}
                Ok(Some(table)) => {
                    found.used.push((table, self.shape.table_len(), What::Table));
                    self.inspect_table(top, table, file_len, &mut found, report)?;
                }
                Err(error) if error.kind() == Kind::Corrupt => {
                    report.corruption(error.to_string());
                    found.lost_tables.push(slot);
                }
                Err(error) => return Err(error),
            }
        }
        self.find_overlaps(&mut found, report);
        Ok(found)
    }

    fn inspect_table(&self, top: &Top, table: u64, file_len: u64, found: &mut Findings, report: &mut CheckReport) -> Result<()> {
        let width = self.shape.width.bytes();
        // What of the table is beyond the file is zeros.
        let len = self.tail.in_file(table, self.shape.table_len())?.next_multiple_of(width).min(self.shape.table_len());
        let mut done = 0;
        let mut bytes = Vec::new();
        while done < len {
            bytes.resize(usize::try_from(STEP.min(len - done)).unwrap_or(0), 0);
            self.writeback.read(0, table + done, &mut bytes)?;
            for (number, raw) in bytes.chunks_exact(width as usize).enumerate() {
                let place = table + done + number as u64 * width;
                let cluster = self.decode(top, self.shape.width.decode(raw), place);
                let allocated = match cluster {
                    Ok(Cluster::Absent) => continue,
                    Ok(Cluster::Zero) => true,
                    Ok(Cluster::At(at)) if at < file_len => {
                        found.used.push((at, self.shape.cluster(), What::Data(place)));
                        true
                    }
                    Ok(Cluster::Encoded(at, coded)) if at < file_len => {
                        found.used.push((at, coded, What::Encoded));
                        report.encoded_units += 1;
                        true
                    }
                    Ok(Cluster::At(at) | Cluster::Encoded(at, _)) => {
                        report.corruption(format!("a cluster lies at {at:#x}, beyond the end of the file (its entry is at {place:#x})"));
                        found.lost.push(place);
                        false
                    }
                    Err(error) => {
                        report.corruption(error.to_string());
                        found.lost.push(place);
                        false
                    }
                };
                report.allocated_units += u64::from(allocated);
            }
            done += bytes.len() as u64;
        }
        Ok(())
    }

    fn find_overlaps(&self, found: &mut Findings, report: &mut CheckReport) {
        found.used.sort_unstable();
        let (mut stop, mut last) = (0_u64, What::Table);
        let mut kept = Vec::with_capacity(found.used.len());
        for &(at, len, what) in &found.used {
            let end = at.saturating_add(len);
            if at < stop && !(what == What::Encoded && last == What::Encoded) {
                report.corruption(format!("a cluster or table at {at:#x} lies over another one"));
                if let What::Data(place) = what {
                    found.shared.push((at, place));
                    continue;
                }
            } else {
                found.bytes += len;
            }
            kept.push((at, len, what));
            if end > stop {
                (stop, last) = (end, what);
            }
        }
        found.used = kept;
        found.end = stop;
    }

    /// What is free, for the first change.
    ///
    /// # Errors
    /// `Corrupt` when something is wrong with the tables: nothing may be changed.
    pub(crate) fn find_space(&self) -> Result<()> {
        if self.tail.is_known() {
            return Ok(());
        }
        let mut report = CheckReport::default();
        let found = self.inspect(&self.top.read(), &mut report)?;
        if report.corruptions > 0 {
            return Err(Error::corrupt(format!(
                "{}; nothing is written to this image (check shows all damage, and repairs what can be)",
                report.notes.first().map_or("", String::as_str)
            )));
        }
        self.begin(&found)
    }

    fn begin(&self, found: &Findings) -> Result<()> {
        let cluster = self.shape.cluster();
        let whole = |at: u64| at.checked_next_multiple_of(cluster).filter(|at| *at <= i64::MAX as u64);
        let end = whole(found.end.max(self.tail.file_len()?)).ok_or_else(|| Error::unsupported("the file is too long to be changed"))?;
        let used = if self.shape.reuse {
            // Whole clusters, without overlaps, as far as those could be mended.
            let mut runs: Vec<(u64, u64)> = Vec::new();
            for &(at, len, _) in &found.used {
                let (start, stop) = (at & !(cluster - 1), whole(at.saturating_add(len)).unwrap_or(end));
                match runs.last_mut() {
                    Some((from, so_far)) if *from + *so_far >= start => *so_far = (*so_far).max(stop - *from),
                    _ => runs.push((start, stop - start)),
                }
            }
            runs
        } else {
            vec![(0, end)]
        };
        self.tail.begin(used, end).map_err(|o| Error::corrupt("two clusters of the image are in one place of the file").at_offset(o.at))
    }

    /// See [`Format::check`](crate::format::Format::check). The caller drains the write-back buffer afterwards, and cuts off what is not used.
    pub(crate) fn check(&self, repair: bool) -> Result<CheckReport> {
        if repair && !self.writable {
            return Err(Error::new(Kind::ReadOnly, "the image is open read-only and cannot be repaired"));
        }
        let mut report = CheckReport::default();
        let top = self.top.read();
        let found = self.inspect(&top, &mut report)?;
        let (cluster, file_len) = (self.shape.cluster(), self.tail.file_len()?);
        let whole_end = found.end.next_multiple_of(cluster);
        let cut = self.shape.reuse && whole_end > file_len;
        if cut {
            report.corruption(format!("the file ends inside the last cluster, which should reach to {whole_end:#x}"));
        }
        if self.shape.reuse {
            let there = file_len / cluster;
            let used = found.bytes.div_ceil(cluster);
            if there > used {
                report.leaks += there - used;
                report.note(format!("{} clusters of the file are not used", there - used));
            }
        }
        if !repair || (report.corruptions == 0 && report.leaks == 0) {
            return Ok(report);
        }
        if cut {
            self.tail.cut(whole_end)?;
            report.corruptions_fixed += 1;
        }
        if self.shape.reuse && file_len > whole_end && found.shared.is_empty() {
            report.leaks_fixed = ((file_len - whole_end) / cluster).min(report.leaks);
            self.tail.cut(whole_end)?;
        }
        self.begin(&found)?;
        for (at, _) in &found.shared {
            self.tail.take_at(*at & !(cluster - 1), cluster);
        }
        for slot in &found.lost_tables {
            top.table.publish(*slot, 0)?;
            report.corruptions_fixed += 1;
        }
        for place in &found.lost {
            self.entries.publish(*place, [0])?;
            report.corruptions_fixed += 1;
        }
        for (at, place) in &found.shared {
            let taken = self.tail.take(cluster, i64::MAX as u64)?;
            copy(&**self.tail.store()?, *at, taken.at, cluster)?;
            self.writeback.wrote_data(0);
            self.entries.publish(*place, [taken.at])?;
            report.corruptions_fixed += 1;
        }
        Ok(report)
    }
}
