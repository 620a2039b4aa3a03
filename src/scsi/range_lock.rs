//! Keeps reads and writes out of a range while a command that must not be seen half done works on it: COMPARE AND WRITE,
//! ORWRITE, WRITE SAME with data, EXTENDED COPY.
//!
//! Ordinary I/O takes the lock shared. As long as nobody holds it exclusively that is one atomic increment and one
//! decrement; ranges are looked at only while an exclusive holder exists or waits. An exclusive holder first announces
//! itself, which turns the shortcut off, and then waits until the I/O that used it has ended and no range overlaps.

use parking_lot::{Condvar, Mutex};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A lock of byte ranges of one disk.
#[derive(Default)]
pub struct RangeLock {
    /// Shared holders that took the shortcut.
    unranged: AtomicUsize,
    /// Exclusive holders and those that wait to be.
    exclusive: AtomicUsize,
    table: Mutex<Table>,
    changed: Condvar,
}

#[derive(Default)]
struct Table {
    held: Vec<Entry>,
    next: u64,
}

struct Entry {
    id: u64,
    range: Range<u64>,
    exclusive: bool,
    /// Exclusive and not in force yet: keeps later requests from passing it, so that it is not starved.
    waiting: bool,
}

/// Holds a range until it is dropped.
pub struct Guard<'a> {
    lock: &'a RangeLock,
    /// The entry in the table; `None` for the shortcut.
    id: Option<u64>,
    exclusive: bool,
}

impl RangeLock {
    /// Waits until no exclusive holder overlaps `range`.
    pub fn shared(&self, range: Range<u64>) -> Guard<'_> {
        if let Some(guard) = self.try_shared() {
            return guard;
        }
        let mut table = self.table.lock();
        while table.held.iter().any(|e| e.exclusive && overlap(&e.range, &range)) {
            self.changed.wait(&mut table);
        }
        let id = table.insert(range, false);
        Guard { lock: self, id: Some(id), exclusive: false }
    }

    /// Takes the lock shared if that needs no wait and no look at ranges.
    pub fn try_shared(&self) -> Option<Guard<'_>> {
        // Sequentially consistent on both sides: either this increment is seen by an exclusive request that counts the
        // shortcuts after announcing itself, or that announcement is seen here.
        self.unranged.fetch_add(1, Ordering::SeqCst);
        if self.exclusive.load(Ordering::SeqCst) == 0 {
            return Some(Guard { lock: self, id: None, exclusive: false });
        }
        self.leave_unranged();
        None
    }

    /// Waits until nobody else holds any of `range`, or any byte at all through the shortcut.
    pub fn exclusive(&self, range: Range<u64>) -> Guard<'_> {
        self.exclusive.fetch_add(1, Ordering::SeqCst);
        let mut table = self.table.lock();
        let id = table.insert(range.clone(), true);
        // Of two requests that wait for each other's range, the earlier entry goes first.
        while self.unranged.load(Ordering::SeqCst) != 0
            || table.held.iter().any(|e| e.id != id && overlap(&e.range, &range) && (!e.waiting || e.id < id))
        {
            self.changed.wait(&mut table);
        }
        if let Some(entry) = table.held.iter_mut().find(|e| e.id == id) {
            entry.waiting = false;
        }
        Guard { lock: self, id: Some(id), exclusive: true }
    }

    fn leave_unranged(&self) {
        if self.unranged.fetch_sub(1, Ordering::SeqCst) == 1 && self.exclusive.load(Ordering::SeqCst) != 0 {
            // Under the mutex, or a waiter between its test and its sleep would miss this.
            let _table = self.table.lock();
            self.changed.notify_all();
        }
    }
}

impl Table {
    fn insert(&mut self, range: Range<u64>, exclusive: bool) -> u64 {
        let id = self.next;
        self.next += 1;
        self.held.push(Entry { id, range, exclusive, waiting: exclusive });
        id
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        let Some(id) = self.id else { return self.lock.leave_unranged() };
        let mut table = self.lock.table.lock();
        table.held.retain(|e| e.id != id);
        drop(table);
        if self.exclusive {
            self.lock.exclusive.fetch_sub(1, Ordering::SeqCst);
        }
        self.lock.changed.notify_all();
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn exclusive_waits_for_shared_and_the_other_way_round() {
        let lock = Arc::new(RangeLock::default());
        let shared = lock.shared(0..10);
        let (sent, got) = std::sync::mpsc::channel();
        let other = lock.clone();
        let thread = thread::spawn(move || {
            let _held = other.exclusive(5..6);
            sent.send(()).unwrap();
            thread::sleep(Duration::from_millis(50));
        });
        assert!(got.recv_timeout(Duration::from_millis(50)).is_err(), "not while a shared holder is in");
        drop(shared);
        got.recv_timeout(Duration::from_secs(10)).unwrap();
        let _elsewhere = lock.shared(6..7);
        let start = std::time::Instant::now();
        let _same = lock.shared(0..10);
        assert!(start.elapsed() > Duration::from_millis(10), "waited for the exclusive holder");
        thread.join().unwrap();
    }

    #[test]
    fn no_increment_is_lost_under_contention() {
        let lock = Arc::new(RangeLock::default());
        let cells: Arc<Vec<AtomicUsize>> = Arc::new((0..4).map(|_| AtomicUsize::new(0)).collect());
        let threads: Vec<_> = (0..8u64)
            .map(|t| {
                let (lock, cells) = (lock.clone(), cells.clone());
                thread::spawn(move || {
                    for i in 0..2000u64 {
                        let at = ((t * 7 + i) % 4) as usize;
                        if (t + i) % 3 == 0 {
                            drop(lock.shared(at as u64..at as u64 + 1));
                            continue;
                        }
                        // A read-modify-write that is only right when the range is held alone.
                        let _held = lock.exclusive(at as u64..at as u64 + 1);
                        let seen = cells[at].load(Ordering::Relaxed);
                        thread::yield_now();
                        cells[at].store(seen + 1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        let total: usize = cells.iter().map(|c| c.load(Ordering::Relaxed)).sum();
        let expected = (0..8u64).flat_map(|t| (0..2000u64).map(move |i| t + i)).filter(|n| n % 3 != 0).count();
        assert_eq!(total, expected);
    }
}
