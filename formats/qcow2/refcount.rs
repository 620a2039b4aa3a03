//! Reference counts of host clusters: the refcount table, its blocks, and a cache of them. Taking new clusters is in `allocate`.
//!
//! Raising and lowering are *reservations* in the sense of [`crate::writeback`]: a count that is too high only leaks, and counts are lowered only when
//! nothing on disk refers to the cluster any more.
//!
//! Source: QEMU's docs/interop/qcow2.rst, "Host cluster management".

use super::entry::{Geometry, REFTABLE_OFFSET};
use super::header::be64;
use super::metadata::Metadata;
use crate::error::{Error, Result};
use crate::writeback::WriteBack;
use lru::LruCache;
use parking_lot::{Mutex, MutexGuard};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

/// Memory for refcount blocks in bytes.
const CACHE: usize = 4 << 20;

/// The refcount at `index` of a block; `order` is log2 of the width in bits.
pub(super) fn get(block: &[u8], order: u32, index: u64) -> u64 {
    let index = index as usize;
    let byte = |at: usize| block.get(at).copied().unwrap_or(0);
    match order {
        0..=2 => {
            let (bits, per_byte) = (1 << order, 8 >> order);
            u64::from(byte(index / per_byte)) >> (index % per_byte * bits) & ((1 << bits) - 1)
        }
        3 => u64::from(byte(index)),
        4 => u64::from(byte(2 * index)) << 8 | u64::from(byte(2 * index + 1)),
        5 => u64::from(super::header::be32(block, 4 * index)),
        _ => be64(block, 8 * index),
    }
}

/// Sets the refcount at `index`; the value fits.
pub(super) fn set(block: &mut [u8], order: u32, index: u64, value: u64) {
    let index = index as usize;
    match order {
        0..=2 => {
            let (bits, per_byte) = (1 << order, 8 >> order);
            let (shift, mask) = (index % per_byte * bits, (1u8 << bits) - 1);
            if let Some(byte) = block.get_mut(index / per_byte) {
                *byte = *byte & !(mask << shift) | (value as u8 & mask) << shift;
            }
        }
        _ => {
            let bytes = 1 << (order - 3);
            let raw = value.to_be_bytes();
            if let Some(into) = block.get_mut(index * bytes..(index + 1) * bytes) {
                into.copy_from_slice(&raw[8 - bytes..]);
            }
        }
    }
}

/// The bytes of a block that hold the refcounts of these indices.
pub(super) fn byte_range(order: u32, indices: &Range<u64>) -> Range<usize> {
    let bits = 1u64 << order;
    (indices.start * bits / 8) as usize..((indices.end * bits).div_ceil(8)) as usize
}

/// What is known of the refcount structures; under the lock of [`Refcounts`].
#[derive(Debug)]
pub(super) struct State {
    /// Entries of the refcount table, as they will be in the file.
    pub table: Vec<u64>,
    pub table_at: u64,
    pub blocks: LruCache<u64, Box<[u8]>>,
    /// Goes up when a block leaves the cache.
    evictions: u64,
    /// Where the search for a free cluster goes on: none below is free.
    pub cursor: u64,
    /// From this byte on, the file holds nothing yet and reads as zeros.
    pub fresh: u64,
    /// Free clusters that are not to be taken yet.
    pub held: Vec<Range<u64>>,
}

impl State {
    /// Host offset of a block; 0: there is none.
    pub fn block_at(&self, index: u64) -> u64 {
        usize::try_from(index).ok().and_then(|i| self.table.get(i)).map_or(0, |raw| raw & REFTABLE_OFFSET)
    }

    pub fn insert_block(&mut self, index: u64, block: Box<[u8]>) {
        if self.blocks.push(index, block).is_some_and(|(old, _)| old != index) {
            self.evictions += 1;
        }
    }
}

/// The reference counts of an image that is open for writing.
pub(super) struct Refcounts {
    pub geometry: Geometry,
    pub writeback: Arc<WriteBack>,
    pub metadata: Metadata,
    state: Mutex<State>,
}

