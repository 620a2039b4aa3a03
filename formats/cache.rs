//! The cache of decoded units: compressed clusters, blocks of compressed streams.
//!
//! One cache serves all open images ([`Cache::shared`]): an idle image's units make room for a busy one's. It owns the bytes, the byte budget
//! and the rule that a unit is decoded once however many readers wait for it. It does not know how to decode, and does not notice when what
//! a unit was decoded from changes: whoever changes that calls [`Cache::remove`].
//!
//! Units are spread over shards so that readers of different units rarely meet at a lock; no lock is held while a unit is decoded. The budget is
//! one for all shards, because units of tens of MiB (blocks of `xz -T`) would never fit a sixteenth of it; what must go is the least recently used unit of
//! all (or nearly, when others use units at that moment).

use crate::error::{Error, Kind, Result};
use lru::LruCache;
use parking_lot::{Condvar, Mutex};
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// What a unit is known by: the owner (see [`Cache::new_owner`]), and the unit's number within it.
pub type Key = (u64, u64);

/// A decoded unit, shared by the cache and its readers.
pub type Decoded = Arc<Vec<u8>>;

/// The budget of [`Cache::shared`] unless [`Cache::set_budget`] changes it, in bytes.
pub const DEFAULT_BUDGET: usize = 64 << 20;

const SHARDS: usize = 16;

/// A byte-budgeted LRU of decoded units with single flight. See the module's text.
pub struct Cache {
    shards: [Mutex<Shard>; SHARDS],
    hasher: RandomState,
    budget: AtomicUsize,
    /// Bytes of all kept units; changed only together with the shard that holds them, under its lock.
    used: AtomicUsize,
    /// Counts uses, to tell which of the shards' least recently used units is the oldest.
    clock: AtomicU64,
    hits: AtomicU64,
    misses: AtomicU64,
}

#[derive(Default)]
struct Shard {
    kept: Option<LruCache<Key, Kept>>,
    flights: HashMap<Key, Arc<Flight>>,
}

struct Kept {
    unit: Decoded,
    used_at: u64,
}

/// A decode under way, and those who wait for it.
#[derive(Default)]
struct Flight {
    outcome: Mutex<Option<Outcome>>,
    landed: Condvar,
}

type Outcome = std::result::Result<Decoded, (Kind, String)>;

/// What the cache did so far, and holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Requests answered from a kept unit, or from another reader's decode.
    pub hits: u64,
    /// Requests that decoded.
    pub misses: u64,
    /// Bytes held now.
    pub used: usize,
    /// Bytes that may be held.
    pub budget: usize,
}

