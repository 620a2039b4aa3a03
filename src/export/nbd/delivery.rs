//! The way of answers to one client.
//!
//! The connection's own thread may wait for its client. A worker may not: clients that do not take their answers would take all the workers, which belong to
//! everybody. A worker's answer goes straight to the socket if that has room for it; else it is queued, and a thread that lives for as long as that is
//! needed sends it. Requests count as the connection's until their answers are sent, in number and in bytes, so that the queue is bounded.

use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

/// Requests of one connection that workers and queue have at the same time; further ones are done by the connection's own thread.
const MAX_HANDED: usize = 64;
/// The same for bytes of answers. One request is always let in, whatever its size.
const MAX_BYTES: usize = 64 << 20;
/// What surely fits into a socket that says it has room.
const SMALL: usize = 16 << 10;
/// The sending thread stays for so long, in case there is more.
const LINGER: Duration = Duration::from_secs(2);

/// A connection's sending half.
pub type Output = Box<dyn Sink>;

/// Where answers go.
pub trait Sink: Write + Send {
    /// Whether a small write would not have to wait.
    fn has_room(&self) -> bool {
        true
    }
}

/// A stream that can always be written to, as far as anybody knows.
impl Sink for Box<dyn Write + Send> {}

#[derive(Default)]
struct Queue {
    /// Answers, and what they cost.
    answers: VecDeque<(Vec<u8>, usize)>,
    sender: bool,
    /// Nothing more comes.
    ended: bool,
    /// Requests that workers and queue have, and their bytes.
    handed: usize,
    bytes: usize,
}

/// The way to one client.
pub struct Delivery {
    output: Mutex<Output>,
    queue: Mutex<Queue>,
    /// An answer was queued, or sent.
    changed: Condvar,
}

impl Delivery {
    /// The way over `output`.
    pub fn new(output: Output) -> Self {
        Self { output: Mutex::new(output), queue: Mutex::default(), changed: Condvar::new() }
    }

    /// Sends, waiting for the client.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.output.lock().write_all(bytes)
    }

    /// Whether a worker may have one more request, with an answer of `cost` bytes. It is counted until its answer is sent.
    pub fn begin(&self, cost: usize) -> bool {
        let mut queue = self.queue.lock();
        let fits = queue.handed < MAX_HANDED && (queue.handed == 0 || queue.bytes.saturating_add(cost) <= MAX_BYTES);
        if fits {
            queue.handed += 1;
            queue.bytes = queue.bytes.saturating_add(cost);
        }
        fits
    }

    /// Sends the answer to a request that was begun, without waiting for the client.
    pub fn deliver(self: &Arc<Self>, answer: Vec<u8>, cost: usize) {
        let mut queue = self.queue.lock();
        if !queue.sender
            && answer.len() <= SMALL
            && let Some(mut output) = self.output.try_lock()
            && output.has_room()
        {
            drop(queue);
            // A client that is gone is its reader's to notice.
            let _ = output.write_all(&answer);
            drop(output);
            self.sent(cost);
            return;
        }
        queue.answers.push_back((answer, cost));
        if queue.sender {
            drop(queue);
            self.changed.notify_all();
            return;
        }
        queue.sender = true;
        drop(queue);
        let mine = self.clone();
        if let Err(error) = std::thread::Builder::new().name("nbd-send".into()).stack_size(256 << 10).spawn(move || mine.run()) {
            tracing::warn!(%error, "cannot start a thread: a worker sends");
            self.run();
        }
    }

    /// Waits until all that was begun is answered, or cannot be any more.
    pub fn finish(&self) {
        let mut queue = self.queue.lock();
        while queue.handed > 0 {
            self.changed.wait(&mut queue);
        }
        queue.ended = true;
        self.changed.notify_all();
    }

    /// Sends what is queued, and what comes within a while.
    fn run(&self) {
        let mut queue = self.queue.lock();
        loop {
            let Some((answer, cost)) = queue.answers.pop_front() else {
                let idle = queue.ended || self.changed.wait_for(&mut queue, LINGER).timed_out();
                if idle && queue.answers.is_empty() {
                    queue.sender = false;
                    return;
                }
                continue;
            };
            drop(queue);
            let _ = self.output.lock().write_all(&answer);
            self.sent(cost);
            queue = self.queue.lock();
        }
    }

    fn sent(&self, cost: usize) {
        let mut queue = self.queue.lock();
        queue.handed -= 1;
        queue.bytes = queue.bytes.saturating_sub(cost);
        drop(queue);
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// A client that takes nothing before it is told to.
    struct Stubborn(mpsc::Receiver<()>, mpsc::Sender<Vec<u8>>);

    impl Write for Stubborn {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.recv().map_err(io::Error::other)?;
            self.1.send(bytes.to_vec()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Sink for Stubborn {
        fn has_room(&self) -> bool {
            false
        }
    }

    #[test]
    fn a_worker_does_not_wait_and_nothing_is_lost() {
        let ((go, wait), (told, got)) = (mpsc::channel(), mpsc::channel());
        let delivery = Arc::new(Delivery::new(Box::new(Stubborn(wait, told))));
        for number in 0..MAX_HANDED {
            assert!(delivery.begin(0));
            delivery.deliver(vec![number as u8], 0);
        }
        assert!(!delivery.begin(0), "as many as may wait do");
        for _ in 0..MAX_HANDED {
            go.send(()).unwrap();
        }
        delivery.finish();
        let all: Vec<u8> = got.try_iter().flatten().collect();
        assert_eq!(all, (0..MAX_HANDED as u8).collect::<Vec<_>>());
    }

    #[test]
    fn bytes_are_bounded_but_one_answer_may_be_of_any_size() {
        let (told, got) = mpsc::channel();
        let (go, wait) = mpsc::channel();
        let delivery = Arc::new(Delivery::new(Box::new(Stubborn(wait, told))));
        assert!(delivery.begin(MAX_BYTES + 1));
        assert!(!delivery.begin(1));
        delivery.deliver(vec![1; 10], MAX_BYTES + 1);
        assert!(!delivery.begin(1), "it is not sent yet");
        go.send(()).unwrap();
        delivery.finish();
        assert!(delivery.begin(1) && delivery.begin(MAX_BYTES - 1) && !delivery.begin(1));
        assert_eq!(got.try_iter().flatten().count(), 10);
    }

    /// A client that is gone: errors are its reader's, nobody hangs.
    #[test]
    fn a_dead_client_ends_it() {
        let (told, _got) = mpsc::channel();
        let (go, wait) = mpsc::channel();
        let delivery = Arc::new(Delivery::new(Box::new(Stubborn(wait, told))));
        for _ in 0..5 {
            assert!(delivery.begin(7));
            delivery.deliver(vec![1; SMALL + 1], 7);
        }
        drop(go);
        delivery.finish();
        assert!(delivery.send(b"x").is_err());
    }
}
