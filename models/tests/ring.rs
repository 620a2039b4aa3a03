//! The ring against the kernel: every command is fetched once and answered once, no completion is left untold, nothing of the ring is damaged, in whatever order
//! threads fetch, complete and kick.

mod runner;

use shuttle::sync::{Condvar, Mutex};
use shuttle::thread;
use std::sync::Arc;

/// Two threads that serve a ring as the daemon's do, each holding some commands back, and a kernel that sends commands of many sizes in three batches.
macro_rules! model {
    ($module:ident) => {
        || {
            use models::$module::fake::{FakeKernel, Options, Request};
            use models::$module::{Completion, Fetched, Ring};
            struct Bell {
                edges: Mutex<(usize, bool)>,
                rung: Condvar,
            }
            impl Bell {
                fn ring(&self, last: bool) {
                    let mut edges = self.edges.lock().unwrap();
                    *edges = (edges.0 + 1, last);
                    self.rung.notify_all();
                }

                /// Waits for an edge; false: there will be none.
                fn wait(&self) -> bool {
                    let mut edges = self.edges.lock().unwrap();
                    loop {
                        if edges.0 > 0 {
                            edges.0 -= 1;
                            return true;
                        }
                        if edges.1 {
                            return false;
                        }
                        edges = self.rung.wait(edges).unwrap();
                    }
                }
            }
            let options = Options { ring_size: 1024, blocks: 32, fragmented: true, ..Options::default() };
            let kernel = FakeKernel::new(options).unwrap();
            let ring = Ring::attach(kernel.map().unwrap(), kernel.doorbell(), "model", Completion::check_condition(&[0x70])).unwrap();
            let bell = Arc::new(Bell { edges: Mutex::new((0, false)), rung: Condvar::new() });
            let threads: Vec<_> = (0..2)
                .map(|number| {
                    let (ring, bell) = (ring.clone(), bell.clone());
                    thread::spawn(move || {
                        let mut held = Vec::new();
                        while bell.wait() {
                            ring.kick().unwrap();
                            while let Some(fetched) = ring.fetch().unwrap() {
                                let Fetched::Command(command) = fetched else { continue };
                                held.push(command);
                                // One thread answers out of order.
                                if held.len() > number {
                                    held.remove(0).complete(Completion::good());
                                }
                            }
                            held.drain(..).rev().for_each(|command| command.complete(Completion::good()));
                            ring.kick().unwrap();
                        }
                    })
                })
                .collect();
            let requests = [
                Request::read(&[0x28, 0, 0, 0, 0, 1, 0, 0, 8, 0], 4096),
                Request::without_data(&[0, 0, 0, 0, 0, 0]),
                Request::write(&[0x8a, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 16, 0, 0], vec![7; 10 * 4096]),
                Request::read(&[0x7f, 0, 0, 0, 0, 0, 0, 24, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9], 512),
                Request::without_data(&[0, 0, 0, 0, 0, 0]),
            ];
            let mut sent = Vec::new();
            for (round, batch) in [&requests[..2], &requests[2..3], &requests[3..]].into_iter().enumerate() {
                sent.extend(kernel.submit_silently(batch));
                bell.ring(round == 2);
                thread::yield_now();
            }
            threads.into_iter().for_each(|t| t.join().unwrap());
            assert_eq!(kernel.violations(), [], "the ring was damaged");
            assert_eq!((kernel.outstanding(), kernel.answers().len()), (0, sent.len()), "commands sent and answered");
            assert_eq!((ring.in_flight(), ring.held_back(), ring.needs_kick()), (0, 0, false));
        }
    };
}

#[test]
fn every_command_is_answered_once() {
    runner::holds(3000, model!(tcmu));
}

#[test]
fn mutants_are_found() {
    runner::finds(5000, model!(tcmu_completions_not_announced));
    runner::finds(5000, model!(tcmu_kick_before_the_flag));
    runner::finds(5000, model!(tcmu_slot_too_small));
    runner::finds(5000, model!(tcmu_command_not_moved));
}
