//! The kernel's TCMU interface: user-space backstores of the Linux SCSI target (`target_core_user`).
//!
//! This module owns everything between the kernel and a SCSI device in user space: the shared-memory [`ring`], its UIO device
//! ([`uio`]), the events about devices ([`netlink`]) and the administration by configfs ([`configfs`]). It knows nothing of SCSI
//! beyond the length of a CDB, and nothing of images.
//!
//! A device's life, as its owner sees it: [`netlink`] announces it (or [`uio::scan`] finds it), [`uio::Uio::open`] and
//! [`Uio::map`](uio::Uio::map) give its memory, [`ring::Ring`] turns that into a stream of commands, and each
//! [`Command`] is answered with a [`Completion`].
//!
//! [`fake`] plays the kernel on a memfd, for tests and benchmarks.

pub mod abi;
pub mod configfs;
mod error;
pub mod fake;
pub mod netlink;
pub mod ring;
pub mod uio;

pub use error::{Error, Result, RingFault};
pub use ring::{Command, Completion, Data, Doorbell, Fetched, Region, Ring, TaskManagement, TmrKind};
