//! What a device has done since it was taken into service: commands, bytes, errors and how long commands took.
//!
//! Counting costs a few uncontended atomic additions a command: threads count on shards of their own, and whoever asks adds them up.

use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

/// What a command does, as far as it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads blocks.
    Read,
    /// Writes blocks.
    Write,
    /// Anything else.
    Other,
}

/// Latencies are counted in units of so many bits of nanoseconds: 256 ns.
const UNIT_BITS: u32 = 8;
/// Each doubling of the latency has 2^3 buckets, so that a bucket is at most an eighth of its value wide.
const STEP_BITS: u32 = 3;
/// The last bucket begins at some 18 minutes and has no end.
const BUCKETS: usize = 240;
/// Independent copies of the counters.
const SHARDS: usize = 4;

/// The bucket of a latency.
fn bucket(ns: u64) -> usize {
    let units = ns >> UNIT_BITS;
    let index = match units.checked_ilog2() {
        Some(octave) if octave >= STEP_BITS => {
            let step = (units >> (octave - STEP_BITS)) & ((1 << STEP_BITS) - 1);
            u64::from(octave - STEP_BITS + 1) << STEP_BITS | step
        }
        _ => units,
    };
    usize::try_from(index).map_or(BUCKETS - 1, |index| index.min(BUCKETS - 1))
}

/// Where a bucket ends, in nanoseconds.
fn end_of(bucket: usize) -> u64 {
    let (octave, step) = ((bucket >> STEP_BITS) as u32, bucket as u64 & ((1 << STEP_BITS) - 1));
    let units = if octave == 0 { step + 1 } else { ((1 << STEP_BITS) + step + 1) << (octave - 1) };
    units << UNIT_BITS
}

#[repr(align(128))]
struct Shard {
    bytes: AtomicU64,
    errors: AtomicU64,
    total_ns: AtomicU64,
    max_ns: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
}

impl Default for Shard {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self { bytes: zero(), errors: zero(), total_ns: zero(), max_ns: zero(), buckets: std::array::from_fn(|_| zero()) }
    }
}

/// The counters of a device.
pub struct Statistics(Box<[[Shard; 3]; SHARDS]>);

impl Default for Statistics {
    fn default() -> Self {
        Self(Box::new(std::array::from_fn(|_| std::array::from_fn(|_| Shard::default()))))
    }
}

/// The shard of this thread.
fn shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static MINE: Cell<usize> = Cell::new(NEXT.fetch_add(1, Relaxed) % SHARDS));
    MINE.get()
}

impl Statistics {
    /// Counts a command that moved `bytes` and took so long. One that failed moved nothing.
    pub fn record(&self, kind: Kind, bytes: u64, took: Duration, failed: bool) {
        let Some(shard) = self.0.get(shard()).and_then(|shards| shards.get(kind as usize)) else { return };
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        if let Some(bucket) = shard.buckets.get(bucket(ns)) {
            bucket.fetch_add(1, Relaxed);
        }
        shard.total_ns.fetch_add(ns, Relaxed);
        if shard.max_ns.load(Relaxed) < ns {
            shard.max_ns.fetch_max(ns, Relaxed);
        }
        if failed {
            shard.errors.fetch_add(1, Relaxed);
        } else {
            shard.bytes.fetch_add(bytes, Relaxed);
        }
    }

    /// What was counted until now.
    pub fn snapshot(&self) -> Snapshot {
        let [reads, writes, others] = [Kind::Read, Kind::Write, Kind::Other].map(|kind| {
            let mut sum = Counts::default();
            let mut buckets = [0; BUCKETS];
            for shard in self.0.iter().filter_map(|shards| shards.get(kind as usize)) {
                sum.bytes += shard.bytes.load(Relaxed);
                sum.errors += shard.errors.load(Relaxed);
                sum.total_ns = sum.total_ns.saturating_add(shard.total_ns.load(Relaxed));
                sum.max_ns = sum.max_ns.max(shard.max_ns.load(Relaxed));
                buckets.iter_mut().zip(&shard.buckets).for_each(|(sum, bucket)| *sum += bucket.load(Relaxed));
            }
            sum.count = buckets.iter().sum();
            let used = buckets.iter().enumerate().filter(|(_, count)| **count > 0);
            sum.latency = used.map(|(index, count)| (end_of(index), *count)).collect();
            sum
        });
        Snapshot { reads, writes, others }
    }
}

