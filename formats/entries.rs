//! Entries of tables that may lie anywhere in a file (second-level tables), in a small cache of pages.
//!
//! What is in memory is always what the write-back buffer would read: a page is loaded, and changed, under its shard's lock.

use crate::error::Result;
use crate::table::Width;
use crate::writeback::WriteBack;
use lru::LruCache;
use parking_lot::Mutex;
use smallvec::SmallVec;
use std::num::NonZeroUsize;
use std::sync::Arc;

const SHARDS: u64 = 16;
/// Bytes in a page.
const PAGE: usize = 4096;
/// Pages that are kept per shard; all together 8 MiB.
const SHARD_PAGES: NonZeroUsize = NonZeroUsize::new(128).unwrap();
/// The most entries that are looked at in one go.
const MOST: u64 = 64;

/// Some entries.
pub(crate) type Raws = SmallVec<[u64; MOST as usize]>;

/// The cache, for entries in the first store.
pub(crate) struct Entries {
    writeback: Arc<WriteBack>,
    width: Width,
    shards: Vec<Mutex<LruCache<u64, Box<[u8; PAGE]>>>>,
}

impl Entries {
    pub(crate) fn new(writeback: Arc<WriteBack>, width: Width) -> Self {
        Self { writeback, width, shards: (0..SHARDS).map(|_| Mutex::new(LruCache::new(SHARD_PAGES))).collect() }
    }

    /// Runs `look` on the page with this number, with its shard locked.
    fn with_page<T>(&self, page: u64, look: impl FnOnce(&mut [u8; PAGE]) -> Result<T>) -> Result<T> {
        let shard = usize::try_from(page % SHARDS).unwrap_or(0);
        let Some(shard) = self.shards.get(shard) else { unreachable!("there are SHARDS shards") };
        let mut shard = shard.lock();
        if let Some(bytes) = shard.get_mut(&page) {
            return look(bytes);
        }
        let mut bytes = Box::new([0; PAGE]);
        self.writeback.read(0, page * PAGE as u64, &mut bytes[..])?;
        look(shard.get_or_insert_mut(page, || bytes))
    }

    /// The entries from byte offset `at` on, which is a multiple of an entry's length: at least one, at most `most`.
    pub(crate) fn get(&self, at: u64, most: u64) -> Result<Raws> {
        let width = self.width.bytes() as usize;
        let start = (at % PAGE as u64) as usize;
        self.with_page(at / PAGE as u64, |bytes| {
            let there = bytes.get(start..).unwrap_or_default().chunks_exact(width);
            Ok(there.take(most.min(MOST) as usize).map(|e| self.width.decode(e)).collect())
        })
    }

    /// Publishes entries, for all who look them up from here on. The caller holds what keeps others from changing the same ones.
    pub(crate) fn publish(&self, at: u64, entries: impl IntoIterator<Item = u64>) -> Result<()> {
        let mut at = at;
        for entry in entries {
            let new = self.width.encode(entry);
            let start = (at % PAGE as u64) as usize;
            self.with_page(at / PAGE as u64, |bytes| {
                self.writeback.publish(0, at, &new)?;
                if let Some(old) = bytes.get_mut(start..start + new.len()) {
                    old.copy_from_slice(&new);
                }
                Ok(())
            })?;
            at += new.len() as u64;
        }
        Ok(())
    }
}
