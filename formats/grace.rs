//! Grace periods: when has every I/O that may have seen an old mapping ended?
//!
//! Every read and write of guest data enters here for as long as it holds a mapping. Space that a change frees is stamped *after* the
//! change is visible; once the epoch has moved on by two, nobody who could have seen the old mapping is left.

use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Epoch counter of one image.
#[derive(Debug, Default)]
pub struct Grace {
    epoch: AtomicU64,
    /// I/O in flight that entered in an even, and in an odd, epoch.
    active: [AtomicU64; 2],
    advancing: Mutex<()>,
}

/// An I/O that holds mappings; ends when dropped.
#[derive(Debug)]
pub struct Entered<'a>(&'a AtomicU64);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Grace {
    /// Enters; call before looking at any mapping.
    pub fn enter(&self) -> Entered<'_> {
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let counter = &self.active[usize::from(epoch % 2 == 1)];
            counter.fetch_add(1, Ordering::SeqCst);
            // Counted before the epoch moved: `advance` sees us. Otherwise it may have missed us: again.
            if self.epoch.load(Ordering::SeqCst) == epoch {
                return Entered(counter);
            }
            counter.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// The stamp for something that became unreachable before this call.
    pub fn stamp(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Moves the epoch on as far as the I/O in flight allows (by two at most); returns it. Never waits.
    pub fn advance(&self) -> u64 {
        let _one = self.advancing.lock();
        for _ in 0..2 {
            let epoch = self.epoch.load(Ordering::SeqCst);
            // Those who entered in the epoch before this one use the other counter.
            if self.active[usize::from(epoch.is_multiple_of(2))].load(Ordering::SeqCst) != 0 {
                break;
            }
            self.epoch.store(epoch + 1, Ordering::SeqCst);
        }
        self.epoch.load(Ordering::SeqCst)
    }

    /// Whether everything stamped `stamp` is out of reach in epoch `now` (of [`Self::advance`]).
    pub fn passed(stamp: u64, now: u64) -> bool {
        now >= stamp.saturating_add(2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_io_in_flight_holds_the_epoch() {
        let grace = Grace::default();
        let stamp = grace.stamp();
        let io = grace.enter();
        assert!(!Grace::passed(stamp, grace.advance()));
        assert!(!Grace::passed(stamp, grace.advance()));
        drop(io);
        assert!(Grace::passed(stamp, grace.advance()));
    }

    #[test]
    fn later_ios_do_not_hold_an_earlier_stamp() {
        let grace = Grace::default();
        let stamp = grace.stamp();
        let first = grace.enter();
        grace.advance();
        let later = grace.enter();
        drop(first);
        assert!(Grace::passed(stamp, grace.advance()));
        drop(later);
    }

    #[test]
    fn nothing_in_flight_passes_at_once() {
        let grace = Grace::default();
        let stamp = grace.stamp();
        assert!(Grace::passed(stamp, grace.advance()));
    }
}
