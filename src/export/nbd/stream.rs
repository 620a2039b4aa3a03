//! Connections as bytes: Unix or TCP, and how long a client may keep us waiting.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A negotiation that takes longer than this between two bytes is given up.
const SILENCE: Duration = Duration::from_secs(10);
/// And one that takes longer than this as a whole, for clients that send a byte now and then.
const NEGOTIATION: Duration = Duration::from_secs(30);
/// A client that takes nothing for so long is gone: others need the workers.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection.
pub trait Stream: Read + Write + Send + 'static {
    /// Another handle to it.
    fn second(&self) -> io::Result<Box<dyn Stream>>;
    /// How long reads and writes may take; for all handles.
    fn timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()>;
    /// Ends it, for all handles.
    fn hang_up(&self);
    /// Whether a small write would not have to wait.
    fn has_room(&self) -> bool;
}

macro_rules! stream {
    ($name:ty) => {
        impl Stream for $name {
            fn second(&self) -> io::Result<Box<dyn Stream>> {
                Ok(Box::new(self.try_clone()?))
            }
            fn timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
                self.set_read_timeout(read)?;
                self.set_write_timeout(write)
            }
            fn hang_up(&self) {
                // It may be closed already.
                let _ = self.shutdown(Shutdown::Both);
            }
            fn has_room(&self) -> bool {
                let mut poll_fd = [PollFd::new(self.as_fd(), PollFlags::POLLOUT)];
                poll(&mut poll_fd, PollTimeout::ZERO) == Ok(1)
            }
        }
    };
}
stream!(UnixStream);
stream!(TcpStream);

/// A connection with an end to our patience, until it is lifted.
pub struct Patient {
    stream: Box<dyn Stream>,
    until: Option<Instant>,
}

impl Patient {
    /// The clock starts now.
    pub fn new(stream: Box<dyn Stream>) -> Self {
        Self { stream, until: Some(Instant::now() + NEGOTIATION) }
    }

    /// The client has shown that it means what we mean: it may be silent for as long as it likes.
    pub fn lift(&mut self) -> io::Result<()> {
        self.until = None;
        self.stream.timeouts(None, Some(SEND_TIMEOUT))
    }

    /// Ends the connection.
    pub fn hang_up(&self) {
        self.stream.hang_up();
    }
}

impl Read for Patient {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if let Some(until) = self.until {
            let left = until.saturating_duration_since(Instant::now()).min(SILENCE);
            if left.is_zero() {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the negotiation takes too long"));
            }
            self.stream.timeouts(Some(left), Some(SEND_TIMEOUT))?;
        }
        self.stream.read(into)
    }
}

impl Write for Patient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// The two halves of a connection as one, for the negotiation.
pub struct Both<'a, R, W>(pub &'a mut R, pub &'a mut W);

impl<R: Read, W> Read for Both<'_, R, W> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

impl<R, W: Write> Write for Both<'_, R, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.1.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.1.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A byte now and then does not buy time.
    #[test]
    fn patience_ends() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut patient = Patient { stream: Box::new(ours), until: Some(Instant::now() + Duration::from_millis(300)) };
        let dawdler = std::thread::spawn(move || {
            while theirs.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let start = Instant::now();
        let error = loop {
            if let Err(error) = patient.read(&mut [0; 16]) {
                break error;
            }
        };
        assert!(matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock), "{error}");
        assert!(start.elapsed() < Duration::from_secs(10));
        patient.lift().unwrap();
        patient.read_exact(&mut [0; 3]).unwrap();
        drop(patient);
        dawdler.join().unwrap();
    }
}
