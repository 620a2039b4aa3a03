//! The decoded bytes of a stream as a read-only [`Store`].
//!
//! A read finds the units that it touches and takes each from the cache, from the scratch file, or from the codec. Units that a read, or a run of sequential reads,
//! will need next are decoded ahead by the shared helper threads.

use super::codec::Codec;
use super::scratch::{Pinned, Scratch};
use super::source::Source;
use super::units::{Span, Units};
use super::workers::Workers;
use crate::cache::{Cache, Decoded};
use crate::error::{Error, Kind, Result};
use crate::store::Store;
use parking_lot::{Condvar, Mutex};
use std::io::{self, IoSliceMut};
use std::path::Path;
use std::sync::{Arc, Weak};

/// Units of at least this length are kept in the scratch file as well: decoding them again would take long.
pub(super) const WORTH_KEEPING: u64 = 2 << 20;
/// How far ahead of a sequential reader units are decoded, in bytes of decoded data; at least one unit is.
const AHEAD: u64 = 8 << 20;
/// How many sequential readers are told apart.
const READERS: usize = 4;

/// An opened stream.
pub(super) struct Stream {
    inner: Arc<Inner>,
    ahead: Arc<Ahead>,
    readers: Mutex<[SequentialReader; READERS]>,
}

/// What helper threads use too.
struct Inner {
    source: Source,
    units: Units,
    codec: Box<dyn Codec>,
    cache: Arc<Cache>,
    owner: u64,
    scratch: Option<Scratch>,
    /// Units longer than this live in the scratch file.
    in_memory: u64,
    /// Some unit is known to be zeros.
    has_zeros: bool,
}

/// What helper threads do for a stream. They hold the file, and with it the file's locks: a stream is closed when they are done.
#[derive(Default)]
struct Ahead {
    state: Mutex<AheadState>,
    done: Condvar,
}

#[derive(Default)]
struct AheadState {
    running: usize,
    closed: bool,
}

impl Ahead {
    /// Gives up what has not begun and waits for the rest: as long as it takes to decode one unit, at most.
    fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        while state.running > 0 {
            self.done.wait(&mut state);
        }
    }
}

/// A unit that is being decoded ahead; holds the stream's parts.
struct Job {
    inner: Option<Arc<Inner>>,
    ahead: Arc<Ahead>,
}

impl Job {
    /// `None`: the stream is closed.
    fn begin(inner: &Weak<Inner>, ahead: Weak<Ahead>) -> Option<Self> {
        let ahead = ahead.upgrade()?;
        let mut state = ahead.state.lock();
        let inner = inner.upgrade().filter(|_| !state.closed)?;
        state.running += 1;
        drop(state);
        Some(Self { inner: Some(inner), ahead })
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.inner = None;
        self.ahead.state.lock().running -= 1;
        self.ahead.done.notify_all();
    }
}

/// Somebody who reads from front to back, perhaps.
#[derive(Clone, Copy, Default)]
struct SequentialReader {
    /// Where its next read would begin.
    next: u64,
    /// How many reads in a row did.
    run: u32,
    /// First unit that was not yet asked to be decoded ahead.
    ahead: usize,
}

/// Where a unit's bytes are.
enum Found<'a> {
    Decoded(Decoded),
    Kept(Pinned<'a>),
}

impl Stream {
    pub(super) fn new(
        source: Source,
        units: Units,
        codec: Box<dyn Codec>,
        cache: Arc<Cache>,
        scratch: Option<Scratch>,
        in_memory: u64,
    ) -> Self {
        let has_zeros = units.spans().iter().any(Span::is_zero);
        let inner = Inner { source, units, codec, cache, owner: Cache::new_owner(), scratch, in_memory, has_zeros };
        Self { inner: Arc::new(inner), ahead: Arc::default(), readers: Mutex::default() }
    }

