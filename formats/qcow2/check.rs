//! Looking for damage: every reference to a cluster is counted and compared with its refcount. Findings are counted as `qemu-img check` counts them.
//! What is done about them is in `repair`.

use super::bitmaps;
use super::counts::Counts;
use super::entry::{COMPRESSED, COPIED, Entry, L1_RESERVED, L2_RESERVED, OFFSET, REFTABLE_OFFSET, Raw, ZERO};
use super::header::{AUTOCLEAR_BITMAPS, be64};
use super::refcount::{self, Refcounts};
use super::{Qcow2, open};
use crate::error::Result;
use crate::format::CheckReport;
use std::collections::{BTreeMap, BTreeSet};

/// Bytes of tables that are read at once.
const STEP: usize = 1 << 20;

/// A refcount that differs from the references.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wrong {
    pub cluster: u64,
    pub stored: u64,
    pub counted: u64,
}

/// What a look at an image found.
#[derive(Default)]
pub(super) struct Findings {
    pub report: CheckReport,
    /// References, but for those of the refcount structures.
    pub counts: Counts,
    /// All references.
    pub all: Counts,
    /// References to and by metadata: clusters of these are not to be the guest's.
    pub metadata: Counts,
    /// Those of them that nothing shares: L2 tables belong to several snapshots.
    single: Counts,
    /// Clusters whose double use is reported already.
    doubled: BTreeSet<u64>,
    pub wrong: Vec<Wrong>,
    /// The refcount structures themselves are damaged, or lack what is in use.
    pub rebuild: bool,
    /// Not all references could be counted: refcounts must not be lowered.
    pub incomplete: bool,
    /// L2 tables by host offset, and how many entries of L1 tables name each.
    tables: BTreeMap<u64, u64>,
    /// References to L2 tables and whole clusters of data by the active state alone; and to those that hold compressed ones.
    active: Counts,
    pub packed: Counts,
    file_len: u64,
}

impl Qcow2 {
    /// Counts and compares. Nothing is changed.
    pub(super) fn examine(&self, refcounts: &Refcounts) -> Result<Findings> {
        let g = self.geometry;
        let mut found = Findings { file_len: self.file_len()?, ..Findings::default() };
        self.count_metadata(&mut found, 0, g.cluster_size(), "header");
        self.count_metadata(&mut found, self.l1.at(), self.l1.entries() * 8, "L1 table");
        for index in self.l1.not_zero() {
            let raw = self.l1.slot(index).map_or(0, super::l1::Slot::entry);
            self.count_l1_entry(&mut found, raw);
        }
        let active: BTreeSet<u64> = found.tables.keys().copied().collect();
        for (at, times) in &found.tables {
            found.active.add(at >> g.cluster_bits, *times);
        }
        self.count_snapshots(&mut found)?;
        for (at, times) in std::mem::take(&mut found.tables) {
            self.count_l2_table(&mut found, at, times, active.contains(&at))?;
        }
        self.look_for_misplaced_data(&mut found)?;
        self.count_bitmaps(&mut found)?;
        found.all = found.counts.clone();
        self.count_refcount_structures(&mut found, refcounts);
        let all = std::mem::take(&mut found.all);
        self.compare(&mut found, &all, refcounts)?;
        found.all = all;
        self.look_for_double_use(&mut found, refcounts)?;
        Ok(found)
    }

    /// Counts a reference from something to a run of bytes of metadata.
    fn count_metadata(&self, found: &mut Findings, at: u64, len: u64, what: &str) {
        if self.count(found, at, len, 1, what) {
            for index in at >> self.geometry.cluster_bits..self.geometry.clusters(at.saturating_add(len)) {
                found.metadata.add(index, 1);
                found.single.add(index, 1);
            }
        }
    }

    /// Clusters with two uses, where the refcount does not tell already. Of one that holds metadata as well, what is written as one destroys the other. The
    /// active state shares its clusters with snapshots, but none with itself: COPIED flags become wrong when it lets go of one.
    fn look_for_double_use(&self, found: &mut Findings, refcounts: &Refcounts) -> Result<()> {
        let mut doubled = BTreeMap::new();
        for (cluster, metadata) in found.metadata.iter() {
            let single = found.single.get(cluster);
            if found.all.get(cluster) > metadata {
                doubled.insert(cluster, "metadata and data of the guest at once");
            } else if single > 1 || (single > 0 && metadata > single) {
                doubled.insert(cluster, "metadata of two kinds");
            }
        }
        for (cluster, times) in found.active.iter() {
            if times > 1 || found.packed.get(cluster) > 0 {
                doubled.entry(cluster).or_insert("what two entries of the active state name");
            }
        }
        for (cluster, what) in doubled.into_iter().filter(|(cluster, _)| !found.doubled.contains(cluster)).collect::<Vec<_>>() {
            if refcounts.count(cluster << self.geometry.cluster_bits).is_ok_and(|stored| stored >= found.all.get(cluster)) {
                found.report.corruption(format!("cluster {cluster} holds {what}"));
            }
        }
        Ok(())
    }

