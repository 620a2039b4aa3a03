//! Range locks of one image: changes of a mapping exclude each other and writes in place, unit by unit.
//!
//! Readers take none: they are covered by [`crate::grace`].

use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;

#[derive(Clone, Copy, Debug)]
struct Entry {
    ticket: u64,
    start: u64,
    end: u64,
    exclusive: bool,
    held: bool,
}

impl Entry {
    fn conflicts(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end && (self.exclusive || other.exclusive)
    }
}

#[derive(Debug, Default)]
struct State {
    /// In order of arrival: one that waits holds back later ones that conflict with it, so that nobody starves.
    entries: VecDeque<Entry>,
    next: u64,
    waiting: usize,
}

/// Locks on byte ranges of one image.
#[derive(Debug, Default)]
pub struct RangeLocks {
    state: Mutex<State>,
    changed: Condvar,
}

/// A held range; released when dropped.
#[derive(Debug)]
pub struct Held<'a> {
    locks: &'a RangeLocks,
    ticket: u64,
}

impl RangeLocks {
    /// Waits for `[start, end)` to be free of exclusive holders.
    pub fn shared(&self, start: u64, end: u64) -> Held<'_> {
        self.lock(start, end, false)
    }

    /// Waits for `[start, end)` to be free of any holder.
    pub fn exclusive(&self, start: u64, end: u64) -> Held<'_> {
        self.lock(start, end, true)
    }

    fn lock(&self, start: u64, end: u64, exclusive: bool) -> Held<'_> {
        let mut state = self.state.lock();
        let ticket = state.next;
        state.next += 1;
        let mut mine = Entry { ticket, start, end, exclusive, held: false };
        let blocked = |state: &State| state.entries.iter().take_while(|e| e.ticket != ticket).any(|e| e.conflicts(&mine));
        if !blocked(&state) {
            mine.held = true;
            state.entries.push_back(mine);
        } else {
            state.entries.push_back(mine);
            state.waiting += 1;
            while blocked(&state) {
                self.changed.wait(&mut state);
            }
            state.waiting -= 1;
            if let Some(entry) = state.entries.iter_mut().find(|e| e.ticket == ticket) {
                entry.held = true;
            }
        }
        Held { locks: self, ticket }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut state = self.locks.state.lock();
        if let Some(index) = state.entries.iter().position(|e| e.ticket == self.ticket) {
            state.entries.remove(index);
        }
        if state.waiting > 0 {
            self.locks.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicI64, Ordering};
    use std::thread;

    #[test]
    fn exclusive_means_alone_and_nobody_starves() {
        let locks = Arc::new(RangeLocks::default());
        // Per slot of the range: readers count up by one, a writer sets -1000.
        let slots: Arc<Vec<AtomicI64>> = Arc::new((0..16).map(|_| AtomicI64::new(0)).collect());
        let threads: Vec<_> = (0..6u64)
            .map(|t| {
                let (locks, slots) = (locks.clone(), slots.clone());
                thread::spawn(move || {
                    let mut x = t + 1;
                    for _ in 0..3000 {
                        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let start = (x >> 33) % 16;
                        let end = (start + 1 + (x >> 40) % 4).min(16);
                        let exclusive = (x >> 50) % 3 == 0;
                        let add = if exclusive { -1000 } else { 1 };
                        let held = if exclusive { locks.exclusive(start, end) } else { locks.shared(start, end) };
                        for slot in &slots[start as usize..end as usize] {
                            let before = slot.fetch_add(add, Ordering::SeqCst);
                            assert!(if exclusive { before == 0 } else { before >= 0 }, "before {before}");
                        }
                        thread::yield_now();
                        for slot in &slots[start as usize..end as usize] {
                            slot.fetch_sub(add, Ordering::SeqCst);
                        }
                        drop(held);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert!(locks.state.lock().entries.is_empty());
    }
}
