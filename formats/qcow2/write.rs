//! Allocating writes: which clusters may be written where they are, taking new ones, and making them visible.
//!
//! An L2 entry's COPIED flag alone is not believed: before a cluster is written in place for the first time, its refcount must be 1 and it must not
//! hold metadata. What passed is remembered with the loaded table (`verified`), so that `map` allows the next write in place at once.

use super::Qcow2;
use super::entry::{COPIED, Entry, L1_RESERVED, OFFSET, Raw};
use super::l1::{self, Slot};
use super::refcount::Refcounts;
use crate::error::{Error, Kind, Result};
use crate::format::Placement;
use crate::writeback::Freed;
use smallvec::SmallVec;
use std::sync::atomic::Ordering;

/// The most guest bytes that one placement covers, if clusters are smaller.
const MAX_PLACEMENT: u64 = 16 << 20;

/// [`Placement::token`]: the clusters are the guest's already and nothing is to be published.
const IN_PLACE: u64 = 0;
/// The clusters are new.
const NEW: u64 = 1;
/// The clusters are the guest's already, but hold nothing yet.
const SET_ASIDE: u64 = 2;

pub(super) type Raws = SmallVec<[Raw; 32]>;

impl Qcow2 {
    /// The refcounts, if the image may be changed.
    pub(super) fn changeable(&self) -> Result<&Refcounts> {
        if self.damaged.load(Ordering::Acquire) {
            return Err(Error::new(
                Kind::ReadOnly,
                "damage was found in the image, so it is not changed any more (copy what can be read, then try a check with repair)",
            ));
        }
        self.refcounts.as_ref().ok_or_else(|| Error::new(Kind::ReadOnly, "the image is open read-only"))
    }

    /// Passes a result on; damage is noted for good.
    pub(super) fn noting_damage<T>(&self, result: Result<T>) -> Result<T> {
        result.inspect_err(|error| {
            if error.kind() == Kind::Corrupt {
                self.mark_damaged(error);
            }
        })
    }

    /// See [`Format::prepare`](crate::format::Format::prepare).
    pub(super) fn prepare_write(&self, at: u64, len: u64) -> Result<Placement> {
        let refcounts = self.changeable()?;
        let g = self.geometry;
        let size = self.size();
        let end = at.checked_add(len.max(1)).filter(|_| at < size).map(|end| end.min(size));
        let end = end.ok_or_else(|| Error::new(Kind::OutOfBounds, format!("byte {at} lies beyond the end of the image ({size} bytes)")))?;
        let slot_index = l1::index(g, at);
        self.own_table(slot_index)?;
        let first = g.l2_index(at);
        let start = at - g.in_cluster(at);
        let most = (MAX_PLACEMENT >> g.cluster_bits).max(1).min(g.l2_entries() - first as u64);
        let count = g.clusters(end - start).min(most);
        let raws = self.raw_entries(slot_index, first, count as usize)?;
        let cluster = g.cluster_size();
        // Of the clusters before a given one from the first on, the parts that the write touches.
        let touched = |clusters: u64| {
            let from = at & !((1 << g.part_bits()) - 1);
            let to = end.min(start + clusters * cluster).checked_next_multiple_of(1 << g.part_bits()).unwrap_or(u64::MAX);
            (from, to - from)
        };
        let whole = |clusters: u64| (start, clusters * cluster);
        let store = g.data_store();
        let placed = |(at, len): (u64, u64), host: u64, zeroed: bool, token: u64| Placement {
            at,
            len,
            store,
            host: host + (at - start),
            zeroed,
            token,
        };
        match self.ownership(refcounts, raws.first().copied().unwrap_or_default(), start)? {
            Ownership::Data(host) => {
                let run = self.owned_run(refcounts, &raws, start, |o, i| o == Ownership::Data(host + i * cluster))?;
                self.allow_in_place(slot_index, first, run)?;
                let len = (run * cluster - g.in_cluster(at)).min(end - at);
                Ok(placed((at, len), host, false, IN_PLACE))
            }
            Ownership::SetAside(host) => {
                let run = self.owned_run(refcounts, &raws, start, |o, i| o == Ownership::SetAside(host + i * cluster))?;
                Ok(placed(touched(run), host, false, SET_ASIDE))
            }
            Ownership::Parts { host, there } => {
                // As far as it goes on as it begins, within the cluster.
                let part = |at: u64| g.parts(start, at, at + 1);
                let is_there = |at: u64| there & part(at) != 0;
                let (from, len) = touched(1);
                let to = (from..from + len).step_by(1 << g.part_bits()).find(|here| is_there(*here) != is_there(at)).unwrap_or(from + len);
                if is_there(at) {
                    self.allow_in_place(slot_index, first, 1)?;
                    Ok(placed((at, to.min(end) - at), host, false, IN_PLACE))
                } else {
                    Ok(placed((from, to - from), host, false, SET_ASIDE))
                }
            }
            Ownership::Nothing if g.data_file => {
                let run = self.owned_run(refcounts, &raws, start, |o, _| o == Ownership::Nothing)?;
                Ok(placed(touched(run), start, false, SET_ASIDE))
            }
            what @ (Ownership::Nothing | Ownership::Shared) => {
                let want = self.owned_run(refcounts, &raws, start, |o, _| o == what)?;
                let taken = self.noting_damage(refcounts.allocate(want))?;
                // What others have too is copied whole.
                let range = if what == Ownership::Nothing { touched(taken.clusters) } else { whole(taken.clusters) };
                Ok(placed(range, taken.at, taken.zeroed, NEW))
            }
        }
    }