    /// What people call the stream's format.
    pub(super) fn name(&self) -> &'static str {
        self.inner.codec.name()
    }

    /// Decodes a unit into the scratch file now.
    pub(super) fn prefill(&self, number: usize, mut tell: impl FnMut(u64)) -> Result<()> {
        let span = *self.inner.units.get(number).ok_or_else(|| Error::corrupt("no such unit"))?;
        self.inner.scratch_unit(number, &span, span.len, Some(&mut tell)).map(drop)
    }

    fn read(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> Result<usize> {
        let wanted: u64 = bufs.iter().map(|buf| buf.len() as u64).sum();
        let len = wanted.min(self.inner.units.len().saturating_sub(at));
        if len == 0 {
            return Ok(0);
        }
        self.decode_ahead(at, len);
        let mut cursor = Cursor { bufs, at: 0 };
        let (mut from, end) = (at, at + len);
        while from < end {
            let Some((number, span)) = self.inner.units.find(from) else { break };
            let until = span.end().min(end);
            self.inner.read_unit(number, &span, from, until, &mut cursor)?;
            from = until;
        }
        Ok(len as usize)
    }

    /// Has the helpers decode what this read and the sequential reader whose read it seems to be will need.
    fn decode_ahead(&self, at: u64, len: u64) {
        let inner = &self.inner;
        let (Some((first, first_span)), Some((last, _))) = (inner.units.find(at), inner.units.find(at + len - 1)) else { return };
        let budget = inner.cache.stats().budget as u64;
        let (begin, end) = {
            let mut readers = self.readers.lock();
            let known = readers.iter().position(|reader| reader.next == at && at > 0);
            // The one that is not known takes the place of the one that made least of it.
            let slot = known.or_else(|| (0..READERS).min_by_key(|n| readers.get(*n).map_or(0, |reader| reader.run))).unwrap_or(0);
            let Some(reader) = readers.get_mut(slot) else { return };
            if known.is_none() {
                *reader = SequentialReader { ahead: first + 1, ..SequentialReader::default() };
                if at > 0 {
                    // Readers that stopped do not hold their places for ever.
                    readers.iter_mut().for_each(|reader| reader.run /= 2);
                }
            }
            let Some(reader) = readers.get_mut(slot) else { return };
            reader.next = at + len;
            reader.run = reader.run.saturating_add(1);
            let mut end = last + 1;
            if reader.run >= 3 {
                let most = (budget / 4).min(AHEAD);
                let mut bytes = 0;
                while let Some(span) = inner.units.get(end).filter(|_| end <= last + 1 || bytes < most) {
                    bytes += if span.is_zero() { 0 } else { span.len };
                    end += 1;
                    if end > last + 256 {
                        break;
                    }
                }
            }
            let begin = reader.ahead.clamp(first + 1, end.max(first + 1));
            reader.ahead = end.max(reader.ahead);
            (begin, end)
        };
        if first_span.len > inner.in_memory || begin >= end {
            return;
        }
        let workers = Workers::shared();
        for number in begin..end {
            let Some(span) = inner.units.get(number) else { return };
            let is_kept = span.len <= budget / 2 || (span.len >= WORTH_KEEPING && inner.scratch.is_some());
            if span.is_zero() || span.len > inner.in_memory || !is_kept || inner.cache.is_here_or_coming(inner.key(number)) {
                continue;
            }
            let (stream, ahead) = (Arc::downgrade(inner), Arc::downgrade(&self.ahead));
            let span = *span;
            let submitted = workers.submit(move || {
                let job = Job::begin(&stream, ahead);
                if let Some(inner) = job.as_ref().and_then(|job| job.inner.as_ref()) {
                    // An error is met again by whoever needs the unit.
                    let _ = inner.find(number, &span);
                }
            });
            if !submitted {
                return;
            }
        }
    }
}

impl Inner {
    fn key(&self, number: usize) -> (u64, u64) {
        (self.owner, number as u64)
    }

    /// Copies the decoded bytes `[from, until)`, which lie in the unit, to the cursor.
    fn read_unit(&self, number: usize, span: &Span, from: u64, until: u64, cursor: &mut Cursor<'_, '_>) -> Result<()> {
        let len = (until - from) as usize;
        if span.is_zero() {
            return cursor.each(len, |buf, _| {
                buf.fill(0);
                Ok(())
            });
        }
        let found = if span.len > self.in_memory {
            Found::Kept(self.scratch_unit(number, span, until - span.at, None)?)
        } else {
            self.find(number, span)?
        };
        match found {
            Found::Kept(unit) => cursor.each(len, |buf, done| unit.read(&mut [IoSliceMut::new(buf)], from + done as u64)),
            Found::Decoded(unit) => {
                let skip = (from - span.at) as usize;
                cursor.each(len, |buf, done| {
                    let bytes = unit.get(skip + done..skip + done + buf.len());
                    buf.copy_from_slice(bytes.ok_or_else(|| Error::corrupt("a unit is shorter than its index says"))?);
                    Ok(())
                })
            }
        }
    }

