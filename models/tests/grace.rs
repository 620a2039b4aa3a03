//! Grace periods: what is freed is not used again while somebody may still hold the old mapping.

mod runner;

use shuttle::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use shuttle::thread;
use std::sync::Arc;

/// A mapping moves from cluster to cluster; each one that is left is freed, and used again when it may be. Readers look the mapping up, and find the data of
/// the mapping's owner in the cluster for as long as they are inside.
macro_rules! model {
    ($module:ident) => {
        || {
            use models::$module::Grace;
            struct World {
                grace: Grace,
                mapping: AtomicUsize,
                /// Whether a cluster belongs to somebody else by now.
                reused: [AtomicBool; 4],
            }
            let world =
                Arc::new(World { grace: Grace::default(), mapping: AtomicUsize::new(0), reused: [(); 4].map(|()| AtomicBool::new(false)) });
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    let world = world.clone();
                    thread::spawn(move || {
                        for _ in 0..3 {
                            let entered = world.grace.enter();
                            let cluster = world.mapping.load(SeqCst);
                            assert!(!world.reused[cluster].load(SeqCst), "a reader's cluster was used again");
                            thread::yield_now();
                            assert!(!world.reused[cluster].load(SeqCst), "a reader's cluster was used again");
                            drop(entered);
                        }
                    })
                })
                .collect();
            let writer = {
                let world = world.clone();
                thread::spawn(move || {
                    let mut freed = Vec::new();
                    for next in 1..4 {
                        world.mapping.store(next, SeqCst);
                        freed.push((next - 1, world.grace.stamp()));
                        let now = world.grace.advance();
                        freed.retain(|(cluster, stamp)| {
                            let passed = Grace::passed(*stamp, now);
                            if passed {
                                world.reused[*cluster].store(true, SeqCst);
                            }
                            !passed
                        });
                    }
                    freed
                })
            };
            let freed = writer.join().unwrap();
            readers.into_iter().for_each(|t| t.join().unwrap());
            // Nobody is inside: all of it comes free.
            let now = world.grace.advance();
            assert!(freed.iter().all(|(_, stamp)| Grace::passed(*stamp, now)), "space is held for ever");
        }
    };
}

#[test]
fn nothing_is_reused_under_a_reader() {
    runner::holds(5000, model!(grace));
}

#[test]
fn mutants_are_found() {
    runner::finds(5000, model!(grace_one_epoch_is_enough));
    runner::finds(5000, model!(grace_nobody_is_waited_for));
    runner::finds(5000, model!(grace_stamp_of_the_past));
}
