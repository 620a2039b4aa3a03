//! The transmission phase of one connection.
//!
//! One thread reads the connection. What it can do without waiting for a disk (reads from the page cache, writes) it does itself, and it sends the
//! answers to all requests that had arrived together in one go. What may wait goes to the workers, which all connections share, and is answered
//! from there, but a worker never waits for a client: what does not fit into the socket now is left to a thread of the connection's own
//! ([`delivery`](super::delivery)).

use super::Export;
use super::delivery::Delivery;
use super::handshake::Agreed;
use super::reply::Replies;
use super::wire::{self, command, command_flag, errno};
use formats::{BlockDevice, Error, Kind, ZeroMode};
use parking_lot::Mutex;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Bytes read from a connection at once.
const INPUT: usize = 256 << 10;
/// Answers are sent when so many bytes wait, even if more requests have arrived.
const SEND_AT: usize = 512 << 10;
/// Reads of holes of at least this length are answered without the zeros.
const MIN_HOLE: u32 = 4096;
/// The most runs that one BLOCK_STATUS tells.
const MAX_RUNS: usize = 1024;

pub use super::delivery::Output;

/// Threads that do what may wait.
#[derive(Clone)]
pub struct Workers(Sender<Box<dyn FnOnce() + Send>>);

impl Workers {
    /// Starts `count` of them; they end when the last handle is gone.
    pub fn new(count: usize) -> io::Result<Self> {
        let (send, receive) = channel::<Box<dyn FnOnce() + Send>>();
        let receive = Arc::new(Mutex::new(receive));
        for number in 0..count {
            let receive: Arc<Mutex<Receiver<_>>> = receive.clone();
            std::thread::Builder::new().name(format!("nbd-work-{number}")).spawn(move || {
                loop {
                    let Ok(work) = receive.lock().recv() else { return };
                    work();
                }
            })?;
        }
        Ok(Self(send))
    }
}

#[derive(Clone, Copy, Debug)]
struct Request {
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    len: u64,
}

/// What the reader and the workers of a connection share.
struct Shared {
    device: Arc<dyn BlockDevice>,
    agreed: Agreed,
    delivery: Arc<Delivery>,
}

impl Shared {
    fn send(&self, replies: &mut Replies) -> io::Result<()> {
        if replies.len() > 0 {
            self.delivery.send(replies.pending())?;
            replies.clear();
        }
        Ok(())
    }
}

/// Serves a connection after its negotiation until the client leaves.
///
/// # Errors
/// The connection's; `InvalidData` when the client does not speak NBD any more.
pub fn serve(input: &mut dyn Read, output: Output, export: &Export, agreed: Agreed, workers: &Workers) -> io::Result<()> {
    let shared = Arc::new(Shared { device: export.device.clone(), agreed, delivery: Arc::new(Delivery::new(output)) });
    let result = Reader { input, buffer: vec![0; INPUT], start: 0, end: 0, payload: Vec::new() }.run(&shared, workers);
    // What the workers still have belongs to this connection.
    shared.delivery.finish();
    result
}

struct Reader<'a> {
    input: &'a mut dyn Read,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Of a write that is longer than the buffer.
    payload: Vec<u8>,
}