/// Counters of one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Commands that read blocks.
    pub reads: Counts,
    /// Commands that write blocks.
    pub writes: Counts,
    /// All others.
    pub others: Counts,
}

impl Snapshot {
    /// What was counted since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            reads: self.reads.since(&earlier.reads),
            writes: self.writes.since(&earlier.writes),
            others: self.others.since(&earlier.others),
        }
    }
}

/// Counters of one kind of commands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Commands that ended, well or not.
    pub count: u64,
    /// Of those, the ones that did not end with GOOD.
    pub errors: u64,
    /// Bytes that were moved.
    pub bytes: u64,
    /// The sum of the commands' times, from when a command was fetched to its completion, in nanoseconds.
    pub total_ns: u64,
    /// The longest.
    pub max_ns: u64,
    /// How many commands took less than so many nanoseconds, and no less than the entry before. Entries of none are left out.
    pub latency: Vec<(u64, u64)>,
}

impl Counts {
    fn since(&self, earlier: &Self) -> Self {
        let before = |end: u64| earlier.latency.iter().find(|(other, _)| *other == end).map_or(0, |(_, count)| *count);
        let latency = self.latency.iter().map(|&(end, count)| (end, count.saturating_sub(before(end))));
        Self {
            count: self.count.saturating_sub(earlier.count),
            errors: self.errors.saturating_sub(earlier.errors),
            bytes: self.bytes.saturating_sub(earlier.bytes),
            total_ns: self.total_ns.saturating_sub(earlier.total_ns),
            max_ns: self.max_ns,
            latency: latency.filter(|(_, count)| *count > 0).collect(),
        }
    }

    /// The time that the part `quantile` (0 to 1) of the commands did not exceed, to an eighth; none without commands.
    pub fn quantile(&self, quantile: f64) -> Option<Duration> {
        let total: u64 = self.latency.iter().map(|(_, count)| count).sum();
        let rank = (quantile * total as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        let (end, _) = self.latency.iter().find(|(_, count)| {
            seen += count;
            seen >= rank
        })?;
        Some(Duration::from_nanos((*end).min(self.max_ns)))
    }

    /// The mean time.
    pub fn mean(&self) -> Option<Duration> {
        self.total_ns.checked_div(self.count).map(Duration::from_nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_one_another_and_are_narrow() {
        let mut last = 0;
        for ns in (0..4096).chain((12..40).flat_map(|bits| [-1i64, 0, 1].map(|off| ((1i64 << bits) + off) as u64))) {
            let index = bucket(ns);
            assert!(index >= last, "{ns}");
            last = index;
            let (begin, end) = (if index == 0 { 0 } else { end_of(index - 1) }, end_of(index));
            assert!(begin <= ns && ns < end, "{ns} is not in {begin}..{end}");
            assert!(end - begin <= (begin / 8).max(256), "{begin}..{end}");
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_of_what_came_since() {
        let statistics = Statistics::default();
        for us in 1..=1000 {
            statistics.record(Kind::Read, 4096, Duration::from_micros(us), false);
        }
        let first = statistics.snapshot();
        assert_eq!((first.reads.count, first.reads.bytes, first.reads.errors), (1000, 4_096_000, 0));
        for (quantile, us) in [(0.5, 500.0), (0.99, 990.0), (0.999, 999.0), (1.0, 1000.0)] {
            let found = first.reads.quantile(quantile).unwrap().as_nanos() as f64 / 1000.0;
            assert!(found >= us && found <= us * 1.13, "{quantile}: {found}");
        }
        assert_eq!(first.reads.mean().unwrap().as_micros(), 500);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| (0..1000).for_each(|_| statistics.record(Kind::Write, 512, Duration::from_millis(3), true)));
            }
        });
        let since = statistics.snapshot().since(&first);
        assert_eq!((since.writes.count, since.writes.errors, since.writes.bytes, since.reads.count), (8000, 8000, 0, 0));
        assert_eq!(since.reads.quantile(0.5), None);
        assert!(since.writes.quantile(0.01).unwrap() >= Duration::from_millis(3));
    }
}