    /// Counts references from something to a run of bytes. `false`: they are not in the file.
    fn count(&self, found: &mut Findings, at: u64, len: u64, times: u64, what: &str) -> bool {
        let cluster = self.geometry.cluster_size();
        let end = at.saturating_add(len);
        if end > found.file_len && end - found.file_len >= cluster {
            found.report.corruption(format!("{what}: {len} bytes at {at:#x} lie beyond the end of the file"));
            return false;
        }
        for index in at >> self.geometry.cluster_bits..self.geometry.clusters(end) {
            found.counts.add(index, times);
        }
        true
    }

    fn count_l1_entry(&self, found: &mut Findings, raw: u64) {
        let at = raw & OFFSET;
        if raw & L1_RESERVED != 0 {
            found.report.corruption(format!("an L1 entry has reserved bits set: {raw:#018x}"));
        }
        if at == 0 {
            return;
        }
        if self.count(found, at, self.geometry.cluster_size(), 1, "L2 table") {
            found.metadata.add(at >> self.geometry.cluster_bits, 1);
        }
        if !self.geometry.aligned(at) {
            found.report.corruption(format!("an L1 entry points between clusters: {raw:#018x}"));
        } else if at < found.file_len {
            *found.tables.entry(at).or_default() += 1;
        }
    }

    fn count_snapshots(&self, found: &mut Findings) -> Result<()> {
        let mut total = 0u64;
        for snapshot in &self.snapshots {
            let len = u64::from(snapshot.l1_entries) * 8;
            let name = &snapshot.name;
            if !open::l1_is_possible(self.geometry, snapshot.l1_at, u64::from(snapshot.l1_entries)) {
                found.report.corruption(format!("the snapshot {name:?} has an impossible L1 table"));
                found.incomplete = true;
                continue;
            }
            // Tables that do not overlap are not longer together than the file.
            total += len;
            if total > found.file_len {
                found.report.corruption(format!("the L1 tables of the snapshots up to {name:?} are longer than the file"));
                found.incomplete = true;
                break;
            }
            self.count_metadata(found, snapshot.l1_at, len, "L1 table of a snapshot");
            self.each_entry(snapshot.l1_at, len, |_, raw| self.count_l1_entry(found, raw))?;
        }
        if self.header.snapshots > 0 {
            self.count_metadata(found, self.header.snapshots_at, self.snapshots_len, "snapshot table");
        }
        Ok(())
    }

    /// Calls `with` with each number of a table and its index.
    pub(super) fn each_entry(&self, at: u64, len: u64, mut with: impl FnMut(u64, u64)) -> Result<()> {
        let mut done = 0;
        let mut buf = Vec::new();
        while done < len {
            buf.resize(usize::try_from(len - done).unwrap_or(STEP).min(STEP), 0);
            self.writeback.read(0, at + done, &mut buf)?;
            buf.chunks_exact(8).zip(done / 8..).for_each(|(raw, index)| with(index, be64(raw, 0)));
            done += buf.len() as u64;
        }
        Ok(())
    }

    fn count_l2_table(&self, found: &mut Findings, at: u64, times: u64, active: bool) -> Result<()> {
        let g = self.geometry;
        self.each_l2_entry(at, |index, raw| {
            // Most of a large table.
            if raw == Raw::default() {
                return;
            }
            let place = at + index * g.entry_size();
            let mut entry = raw.entry;
            if entry & COMPRESSED != 0 {
                if entry & COPIED != 0 {
                    found.report.corruption(format!("a compressed cluster has the COPIED flag: {entry:#018x} at {place:#x}"));
                }
            } else {
                let zero = if g.version < 3 || g.extended { ZERO } else { 0 };
                if entry & L2_RESERVED != 0 || (g.extended && entry & ZERO != 0) {
                    found.report.corruption(format!("an L2 entry has reserved bits set: {entry:#018x} at {place:#x}"));
                } else if entry & zero != 0 {
                    found
                        .report
                        .corruption(format!("an L2 entry has the zero flag, which version 2 does not know: {entry:#018x} at {place:#x}"));
                }
                if !g.aligned(entry & OFFSET) {
                    found.report.corruption(format!("an L2 entry points between clusters: {entry:#018x} at {place:#x}"));
                    return;
                }
                entry &= !L2_RESERVED & !zero;
            }
            // Reserved bits and impossible bitmaps are reported; what the entry refers to is in use all the same.
            let entry = match g.l2_entry(Raw { entry, ..raw }) {
                Ok(entry) => entry,
                Err(error) => {
                    found.report.corruption(format!("{error}, at {place:#x}"));
                    let Ok(entry) = g.l2_entry(Raw { entry, bitmap: 0 }) else { return };
                    entry
                }
            };
            if g.data_file {
                found.report.allocated_units += u64::from(entry.host().is_some());
            }
            if let Some((start, len)) = entry.clusters(self.geometry) {
                // Shared tables are examined once; each cluster is in use as often as its table.
                let compressed = matches!(entry, Entry::Compressed { .. });
                found.report.allocated_units += 1;
                found.report.encoded_units += u64::from(compressed);
                // The last sector of a compressed cluster may be cut off by the end of the file.
                let len = match entry {
                    Entry::Compressed { host, len } => host + len - start,
                    _ => len,
                };
                // Only what is in the file: other entries could name any number of places.
                if self.count(found, start, len, times, "data cluster") && active {
                    let of_kind = if compressed { &mut found.packed } else { &mut found.active };
                    (start >> self.geometry.cluster_bits..self.geometry.clusters(start + len)).for_each(|index| of_kind.add(index, 1));
                }
            }
        })
    }

