//! Taking free clusters, and making room for their refcounts.
//!
//! A cluster is taken by raising its refcount from 0 to 1 under the lock of [`Refcounts`]. A new refcount block counts itself and is durable before the
//! refcount table names it; a longer refcount table is durable with the blocks that count it before the header names it. So whatever a power
//! cut leaves is a whole structure.

use super::entry::MAX_REFTABLE_BYTES;
use super::header::field;
use super::refcount::{self, Refcounts, State};
use crate::error::{Error, Kind, Result};
use crate::writeback::Freed;
use std::ops::Range;

/// Host offsets end here.
const MAX_HOST: u64 = 1 << 56;

/// A run of clusters that has been taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    /// Host offset in bytes.
    pub at: u64,
    /// How many.
    pub clusters: u64,
    /// The file reads as zeros there.
    pub zeroed: bool,
}

fn full() -> Error {
    Error::new(Kind::NoSpace, "the image file has reached the largest size that its format allows")
}

impl Refcounts {
    /// Takes up to `want` contiguous clusters, at least one.
    pub fn allocate(&self, want: u64) -> Result<Taken> {
        let (order, per_block, bits) = (self.geometry.refcount_order, self.geometry.refcounts_per_block(), self.geometry.cluster_bits);
        loop {
            let index = self.lock().cursor / per_block;
            let mut state = self.lock_with_block(index)?;
            if state.cursor / per_block != index {
                continue;
            }
            if state.block_at(index) == 0 {
                let from = state.cursor;
                self.add_block(&mut state, from)?;
                continue;
            }
            let Some(run) = find(&mut state, order, per_block, want.max(1)) else {
                state.cursor = (index + 1) * per_block;
                continue;
            };
            if run.end > MAX_HOST >> bits {
                return Err(full());
            }
            let clear = run.clone().take_while(|c| self.metadata.what(c << bits).is_none()).count() as u64;
            if clear == 0 {
                return Err(self.overlap(run.start << bits));
            }
            let run = run.start..run.start + clear;
            self.change_in(&mut state, &run, |_| 1)?;
            state.cursor = run.end;
            return Ok(self.taken(&mut state, &run));
        }
    }

    /// Takes exactly `count` contiguous clusters, from the end of the file on. Slow; for tables.
    pub fn allocate_contiguous(&self, count: u64) -> Result<Taken> {
        let (order, per_block, bits) = (self.geometry.refcount_order, self.geometry.refcounts_per_block(), self.geometry.cluster_bits);
        let mut run = {
            let start = self.lock().fresh >> bits;
            start..start
        };
        while run.end - run.start < count {
            let index = run.end / per_block;
            if run.end >= MAX_HOST >> bits {
                return Err(full());
            }
            let mut state = self.lock_with_block(index)?;
            if state.block_at(index) == 0 {
                self.add_block(&mut state, run.end)?;
            }
            let free = state.blocks.get(&index).is_some_and(|b| refcount::get(b, order, run.end % per_block) == 0);
            let held = state.held.iter().any(|h| h.contains(&run.end));
            drop(state);
            run.end += 1;
            if !free || held || self.metadata.what((run.end - 1) << bits).is_some() {
                run.start = run.end;
            }
        }
        let mut here = run.start;
        while here < run.end {
            let upto = run.end.min((here / per_block + 1) * per_block);
            let mut state = self.lock_with_block(here / per_block)?;
            self.change_in(&mut state, &(here..upto), |count| count + 1)?;
            here = upto;
        }
        Ok(self.taken(&mut self.lock(), &run))
    }

    fn taken(&self, state: &mut State, run: &Range<u64>) -> Taken {
        let bits = self.geometry.cluster_bits;
        let zeroed = run.start << bits >= state.fresh;
        state.fresh = state.fresh.max(run.end << bits);
        Taken { at: run.start << bits, clusters: run.end - run.start, zeroed }
    }

    fn overlap(&self, at: u64) -> Error {
        let what = self.metadata.what(at).unwrap_or("metadata");
        Error::corrupt(format!("the refcounts call a cluster free that holds the {what}")).at_offset(at)
    }

