//! Zeroing and discarding whole clusters by changing their entries alone.

use super::Qcow2;
use super::entry::{Entry, Raw};
use super::l1;
use super::l2::SLICE;
use super::write::Raws;
use crate::error::{Error, Result};

/// What becomes of the space of clusters that are cleared.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Space {
    /// Clusters stay set aside under the zero flag.
    Keep,
    /// Clusters are given back.
    Free,
}

impl Qcow2 {
    /// Makes whole clusters from `at` on read as zeros; returns how many bytes, 0 when the format has no way to say it.
    pub(super) fn clear(&self, at: u64, len: u64, space: Space) -> Result<u64> {
        self.changeable()?;
        let g = self.geometry;
        let has_parent = self.header.backing.is_some();
        // Version 2 has no zero flag: only where nothing shows through can entries say zero.
        if g.version < 3 && (has_parent || space == Space::Keep) {
            return Ok(0);
        }
        let len = len.min(self.size().saturating_sub(at));
        if self.raw_data_file() {
            return Ok(if self.clear_data_file(at, len, space)? { len } else { 0 });
        }
        let slot_index = l1::index(g, at);
        let table_end = (slot_index + 1).checked_shl(g.table_bits()).unwrap_or(u64::MAX);
        if !has_parent && self.l1.slot(slot_index).is_none_or(|s| s.table_at() == 0) {
            // Nothing here, and nothing below.
            let last = l1::index(g, (at + len).saturating_sub(1)) + 1;
            let next = self.l1.next_used(slot_index, last);
            return Ok(if next == last { len } else { ((next << g.table_bits()) - at).min(len) });
        }
        self.own_table(slot_index)?;
        let len = len.min(table_end - at);
        let (first, end) = (g.l2_index(at), g.l2_index(at) + g.clusters(len) as usize);
        let mut here = first;
        while here < end {
            let count = (end - here).min(SLICE);
            let raws = self.raw_entries(slot_index, here, count)?;
            // All entries are looked at before the first is changed.
            (here..).zip(&raws).try_for_each(|(i, raw)| {
                let guest = at + ((i - first) as u64) * g.cluster_size();
                self.noting_damage(self.l2_entry_at(*raw, guest)).map(drop)
            })?;
            if g.data_file && space == Space::Free {
                // First, since a cluster that is not in use any more may be taken at once, in the same place. That it cannot be done costs space.
                let start = at + ((here - first) as u64) * g.cluster_size();
                let _ = self.clear_data_file(start, (count as u64 * g.cluster_size()).min(at + len - start), space);
            }
            let old = self.replace(slot_index, here, count, |_, raw| self.cleared(raw, space, has_parent), false)?;
            let freed: Raws = old.into_iter().filter(|raw| self.gives_up(*raw, space)).collect();
            self.release_clusters(&freed);
            here += count;
        }
        Ok(len)
    }

    /// Makes a range of the data file read as zeros without writing them. `false`: the host cannot.
    fn clear_data_file(&self, at: u64, len: u64, space: Space) -> Result<bool> {
        let store = self.guest_file();
        let fail = |e| Error::io("cannot zero a range of the data file", e).at_offset(at);
        // What is beyond its end reads as zeros.
        let inside = store.len().map_err(fail)?.saturating_sub(at).min(len);
        let done =
            inside == 0 || (space == Space::Free && store.punch(at, inside).map_err(fail)?) || store.zero(at, inside).map_err(fail)?;
        self.writeback.wrote_data(self.geometry.data_store());
        Ok(done)
    }

    /// The entry that reads as zeros in place of `raw`.
    fn cleared(&self, raw: Raw, space: Space, has_parent: bool) -> Raw {
        let nothing = if has_parent { Raw::zeros(self.geometry) } else { Raw::default() };
        match (self.geometry.l2_entry(raw), space) {
            (Ok(Entry::Zero { host: None, .. }), _) | (Ok(Entry::Zero { .. }), Space::Keep) => raw,
            (Ok(Entry::Data { .. } | Entry::Parts { host: Some(_), .. }), Space::Keep) => raw.zeroed(self.geometry),
            // There is no unallocated entry without a parent that does not read as zeros.
            _ => nothing,
        }
    }

    /// Whether clearing `raw` gives up its clusters.
    fn gives_up(&self, raw: Raw, space: Space) -> bool {
        match self.geometry.l2_entry(raw) {
            Ok(Entry::Compressed { .. }) => true,
            Ok(entry) => entry.host().is_some() && space == Space::Free,
            Err(_) => false,
        }
    }
}
