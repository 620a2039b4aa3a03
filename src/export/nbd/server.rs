//! The sockets: where to listen, who may connect, and the end.

use super::Export;
use super::delivery::Sink;
use super::handshake::{self, Outcome, Security};
use super::session::{self, Workers};
use super::stream::{Both, Patient, Stream};
use super::tls::Tls;
use nix::sys::signal::Signal;
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Connections at the same time; further ones are closed at once.
const MAX_CONNECTIONS: usize = 1024;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A Unix socket, made by us and removed at the end.
    Unix(PathBuf),
    /// An address and port, like `[::1]:10809`.
    Tcp(String),
    /// The socket that the service manager, or a client, opened for us (LISTEN_FDS of sd_listen_fds(3)).
    Passed,
}

impl std::fmt::Display for Listen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp(address) => f.write_str(address),
            Self::Passed => f.write_str("the socket that was passed"),
        }
    }
}

enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// A server of one export.
pub struct Server {
    socket: Socket,
    /// To be removed at the end.
    path: Option<PathBuf>,
    export: Export,
    tls: Option<Tls>,
    workers: Workers,
    connections: Arc<AtomicUsize>,
}

impl Server {
    /// Opens the socket.
    ///
    /// # Errors
    /// The host's: the path exists, the port is taken.
    pub fn new(listen: &Listen, export: Export, tls: Option<Tls>) -> io::Result<Self> {
        allow_many_files();
        let (socket, path) = match listen {
            Listen::Unix(path) => (Socket::Unix(UnixListener::bind(path)?), Some(path.clone())),
            Listen::Tcp(address) => (Socket::Tcp(TcpListener::bind(address.as_str())?), None),
            Listen::Passed => (passed()?, None),
        };
        let cpus = std::thread::available_parallelism().map_or(2, usize::from);
        Ok(Self { socket, path, export, tls, workers: Workers::new((2 * cpus).max(4))?, connections: Arc::default() })
    }

    /// The address in use, for whoever asked for port 0.
    pub fn address(&self) -> String {
        match &self.socket {
            Socket::Tcp(listener) => listener.local_addr().map_or_else(|e| e.to_string(), |a| a.to_string()),
            Socket::Unix(listener) => {
                let path = listener.local_addr().ok().and_then(|a| a.as_pathname().map(|p| p.display().to_string()));
                path.unwrap_or_else(|| "a socket without a name".into())
            }
        }
    }

    /// Serves connections until the process is told to end (SIGINT, SIGTERM), then flushes.
    ///
    /// # Errors
    /// The socket's, or that of the last flush.
    pub fn run(self) -> io::Result<()> {
        let mut signals = signal_hook::iterator::Signals::new([Signal::SIGINT as i32, Signal::SIGTERM as i32])?;
        let listening = match &self.socket {
            Socket::Unix(listener) => listener.as_fd().try_clone_to_owned()?,
            Socket::Tcp(listener) => listener.as_fd().try_clone_to_owned()?,
        };
        std::thread::Builder::new().name("nbd-signals".into()).spawn(move || {
            if signals.forever().next().is_some() {
                // Makes `accept` return. If that fails the process ends by the next signal.
                let _ = nix::sys::socket::shutdown(listening.as_raw_fd(), nix::sys::socket::Shutdown::Both);
            }
        })?;
        loop {
            let accepted: io::Result<Box<dyn Stream>> = match &self.socket {
                Socket::Unix(listener) => listener.accept().map(|(s, _)| Box::new(s) as Box<dyn Stream>),
                Socket::Tcp(listener) => listener.accept().and_then(|(s, _)| {
                    s.set_nodelay(true)?;
                    Ok(Box::new(s) as Box<dyn Stream>)
                }),
            };
            match accepted {
                Ok(stream) => self.connect(stream),
                Err(e) if e.raw_os_error() == Some(nix::libc::EINVAL) => break,
                Err(e) if matches!(e.raw_os_error(), Some(nix::libc::EMFILE | nix::libc::ENFILE | nix::libc::ENOMEM)) => {
                    tracing::warn!(error = %e, "cannot accept a connection now");
                    std::thread::sleep(Duration::from_millis(100));
                }
                Err(e) => tracing::debug!(error = %e, "a connection went away"),
            }
        }
        self.export.device.flush().map_err(|e| io::Error::other(e.chain()))
    }

