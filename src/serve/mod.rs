//! Threads that move commands from rings to answers.
//!
//! A [`Pool`] has a fixed number of threads for any number of rings. All of them sleep on one epoll; an event on a ring wakes one,
//! and that thread fetches, executes and completes one command after the other until the ring is empty, and then tells the
//! kernel once. Nothing is handed from thread to thread on this path.
//!
//! What may wait must not keep others waiting:
//!
//! - A command is first tried in a way that cannot wait ([`Service::try_execute`]). If that is not possible, the thread makes
//!   sure before it goes on that somebody else looks after the rest of the ring: a free thread is woken to fetch on, and to
//!   announce what this one has completed.
//! - The other threads keep sleeping on the epoll, so events on other rings, and new ones on this ring, find them.
//! - If commands hang (a file server that is gone), a watch adds spare threads, up to a limit, and keeps the last free threads
//!   away from the devices that hang ([`watch`]).
//!
//! A panic while a command is executed, or a ring that breaks, takes that one device out of service: its commands fail from
//! then on, the others are served as before.
//!
//! This module knows nothing of what commands mean; [`scsi`] plugs the SCSI layer in.

mod inbox;
mod pool;
mod scsi;
mod served;
mod statistics;
mod watch;

pub use pool::Pool;
pub use served::{Served, Stopping};
pub use statistics::{Counts, Kind, Snapshot};
pub use watch::Stuck;

use crate::tcmu::{Command, Completion, TaskManagement};

/// What executes the commands of a device. Called by several threads at once.
pub trait Service: Send + Sync {
    /// Executes the command if that needs no wait for a disk, a lock or a computation; none if it would: then nothing has
    /// happened but that the buffer may have changed.
    fn try_execute(&self, command: &mut Command) -> Option<Completion> {
        let _ = command;
        None
    }

    /// Executes the command.
    fn execute(&self, command: &mut Command) -> Completion;

    /// What a command with this operation code is counted as.
    fn kind(&self, opcode: u8) -> Kind {
        let _ = opcode;
        Kind::Other
    }

    /// Somebody gave up commands. They are completed as usual.
    fn task_management(&self, notice: &TaskManagement) {
        let _ = notice;
    }

    /// The device was taken out of service for good, and why. Called once.
    fn out_of_service(&self, reason: &str) {
        let _ = reason;
    }
}
