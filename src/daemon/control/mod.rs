//! The control socket: who may ask, how a question is read, who answers.
//!
//! Everything is bounded: the length of a request, the time it may take to arrive and its answer to leave, the number of
//! connections. None of it touches the threads that do I/O.

pub mod metrics;
pub mod protocol;
mod report;

pub use report::Reporter;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Uid;
use protocol::{MAX_REQUEST, PROTOCOL, Reply, Request};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{self, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

/// Name of the socket in the run directory.
pub const SOCKET: &str = "control.sock";

/// How long a request may take to arrive, and its answer to be taken.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long the main thread may take for its answer: it may be retrying devices.
const MAIN_PATIENCE: Duration = Duration::from_secs(30);

/// Connections at a time.
const MAX_CONNECTIONS: usize = 32;

/// A question that only the main thread can answer.
#[derive(Debug)]
pub enum Order {
    /// Read the configuration again.
    Reload,
    /// Become this program.
    Upgrade(PathBuf),
}

/// An order, and where its outcome goes.
#[derive(Debug)]
pub struct Errand {
    /// What is to be done.
    pub order: Order,
    /// What became of it.
    pub outcome: SyncSender<Result<String, String>>,
}

/// Answers on a socket in `directory` from now on. `send` takes an errand to the main thread; false: there is none any more.
///
/// # Errors
/// The socket or the thread cannot be made.
pub fn listen(directory: &Path, reporter: Reporter, send: impl Fn(Errand) -> bool + Send + Sync + 'static) -> io::Result<()> {
    let path = directory.join(SOCKET);
    // Whoever made it is dead: we hold the lock.
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    let answering = Arc::new((reporter, send));
    let next = move || listener.accept().map(|(stream, _)| stream);
    accept(next, "control", move |stream| {
        let (reporter, send) = &*answering;
        converse(&stream, reporter, send)
    })
}

/// Gives each connection a thread of its own, up to a limit; those beyond it are closed.
fn accept(
    mut next: impl FnMut() -> io::Result<UnixStream> + Send + 'static,
    name: &'static str,
    serve: impl Fn(UnixStream) -> io::Result<()> + Clone + Send + 'static,
) -> io::Result<()> {
    let connections = Arc::new(AtomicUsize::new(0));
    thread::Builder::new().name(name.into()).spawn(move || {
        loop {
            let stream = match next() {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!("{name}: {error}");
                    thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            let place = Place::take(&connections);
            if place.number >= MAX_CONNECTIONS {
                tracing::debug!("{name}: a connection more than {MAX_CONNECTIONS} is closed");
                continue;
            }
            let serve = serve.clone();
            let spawned = thread::Builder::new().name(name.into()).spawn(move || {
                let _place = place;
                if let Err(error) = serve(stream) {
                    tracing::debug!("{name}: {error}");
                }
            });
            if let Err(error) = spawned {
                tracing::warn!("{name}: cannot start a thread: {error}");
            }
        }
    })?;
    Ok(())
}

/// One of the connections there may be, given back however its thread ends.
struct Place {
    all: Arc<AtomicUsize>,
    /// How many there were before it.
    number: usize,
}

impl Place {
    fn take(all: &Arc<AtomicUsize>) -> Self {
        Self { all: Arc::clone(all), number: all.fetch_add(1, Ordering::Relaxed) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.all.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Answers one request.
fn converse(stream: &UnixStream, reporter: &Reporter, send: &impl Fn(Errand) -> bool) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let peer = getsockopt(stream, PeerCredentials)?.uid();
    if peer != 0 && peer != Uid::effective().as_raw() {
        return reply::<()>(stream, Err(format!("user {peer} may not control the daemon")));
    }
    match serde_json::from_slice(&read_line(stream, MAX_REQUEST, PATIENCE)?) {
        Err(error) => reply::<()>(stream, Err(format!("not a request of this daemon: {error}"))),
        Ok(Request::Status) => reply(stream, Ok(reporter.status())),
        Ok(Request::Reload) => reply(stream, run_errand(send, Order::Reload)),
        Ok(Request::Upgrade { binary }) => reply(stream, run_errand(send, Order::Upgrade(binary))),
    }
}

fn run_errand(send: &impl Fn(Errand) -> bool, order: Order) -> Result<String, String> {
    let (outcome, answer) = mpsc::sync_channel(1);
    if !send(Errand { order, outcome }) {
        return Err("the daemon is ending".into());
    }
    answer.recv_timeout(MAIN_PATIENCE).unwrap_or_else(|_| Err("the daemon is busy, or ending; its log tells more".into()))
}

fn reply<T: Serialize>(mut stream: &UnixStream, result: Result<T, String>) -> io::Result<()> {
    let (answer, error) = match result {
        Ok(answer) => (Some(answer), None),
        Err(error) => (None, Some(error)),
    };
    let mut line = serde_json::to_vec(&Reply { protocol: PROTOCOL, answer, error })?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// What comes before the first line's end, or the stream's.
///
/// # Errors
/// It is longer than `max`, or has not arrived in time.
fn read_line(mut stream: &UnixStream, max: usize, patience: Duration) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + patience;
    let (mut line, mut part) = (Vec::new(), [0; 4096]);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let len = stream.read(&mut part)?;
        let read = part.get(..len).unwrap_or_default();
        let end = read.iter().position(|byte| *byte == b'\n');
        line.extend_from_slice(read.get(..end.unwrap_or(len)).unwrap_or_default());
        if line.len() > max {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a request of more than {max} bytes")));
        }
        if end.is_some() || len == 0 {
            return Ok(line);
        }
    }
}

/// A number that is another one after each start.
pub fn incarnation() -> &'static str {
    static INCARNATION: LazyLock<String> = LazyLock::new(|| uuid::Uuid::new_v4().to_string());
    &INCARNATION
}

/// Why a client got no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens.
    #[error("no daemon answers on {0}: is 'img-tcmu serve' running, and are you root?")]
    Absent(PathBuf, #[source] io::Error),
    /// The connection broke.
    #[error("the daemon's answer on {0} cannot be read")]
    Broken(PathBuf, #[source] io::Error),
    /// It said no.
    #[error("the daemon says: {0}")]
    Refused(String),
}

/// Asks the daemon whose run directory this is.
///
/// # Errors
/// There is no answer.
pub fn ask<T: DeserializeOwned>(directory: &Path, request: &Request) -> Result<T, AskError> {
    let path = directory.join(SOCKET);
    let mut stream = UnixStream::connect(&path).map_err(|error| AskError::Absent(path.clone(), error))?;
    let broken = |error: io::Error| AskError::Broken(path.clone(), error);
    let exchange = |stream: &mut UnixStream| -> io::Result<Vec<u8>> {
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_read_timeout(Some(MAIN_PATIENCE + PATIENCE))?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    };
    let answer = exchange(&mut stream).map_err(broken)?;
    let reply: Reply<T> = serde_json::from_slice(&answer).map_err(|error| broken(error.into()))?;
    match (reply.answer, reply.error) {
        (Some(answer), _) => Ok(answer),
        (None, Some(error)) => Err(AskError::Refused(error)),
        (None, None) => Err(broken(io::Error::new(io::ErrorKind::InvalidData, "neither an answer nor an error"))),
    }
}

#[cfg(test)]
mod tests;
