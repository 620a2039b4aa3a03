//! Sector bitmaps (VHD, VHDX): which sectors of a block are in this file.
//!
//! Pages of bits are kept in a small cache. What is in memory is always what the write-back buffer would read: a page is loaded, and changed, under its
//! shard's lock.

use crate::error::Result;
use crate::writeback::{Stage, WriteBack};
use lru::LruCache;
use parking_lot::Mutex;
use std::num::NonZeroUsize;
use std::sync::Arc;

const SHARDS: u64 = 16;
/// Bytes of bits that are kept per shard; all together 8 MiB, the bits of 32 GiB of 512-byte sectors.
const SHARD_BYTES: usize = 512 << 10;

/// Which bit of a byte is the first sector's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BitOrder {
    /// The least significant (VHDX).
    LsbFirst,
    /// The most significant (VHD).
    MsbFirst,
}

impl BitOrder {
    fn get(self, bits: &[u8], index: u64) -> bool {
        let shift = if self == Self::LsbFirst { index % 8 } else { 7 - index % 8 };
        bits.get((index / 8) as usize).is_some_and(|byte| byte >> shift & 1 == 1)
    }

    /// Sets `count` bits from bit `from` on.
    pub(crate) fn set(self, bytes: &mut [u8], from: u64, count: u64) {
        let (mut here, end) = (from, from.saturating_add(count));
        while here < end {
            let Some(byte) = bytes.get_mut((here / 8) as usize) else { return };
            let upto = end.min((here / 8 + 1) * 8);
            let ones = u8::try_from((1u16 << (upto - here)) - 1).unwrap_or(u8::MAX) << (here % 8);
            *byte |= if self == Self::LsbFirst { ones } else { ones.reverse_bits() };
            here = upto;
        }
    }
}

type Shard<const PAGE: usize> = Mutex<LruCache<u64, Box<[u8; PAGE]>>>;

/// The bits, by byte offset in the first store, in pages of `PAGE` bytes.
pub(crate) struct Bitmaps<const PAGE: usize> {
    writeback: Arc<WriteBack>,
    order: BitOrder,
    shards: Vec<Shard<PAGE>>,
}

impl<const PAGE: usize> Bitmaps<PAGE> {
    pub(crate) fn new(writeback: Arc<WriteBack>, order: BitOrder) -> Self {
        let pages = NonZeroUsize::new(SHARD_BYTES / PAGE).unwrap_or(NonZeroUsize::MIN);
        Self { writeback, order, shards: (0..SHARDS).map(|_| Mutex::new(LruCache::new(pages))).collect() }
    }

    /// Runs `look` on the page at `page * PAGE`, with its shard locked.
    fn with_page<T>(&self, page: u64, look: impl FnOnce(&mut [u8; PAGE]) -> Result<T>) -> Result<T> {
        let shard = usize::try_from(page % SHARDS).unwrap_or(0);
        let Some(shard) = self.shards.get(shard) else { unreachable!("there are SHARDS shards") };
        let mut shard = shard.lock();
        if let Some(bits) = shard.get_mut(&page) {
            return look(bits);
        }
        let mut bits = Box::new([0; PAGE]);
        self.writeback.read(0, page * PAGE as u64, &mut bits[..])?;
        look(shard.get_or_insert_mut(page, || bits))
    }

    /// Length of the run of equal bits that begins at bit `from` of the bits at byte offset `at`, and their value. Looks at most `most` bits far, and no
    /// further than a page.
    pub(crate) fn run(&self, at: u64, from: u64, most: u64) -> Result<(u64, bool)> {
        let first = at.saturating_add(from / 8);
        let start = first % PAGE as u64 * 8 + from % 8;
        let end = start.saturating_add(most).min(PAGE as u64 * 8);
        self.with_page(first / PAGE as u64, |bits| {
            let value = self.order.get(&bits[..], start);
            let other = if value { 0xFF } else { 0 };
            let mut here = start + 1;
            while here < end {
                if here.is_multiple_of(8) && end - here >= 8 && bits.get((here / 8) as usize) == Some(&other) {
                    here += 8;
                } else if self.order.get(&bits[..], here) == value {
                    here += 1;
                } else {
                    break;
                }
            }
            Ok((here - start, value))
        })
    }

    /// Sets `count` bits from bit `from` of the bits at byte offset `at`, and publishes them.
    pub(crate) fn set(&self, at: u64, from: u64, count: u64) -> Result<()> {
        let (mut here, end) = (from, from.saturating_add(count));
        while here < end {
            let first = at.saturating_add(here / 8);
            let start = first % PAGE as u64 * 8 + here % 8;
            let stop = start.saturating_add(end - here).min(PAGE as u64 * 8);
            self.with_page(first / PAGE as u64, |bits| {
                let bytes = (start / 8) as usize..stop.div_ceil(8) as usize;
                let mut new = bits.get(bytes.clone()).unwrap_or_default().to_vec();
                self.order.set(&mut new, start % 8, stop - start);
                self.writeback.publish(0, first, &new)?;
                if let Some(old) = bits.get_mut(bytes) {
                    old.copy_from_slice(&new);
                }
                Ok(())
            })?;
            here += stop - start;
        }
        Ok(())
    }

    /// Puts all `bytes` of bits at byte offset `at`. With [`Stage::Reserve`] nothing may refer to them yet.
    pub(crate) fn replace(&self, stage: Stage, at: u64, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let here = at.saturating_add(done as u64);
            let start = (here % PAGE as u64) as usize;
            let count = (PAGE - start).min(bytes.len() - done);
            let new = bytes.get(done..done + count).unwrap_or_default();
            self.with_page(here / PAGE as u64, |bits| {
                match stage {
                    Stage::Reserve => self.writeback.reserve(0, here, new)?,
                    Stage::Publish => self.writeback.publish(0, here, new)?,
                }
                if let Some(old) = bits.get_mut(start..start + count) {
                    old.copy_from_slice(new);
                }
                Ok(())
            })?;
            done += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    #[test]
    fn runs_are_what_was_set() {
        for order in [BitOrder::LsbFirst, BitOrder::MsbFirst] {
            let writeback = Arc::new(WriteBack::unmirrored(vec![Arc::new(MemoryStore::new(vec![0; 8192]))]));
            let bitmaps = Bitmaps::<512>::new(writeback.clone(), order);
            let mut model = vec![false; 8192 * 8];
            for (from, count) in [(3, 1), (9, 30), (4090, 20), (8000, 900), (0, 8), (20_000, 1)] {
                bitmaps.set(512, from, count).unwrap();
                model[from as usize..][..count as usize].fill(true);
            }
            let mut here = 0;
            while here < 24_000 {
                let (run, value) = bitmaps.run(512, here, 24_000 - here).unwrap();
                assert!(model[here as usize..][..run as usize].iter().all(|b| *b == value), "{order:?}: {run} at {here}");
                // Ends where the bits change, or with a page.
                assert!(
                    (here + run).is_multiple_of(4096) || here + run == 24_000 || model[(here + run) as usize] != value,
                    "{order:?}: {run} at {here}"
                );
                here += run;
            }
            let mut first = [0; 2];
            writeback.read(0, 512, &mut first).unwrap();
            assert_eq!(first, if order == BitOrder::LsbFirst { [0xFF, 0xFE] } else { [0xFF, 0x7F] });
            bitmaps.replace(Stage::Publish, 512, &[0; 600]).unwrap();
            assert_eq!(bitmaps.run(512, 0, 4096).unwrap(), (4096, false));
        }
    }
}
