//! Mending: refcounts that differ from the references, COPIED flags, and whole refcount structures.
//!
//! Entries come first: those that lead beyond the end of the file, where nothing can be found any more, and those that share a cluster. Single refcounts are set where they are. Where the structures themselves are damaged, or clusters in use count as free, a new table with new blocks is
//! written behind everything else, and the header names it when it is durable: a cut leaves the old or the new structure.

use super::check::{Findings, Wrong};
use super::counts::Counts;
use super::entry::{COMPRESSED, COPIED, Entry, MAX_REFTABLE_BYTES, Raw};
use super::header::{field, incompatible};
use super::refcount::{self, Refcounts};
use super::{Qcow2, open};
use crate::error::{Error, Kind, Result};
use crate::format::CheckReport;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Qcow2 {
    /// See [`Format::check`](crate::format::Format::check).
    pub(super) fn check_image(&self, repair: bool) -> Result<CheckReport> {
        if !repair {
            let mine;
            let refcounts = match &self.refcounts {
                Some(refcounts) => refcounts,
                None => {
                    let (at, clusters) = (self.header.reftable_at, self.header.reftable_clusters);
                    mine = Refcounts::read(Arc::clone(&self.writeback), self.geometry, at, clusters, self.file_len()?)?;
                    &mine
                }
            };
            let mut report = self.examine(refcounts)?.report;
            self.each_wrong_flag(refcounts, |place, _, _, right| {
                report.corruption(format!("the COPIED flag of the entry at {place:#x} is wrong: it should be {right:#018x}"));
                Ok(())
            })?;
            return Ok(report);
        }
        let refcounts = self.refcounts.as_ref();
        let refcounts = refcounts.ok_or_else(|| Error::new(Kind::ReadOnly, "the image is open read-only and cannot be repaired"))?;
        self.l2.clear(&self.l1);
        self.repair_image(refcounts)
    }

    fn repair_image(&self, refcounts: &Refcounts) -> Result<CheckReport> {
        let mut notes = Vec::new();
        let mut before = self.examine(refcounts)?;
        let mut corruptions_fixed = self.mend_entries(&mut notes)? + self.separate_entries(refcounts, &before, &mut notes)?;
        let mut leaks_fixed = 0;
        if corruptions_fixed > 0 {
            before = self.examine(refcounts)?;
        }
        notes.extend_from_slice(&before.report.notes);
        let max = self.geometry.max_refcount();
        if let Some(wrong) = before.wrong.iter().find(|w| w.counted > max) {
            notes.push(format!("cluster {} has more references than a refcount of this width can count", wrong.cluster));
        } else if before.rebuild && !before.incomplete {
            let structures = before.report.corruptions - before.wrong.iter().filter(|w| w.stored < w.counted).count() as u64;
            self.rebuild(refcounts, &before)?;
            let after = self.examine(refcounts)?;
            corruptions_fixed += before.report.corruptions.saturating_sub(after.report.corruptions);
            leaks_fixed = before.report.leaks.saturating_sub(after.report.leaks);
            notes.push(format!("the refcounts were built anew ({structures} findings other than refcounts before)"));
        } else {
            for wrong in &before.wrong {
                if self.set_refcount(refcounts, wrong, before.incomplete)? {
                    if wrong.stored < wrong.counted { corruptions_fixed += 1 } else { leaks_fixed += 1 }
                }
            }
            if !before.incomplete {
                self.settle_refcounts_beyond_the_end(refcounts, &before.all)?;
            }
            refcounts.lock().cursor = 0;
        }
        self.each_wrong_flag(refcounts, |place, index, in_table, right| {
            notes.push(format!("the COPIED flag of the entry at {place:#x} was wrong"));
            self.writeback.publish(0, place, &right.to_be_bytes())?;
            if in_table.is_none() {
                self.l1.slot_for(index).set_entry(right);
            }
            corruptions_fixed += 1;
            Ok(())
        })?;
        open::register_metadata(self, refcounts)?;
        let mut report = self.examine(refcounts)?.report;
        notes.append(&mut report.notes);
        notes.truncate(CheckReport::MAX_NOTES);
        report.notes = notes;
        if report.corruptions == 0 {
            self.writeback.drain(self)?;
            self.set_incompatible(0, incompatible::DIRTY | incompatible::CORRUPT)?;
            self.damaged.store(false, Ordering::Release);
        }
        (report.corruptions_fixed, report.leaks_fixed) = (corruptions_fixed, leaks_fixed);
        report.corruptions += corruptions_fixed;
        report.leaks += leaks_fixed;
        Ok(report)
    }

    /// Mends entries of the active L2 tables without which no refcount can become right: those whose data are beyond the end of the file, and so lost, read as
    /// zeros from now on; compressed clusters lose the COPIED flag, which means nothing there. Returns how many there were.
    fn mend_entries(&self, notes: &mut Vec<String>) -> Result<u64> {
        let g = self.geometry;
        let file_len = self.file_len()?;
        let zeros = if g.version >= 3 { Raw::zeros(g) } else { Raw::default() };
        let (mut mended, mut raws) = (0, Vec::new());
        for index in self.l1.used() {
            let table_at = self.l1.slot(index).map_or(0, super::l1::Slot::table_at);
            if !g.aligned(table_at) || table_at >= file_len {
                continue;
            }
            raws.clear();
            self.each_l2_entry(table_at, |_, raw| raws.push(raw))?;
            for (number, raw) in (0..).zip(&raws) {
                let end = match g.l2_entry(*raw) {
                    Ok(Entry::Compressed { host, len }) => host + len,
                    Ok(entry) => match entry.clusters(g) {
                        Some((host, len)) => host + len,
                        None => continue,
                    },
                    Err(_) => continue,
                };
                let guest = (index << g.table_bits()) + (number << g.cluster_bits);
                let right = if end > file_len && end - file_len >= g.cluster_size() {
                    notes.push(format!(
                        "the data of guest offset {guest:#x} are beyond the end of the file and lost: it reads as zeros now"
                    ));
                    zeros
                } else if raw.entry & COMPRESSED != 0 && raw.entry & COPIED != 0 {
                    notes.push(format!("the compressed cluster of guest offset {guest:#x} had the COPIED flag"));
                    Raw { entry: raw.entry & !COPIED, ..*raw }
                } else {
                    continue;
                };
                self.publish_entry(table_at, number, right)?;
                notes.truncate(CheckReport::MAX_NOTES);
                mended += 1;
            }
        }
        Ok(mended)
    }

    /// Gives every active entry a cluster of its own: where two name one, or one that is metadata, the later one gets a copy, behind everything else. Internal snapshots share clusters,
    /// the active state does not, and a writer that takes one reference away would leave the other with the wrong flag. Returns how many there were.
    fn separate_entries(&self, refcounts: &Refcounts, found: &Findings, notes: &mut Vec<String>) -> Result<u64> {
        let g = self.geometry;
        if g.data_file {
            return Ok(0);
        }
        let file_len = self.file_len()?;
        let (mut tables, mut seen, mut end, mut copies) = (Counts::default(), Counts::default(), g.round_up(file_len), 0);
        let (mut raws, mut cluster) = (Vec::new(), Vec::new());
        for index in self.l1.used() {
            let table_at = self.l1.slot(index).map_or(0, super::l1::Slot::table_at);
            // Entries of a table that two L1 entries name are the same entries.
            if !g.aligned(table_at) || table_at >= file_len || tables.get(table_at >> g.cluster_bits) > 0 {
                continue;
            }
            tables.add(table_at >> g.cluster_bits, 1);
            raws.clear();
            self.each_l2_entry(table_at, |_, raw| raws.push(raw))?;
            for (number, raw) in (0..).zip(&raws) {
                let host = match g.l2_entry(*raw) {
                    Ok(Entry::Data { host, .. }) => host,
                    Ok(Entry::Parts { host: Some(host), there, .. }) if there != 0 => host,
                    _ => continue,
                };
                seen.add(host >> g.cluster_bits, 1);
                let of_others = [&found.metadata, &found.packed].iter().any(|counts| counts.get(host >> g.cluster_bits) > 0);
                let alone = seen.get(host >> g.cluster_bits) == 1 && !of_others;
                if host >= file_len || alone {
                    continue;
                }
                let guest = (index << g.table_bits()) + (number << g.cluster_bits);
                notes.push(format!("the data of guest offset {guest:#x} were another's, too, or metadata: it has a copy of them now"));
                notes.truncate(CheckReport::MAX_NOTES);
                let fail = |e| Error::io("cannot copy a cluster", e).at_offset(host);
                cluster.resize(g.cluster_size() as usize, 0);
                self.file().read_zero_filled(&mut cluster, host).map_err(fail)?;
                self.file().write_all_at(&cluster, end).map_err(fail)?;
                self.writeback.wrote_data(0);
                self.publish_entry(table_at, number, Raw { entry: end, ..*raw })?;
                end += g.cluster_size();
                copies += 1;
            }
        }
        let mut state = refcounts.lock();
        state.fresh = state.fresh.max(end);
        Ok(copies)
    }

    fn publish_entry(&self, table_at: u64, number: u64, raw: Raw) -> Result<()> {
        let mut bytes = smallvec::SmallVec::new();
        raw.encode(self.geometry, &mut bytes);
        self.writeback.publish(0, table_at + number * self.geometry.entry_size(), &bytes)
    }

    /// Refcounts of clusters that the file does not have would hide them from the allocator, and show as leaks, as soon as it has them; but for those of clusters
    /// that something refers to.
    fn settle_refcounts_beyond_the_end(&self, refcounts: &Refcounts, counted: &Counts) -> Result<()> {
        let g = self.geometry;
        let (end, per_block) = (g.clusters(self.file_len()?), g.refcounts_per_block());
        let blocks = refcounts.lock().table.len() as u64;
        for index in end / per_block..blocks {
            if refcounts.lock().block_at(index) == 0 {
                continue;
            }
            let (first, range) = (index * per_block, end.max(index * per_block)..(index + 1) * per_block);
            let mut state = refcounts.lock_with_block(index)?;
            let count = |cluster: u64| state.blocks.peek(&index).map_or(0, |b| refcount::get(b, g.refcount_order, cluster - first));
            if range.clone().any(|cluster| count(cluster) != counted.get(cluster)) {
                let mut right = range.clone().map(|cluster| counted.get(cluster));
                refcounts.change_in(&mut state, &range, |old| right.next().unwrap_or(old))?;
            }
        }
        Ok(())
    }

    /// Sets one refcount to what was counted. `false`: it was left alone.
    fn set_refcount(&self, refcounts: &Refcounts, wrong: &Wrong, only_raise: bool) -> Result<bool> {
        if only_raise && wrong.stored > wrong.counted {
            return Ok(false);
        }
        let index = wrong.cluster / self.geometry.refcounts_per_block();
        let mut state = refcounts.lock_with_block(index)?;
        if state.block_at(index) == 0 {
            return Ok(false);
        }
        refcounts.change_in(&mut state, &(wrong.cluster..wrong.cluster + 1), |_| wrong.counted)?;
        Ok(true)
    }

    /// Writes a new refcount table and new blocks, and makes the header name them.
    fn rebuild(&self, refcounts: &Refcounts, found: &Findings) -> Result<()> {
        let g = self.geometry;
        let (size, per_block) = (g.cluster_size(), g.refcounts_per_block());
        let start = g.clusters(self.file_len()?).max(found.counts.last().map_or(0, |last| last + 1));
        let mut indices: BTreeSet<u64> = found.counts.iter().map(|(cluster, _)| cluster / per_block).collect();
        let clusters = loop {
            let entries = indices.last().map_or(0, |last| last + 1);
            let table = g.clusters(entries * 8).max(1);
            let end = start + indices.len() as u64 + table;
            let before = indices.len();
            indices.extend(start / per_block..=(end - 1) / per_block);
            if indices.len() == before {
                break table;
            }
        };
        if clusters * size > MAX_REFTABLE_BYTES {
            return Err(Error::new(Kind::NoSpace, "the refcounts cannot be built anew: the file is too long for its cluster size"));
        }
        let end = start + indices.len() as u64 + clusters;
        let fail = |at: u64| move |e| Error::io("cannot write new refcounts", e).at_offset(at);
        let mut table = vec![0u8; (clusters * size) as usize];
        let mut block = vec![0u8; size as usize];
        let mut counted = found.counts.iter().peekable();
        for (number, index) in (0..).zip(&indices) {
            block.fill(0);
            let range = index * per_block..(index + 1) * per_block;
            while let Some((cluster, count)) = counted.next_if(|(cluster, _)| *cluster < range.end) {
                refcount::set(&mut block, g.refcount_order, cluster - range.start, count);
            }
            for cluster in start.max(range.start)..end.min(range.end) {
                refcount::set(&mut block, g.refcount_order, cluster - range.start, 1);
            }
            let at = (start + number) << g.cluster_bits;
            self.file().write_all_at(&block, at).map_err(fail(at))?;
            let entry = (index * 8) as usize;
            if let Some(into) = table.get_mut(entry..entry + 8) {
                into.copy_from_slice(&at.to_be_bytes());
            }
        }
        self.writeback.wrote_data(0);
        let table_at = (start + indices.len() as u64) << g.cluster_bits;
        self.writeback.write_through(0, table_at, &table)?;
        let mut switch = [0; 12];
        switch[..8].copy_from_slice(&table_at.to_be_bytes());
        switch[8..].copy_from_slice(&u32::try_from(clusters).unwrap_or(0).to_be_bytes());
        self.writeback.write_through(0, field::REFTABLE_AT, &switch)?;
        refcounts.replaced(table_at, &table, end << g.cluster_bits);
        Ok(())
    }
}