    /// A unit that fits in memory, decoded if need be.
    fn find(&self, number: usize, span: &Span) -> Result<Found<'_>> {
        let key = self.key(number);
        if let Some(unit) = self.cache.peek(key) {
            return Ok(Found::Decoded(unit));
        }
        if let Some(unit) = self.scratch.as_ref().and_then(|scratch| scratch.find(number)) {
            return Ok(Found::Kept(unit));
        }
        let mut fresh = false;
        let unit = self.cache.get(key, span.len as usize, |out| {
            fresh = true;
            self.codec.decode(&self.source, number, span, out)?;
            if out.len() as u64 == span.len {
                return Ok(());
            }
            Err(Error::corrupt(format!(
                "a block of the {} stream decodes to {} bytes instead of {}",
                self.codec.name(),
                out.len(),
                span.len
            ))
            .at_offset(span.coded_at))
        })?;
        if let (true, Some(scratch)) = (fresh && span.len >= WORTH_KEEPING, &self.scratch) {
            scratch.offer(number, span, &unit);
        }
        Ok(Found::Decoded(unit))
    }

    /// A unit of any length, its first `need` bytes at least, in the scratch file.
    fn scratch_unit(&self, number: usize, span: &Span, need: u64, tell: Option<&mut dyn FnMut(u64)>) -> Result<Pinned<'_>> {
        let scratch = self.scratch.as_ref().ok_or_else(|| Error::new(Kind::NoSpace, "there is no scratch file for so large a block"))?;
        scratch.get(number, span, need, || {
            let reader = self.codec.reader(&self.source, number, span)?;
            Ok(match tell {
                Some(tell) => Box::new(Telling { from: reader, tell, done: 0 }),
                None => reader,
            })
        })
    }

    fn explain(&self, error: Error) -> io::Error {
        let kind = if error.kind() == Kind::Corrupt { io::ErrorKind::InvalidData } else { io::ErrorKind::Other };
        let error = match self.source.store().path() {
            Some(path) => error.at_path(path),
            None => error,
        };
        io::Error::new(kind, error)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.cache.forget(self.owner);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.ahead.close();
    }
}

impl Store for Stream {
    fn read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> io::Result<usize> {
        self.read(bufs, at).map_err(|error| self.inner.explain(error))
    }

    fn try_read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> io::Result<Option<usize>> {
        let inner = &self.inner;
        let wanted: u64 = bufs.iter().map(|buf| buf.len() as u64).sum();
        let len = wanted.min(inner.units.len().saturating_sub(at));
        let mut cursor = Cursor { bufs, at: 0 };
        let (mut from, end) = (at, at + len);
        while from < end {
            let Some((number, span)) = inner.units.find(from) else { break };
            if !span.is_zero() && inner.cache.peek(inner.key(number)).is_none() {
                return Ok(None);
            }
            let until = span.end().min(end);
            inner.read_unit(number, &span, from, until, &mut cursor).map_err(|error| inner.explain(error))?;
            from = until;
        }
        Ok(Some(len as usize))
    }

    fn write_at(&self, _: &[io::IoSlice<'_>], _: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.inner.units.len())
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn punch(&self, _: u64, _: u64) -> io::Result<bool> {
        Err(read_only())
    }

    fn zero(&self, _: u64, _: u64) -> io::Result<bool> {
        Err(read_only())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn hole_or_data(&self, at: u64) -> io::Result<Option<(u64, bool)>> {
        if !self.inner.has_zeros {
            return Ok(None);
        }
        let Some((number, span)) = self.inner.units.find(at) else { return Ok(None) };
        // Not all of a long run: finding its end must not cost more than reading some of it.
        let near = self.inner.units.spans().get(number..).unwrap_or_default().iter().take(256);
        let same = near.take_while(|other| other.is_zero() == span.is_zero());
        let end = same.last().map_or(span.end(), Span::end);
        Ok(Some((end - at, !span.is_zero())))
    }

    fn path(&self) -> Option<&Path> {
        self.inner.source.store().path()
    }
}

fn read_only() -> io::Error {
    io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "a compressed stream cannot be written: put an overlay on it")
}

/// Goes through scattered buffers in order.
struct Cursor<'a, 'b> {
    bufs: &'a mut [IoSliceMut<'b>],
    /// Bytes used of the first of them.
    at: usize,
}

impl Cursor<'_, '_> {
    /// Calls `fill` with pieces that make up the next `len` bytes, and how many bytes came before each.
    fn each(&mut self, len: usize, mut fill: impl FnMut(&mut [u8], usize) -> Result<()>) -> Result<()> {
        let mut done = 0;
        while done < len {
            let Some(buf) = self.bufs.first_mut() else { return Ok(()) };
            let part = (buf.len() - self.at).min(len - done);
            fill(buf.get_mut(self.at..self.at + part).unwrap_or_default(), done)?;
            done += part;
            self.at += part;
            if self.at == buf.len() {
                let bufs = std::mem::take(&mut self.bufs);
                self.bufs = bufs.get_mut(1..).unwrap_or_default();
                self.at = 0;
            }
        }
        Ok(())
    }
}

/// Tells how much was read.
struct Telling<'a> {
    from: Box<dyn io::Read + 'a>,
    tell: &'a mut dyn FnMut(u64),
    done: u64,
}

impl io::Read for Telling<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let got = self.from.read(buf)?;
        self.done += got as u64;
        (self.tell)(self.done);
        Ok(got)
    }
}