impl Refcounts {
    /// Reads the refcount table.
    pub fn read(writeback: Arc<WriteBack>, geometry: Geometry, table_at: u64, table_clusters: u32, file_len: u64) -> Result<Self> {
        let len = u64::from(table_clusters) << geometry.cluster_bits;
        // What lies beyond the end of the file is zero; memory is taken for what is there.
        let there = len.min(file_len.saturating_sub(table_at)).next_multiple_of(8);
        let mut raw = vec![0; usize::try_from(there).unwrap_or(0)];
        writeback.read(0, table_at, &mut raw)?;
        let mut table: Vec<u64> = raw.chunks_exact(8).map(|raw| be64(raw, 0)).collect();
        table.resize(usize::try_from(len / 8).unwrap_or(0), 0);
        let blocks = NonZeroUsize::new((CACHE >> geometry.cluster_bits).max(4)).unwrap_or(NonZeroUsize::MIN);
        let state = State {
            table,
            table_at,
            blocks: LruCache::new(blocks),
            evictions: 0,
            cursor: 0,
            fresh: geometry.round_up(file_len),
            held: Vec::new(),
        };
        Ok(Self { geometry, writeback, metadata: Metadata::default(), state: Mutex::new(state) })
    }

    /// The state as it is.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// The state with a block in the cache, unless the table has none of that index. The lock is not held while the block is read.
    pub fn lock_with_block(&self, index: u64) -> Result<MutexGuard<'_, State>> {
        loop {
            let (at, evictions) = {
                let state = self.state.lock();
                let at = state.block_at(index);
                if at == 0 || state.blocks.contains(&index) {
                    return Ok(state);
                }
                (at, state.evictions)
            };
            self.check_block(index, at)?;
            let mut block = vec![0; self.geometry.cluster_size() as usize].into_boxed_slice();
            self.writeback.read(0, at, &mut block)?;
            let mut state = self.state.lock();
            if state.blocks.contains(&index) {
                return Ok(state);
            }
            // If blocks have come and gone, it may have been changed since it was read.
            if state.evictions == evictions && state.block_at(index) == at {
                state.insert_block(index, block);
                return Ok(state);
            }
        }
    }

    fn check_block(&self, index: u64, at: u64) -> Result<()> {
        let bad = |why: &str| Error::corrupt(format!("refcount block {index} {why}")).at_offset(at);
        if !self.geometry.aligned(at) {
            return Err(bad("lies between clusters"));
        }
        if at > i64::MAX as u64 || at >= self.state.lock().fresh {
            return Err(bad("lies beyond the end of the file"));
        }
        if self.metadata.is_doubled(at) {
            return Err(bad("lies in a cluster that holds other metadata too"));
        }
        Ok(())
    }

    /// A new table, with new blocks, has taken the place of the old one. Nothing else goes on.
    pub fn replaced(&self, table_at: u64, table: &[u8], fresh: u64) {
        let mut state = self.state.lock();
        state.table = table.chunks_exact(8).map(|raw| be64(raw, 0)).collect();
        state.table_at = table_at;
        state.blocks.clear();
        state.evictions += 1;
        state.cursor = 0;
        state.fresh = state.fresh.max(fresh);
    }

    /// The refcount of the cluster at host offset `at`.
    pub fn count(&self, at: u64) -> Result<u64> {
        let cluster = at >> self.geometry.cluster_bits;
        let per_block = self.geometry.refcounts_per_block();
        let mut state = self.lock_with_block(cluster / per_block)?;
        let block = state.blocks.get(&(cluster / per_block));
        Ok(block.map_or(0, |b| get(b, self.geometry.refcount_order, cluster % per_block)))
    }

    /// Changes the refcounts of a run of clusters within one block, in memory and in the write-back buffer. The block is cached; `change` gets every
    /// count, and its result fits the width.
    pub fn change_in(&self, state: &mut State, clusters: &Range<u64>, mut change: impl FnMut(u64) -> u64) -> Result<()> {
        let (order, per_block) = (self.geometry.refcount_order, self.geometry.refcounts_per_block());
        let index = clusters.start / per_block;
        let at = state.block_at(index);
        let Some(block) = state.blocks.get_mut(&index) else {
            return Err(Error::corrupt(format!("refcount block {index} is missing")));
        };
        let indices = clusters.start % per_block..clusters.start % per_block + (clusters.end - clusters.start);
        let bytes = byte_range(order, &indices);
        let Some(old) = block.get(bytes.clone()).map(<[u8]>::to_vec) else {
            return Err(Error::corrupt(format!("refcount block {index} is too short")));
        };
        for i in indices {
            let value = change(get(block, order, i));
            set(block, order, i, value);
        }
        let written = self.writeback.reserve(0, at + bytes.start as u64, block.get(bytes.clone()).unwrap_or_default());
        if written.is_err()
            && let Some(into) = block.get_mut(bytes)
        {
            into.copy_from_slice(&old);
        }
        written
    }

    /// Takes one reference from each cluster of a run of bytes. Returns clusters that nothing refers to any more, *held*: they are not given out again
    /// before [`Self::unhold`]; and how many clusters had no reference that could be taken.
    pub fn lower(&self, at: u64, len: u64) -> Result<(Vec<Range<u64>>, u64)> {
        let end = self.geometry.clusters(at.saturating_add(len));
        let per_block = self.geometry.refcounts_per_block();
        let mut here = at >> self.geometry.cluster_bits;
        let (mut free, mut missing) = (Vec::<Range<u64>>::new(), 0);
        while here < end {
            let upto = end.min((here / per_block + 1) * per_block);
            let mut state = self.lock_with_block(here / per_block)?;
            if state.block_at(here / per_block) == 0 {
                missing += upto - here;
            } else {
                let mut cluster = here;
                self.change_in(&mut state, &(here..upto), |count| {
                    if count == 0 {
                        missing += 1;
                    } else if count == 1 {
                        match free.last_mut() {
                            Some(last) if last.end == cluster => last.end += 1,
                            _ => free.push(cluster..cluster + 1),
                        }
                    }
                    cluster += 1;
                    count.saturating_sub(1)
                })?;
                // A run may have begun in the block before; it is held from there already.
                let first = here;
                state.held.extend(free.iter().filter(|r| r.end > first).map(|r| r.start.max(first)..r.end));
            }
            here = upto;
        }
        Ok((free, missing))
    }

    /// Clusters that [`Self::lower`] has freed may be given out again.
    pub fn unhold(&self, free: &[Range<u64>]) {
        let mut state = self.state.lock();
        state.held.retain(|held| !free.iter().any(|f| f.start <= held.start && held.end <= f.end));
        if let Some(first) = free.iter().map(|r| r.start).min() {
            state.cursor = state.cursor.min(first);
        }
    }

    /// Gives back clusters that were taken and never became visible.
    pub fn give_back(&self, at: u64, len: u64) -> Result<()> {
        let (free, _) = self.lower(at, len)?;
        self.unhold(&free);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_widths() {
        for order in 0..=6 {
            let bits = 1u32 << order;
            let max = u64::MAX >> (64 - bits);
            let mut block = vec![0u8; 64 * bits as usize / 8];
            for i in 0..64 {
                set(&mut block, order, i, i.wrapping_mul(0x9E37_79B9_7F4A_7C15) & max);
            }
            for i in 0..64 {
                assert_eq!(get(&block, order, i), i.wrapping_mul(0x9E37_79B9_7F4A_7C15) & max, "{order} {i}");
            }
        }
        let mut block = [0u8; 8];
        set(&mut block, 0, 3, 1);
        set(&mut block, 2, 3, 0xA);
        assert_eq!(block[..2], [0x08, 0xA0]);
        set(&mut block, 4, 2, 0x1234);
        assert_eq!(block[4..6], [0x12, 0x34]);
        assert_eq!(byte_range(0, &(3..9)), 0..2);
        assert_eq!(byte_range(5, &(1..3)), 4..12);
    }
}