    /// Makes the block that counts cluster `from`, in that cluster.
    fn add_block(&self, state: &mut State, from: u64) -> Result<()> {
        let (order, per_block, bits) = (self.geometry.refcount_order, self.geometry.refcounts_per_block(), self.geometry.cluster_bits);
        let index = from / per_block;
        if index >= state.table.len() as u64 {
            return self.grow_table(state, index);
        }
        let at = from << bits;
        if at >= MAX_HOST {
            return Err(full());
        }
        if self.metadata.what(at).is_some() {
            return Err(self.overlap(at));
        }
        let mut block = vec![0; self.geometry.cluster_size() as usize].into_boxed_slice();
        refcount::set(&mut block, order, from % per_block, 1);
        self.writeback.write_through(0, at, &block)?;
        let entry = state.table_at + index * 8;
        self.writeback.reserve(0, entry, &at.to_be_bytes())?;
        if let Some(raw) = usize::try_from(index).ok().and_then(|i| state.table.get_mut(i)) {
            *raw = at;
        }
        self.metadata.add_table(at, "refcount block");
        state.insert_block(index, block);
        state.fresh = state.fresh.max(at + self.geometry.cluster_size());
        Ok(())
    }

    /// Makes the refcount table longer, so that it has room for block `index` at least. The new table and the blocks that count it begin where
    /// the old table's reach ends.
    fn grow_table(&self, state: &mut State, index: u64) -> Result<()> {
        let (g, order) = (self.geometry, self.geometry.refcount_order);
        let (per_block, size) = (g.refcounts_per_block(), g.cluster_size());
        let old_entries = state.table.len() as u64;
        let old_clusters = g.clusters(old_entries * 8);
        let most = MAX_REFTABLE_BYTES >> g.cluster_bits;
        let start = old_entries * per_block;
        let mut clusters = (old_clusters + old_clusters / 2 + 1).max(g.clusters((index + 1) * 8)).min(most);
        let mut blocks = 1;
        while blocks * per_block < blocks + clusters {
            blocks += 1;
        }
        if old_entries + blocks > clusters * size / 8 {
            clusters = g.clusters((old_entries + blocks + 1) * 8);
        }
        let len = blocks + clusters;
        let fits = blocks * per_block >= len && old_entries + blocks <= clusters * size / 8 && index < clusters * size / 8;
        if clusters > most || !fits || (start + len) << g.cluster_bits >= MAX_HOST {
            return Err(full());
        }
        let at = start << g.cluster_bits;
        if let Some(taken) = (start..start + len).map(|c| c << g.cluster_bits).find(|at| self.metadata.what(*at).is_some()) {
            return Err(self.overlap(taken));
        }
        let mut bytes = vec![0; (len * size) as usize];
        let (counts, entries) = bytes.split_at_mut((blocks * size) as usize);
        // The blocks lie one behind the other, and so do their counts.
        let per_slice = size as usize;
        for (number, block) in counts.chunks_exact_mut(per_slice).enumerate() {
            let first = number as u64 * per_block;
            (first..len.min(first + per_block)).for_each(|i| refcount::set(block, order, i - first, 1));
        }
        let mut table = state.table.clone();
        table.extend((0..blocks).map(|b| at + b * size));
        table.resize((clusters * size / 8) as usize, 0);
        for (into, raw) in entries.chunks_exact_mut(8).zip(&table) {
            into.copy_from_slice(&raw.to_be_bytes());
        }
        self.writeback.write_through(0, at, &bytes)?;
        let table_at = at + blocks * size;
        let mut switch = [0; 12];
        switch[..8].copy_from_slice(&table_at.to_be_bytes());
        switch[8..].copy_from_slice(&u32::try_from(clusters).unwrap_or(0).to_be_bytes());
        self.writeback.write_through(0, field::REFTABLE_AT, &switch)?;
        let old_at = std::mem::replace(&mut state.table_at, table_at);
        state.table = table;
        self.metadata.add_run(table_at, clusters * size, "refcount table");
        self.metadata.remove_run(old_at);
        (0..blocks).for_each(|b| self.metadata.add_table(at + b * size, "refcount block"));
        state.fresh = state.fresh.max((start + len) << g.cluster_bits);
        self.writeback.release(Freed { store: 0, at: old_at, len: old_clusters * size });
        Ok(())
    }
}

/// The first run of at most `want` free clusters in the cursor's block.
fn find(state: &mut State, order: u32, per_block: u64, want: u64) -> Option<Range<u64>> {
    let (index, from) = (state.cursor / per_block, state.cursor % per_block);
    let base = index * per_block;
    let block = state.blocks.get(&index)?;
    let held = &state.held;
    let free = |i: u64| refcount::get(block, order, i) == 0 && !held.iter().any(|h| h.contains(&(base + i)));
    let first = (from..per_block).find(|i| free(*i))?;
    let count = (first..per_block).take(usize::try_from(want).unwrap_or(usize::MAX)).take_while(|i| free(*i)).count() as u64;
    Some(base + first..base + first + count)
}