    /// Lets the next writes to clusters that were found to be the guest's alone go there at once.
    fn allow_in_place(&self, slot_index: u64, first: usize, count: u64) -> Result<()> {
        let indices = first..first + count as usize;
        self.with_table(self.l1.slot_for(slot_index), slot_index, indices.clone(), |table| {
            indices.for_each(|i| table.set_verified(i, true));
            Ok(())
        })
    }

    /// How many entries from the first on, which does and is that of guest offset `start`, fit.
    fn owned_run(&self, refcounts: &Refcounts, raws: &[Raw], start: u64, fits: impl Fn(Ownership, u64) -> bool) -> Result<u64> {
        let mut run = 1;
        for (i, raw) in (1..).zip(raws.iter().skip(1)) {
            if !fits(self.ownership(refcounts, *raw, start + (i << self.geometry.cluster_bits))?, i) {
                break;
            }
            run += 1;
        }
        Ok(run)
    }

    /// Whether the cluster of the L2 entry for guest offset `at` is the guest's alone.
    fn ownership(&self, refcounts: &Refcounts, raw: Raw, at: u64) -> Result<Ownership> {
        // The data file is the guest's, all of it.
        let alone = |host: u64, copied: bool| -> Result<bool> {
            Ok(self.geometry.data_file || (copied && self.is_exclusive(refcounts, host, "data cluster")?))
        };
        Ok(match self.noting_damage(self.l2_entry_at(raw, at))? {
            Entry::Data { host, copied } if alone(host, copied)? => Ownership::Data(host),
            Entry::Zero { host: Some(host), copied } if alone(host, copied)? => Ownership::SetAside(host),
            Entry::Parts { host: Some(host), copied, there, .. } if alone(host, copied)? => Ownership::Parts { host, there },
            Entry::Unallocated | Entry::Zero { host: None, .. } | Entry::Parts { host: None, .. } => Ownership::Nothing,
            _ => Ownership::Shared,
        })
    }

    /// Whether a cluster has a refcount of 1 and holds nothing else.
    fn is_exclusive(&self, refcounts: &Refcounts, host: u64, what: &str) -> Result<bool> {
        if let Some(other) = refcounts.metadata.what(host) {
            return Err(self.damage(format!("a {what} lies where the {other} is"), host));
        }
        match self.noting_damage(refcounts.count(host))? {
            0 => Err(self.damage(format!("a {what} that is in use counts as free"), host)),
            count => Ok(count == 1),
        }
    }

