//! Zeroing and discarding whole clusters by changing their entries alone.

use super::Qcow2;
use super::entry::{Entry, ZERO};
use super::l1;
use super::l2::SLICE;
use crate::error::Result;

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
            raws.iter().try_for_each(|raw| self.noting_damage(g.l2_entry(*raw)).map(drop))?;
            let old = self.replace(slot_index, here, count, |_, raw| self.cleared(raw, space, has_parent), false)?;
            let freed: Vec<u64> = old.into_iter().filter(|raw| self.gives_up(*raw, space)).collect();
            self.release_clusters(&freed);
            here += count;
        }
        Ok(len)
    }

    /// The entry that reads as zeros in place of `raw`.
    fn cleared(&self, raw: u64, space: Space, has_parent: bool) -> u64 {
        let nothing = if has_parent { ZERO } else { 0 };
        match (self.geometry.l2_entry(raw), space) {
            (Ok(Entry::Zero { host: None, .. }), _) | (Ok(Entry::Zero { .. }), Space::Keep) => raw,
            (Ok(Entry::Data { .. }), Space::Keep) => raw | ZERO,
            // There is no unallocated entry without a parent that does not read as zeros.
            (Ok(Entry::Unallocated), _) => nothing,
            _ => nothing,
        }
    }

    /// Whether clearing `raw` gives up its clusters.
    fn gives_up(&self, raw: u64, space: Space) -> bool {
        match self.geometry.l2_entry(raw) {
            Ok(Entry::Compressed { .. }) => true,
            Ok(Entry::Data { .. } | Entry::Zero { host: Some(_), .. }) => space == Space::Free,
            _ => false,
        }
    }
}
