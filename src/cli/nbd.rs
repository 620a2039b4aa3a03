//! `img-tcmu nbd`: an image as an NBD export.

use super::{Failure, ImageArgs};
use crate::export::nbd::{Export, Listen, Server};
use crate::image::{Disk, Purpose};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

/// Serve an image over NBD, in the foreground, until SIGINT or SIGTERM
///
/// For hosts without TCMU: nbd-client makes a local disk of it, and qemu-img, nbdcopy, nbdinfo and libguestfs use it as it is. A single export, under
/// any name that the client asks for with --name and under the empty one. There is no encryption and no authentication: listen on a Unix socket, or on
/// an address that only trusted hosts reach.
#[derive(Debug, Args)]
pub struct Nbd {
    #[command(flatten)]
    image: ImageArgs,
    /// Listen on this Unix socket, which must not exist yet
    #[arg(long, value_name = "PATH", required_unless_present = "listen", conflicts_with = "listen")]
    socket: Option<PathBuf>,
    /// Listen on this address and port, for example 127.0.0.1:10809
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// Serve it read-only
    #[arg(short, long)]
    read_only: bool,
    /// Name of the export
    #[arg(long, default_value = "")]
    name: String,
}

impl Nbd {
    /// Serves until it is told to end.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let Disk { image, device } = self.image.open(if self.read_only { Purpose::Read } else { Purpose::Serve })?;
        let listen = match (self.socket, self.listen) {
            (Some(path), _) => Listen::Unix(path),
            (None, Some(address)) => Listen::Tcp(address),
            (None, None) => return Err(Failure::new("give --socket or --listen")),
        };
        let description = format!("{} ({})", image.path().display(), image.format().name());
        let server = Server::new(&listen, Export { name: self.name, description, device })
            .map_err(|e| Failure::caused(format!("cannot listen on {listen}"), e))?;
        eprintln!("img-tcmu: serving {} on {}", image.path().display(), server.address());
        server.run().map_err(|e| Failure::caused("the server ended", e))?;
        image.close()?;
        Ok(ExitCode::SUCCESS)
    }
}