impl Reader<'_> {
    fn run(&mut self, shared: &Arc<Shared>, workers: &Workers) -> io::Result<()> {
        let header = if shared.agreed.extended { 32 } else { 28 };
        let mut replies = Replies::default();
        loop {
            if self.end - self.start < header {
                // The last of a batch: nothing more has arrived whole.
                shared.send(&mut replies)?;
                if !self.fill(header)? {
                    return Ok(());
                }
            }
            let request = parse(self.buffer.get(self.start..self.start + header).unwrap_or_default(), shared.agreed)?;
            self.start += header;
            match request.kind {
                command::DISC => {
                    shared.send(&mut replies)?;
                    return Ok(());
                }
                command::WRITE => self.write(shared, workers, request, &mut replies)?,
                _ if shared.agreed.extended && request.flags & command_flag::PAYLOAD_LEN != 0 => {
                    // A payload that the command has no use for: past it, then refused.
                    self.skip(request.len)?;
                    replies.error(shared.agreed, request.cookie, request.offset, errno::EINVAL, "this command takes no payload");
                }
                command::READ => read(shared, workers, request, &mut replies)?,
                _ => hand(shared, workers, request, &mut replies),
            }
            if replies.len() >= SEND_AT {
                shared.send(&mut replies)?;
            }
        }
    }

    /// Reads until `want` bytes are in the buffer. `false`: the client closed the connection between requests.
    fn fill(&mut self, want: usize) -> io::Result<bool> {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        while self.end < want {
            let room = self.buffer.get_mut(self.end..).unwrap_or_default();
            match self.input.read(room) {
                Ok(0) if self.end == 0 => return Ok(false),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(got) => self.end += got,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    fn skip(&mut self, len: u64) -> io::Result<()> {
        let buffered = len.min((self.end - self.start) as u64);
        self.start += usize::try_from(buffered).unwrap_or(0);
        let rest = len - buffered;
        let skipped = io::copy(&mut Read::take(&mut self.input, rest), &mut io::sink())?;
        if skipped < rest { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    fn write(&mut self, shared: &Arc<Shared>, workers: &Workers, request: Request, replies: &mut Replies) -> io::Result<()> {
        if request.len > u64::from(wire::MAX_PAYLOAD) {
            self.skip(request.len)?;
            replies.error(shared.agreed, request.cookie, request.offset, errno::EINVAL, "the payload is longer than the published maximum");
            return Ok(());
        }
        let len = usize::try_from(request.len).unwrap_or(0);
        let buffered = len.min(self.end - self.start);
        let payload = if buffered == len {
            self.buffer.get(self.start..self.start + len).unwrap_or_default()
        } else if len <= INPUT / 2 {
            if !self.fill(len)? {
                // Gone before the first byte of it: what the buffer holds is not the client's.
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.buffer.get(self.start..self.start + len).unwrap_or_default()
        } else {
            self.payload.resize(len, 0);
            let (now, later) = self.payload.split_at_mut(buffered);
            now.copy_from_slice(self.buffer.get(self.start..self.start + buffered).unwrap_or_default());
            self.input.read_exact(later)?;
            self.payload.as_slice()
        };
        let result = guarded(|| {
            check(&*shared.device, request, command_flag::FUA).and_then(|()| shared.device.write(&[IoSlice::new(payload)], request.offset))
        });
        self.start += if buffered == len || len <= INPUT / 2 { len } else { buffered };
        match result {
            // The rest of it may wait for the disk.
            Ok(()) if request.flags & command_flag::FUA != 0 => {
                hand(shared, workers, Request { kind: command::FLUSH, len: 0, flags: 0, ..request }, replies)
            }
            Ok(()) => replies.done(shared.agreed, request.cookie, request.offset),
            Err(error) => fail(replies, shared.agreed, request, &error),
        }
        Ok(())
    }
}

fn parse(header: &[u8], agreed: Agreed) -> io::Result<Request> {
    let bad = || io::Error::new(io::ErrorKind::InvalidData, "a request without its magic number");
    let half = |at: usize| header.get(at..).and_then(|h| h.first_chunk::<2>()).map_or(0, |b| u16::from_be_bytes(*b));
    let word = |at: usize| header.get(at..).and_then(|h| h.first_chunk::<4>()).map_or(0, |b| u32::from_be_bytes(*b));
    let long = |at: usize| header.get(at..).and_then(|h| h.first_chunk::<8>()).map_or(0, |b| u64::from_be_bytes(*b));
    let magic = if agreed.extended { wire::EXTENDED_REQUEST_MAGIC } else { wire::REQUEST_MAGIC };
    if word(0) != magic {
        return Err(bad());
    }
    let len = if agreed.extended { long(24) } else { u64::from(word(24)) };
    Ok(Request { flags: half(4), kind: half(6), cookie: long(8), offset: long(16), len })
}

/// Reads what can be read at once; hands over the rest.
fn read(shared: &Arc<Shared>, workers: &Workers, request: Request, replies: &mut Replies) -> io::Result<()> {
    let before = replies.len();
    if let Ok(len) = u32::try_from(request.len)
        && len <= wire::MAX_PAYLOAD
        && check(&*shared.device, request, command_flag::DF).is_ok()
    {
        if before > 0 && before + request.len as usize > SEND_AT {
            shared.send(replies)?;
        }
        let before = replies.len();
        replies.data(shared.agreed, request.cookie, request.offset, len);
        let room = replies.room(len as usize);
        if let Ok(true) = guarded(|| shared.device.try_read(&mut [IoSliceMut::new(room)], request.offset)) {
            return Ok(());
        }
        replies.truncate(before);
    }
    hand(shared, workers, request, replies);
    Ok(())
}

/// Gives a request to the workers, or does it here when they have enough of this connection.
fn hand(shared: &Arc<Shared>, workers: &Workers, request: Request, replies: &mut Replies) {
    // What its answer may take: that much memory is the connection's until the client has it.
    let cost = if request.kind == command::READ { usize::try_from(request.len).unwrap_or(usize::MAX) } else { 0 };
    if !shared.delivery.begin(cost) {
        return execute(shared, request, replies);
    }
    let mine = shared.clone();
    let work = move || {
        let mut replies = Replies::default();
        execute(&mine, request, &mut replies);
        mine.delivery.deliver(replies.into_bytes(), cost);
    };
    if let Err(refused) = workers.0.send(Box::new(work)) {
        refused.0();
    }
}

/// Does a request, waiting for what it takes.
fn execute(shared: &Shared, request: Request, replies: &mut Replies) {
    let (device, agreed) = (&*shared.device, shared.agreed);
    let Request { flags, kind, cookie, offset, len } = request;
    let before = replies.len();
    let result = guarded(|| match kind {
        command::READ => {
            check(device, request, command_flag::DF)?;
            let len = u32::try_from(len).ok().filter(|l| *l <= wire::MAX_PAYLOAD).ok_or_else(too_long)?;
            if agreed.structured && len >= MIN_HOLE && flags & command_flag::DF == 0 {
                let extent = device.map(offset, u64::from(len))?;
                if extent.zero && extent.len == u64::from(len) {
                    replies.hole(agreed, cookie, offset, len);
                    return Ok(());
                }
            }
            replies.data(agreed, cookie, offset, len);
            device.read(&mut [IoSliceMut::new(replies.room(len as usize))], offset)
        }
        command::FLUSH => {
            check_flags(flags, command_flag::FUA)?;
            device.flush()?;
            replies.done(agreed, cookie, offset);
            Ok(())
        }
        command::TRIM => {
            check(device, request, command_flag::FUA)?;
            device.discard(offset, len)?;
            finish(device, request, agreed, replies)
        }
        command::WRITE_ZEROES => {
            check(device, request, command_flag::FUA | command_flag::NO_HOLE | command_flag::FAST_ZERO)?;
            let mode = if flags & command_flag::FAST_ZERO != 0 {
                ZeroMode::OnlyIfCheap
            } else if flags & command_flag::NO_HOLE != 0 {
                ZeroMode::KeepAllocated
            } else {
                ZeroMode::MayUnmap
            };
            device.zero(offset, len, mode)?;
            finish(device, request, agreed, replies)
        }
        command::CACHE => {
            check(device, request, 0)?;
            let mut buffer = vec![0; 1 << 20];
            let (mut at, end) = (offset, offset + len);
            while at < end {
                let part = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
                device.read(&mut [IoSliceMut::new(buffer.get_mut(..part).unwrap_or_default())], at)?;
                at += part as u64;
            }
            replies.done(agreed, cookie, offset);
            Ok(())
        }
        command::BLOCK_STATUS if agreed.allocation => {
            check(device, request, command_flag::REQ_ONE)?;
            let runs = states(device, request, agreed)?;
            replies.status(agreed, cookie, offset, &runs);
            Ok(())
        }
        command::BLOCK_STATUS => Err(Error::new(Kind::InvalidOption, "no metadata context was agreed on")),
        _ => Err(Error::new(Kind::InvalidOption, format!("unknown command {kind}"))),
    });
    if let Err(error) = result {
        replies.truncate(before);
        fail(replies, agreed, request, &error);
    }
}

fn finish(device: &dyn BlockDevice, request: Request, agreed: Agreed, replies: &mut Replies) -> formats::Result<()> {
    if request.flags & command_flag::FUA != 0 {
        device.flush()?;
    }
    replies.done(agreed, request.cookie, request.offset);
    Ok(())
}

/// Runs of equal state, at least one.
fn states(device: &dyn BlockDevice, request: Request, agreed: Agreed) -> formats::Result<Vec<(u64, u32)>> {
    let mut runs: Vec<(u64, u32)> = Vec::new();
    let one = request.flags & command_flag::REQ_ONE != 0;
    let (mut at, end) = (request.offset, request.offset + request.len);
    while at < end {
        let extent = device.map(at, end - at)?;
        let state = if extent.allocated { 0 } else { wire::STATE_HOLE } | if extent.zero { wire::STATE_ZERO } else { 0 };
        let last_one = !runs.is_empty() && (one || runs.len() >= MAX_RUNS);
        match runs.last_mut() {
            Some((len, last)) if *last == state && (agreed.extended || *len + extent.len <= u64::from(u32::MAX)) => *len += extent.len,
            Some(_) if last_one => break,
            _ => runs.push((extent.len, state)),
        }
        at += extent.len;
    }
    Ok(runs)
}

fn check_flags(flags: u16, allowed: u16) -> formats::Result<()> {
    // PAYLOAD_LEN is dealt with where payloads are.
    match flags & !allowed & !command_flag::PAYLOAD_LEN {
        0 => Ok(()),
        unknown => Err(Error::new(Kind::InvalidOption, format!("the command does not take the flags {unknown:#x}"))),
    }
}

/// Flags that the command takes, and a range that is not empty and inside the device.
fn check(device: &dyn BlockDevice, request: Request, allowed: u16) -> formats::Result<()> {
    check_flags(request.flags, allowed)?;
    let size = device.limits().size;
    if request.len == 0 {
        return Err(Error::new(Kind::InvalidOption, "the length is 0"));
    }
    if request.offset.checked_add(request.len).is_none_or(|end| end > size) {
        return Err(Error::new(Kind::OutOfBounds, format!("{} bytes at {} reach beyond the end ({size})", request.len, request.offset)));
    }
    Ok(())
}

fn too_long() -> Error {
    Error::new(Kind::InvalidOption, "the length is more than the published maximum")
}

/// A panic fails its request, and nothing else.
fn guarded<T>(work: impl FnOnce() -> formats::Result<T>) -> formats::Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(Error::new(Kind::Io, "internal error: the request panicked")))
}

fn fail(replies: &mut Replies, agreed: Agreed, request: Request, error: &Error) {
    let writes = matches!(request.kind, command::WRITE | command::WRITE_ZEROES | command::TRIM);
    let number = match error.kind() {
        Kind::Io | Kind::Corrupt | Kind::InvalidFormat | Kind::NotFound | Kind::Denied | Kind::Locked => errno::EIO,
        Kind::Unsupported => errno::ENOTSUP,
        // "Error values": writes beyond the end are ENOSPC, reads EINVAL.
        Kind::OutOfBounds if writes => errno::ENOSPC,
        Kind::OutOfBounds | Kind::InvalidOption => errno::EINVAL,
        Kind::ReadOnly => errno::EPERM,
        Kind::NoSpace => errno::ENOSPC,
    };
    if number == errno::EIO {
        tracing::error!(command = request.kind, offset = request.offset, len = request.len, error = %error.chain(), "a request failed");
    }
    replies.error(agreed, request.cookie, request.offset, number, &error.chain());
}