    fn connect(&self, stream: Box<dyn Stream>) {
        if self.connections.fetch_add(1, Ordering::SeqCst) >= MAX_CONNECTIONS {
            self.connections.fetch_sub(1, Ordering::SeqCst);
            tracing::warn!("{MAX_CONNECTIONS} connections are open: another one is refused");
            return;
        }
        let (export, tls, workers, connections) = (self.export.clone(), self.tls.clone(), self.workers.clone(), self.connections.clone());
        let spawned = std::thread::Builder::new().name("nbd-client".into()).stack_size(512 << 10).spawn(move || {
            match converse(stream, &export, tls.as_ref(), &workers) {
                Ok(()) => tracing::debug!("a client left"),
                Err(e) => tracing::info!(error = %e, "a connection ended"),
            }
            connections.fetch_sub(1, Ordering::SeqCst);
        });
        if let Err(e) = spawned {
            self.connections.fetch_sub(1, Ordering::SeqCst);
            tracing::warn!(error = %e, "cannot start a thread for a connection");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Somebody may have removed it already.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn converse(stream: Box<dyn Stream>, export: &Export, tls: Option<&Tls>, workers: &Workers) -> io::Result<()> {
    let second = stream.second()?;
    let mut input = Patient::new(stream);
    let Some(tls) = tls else {
        let Some(agreed) = handshake::negotiate(&mut input, export)? else { return Ok(()) };
        input.lift()?;
        let result = session::serve(&mut input, Box::new(Sending(second)), export, agreed, workers);
        input.hang_up();
        return result;
    };
    let no_zeroes = handshake::greet(&mut input)?;
    if handshake::haggle(&mut input, export, no_zeroes, Security::Wanted)? != Outcome::StartTls {
        return Ok(());
    }
    let (mut input, mut output) = tls.accept(input, second)?;
    let outcome = handshake::haggle(&mut Both(&mut input, &mut output), export, no_zeroes, Security::Tls);
    let result = match outcome {
        Ok(Outcome::Agreed(agreed)) => {
            input.lift()?;
            session::serve(&mut input, Box::new(output.second()), export, agreed, workers)
        }
        Ok(Outcome::Left | Outcome::StartTls) => Ok(()),
        Err(error) => Err(error),
    };
    output.close();
    result
}

/// Two descriptors a connection are more than the usual limit of 1024 has for them all.
fn allow_many_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let wanted = 4 * MAX_CONNECTIONS as u64;
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(soft, hard)| if soft < wanted { setrlimit(Resource::RLIMIT_NOFILE, wanted.min(hard), hard) } else { Ok(()) });
    if let Err(error) = raised {
        tracing::debug!(%error, "cannot raise the limit of open files");
    }
}

/// The one socket that was passed.
fn passed() -> io::Result<Socket> {
    let mut sockets = listenfd::ListenFd::from_env();
    if sockets.len() != 1 {
        return Err(io::Error::other(format!("{} sockets were passed (LISTEN_FDS), and one is wanted", sockets.len())));
    }
    if let Ok(Some(listener)) = sockets.take_unix_listener(0) {
        listener.set_nonblocking(false)?;
        return Ok(Socket::Unix(listener));
    }
    match sockets.take_tcp_listener(0)? {
        Some(listener) => {
            listener.set_nonblocking(false)?;
            Ok(Socket::Tcp(listener))
        }
        None => Err(io::Error::other("the socket that was passed is gone")),
    }
}

/// A sending half that ends the whole connection when it fails, so that the reader notices.
struct Sending(Box<dyn Stream>);

impl Sink for Sending {
    fn has_room(&self) -> bool {
        self.0.has_room()
    }
}

impl Write for Sending {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).inspect_err(|e| {
            if e.kind() != io::ErrorKind::Interrupted {
                self.0.hang_up();
            }
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
