//! Rings that somebody should look at although the kernel did not ring: a queue, and an event to wake one thread for each entry.

use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

/// The queue of a pool. Its event is polled edge-triggered and never read: each write is an edge.
#[derive(Debug)]
pub(super) struct Inbox {
    event: EventFd,
    keys: Mutex<VecDeque<u64>>,
}

impl Inbox {
    pub fn new() -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { event, keys: Mutex::default() })
    }

    /// Asks for a thread to look at device `key`.
    pub fn push(&self, key: u64) {
        self.keys.lock().push_back(key);
        self.wake();
    }

    /// Takes the next device. If there are more, another thread is woken for them.
    pub fn pop(&self) -> Option<u64> {
        let (key, more) = {
            let mut keys = self.keys.lock();
            (keys.pop_front(), !keys.is_empty())
        };
        if more {
            self.wake();
        }
        key
    }

    /// Wakes a thread.
    pub fn wake(&self) {
        // The counter is 64 bits: it does not overflow, so the write does not fail.
        if let Err(error) = self.event.write(1) {
            tracing::error!("cannot wake a thread: {error}");
        }
    }
}

impl AsFd for Inbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
