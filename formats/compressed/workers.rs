//! The helper threads that decode ahead: few, shared by all streams of the process, started when first needed.

use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

type Job = Box<dyn FnOnce() + Send>;

/// Jobs beyond this many are refused: they are worth doing now or not at all.
const QUEUE: usize = 64;
const MAX_THREADS: usize = 4;

/// A queue, and the threads that serve it.
pub(super) struct Workers {
    queue: Mutex<VecDeque<Job>>,
    filled: Condvar,
}

/// How many threads decode: one a processor, at most four.
pub(super) fn thread_count() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS)
}

impl Workers {
    /// The process's threads.
    pub(super) fn shared() -> &'static Self {
        static SHARED: OnceLock<Workers> = OnceLock::new();
        static STARTED: OnceLock<()> = OnceLock::new();
        let workers = SHARED.get_or_init(|| Self { queue: Mutex::default(), filled: Condvar::new() });
        STARTED.get_or_init(|| {
            for n in 0..thread_count() {
                let started = std::thread::Builder::new().name(format!("img decode {n}")).spawn(|| workers.serve());
                if let Err(error) = started {
                    // Without helpers readers decode for themselves.
                    tracing::warn!("cannot start a decoding thread: {error}");
                }
            }
        });
        workers
    }

    /// Has the job done soon, unless too much is waiting: false.
    pub(super) fn submit(&self, job: impl FnOnce() + Send + 'static) -> bool {
        let mut queue = self.queue.lock();
        if queue.len() >= QUEUE {
            return false;
        }
        queue.push_back(Box::new(job));
        drop(queue);
        self.filled.notify_one();
        true
    }

    fn serve(&self) {
        loop {
            let job = {
                let mut queue = self.queue.lock();
                loop {
                    if let Some(job) = queue.pop_front() {
                        break job;
                    }
                    self.filled.wait(&mut queue);
                }
            };
            // A decoder's bug must not take the threads away from all other streams. The reader meets it again in its own thread.
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                tracing::error!("a decoder panicked while decoding ahead");
            }
        }
    }
}
