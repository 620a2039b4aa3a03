//! The cache of decoded units: one decode however many readers wait, nothing old after a removal, nobody waits for ever, bytes are counted right.

mod runner;

use shuttle::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use shuttle::thread;
use std::sync::Arc;

/// Readers of two units, a decode that fails once, and a writer that changes what a unit is decoded from and removes it.
macro_rules! model {
    ($module:ident) => {
        || {
            use models::$module::Cache;
            struct World {
                cache: Cache,
                /// What unit 0 is decoded from.
                source: AtomicUsize,
                /// Removals of it so far.
                removed: AtomicUsize,
                decoding: [AtomicUsize; 2],
            }
            let world = Arc::new(World {
                cache: Cache::new(5),
                source: AtomicUsize::new(1),
                removed: AtomicUsize::new(0),
                decoding: [AtomicUsize::new(0), AtomicUsize::new(0)],
            });
            let get = |world: &World, unit: usize| {
                let removed = world.removed.load(SeqCst);
                let result = world.cache.get((7, unit as u64), 3, |out| {
                    let before = world.decoding[unit].fetch_add(1, SeqCst);
                    // After a removal a new decode may run beside the old one.
                    assert!(before == 0 || unit == 0 && world.source.load(SeqCst) > 1, "a unit is decoded twice at once");
                    let value = world.source.load(SeqCst) as u8;
                    thread::yield_now();
                    out.extend([value; 3]);
                    world.decoding[unit].fetch_sub(1, SeqCst);
                    Ok(())
                });
                (removed, result.unwrap()[0] as usize)
            };
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    let world = world.clone();
                    thread::spawn(move || {
                        for unit in [0, 1, 0] {
                            let (removed, value) = get(&world, unit);
                            assert!(unit == 1 || value > removed, "the unit is older than its removal");
                        }
                    })
                })
                .collect();
            let writer = {
                let world = world.clone();
                thread::spawn(move || {
                    for _ in 0..2 {
                        world.source.fetch_add(1, SeqCst);
                        world.cache.remove((7, 0));
                        world.removed.fetch_add(1, SeqCst);
                    }
                })
            };
            writer.join().unwrap();
            readers.into_iter().for_each(|t| t.join().unwrap());
            assert_eq!(get(&world, 0).1, 3, "what is kept is what was decoded last");
            let stats = world.cache.stats();
            assert!(stats.used <= stats.budget, "more is kept than may be");
            world.cache.forget(7);
            assert_eq!(world.cache.stats().used, 0, "bytes are miscounted");
        }
    };
}

#[test]
fn one_flight_and_nothing_old() {
    runner::holds(3000, model!(cache));
}

#[test]
fn mutants_are_found() {
    runner::finds(5000, model!(cache_stale_unit_kept));
    runner::finds(5000, model!(cache_another_flight_ended));
    runner::finds(5000, model!(cache_decoded_twice));
    runner::finds(5000, model!(cache_waiters_not_woken));
    runner::finds(5000, model!(cache_outcome_after_the_call));
    runner::finds(5000, model!(cache_bytes_miscounted));
}
