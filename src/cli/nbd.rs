//! `img-tcmu nbd`: an image as an NBD export.

use super::{Failure, ImageArgs};
use crate::daemon::log;
use crate::export::manager;
use crate::export::nbd::tls::{Files, Tls};
use crate::export::nbd::{Export, Listen, Server};
use crate::image::{Disk, Purpose};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

/// Serve an image over NBD, in the foreground, until SIGINT or SIGTERM
///
/// For hosts without TCMU: nbd-client makes a local disk of it, and qemu-img, nbdcopy, nbdinfo and libguestfs use it as it is. A single export, under
/// any name that the client asks for with --name and under the empty one.
///
/// Without --tls-cert there is no encryption and no authentication: listen on a Unix socket, or on an address that only trusted hosts reach. With it, nothing
/// is served without TLS, and with --tls-ca nothing to clients without a certificate of that authority.
///
/// Without --socket and --listen the socket is the one that was passed on: by systemd (socket units; the service is of Type=notify), or by a client such as
/// 'nbdinfo [ img-tcmu nbd IMAGE ]'.
#[derive(Debug, Args)]
pub struct Nbd {
    #[command(flatten)]
    image: ImageArgs,
    /// Listen on this Unix socket, which must not exist yet
    #[arg(long, value_name = "PATH", conflicts_with = "listen")]
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
    /// Insist on TLS with this certificate; certificates of authorities between it and the root follow in the file (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The private key of --tls-cert (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Insist on clients with certificates that one of these authorities issued (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_ca: Option<PathBuf>,
}

impl Nbd {
    /// Serves until it is told to end.
    pub fn run(self) -> Result<ExitCode, Failure> {
        log::init("warn").map_err(Failure::new)?;
        let listen = match (self.socket, self.listen) {
            (Some(path), _) => Listen::Unix(path),
            (None, Some(address)) => Listen::Tcp(address),
            (None, None) if std::env::var_os("LISTEN_FDS").is_some() => Listen::Passed,
            (None, None) => {
                return Err(
                    Failure::new("give --socket or --listen (no socket was passed by a service manager)").code(super::failure::USAGE)
                );
            }
        };
        let tls = match (self.tls_cert, self.tls_key) {
            (Some(certificate), Some(key)) => Some(Files { certificate, key, clients: self.tls_ca }),
            _ => None,
        };
        let tls = tls.map(|files| Tls::new(&files)).transpose().map_err(|error| Failure::caused("cannot set up TLS", error))?;
        let Disk { image, device } = self.image.open(if self.read_only { Purpose::Read } else { Purpose::Serve })?;
        let description = format!("{} ({})", image.path().display(), image.format().name());
        let server = Server::new(&listen, Export { name: self.name, description, device }, tls)
            .map_err(|e| Failure::caused(format!("cannot listen on {listen}"), e))?;
        let what = format!("serving {} on {}", image.path().display(), server.address());
        eprintln!("img-tcmu: {what}");
        manager::ready(&what);
        server.run().map_err(|e| Failure::caused("the server ended", e))?;
        image.close()?;
        Ok(ExitCode::SUCCESS)
    }
}
