//! TLS for connections: certificates, and a connection's two halves.
//!
//! The reader must not keep the writers waiting while it waits for the client, so the TLS state is locked for as long as bytes go in or out of it, never
//! while the socket is waited for. What is encrypted must reach the socket in the order in which it was encrypted: whoever writes holds the socket's
//! lock first and takes the state's inside it.

use super::delivery::Sink;
use super::stream::{Patient, Stream};
use parking_lot::Mutex;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use std::fmt::Display;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes that are read from the socket, or encrypted, at once.
const PIECE: usize = 128 << 10;

/// The files, in PEM.
#[derive(Clone, Debug)]
pub struct Files {
    /// Our certificate, then those of the authorities between it and the root.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Authorities one of which has to have issued the client's certificate; `None`: clients need none.
    pub clients: Option<PathBuf>,
}

/// What all connections share.
#[derive(Clone)]
pub struct Tls(Arc<ServerConfig>);

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// A file that is not there, holds nothing of its kind, or does not belong to the others.
    pub fn new(files: &Files) -> io::Result<Self> {
        let chain = certificates(&files.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| in_file(&files.key, error))?;
        let provider = Arc::new(default_provider());
        let builder =
            ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().map_err(io::Error::other)?;
        let builder = match &files.clients {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(path)? {
                    roots.add(certificate).map_err(|error| in_file(path, error))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                builder.with_client_cert_verifier(verifier.map_err(|error| in_file(path, error))?)
            }
        };
        let config = builder.with_single_cert(chain, key).map_err(|error| in_file(&files.certificate, error))?;
        Ok(Self(Arc::new(config)))
    }

    /// The halves of a connection whose client is about to begin the handshake, which the first read carries out.
    pub fn accept(&self, input: Patient, output: Box<dyn Stream>) -> io::Result<(Receiving, Sending)> {
        let mut connection = ServerConnection::new(self.0.clone()).map_err(io::Error::other)?;
        // The pieces are bounded by us.
        connection.set_buffer_limit(None);
        let channel = Arc::new(Channel { output: Mutex::new(output), connection: Mutex::new(connection) });
        Ok((Receiving { channel: channel.clone(), input, buffer: vec![0; PIECE], start: 0, end: 0 }, Sending(channel)))
    }
}

fn certificates(path: &Path) -> io::Result<Vec<CertificateDer<'static>>> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(|error| in_file(path, error))?.collect();
    match found {
        Ok(found) if found.is_empty() => Err(in_file(path, "there is no certificate in it")),
        Ok(found) => Ok(found),
        Err(error) => Err(in_file(path, error)),
    }
}

fn in_file(path: &Path, error: impl Display) -> io::Error {
    io::Error::other(format!("{}: {error}", path.display()))
}

struct Channel {
    /// Locked before `connection`, by whoever locks both.
    output: Mutex<Box<dyn Stream>>,
    connection: Mutex<ServerConnection>,
}

impl Channel {
    /// Encrypts `plain`, and sends that and whatever else waits to be sent.
    fn send(&self, plain: &[u8]) -> io::Result<()> {
        let mut output = self.output.lock();
        let mut encrypted = Vec::with_capacity(plain.len() + 1024);
        {
            let mut connection = self.connection.lock();
            connection.writer().write_all(plain)?;
            while connection.wants_write() {
                connection.write_tls(&mut encrypted)?;
            }
        }
        output.write_all(&encrypted).inspect_err(|_| output.hang_up())
    }
}

/// The half that reads.
pub struct Receiving {
    channel: Arc<Channel>,
    input: Patient,
    /// Encrypted bytes from the socket; those from `start` to `end` have not been looked at.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Receiving {
    /// The negotiation is over: the client may take its time.
    pub fn lift(&mut self) -> io::Result<()> {
        self.input.lift()
    }

    /// Decrypts what of the buffer can be. Whether something has to be sent for it.
    fn decrypt(&mut self) -> io::Result<bool> {
        let mut connection = self.channel.connection.lock();
        let mut rest = self.buffer.get(self.start..self.end).unwrap_or_default();
        let before = rest.len();
        connection.read_tls(&mut rest)?;
        self.start += before - rest.len();
        let processed = connection.process_new_packets().map(drop);
        let answers = connection.wants_write();
        drop(connection);
        processed.map_err(|error| {
            // It says why to the client, which may be gone.
            let _ = self.channel.send(&[]);
            io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {error}"))
        })?;
        Ok(answers)
    }

    /// As much as was received already.
    fn take(&mut self, into: &mut [u8]) -> io::Result<Option<usize>> {
        let mut got = 0;
        loop {
            let room = into.get_mut(got..).unwrap_or_default();
            if room.is_empty() {
                return Ok(Some(got));
            }
            let result = self.channel.connection.lock().reader().read(room);
            match result {
                Ok(0) => return Ok(Some(got)),
                Ok(more) => got += more,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.start == self.end {
                        return Ok((got > 0).then_some(got));
                    }
                    if self.decrypt()? {
                        self.channel.send(&[])?;
                    }
                }
                Err(_) if got > 0 => return Ok(Some(got)),
                Err(error) => return Err(error),
            }
        }
    }
}

impl Read for Receiving {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(got) = self.take(into)? {
                return Ok(got);
            }
            self.start = 0;
            self.end = 0;
            self.end = self.input.read(&mut self.buffer)?;
            if self.end == 0 {
                // An end without a goodbye is an error of the next `take`: somebody may have cut the connection.
                self.channel.connection.lock().read_tls(&mut io::empty())?;
            }
        }
    }
}

/// The half that writes.
pub struct Sending(Arc<Channel>);

impl Sending {
    /// Another handle to the same half.
    pub fn second(&self) -> Self {
        Self(self.0.clone())
    }

    /// Says goodbye and hangs up.
    pub fn close(&self) {
        self.0.connection.lock().send_close_notify();
        // It may be gone already.
        let _ = self.0.send(&[]);
        self.0.output.lock().hang_up();
    }
}

impl Sink for Sending {
    fn has_room(&self) -> bool {
        self.0.output.try_lock().is_some_and(|output| output.has_room())
    }
}

impl Write for Sending {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = bytes.get(..bytes.len().min(PIECE)).unwrap_or_default();
        self.0.send(piece)?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