    /// Looks for data that are said to be elsewhere in the data file than where they can be.
    fn look_for_misplaced_data(&self, found: &mut Findings) -> Result<()> {
        let g = self.geometry;
        for index in self.l1.used().filter(|_| g.data_file) {
            let table_at = self.l1.slot(index).map_or(0, super::l1::Slot::table_at);
            if !g.aligned(table_at) || table_at >= found.file_len {
                continue;
            }
            self.each_l2_entry(table_at, |number, raw| {
                let guest = (index << g.table_bits()) + (number << g.cluster_bits);
                // What the entry itself is accused of is known already.
                if g.l2_entry(raw).is_ok()
                    && let Err(error) = self.l2_entry_at(raw, guest)
                {
                    found.report.corruption(error.to_string());
                }
            })?;
        }
        Ok(())
    }

    /// Calls `with` with each entry of an L2 table and its index.
    pub(super) fn each_l2_entry(&self, table_at: u64, mut with: impl FnMut(u64, Raw)) -> Result<()> {
        if !self.geometry.extended {
            return self.each_entry(table_at, self.geometry.cluster_size(), |index, entry| with(index, Raw { entry, bitmap: 0 }));
        }
        let mut entry = 0;
        self.each_entry(table_at, self.geometry.cluster_size(), |index, half| match index % 2 {
            0 => entry = half,
            _ => with(index / 2, Raw { entry, bitmap: half }),
        })
    }

    fn count_bitmaps(&self, found: &mut Findings) -> Result<()> {
        let Some(at) = self.header.bitmaps.filter(|_| *self.autoclear.lock() & AUTOCLEAR_BITMAPS != 0) else { return Ok(()) };
        let list = match bitmaps::read(&self.writeback, at, found.file_len) {
            Ok((_, list)) => list,
            Err(error) => {
                found.report.corruption(error.to_string());
                found.incomplete = true;
                return Ok(());
            }
        };
        self.count_metadata(found, at.at, at.size, "list of bitmaps");
        let mut total = 0u64;
        for bitmap in &list {
            let len = u64::from(bitmap.table_entries) * 8;
            total += len;
            if !self.geometry.aligned(bitmap.table_at) || total > found.file_len {
                found.report.corruption(format!("the bitmap {:?} has an impossible table", bitmap.name));
                found.incomplete = true;
                continue;
            }
            self.count_metadata(found, bitmap.table_at, len, "table of a bitmap");
            self.each_entry(bitmap.table_at, len, |_, raw| {
                if raw & OFFSET != 0 {
                    self.count_metadata(found, raw & OFFSET, self.geometry.cluster_size(), "bitmap");
                }
            })?;
        }
        Ok(())
    }

    fn count_refcount_structures(&self, found: &mut Findings, refcounts: &Refcounts) {
        let g = self.geometry;
        let state = refcounts.lock();
        let table_clusters = state.table_at >> g.cluster_bits..g.clusters(state.table_at.saturating_add(state.table.len() as u64 * 8));
        let add = |found: &mut Findings, cluster: u64| {
            found.all.add(cluster, 1);
            found.metadata.add(cluster, 1);
            found.single.add(cluster, 1);
        };
        table_clusters.for_each(|cluster| add(found, cluster));
        for (index, raw) in state.table.iter().enumerate() {
            let at = raw & REFTABLE_OFFSET;
            let bad = |found: &mut Findings, why: &str| {
                found.report.corruption(format!("refcount block {index} {why}: {raw:#018x}"));
                found.rebuild = true;
            };
            if raw & !REFTABLE_OFFSET != 0 {
                bad(found, "has reserved bits set");
            } else if !g.aligned(at) {
                bad(found, "lies between clusters");
            } else if at != 0 && g.clusters(found.file_len) <= at >> g.cluster_bits {
                bad(found, "lies beyond the end of the file");
            } else if at != 0 {
                add(found, at >> g.cluster_bits);
                if found.all.get(at >> g.cluster_bits) != 1 {
                    found.doubled.insert(at >> g.cluster_bits);
                    bad(found, "shares its cluster");
                }
            }
        }
    }

