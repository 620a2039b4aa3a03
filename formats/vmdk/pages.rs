//! Grain directories and grain tables, by the pages of the files that they are in: a cache of bounded size.
//!
//! What is in memory is always what the write-back buffer would read: a page is loaded, and changed, under its shard's lock.

use crate::error::Result;
use crate::writeback::{Stage, WriteBack};
use lru::LruCache;
use parking_lot::Mutex;
use std::num::NonZeroUsize;
use std::sync::Arc;

/// Bytes of a page. Entries lie at multiples of their size, and so never across pages.
const PAGE: usize = 4096;
const SHARDS: usize = 16;
/// Pages that are kept per shard: all together 8 MiB, the tables of 128 GiB in grains of 64 KiB.
const SHARD_PAGES: usize = 128;

type Shard = Mutex<LruCache<(usize, u64), Box<[u8; PAGE]>>>;

/// The cache.
pub(super) struct Pages {
    writeback: Arc<WriteBack>,
    shards: Vec<Shard>,
}

impl Pages {
    pub(super) fn new(writeback: Arc<WriteBack>) -> Self {
        let pages = NonZeroUsize::new(SHARD_PAGES).unwrap_or(NonZeroUsize::MIN);
        Self { writeback, shards: (0..SHARDS).map(|_| Mutex::new(LruCache::new(pages))).collect() }
    }

    /// Runs `look` on a page, with its shard locked.
    fn with_page<T>(&self, store: usize, page: u64, look: impl FnOnce(&mut [u8; PAGE]) -> Result<T>) -> Result<T> {
        let shard = (page as usize).wrapping_add(store) % SHARDS;
        let Some(shard) = self.shards.get(shard) else { unreachable!("there are SHARDS shards") };
        let mut shard = shard.lock();
        if let Some(bytes) = shard.get_mut(&(store, page)) {
            return look(bytes);
        }
        let mut bytes = Box::new([0; PAGE]);
        self.writeback.read(store, page.saturating_mul(PAGE as u64), &mut bytes[..])?;
        look(shard.get_or_insert_mut((store, page), || bytes))
    }

    /// Shows `look` the bytes at `at`: `len` of them, or as many as are in the page.
    pub(super) fn look<T>(&self, store: usize, at: u64, len: u64, look: impl FnOnce(&[u8]) -> Result<T>) -> Result<T> {
        let start = (at % PAGE as u64) as usize;
        let count = usize::try_from(len).unwrap_or(PAGE).min(PAGE - start);
        self.with_page(store, at / PAGE as u64, |bytes| look(bytes.get(start..start + count).unwrap_or_default()))
    }

    /// All of `len` bytes at `at`.
    pub(super) fn read(&self, store: usize, at: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
        while (bytes.len() as u64) < len {
            let done = bytes.len() as u64;
            self.look(store, at.saturating_add(done), len - done, |part| {
                bytes.extend_from_slice(part);
                Ok(())
            })?;
        }
        Ok(bytes)
    }

    /// Changes the bytes at `at`. With [`Stage::Reserve`] nothing may refer to them yet.
    pub(super) fn put(&self, stage: Stage, store: usize, at: u64, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let here = at.saturating_add(done as u64);
            let start = (here % PAGE as u64) as usize;
            let count = (PAGE - start).min(bytes.len() - done);
            let new = bytes.get(done..done + count).unwrap_or_default();
            self.with_page(store, here / PAGE as u64, |page| {
                match stage {
                    Stage::Reserve => self.writeback.reserve(store, here, new)?,
                    Stage::Publish => self.writeback.publish(store, here, new)?,
                }
                if let Some(old) = page.get_mut(start..start + count) {
                    old.copy_from_slice(new);
                }
                Ok(())
            })?;
            done += count;
        }
        Ok(())
    }
}
