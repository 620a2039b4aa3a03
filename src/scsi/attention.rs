//! Unit attentions waiting to be told: capacity changed, threshold reached.
//!
//! The ring does not say which initiator sent a command, so each condition is reported once, to whoever asks next.

use crate::scsi::sense::Triple;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

/// The queue of one logical unit.
#[derive(Default)]
pub struct Attention {
    /// The queue is not empty; spares every command the lock.
    pending: AtomicBool,
    queue: Mutex<VecDeque<Triple>>,
}

impl Attention {
    /// Queues a condition, unless it is waiting already.
    pub fn raise(&self, condition: Triple) {
        let mut queue = self.queue.lock();
        if !queue.contains(&condition) {
            queue.push_back(condition);
        }
        self.pending.store(true, Ordering::Release);
    }

    /// Takes the oldest condition.
    pub fn take(&self) -> Option<Triple> {
        if !self.pending.load(Ordering::Acquire) {
            return None;
        }
        let mut queue = self.queue.lock();
        let condition = queue.pop_front();
        self.pending.store(!queue.is_empty(), Ordering::Release);
        condition
    }
}