    /// Sees to it that an L1 entry has an L2 table that may be changed where it is: makes one, or copies one that a snapshot shares.
    pub(super) fn own_table(&self, slot_index: u64) -> Result<()> {
        let refcounts = self.changeable()?;
        let slot = self.l1.slot_for(slot_index);
        if Self::is_owned(slot) {
            return Ok(());
        }
        // One at a time for an entry; the lock is not the slot's, so that readers go on.
        let _one = self.table_locks[slot_index as usize % self.table_locks.len()].lock();
        if Self::is_owned(slot) {
            return Ok(());
        }
        let raw = slot.entry();
        if raw & OFFSET == 0 {
            if raw & L1_RESERVED != 0 {
                self.check_l1_entry(raw, slot_index)?;
            }
            return self.new_table(refcounts, slot, slot_index, None);
        }
        let at = self.check_l1_entry(raw, slot_index)?;
        match self.noting_damage(refcounts.count(at))? {
            1 if refcounts.metadata.is_doubled(at) => {
                Err(self.damage(format!("the L2 table of L1 entry {slot_index} lies where other metadata is"), at))
            }
            0 => Err(self.damage(format!("the L2 table of L1 entry {slot_index} counts as free"), at)),
            1 if raw & COPIED != 0 => {
                // Hung in, so that the flag has a place; it may be thrown out again before it is used, and then this is repeated.
                self.with_table(slot, slot_index, 0..1, |table| {
                    table.owned.store(true, Ordering::Release);
                    Ok(())
                })
            }
            _ => self.new_table(refcounts, slot, slot_index, Some(at)),
        }
    }

    fn is_owned(slot: &Slot) -> bool {
        slot.table.read().as_ref().is_some_and(|t| t.owned.load(Ordering::Acquire))
    }

    /// Makes an L2 table for an entry: empty, or a copy of the one at `old`, which loses a reference.
    fn new_table(&self, refcounts: &Refcounts, slot: &Slot, slot_index: u64, old: Option<u64>) -> Result<()> {
        let size = self.geometry.cluster_size();
        let taken = self.noting_damage(refcounts.allocate(1))?;
        let mut bytes = vec![0; if old.is_none() && taken.zeroed { 8 } else { size as usize }];
        let read = old.map_or(Ok(()), |old| self.writeback.read(0, old, &mut bytes));
        if let Err(error) = read {
            refcounts.give_back(taken.at, size)?;
            return Err(error);
        }
        // Where the file is empty, its last entry makes it long enough.
        self.writeback.reserve(0, taken.at + size - bytes.len() as u64, &bytes)?;
        let raw = taken.at | COPIED;
        let table = self.l2.table(taken.at);
        table.owned.store(true, Ordering::Release);
        let was_empty = {
            let mut hung = slot.table.write();
            self.writeback.publish(0, self.l1.at() + slot_index * 8, &raw.to_be_bytes())?;
            slot.set_entry(raw);
            hung.replace(table).is_none()
        };
        if was_empty {
            self.l2.installed(&self.l1, slot_index);
        }
        refcounts.metadata.add_table(taken.at, "L2 table");
        if let Some(old) = old {
            refcounts.metadata.remove_table(old);
            self.writeback.release(Freed { store: 0, at: old, len: size });
        }
        Ok(())
    }