impl Cache {
    /// A cache that keeps at most `budget_bytes` of decoded units. Units that readers still hold after they were evicted are not counted.
    pub fn new(budget_bytes: usize) -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::default()),
            hasher: RandomState::new(),
            budget: AtomicUsize::new(budget_bytes),
            used: AtomicUsize::new(0),
            clock: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }
    }

    /// The process's one cache, of [`DEFAULT_BUDGET`] bytes at first.
    pub fn shared() -> Arc<Self> {
        static SHARED: OnceLock<Arc<Cache>> = OnceLock::new();
        Arc::clone(SHARED.get_or_init(|| Arc::new(Self::new(DEFAULT_BUDGET))))
    }

    /// A number that no other user of any cache in this process has: the first half of its keys.
    pub fn new_owner() -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        NEXT.fetch_add(1, Ordering::Relaxed)
    }

    /// Changes the budget; a smaller one takes effect at once.
    pub fn set_budget(&self, bytes: usize) {
        self.budget.store(bytes, Ordering::Relaxed);
        self.evict();
    }

    /// The unit `key`, from the cache or by `decode`, which is given an empty buffer with room for `decoded_len` bytes and fills it.
    ///
    /// While one caller decodes, others that want the same unit wait for it; an error reaches all of them and is not kept. `decode` must not ask for
    /// the unit that it decodes.
    ///
    /// # Errors
    /// Those of `decode`; for those who waited, one of the same kind that says the same. [`Kind::Io`] when there is no memory for the unit.
    pub fn get(&self, key: Key, decoded_len: usize, decode: impl FnOnce(&mut Vec<u8>) -> Result<()>) -> Result<Decoded> {
        let flight = {
            let mut shard = self.shard(key).lock();
            if let Some(found) = shard.find(key, self.tick()) {
                self.hits.fetch_add(1, Ordering::Relaxed);
                return Ok(found);
            }
            if let Some(flight) = shard.flights.get(&key) {
                let flight = Arc::clone(flight);
                drop(shard);
                self.hits.fetch_add(1, Ordering::Relaxed);
                return flight.wait();
            }
            let flight = Arc::new(Flight::default());
            shard.flights.insert(key, Arc::clone(&flight));
            flight
        };
        self.misses.fetch_add(1, Ordering::Relaxed);
        let mut landing =
            Landing { cache: self, key, flight: &flight, outcome: Err((Kind::Io, "the decoder of this unit panicked".into())) };
        let result = fill(decoded_len, decode);
        landing.outcome = match &result {
            Ok(unit) => Ok(Arc::clone(unit)),
            Err(error) => Err((error.kind(), error.chain())),
        };
        drop(landing);
        result
    }

    /// The unit if it is kept: no wait, no decoding.
    pub fn peek(&self, key: Key) -> Option<Decoded> {
        let found = self.shard(key).lock().find(key, self.tick())?;
        self.hits.fetch_add(1, Ordering::Relaxed);
        Some(found)
    }

    /// Whether the unit is kept or being decoded. Counts as no use of it.
    pub fn is_here_or_coming(&self, key: Key) -> bool {
        let shard = self.shard(key).lock();
        shard.flights.contains_key(&key) || shard.kept.as_ref().is_some_and(|kept| kept.contains(&key))
    }

    /// Drops a unit whose source changed. A decode that is under way is not kept, and only those who wait already will see it.
    pub fn remove(&self, key: Key) {
        let mut shard = self.shard(key).lock();
        shard.flights.remove(&key);
        if let Some(Kept { unit, .. }) = shard.kept.as_mut().and_then(|kept| kept.pop(&key)) {
            self.used.fetch_sub(unit.len(), Ordering::Relaxed);
        }
    }

    /// Drops all units of an owner, as when its image is closed.
    pub fn forget(&self, owner: u64) {
        for shard in &self.shards {
            let mut shard = shard.lock();
            shard.flights.retain(|key, _| key.0 != owner);
            if let Some(kept) = &mut shard.kept {
                let gone: Vec<Key> = kept.iter().map(|(key, _)| *key).filter(|key| key.0 == owner).collect();
                for key in gone {
                    if let Some(Kept { unit, .. }) = kept.pop(&key) {
                        self.used.fetch_sub(unit.len(), Ordering::Relaxed);
                    }
                }
            }
        }
    }

    /// Counters and fill.
    pub fn stats(&self) -> CacheStats {
        CacheStats {
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            used: self.used.load(Ordering::Relaxed),
            budget: self.budget.load(Ordering::Relaxed),
        }
    }

    fn shard(&self, key: Key) -> &Mutex<Shard> {
        let at = self.hasher.hash_one(key) as usize % SHARDS;
        &self.shards[at]
    }

    /// Ends a flight: keeps the unit if it fits and nobody removed it meanwhile.
    fn land(&self, key: Key, flight: &Arc<Flight>, outcome: Outcome) {
        let mut shard = self.shard(key).lock();
        if shard.flights.get(&key).is_some_and(|current| Arc::ptr_eq(current, flight)) {
            shard.flights.remove(&key);
            if let Ok(unit) = &outcome
                && unit.len() <= self.budget.load(Ordering::Relaxed)
            {
                self.used.fetch_add(unit.len(), Ordering::Relaxed);
                let old =
                    shard.kept.get_or_insert_with(LruCache::unbounded).put(key, Kept { unit: Arc::clone(unit), used_at: self.tick() });
                self.used.fetch_sub(old.map_or(0, |old| old.unit.len()), Ordering::Relaxed);
            }
        }
        drop(shard);
        *flight.outcome.lock() = Some(outcome);
        flight.landed.notify_all();
        self.evict();
    }

    /// Drops least recently used units until the budget is kept.
    fn evict(&self) {
        while self.used.load(Ordering::Relaxed) > self.budget.load(Ordering::Relaxed) {
            let oldest = self.shards.iter().filter_map(|shard| Some((shard.lock().oldest()?, shard))).min_by_key(|(used_at, _)| *used_at);
            let Some((_, shard)) = oldest else { return };
            let mut shard = shard.lock();
            if let Some((_, Kept { unit, .. })) = shard.kept.as_mut().and_then(LruCache::pop_lru) {
                self.used.fetch_sub(unit.len(), Ordering::Relaxed);
            }
        }
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }
}

