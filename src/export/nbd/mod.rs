//! NBD: negotiation and framing over one block device.
//!
//! [`wire`] has the protocol's numbers, [`handshake`] the negotiation, [`session`] the transmission of one connection, [`reply`] the encoding of
//! answers, [`server`] the sockets, [`stream`] and [`tls`] what goes over them. Clause names refer to the NBD protocol's document (doc/proto.md of the reference implementation).

mod handshake;
mod reply;
pub mod server;
mod session;
mod stream;
pub mod tls;
mod wire;

pub use server::{Listen, Server};

use formats::BlockDevice;
use std::sync::Arc;

/// The device that is exported, and what clients are told of it.
#[derive(Clone)]
pub struct Export {
    /// The name that clients ask for; "" is the default one, which every server of a single export also answers to.
    pub name: String,
    /// A line about it for `nbdinfo --list`.
    pub description: String,
    /// The disk.
    pub device: Arc<dyn BlockDevice>,
}