    /// Compares refcounts and references of all clusters up to the end of the file, and beyond it of those that are referred to.
    fn compare(&self, found: &mut Findings, all: &Counts, refcounts: &Refcounts) -> Result<()> {
        let g = self.geometry;
        let end = g.clusters(found.file_len);
        let per_block = g.refcounts_per_block();
        let blocks = refcounts.lock().table.len() as u64;
        let mut counted = all.iter().take_while(|(cluster, _)| *cluster < end).peekable();
        let mut buf = vec![0; g.cluster_size() as usize];
        for index in 0..end.div_ceil(per_block).min(blocks) {
            let at = refcounts.lock().block_at(index);
            let range = index * per_block..((index + 1) * per_block).min(end);
            if at == 0 || !g.aligned(at) || at >= found.file_len {
                // All of its refcounts are 0.
                while let Some((cluster, counted)) = counted.next_if(|(cluster, _)| *cluster < range.end) {
                    differs(found, Wrong { cluster, stored: 0, counted });
                }
                continue;
            }
            self.writeback.read(0, at, &mut buf)?;
            for cluster in range.clone() {
                let stored = refcount::get(&buf, g.refcount_order, cluster - range.start);
                let counted = counted.next_if(|(c, _)| *c == cluster).map_or(0, |(_, n)| n);
                if stored != counted {
                    differs(found, Wrong { cluster, stored, counted });
                }
            }
        }
        counted.for_each(|(cluster, counted)| differs(found, Wrong { cluster, stored: 0, counted }));
        // What is in use just beyond the end (a compressed cluster that claims more than there is) would be handed out when the file grows.
        for (cluster, counted) in all.iter().skip_while(|(cluster, _)| *cluster < end) {
            let stored = refcounts.count(cluster << g.cluster_bits)?;
            if stored < counted {
                differs(found, Wrong { cluster, stored, counted });
            }
        }
        Ok(())
    }

    /// Calls `wrong` for each COPIED flag of the active state that does not agree with its cluster's refcount: offset of the entry, and what it should be;
    /// the second argument is the L1 index, the third the index in its L2 table if it is an L2 entry.
    pub(super) fn each_wrong_flag(
        &self,
        refcounts: &Refcounts,
        mut wrong: impl FnMut(u64, u64, Option<u64>, u64) -> Result<()>,
    ) -> Result<()> {
        let g = self.geometry;
        let right = |raw: u64, at: u64| -> u64 {
            // A count that cannot be found out is reported elsewhere.
            let alone = refcounts.count(at).is_ok_and(|count| count == 1);
            if alone { raw | COPIED } else { raw & !COPIED }
        };
        let file_len = self.file_len()?;
        let mut raws = Vec::new();
        for index in self.l1.used() {
            let raw = self.l1.slot(index).map_or(0, super::l1::Slot::entry);
            let at = raw & OFFSET;
            if !g.aligned(at) {
                continue;
            }
            let flagged = right(raw, at);
            if flagged != raw {
                wrong(self.l1.at() + index * 8, index, None, flagged)?;
            }
            if at >= file_len {
                continue;
            }
            raws.clear();
            self.each_l2_entry(at, |number, raw| {
                if raw.entry != 0 && !g.data_file {
                    raws.push((number, raw.entry));
                }
            })?;
            for (number, raw) in &raws {
                let host = raw & OFFSET;
                if raw & COMPRESSED != 0 || host == 0 || !g.aligned(host) {
                    continue;
                }
                let flagged = right(*raw, host);
                if flagged != *raw {
                    wrong(at + number * g.entry_size(), index, Some(*number), flagged)?;
                }
            }
        }
        Ok(())
    }
}

fn differs(found: &mut Findings, wrong: Wrong) {
    let Wrong { cluster, stored, counted } = wrong;
    let text = format!("cluster {cluster}: refcount {stored}, references {counted}");
    if stored < counted {
        found.rebuild |= stored == 0;
        found.report.corruption(format!("error: {text}"));
    } else {
        found.report.leak(format!("leaked: {text}"));
    }
    found.wrong.push(wrong);
}