impl Shard {
    fn find(&mut self, key: Key, now: u64) -> Option<Decoded> {
        let kept = self.kept.as_mut()?.get_mut(&key)?;
        kept.used_at = now;
        Some(Arc::clone(&kept.unit))
    }

    fn oldest(&self) -> Option<u64> {
        Some(self.kept.as_ref()?.peek_lru()?.1.used_at)
    }
}

impl Flight {
    fn wait(&self) -> Result<Decoded> {
        let mut outcome = self.outcome.lock();
        loop {
            match &*outcome {
                Some(Ok(unit)) => return Ok(Arc::clone(unit)),
                Some(Err((kind, message))) => return Err(Error::new(*kind, message.clone())),
                None => self.landed.wait(&mut outcome),
            }
        }
    }
}

/// Ends the flight when dropped, also by a panic of the decoder, so that nobody waits for ever.
struct Landing<'a> {
    cache: &'a Cache,
    key: Key,
    flight: &'a Arc<Flight>,
    outcome: Outcome,
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        let outcome = std::mem::replace(&mut self.outcome, Err((Kind::Io, String::new())));
        self.cache.land(self.key, self.flight, outcome);
    }
}

fn fill(decoded_len: usize, decode: impl FnOnce(&mut Vec<u8>) -> Result<()>) -> Result<Decoded> {
    let mut unit = Vec::new();
    unit.try_reserve_exact(decoded_len)
        .map_err(|_| Error::new(Kind::Io, format!("there is no memory for a decoded unit of {decoded_len} bytes")))?;
    decode(&mut unit)?;
    Ok(Arc::new(unit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    fn unit(cache: &Cache, key: Key, len: usize) -> Decoded {
        cache.get(key, len, |out| give(out, &vec![key.1 as u8; len])).unwrap()
    }

    fn give(out: &mut Vec<u8>, bytes: &[u8]) -> Result<()> {
        out.extend_from_slice(bytes);
        Ok(())
    }

    #[test]
    fn keeps_and_counts() {
        let cache = Cache::new(1 << 20);
        assert!(cache.peek((1, 7)).is_none());
        assert_eq!(unit(&cache, (1, 7), 100).as_slice(), &[7; 100]);
        let again = cache.get((1, 7), 100, |_| panic!("decoded twice")).unwrap();
        assert_eq!(again.len(), 100);
        assert!(cache.peek((1, 7)).is_some());
        assert!(cache.peek((2, 7)).is_none());
        assert_eq!(cache.stats(), CacheStats { hits: 2, misses: 1, used: 100, budget: 1 << 20 });
    }

    #[test]
    fn budget_holds_for_all_shards_together() {
        let cache = Cache::new(10_000);
        for n in 0..500 {
            unit(&cache, (1, n), 999);
            assert!(cache.stats().used <= 10_000);
        }
        assert!(cache.stats().used >= 9_000, "evicted more than needed: {:?}", cache.stats());
        cache.set_budget(1000);
        assert!(cache.stats().used <= 1000);
    }

    #[test]
    fn a_large_unit_may_take_most_of_the_budget() {
        let cache = Cache::new(10_000);
        unit(&cache, (1, 1), 9_000);
        assert!(cache.peek((1, 1)).is_some());
        assert_eq!(unit(&cache, (1, 2), 10_001).len(), 10_001);
        assert!(cache.peek((1, 2)).is_none(), "larger than the budget: returned, not kept");
        assert!(cache.peek((1, 1)).is_some(), "what cannot be kept evicts nothing");
    }

    #[test]
    fn the_least_recently_used_unit_of_all_goes_first() {
        let cache = Cache::new(40_000);
        for n in 0..400 {
            unit(&cache, (1, n), 1000);
            assert!(cache.peek((1, 0)).is_some(), "unit 0 is used all the time");
            assert!(n < 40 || cache.peek((1, n - 39)).is_none());
            assert!((n.saturating_sub(38)..=n).all(|recent| cache.is_here_or_coming((1, recent))));
        }
    }

    #[test]
    fn errors_are_not_kept() {
        let cache = Cache::new(1 << 20);
        let error = cache.get((1, 1), 10, |_| Err(Error::corrupt("bad block").at_offset(77))).unwrap_err();
        assert_eq!((error.kind(), error.offset()), (Kind::Corrupt, Some(77)));
        assert_eq!(unit(&cache, (1, 1), 10).len(), 10);
    }

    #[test]
    fn forget_and_remove_drop_units() {
        let cache = Cache::new(1 << 20);
        for n in 0..50 {
            unit(&cache, (1, n), 10);
            unit(&cache, (2, n), 10);
        }
        cache.forget(1);
        cache.remove((2, 3));
        assert!((0..50).all(|n| cache.peek((1, n)).is_none()));
        assert!((0..50).all(|n| cache.peek((2, n)).is_some() == (n != 3)));
        assert_eq!(cache.stats().used, 490);
    }

    #[test]
    fn a_unit_removed_while_it_is_decoded_is_not_kept() {
        let cache = Cache::new(1 << 20);
        cache
            .get((1, 1), 3, |out| {
                cache.remove((1, 1));
                // A reader that comes after the removal decodes for itself and is kept.
                cache.get((1, 1), 3, |out| give(out, b"new"))?;
                give(out, b"old")
            })
            .unwrap();
        assert_eq!(cache.peek((1, 1)).unwrap().as_slice(), b"new");
        assert_eq!(cache.stats().used, 3);
    }

    /// Starts `readers` that want a unit which one of them decodes slowly with `decode`, and returns what they got and how many decoded.
    fn race(readers: usize, decode: impl Fn(&mut Vec<u8>) -> Result<()> + Sync) -> (Vec<std::thread::Result<Result<Decoded>>>, u64) {
        let cache = Cache::new(1 << 20);
        let all_asked = Barrier::new(readers);
        let results = std::thread::scope(|scope| {
            let handles: Vec<_> = (0..readers)
                .map(|_| {
                    scope.spawn(|| {
                        all_asked.wait();
                        cache.get((1, 1), 8, |out| {
                            std::thread::sleep(Duration::from_millis(100));
                            decode(out)
                        })
                    })
                })
                .collect();
            handles.into_iter().map(|handle| handle.join()).collect()
        });
        (results, cache.stats().misses)
    }

    #[test]
    fn one_decode_however_many_readers() {
        let (results, decodes) = race(8, |out| give(out, b"decoded!"));
        assert_eq!(decodes, 1);
        for result in results {
            assert_eq!(result.unwrap().unwrap().as_slice(), b"decoded!");
        }
    }

    #[test]
    fn an_error_reaches_all_who_wait() {
        let (results, decodes) = race(8, |_| Err(Error::corrupt("bad block").at_offset(77)));
        assert_eq!(decodes, 1);
        for result in results {
            let error = result.unwrap().unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt);
            assert_eq!(error.to_string(), "bad block (at byte 0x4d)");
        }
    }

    #[test]
    fn a_panic_releases_those_who_wait() {
        let (results, _) = race(4, |_| panic!("decoder bug"));
        let (panicked, released): (Vec<_>, Vec<_>) = results.into_iter().partition(|result| result.is_err());
        assert_eq!(panicked.len(), 1);
        for result in released {
            assert!(result.unwrap().unwrap_err().to_string().contains("panicked"));
        }
    }

    #[test]
    fn threads_get_right_units_under_eviction() {
        let cache = Cache::new(5_000);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for seed in 1..5_u64 {
                let (cache, stop) = (&cache, &stop);
                scope.spawn(move || {
                    let mut state = seed;
                    for step in 0..20_000 {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        let n = (state >> 33) % 64;
                        match step % 50 {
                            0 => cache.remove((1, n)),
                            1 if step % 1000 == 1 => cache.forget(1),
                            _ => {
                                let got = unit(cache, (1, n), 100 + n as usize);
                                assert!(got.len() == 100 + n as usize && got.iter().all(|byte| *byte == n as u8));
                            }
                        }
                    }
                    stop.store(true, Ordering::Relaxed);
                });
            }
        });
        let stats = cache.stats();
        assert!(stats.used <= 5_000);
        cache.forget(1);
        assert_eq!(cache.stats().used, 0, "the count of bytes drifted");
    }
}
