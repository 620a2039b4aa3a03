//! The range locks: holders of ranges that overlap exclude each other if one of them is exclusive, and nobody waits for ever.

mod runner;

use shuttle::sync::atomic::{AtomicI64, Ordering::SeqCst};
use shuttle::thread;
use std::sync::Arc;

/// Ranges and modes that three threads take one after the other: neighbours, nested ones, equal ones.
const PLANS: [[(u64, u64, bool); 2]; 3] = [[(0, 2, true), (1, 4, false)], [(1, 3, false), (0, 1, true)], [(2, 3, true), (0, 4, false)]];

macro_rules! model {
    ($module:ident) => {
        || {
            use models::$module::RangeLocks;
            let locks = Arc::new(RangeLocks::default());
            // Who is in a slot: a reader counts up by one, a writer takes off a thousand.
            let slots: Arc<Vec<AtomicI64>> = Arc::new((0..4).map(|_| AtomicI64::new(0)).collect());
            let threads: Vec<_> = PLANS
                .into_iter()
                .map(|plan| {
                    let (locks, slots) = (locks.clone(), slots.clone());
                    thread::spawn(move || {
                        for (start, end, exclusive) in plan {
                            let held = if exclusive { locks.exclusive(start, end) } else { locks.shared(start, end) };
                            let add = if exclusive { -1000 } else { 1 };
                            for slot in &slots[start as usize..end as usize] {
                                let before = slot.fetch_add(add, SeqCst);
                                assert!(if exclusive { before == 0 } else { before >= 0 }, "two who exclude each other are in one range");
                            }
                            slots[start as usize..end as usize].iter().for_each(|slot| _ = slot.fetch_sub(add, SeqCst));
                            drop(held);
                        }
                    })
                })
                .collect();
            threads.into_iter().for_each(|t| t.join().unwrap());
        }
    };
}

#[test]
fn exclusive_means_alone_and_everybody_gets_in() {
    runner::holds(3000, model!(ranges));
}

#[test]
fn mutants_are_found() {
    runner::finds(3000, model!(ranges_shared_beside_exclusive));
    runner::finds(3000, model!(ranges_touching_is_not_overlapping));
    runner::finds(3000, model!(ranges_last_waiter_forgotten));
    runner::finds(3000, model!(ranges_one_waiter_woken));
}
