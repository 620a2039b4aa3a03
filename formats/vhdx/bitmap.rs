//! Sector bitmaps of differencing images: which sectors of a partially present block are in this file.
//!
//! Pages of bits are kept in a small cache. What is in memory is always what the write-back buffer would read: a page is loaded, and changed, under its
//! shard's lock.

use crate::error::Result;
use crate::writeback::WriteBack;
use lru::LruCache;
use parking_lot::Mutex;
use std::num::NonZeroUsize;
use std::sync::Arc;

/// Bytes in a page: the bits of 32768 sectors.
const PAGE: usize = 4096;
const SHARDS: u64 = 16;
/// Pages kept per shard; all together 8 MiB, the bits of 32 GiB of 512-byte sectors.
const PAGES: NonZeroUsize = NonZeroUsize::new(128).expect("not zero");

type Shard = Mutex<LruCache<u64, Box<[u8; PAGE]>>>;

/// The bits, by byte offset in the file.
pub(super) struct Bitmaps {
    writeback: Arc<WriteBack>,
    shards: Vec<Shard>,
}

impl Bitmaps {
    pub(super) fn new(writeback: Arc<WriteBack>) -> Self {
        Self { writeback, shards: (0..SHARDS).map(|_| Mutex::new(LruCache::new(PAGES))).collect() }
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
    pub(super) fn run(&self, at: u64, from: u64, most: u64) -> Result<(u64, bool)> {
        let first = at.saturating_add(from / 8);
        let start = first % PAGE as u64 * 8 + from % 8;
        let end = start.saturating_add(most).min(PAGE as u64 * 8);
        self.with_page(first / PAGE as u64, |bits| {
            let value = bit(bits, start);
            let other = if value { 0xFF } else { 0 };
            let mut here = start + 1;
            while here < end {
                if here.is_multiple_of(8) && end - here >= 8 && bits.get((here / 8) as usize) == Some(&other) {
                    here += 8;
                } else if bit(bits, here) == value {
                    here += 1;
                } else {
                    break;
                }
            }
            Ok((here - start, value))
        })
    }

    /// Sets `count` bits from bit `from` of the bits at byte offset `at`, and publishes them.
    pub(super) fn set(&self, at: u64, from: u64, count: u64) -> Result<()> {
        let (mut here, end) = (from, from.saturating_add(count));
        while here < end {
            let first = at.saturating_add(here / 8);
            let start = first % PAGE as u64 * 8 + here % 8;
            let stop = start.saturating_add(end - here).min(PAGE as u64 * 8);
            self.with_page(first / PAGE as u64, |bits| {
                let bytes = (start / 8) as usize..stop.div_ceil(8) as usize;
                let mut new = bits.get(bytes.clone()).unwrap_or_default().to_vec();
                set_bits(&mut new, start % 8, stop - start);
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

    /// Publishes all `bytes` of bits at byte offset `at`.
    pub(super) fn replace(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let here = at.saturating_add(done as u64);
            let start = (here % PAGE as u64) as usize;
            let count = (PAGE - start).min(bytes.len() - done);
            let new = bytes.get(done..done + count).unwrap_or_default();
            self.with_page(here / PAGE as u64, |bits| {
                self.writeback.publish(0, here, new)?;
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

fn bit(bits: &[u8; PAGE], index: u64) -> bool {
    // Least significant bit first ([MS-VHDX] 2.4).
    bits.get((index / 8) as usize).is_some_and(|byte| byte >> (index % 8) & 1 == 1)
}

/// Sets `count` bits from bit `from` on, least significant first.
pub(super) fn set_bits(bytes: &mut [u8], from: u64, count: u64) {
    let (mut here, end) = (from, from.saturating_add(count));
    while here < end {
        let Some(byte) = bytes.get_mut((here / 8) as usize) else { return };
        let upto = end.min((here / 8 + 1) * 8);
        let ones = u8::try_from((1u16 << (upto - here)) - 1).unwrap_or(u8::MAX);
        *byte |= ones << (here % 8);
        here = upto;
    }
}