    /// See [`Format::commit`](crate::format::Format::commit).
    pub(super) fn commit_write(&self, placement: &Placement) -> Result<()> {
        if placement.token == IN_PLACE {
            return Ok(());
        }
        let refcounts = self.changeable()?;
        let g = self.geometry;
        let slot_index = l1::index(g, placement.at);
        let first = g.l2_index(placement.at);
        let (skip, end) = (g.in_cluster(placement.at), placement.at.saturating_add(placement.len));
        let count = g.clusters(skip + placement.len) as usize;
        let new = |i: usize, old: Raw| {
            let ahead = (i as u64) << g.cluster_bits;
            old.with_data(g, placement.host - skip + ahead, g.parts(placement.at - skip + ahead, placement.at, end))
        };
        let old = self.replace(slot_index, first, count, new, true);
        match old {
            Ok(old) if placement.token == NEW => self.release_clusters(&old),
            Ok(_) => {}
            Err(error) => {
                if placement.token == NEW {
                    refcounts.give_back(placement.host - skip, skip + placement.len)?;
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// See [`Format::cancel`](crate::format::Format::cancel).
    pub(super) fn cancel_write(&self, placement: &Placement) {
        let Some(refcounts) = self.refcounts.as_ref().filter(|_| placement.token == NEW) else { return };
        let skip = self.geometry.in_cluster(placement.at);
        if let Err(error) = refcounts.give_back(placement.host - skip, skip + placement.len) {
            tracing::warn!(error = %error.chain(), host = placement.host, "clusters of a write that failed stay allocated");
        }
    }

    /// Replaces `count` entries of an owned table, all or none; returns the old ones. `new` gets the index from `first` on and the old entry. `verified`: what
    /// the new ones point to is the guest's alone.
    pub(super) fn replace(
        &self,
        slot_index: u64,
        first: usize,
        count: usize,
        new: impl Fn(usize, Raw) -> Raw,
        verified: bool,
    ) -> Result<Raws> {
        let slot = self.l1.slot_for(slot_index);
        self.with_table(slot, slot_index, first..first + count, |table| {
            let old: Raws = (first..first + count).map(|i| table.entry(i).unwrap_or_default()).collect();
            let changed: Raws = old.iter().enumerate().map(|(i, raw)| new(i, *raw)).collect();
            if changed == old {
                return Ok(Raws::new());
            }
            let mut bytes = SmallVec::new();
            changed.iter().for_each(|raw| raw.encode(self.geometry, &mut bytes));
            self.writeback.publish(0, table.place(first), &bytes)?;
            for (i, raw) in changed.iter().enumerate() {
                table.set_entry(first + i, *raw);
                table.set_verified(first + i, verified);
            }
            Ok(old)
        })
    }

    /// Gives up the references of entries that were replaced.
    pub(super) fn release_clusters(&self, old: &[Raw]) {
        let mut run: Option<(u64, u64)> = None;
        let release = |run: Option<(u64, u64)>| {
            if let Some((at, len)) = run {
                self.writeback.release(Freed { store: 0, at, len });
            }
        };
        for raw in old {
            // An impossible entry refers to nothing that could be freed.
            let Some((at, len)) = self.geometry.l2_entry(*raw).ok().and_then(|e| e.clusters(self.geometry)) else { continue };
            match &mut run {
                Some((start, so_far)) if *start + *so_far == at => *so_far += len,
                _ => release(run.replace((at, len))),
            }
        }
        release(run);
    }

    /// See [`Format::reclaim`](crate::format::Format::reclaim).
    pub(super) fn reclaim_clusters(&self, freed: &[Freed]) -> Result<()> {
        let Some(refcounts) = &self.refcounts else { return Ok(()) };
        for Freed { at, len, .. } in freed {
            let (free, missing) = refcounts.lower(*at, *len)?;
            let bits = self.geometry.cluster_bits;
            for run in &free {
                // Before anybody may write there. That it cannot be done costs space, nothing else.
                let _ = self.file().punch(run.start << bits, (run.end - run.start) << bits);
            }
            refcounts.unhold(&free);
            if missing > 0 {
                // Not an error of whoever flushes: his data are safe.
                self.damage(format!("{missing} clusters that were in use counted as free"), *at);
            }
        }
        Ok(())
    }
}

/// Whether the guest may write to the cluster of an entry.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ownership {
    /// In place, at this host offset.
    Data(u64),
    /// Once it is said that it holds data.
    SetAside(u64),
    /// In place where subclusters are there, at this host offset; where they are not, once it is said that they are.
    Parts { host: u64, there: u32 },
    /// No: there is no cluster yet.
    Nothing,
    /// No: others have it too, or it is compressed.
    Shared,
}
