//! NBD: negotiation and framing over one block device.
//!
//! [`wire`] has the protocol's numbers, [`handshake`] the negotiation, [`session`] the transmission of one connection, [`reply`] the encoding of
//! answers, [`delivery`] their way to the client, [`server`] the sockets, [`stream`] and [`tls`] what goes over them. Clause names refer to the NBD protocol's document (doc/proto.md of the reference implementation).

mod delivery;
mod handshake;
mod reply;
pub mod server;
mod session;
mod stream;
pub mod tls;
mod wire;

pub use server::{Listen, Server};
#[doc(hidden)]
pub use session::Workers;

use formats::BlockDevice;
use std::io::{self, Read, Write};
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

/// Negotiates with a client and serves it until it leaves, over any two-way stream; `output` is its sending half. Without sockets, for fuzzing.
#[doc(hidden)]
pub fn converse(stream: &mut (impl Read + Write), output: Box<dyn Write + Send>, export: &Export, workers: &Workers) -> io::Result<()> {
    match handshake::negotiate(stream, export)? {
        Some(agreed) => session::serve(stream, Box::new(output), export, agreed, workers),
        None => Ok(()),
    }
}
