//! The compressed file as codecs read it: whole ranges, fixed headers, or a buffered run.

use crate::error::{Error, Result};
use crate::store::Store;
use std::io::{self, IoSliceMut, Read};
use std::sync::Arc;

/// The compressed bytes. Its length is taken once, at open.
pub(super) struct Source {
    store: Arc<dyn Store>,
    len: u64,
}

impl Source {
    pub(super) fn new(store: Arc<dyn Store>) -> Result<Self> {
        let len = store.len().map_err(|error| Error::io("cannot tell the length of the compressed file", error))?;
        Ok(Self { store, len })
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Up to `buf.len()` bytes from `at`; fewer only at the end of the file.
    pub(super) fn read_some(&self, buf: &mut [u8], at: u64) -> Result<usize> {
        self.store
            .read_at(&mut [IoSliceMut::new(buf)], at)
            .map_err(|error| Error::io("cannot read the compressed file", error).at_offset(at))
    }

    /// Exactly `N` bytes from `at`, or `None` where the file ends before.
    pub(super) fn array<const N: usize>(&self, at: u64) -> Result<Option<[u8; N]>> {
        let mut bytes = [0; N];
        if at.checked_add(N as u64).is_none_or(|end| end > self.len) {
            return Ok(None);
        }
        let got = self.read_some(&mut bytes, at)?;
        Ok((got == N).then_some(bytes))
    }

    /// Exactly `len` bytes from `at`. The caller has bounded `len`; it is also bounded by the file.
    pub(super) fn range(&self, at: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.append_range(at, len, &mut bytes)?;
        Ok(bytes)
    }

    /// Appends exactly `len` bytes from `at` to `out`.
    pub(super) fn append_range(&self, at: u64, len: u64, out: &mut Vec<u8>) -> Result<()> {
        let ends_early = || Error::corrupt("the compressed file ends too early").at_offset(at);
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(ends_early());
        }
        let start = out.len();
        let len = usize::try_from(len).map_err(|_| ends_early())?;
        out.try_reserve(len).map_err(|_| Error::new(crate::Kind::Io, format!("there is no memory for {len} compressed bytes")))?;
        out.resize(start + len, 0);
        let got = self.read_some(out.get_mut(start..).unwrap_or_default(), at)?;
        if got < len {
            return Err(ends_early());
        }
        Ok(())
    }

    /// A buffered reader of `[at, end)`.
    pub(super) fn reader(&self, at: u64, end: u64) -> SourceReader<'_> {
        SourceReader { source: self, next: at, end: end.min(self.len), buffer: Vec::new(), taken: 0, ahead: FIRST }
    }
}

const BUFFER: usize = 256 << 10;
/// How much is read after a jump; then twice as much each time.
const FIRST: usize = 4 << 10;

/// Reads a range of a [`Source`] from front to back, or hops over it.
pub(super) struct SourceReader<'a> {
    source: &'a Source,
    /// Offset in the file of the byte after the buffer.
    next: u64,
    end: u64,
    buffer: Vec<u8>,
    taken: usize,
    /// How much to read next.
    ahead: usize,
}

impl SourceReader<'_> {
    /// Offset in the file of the next byte.
    pub(super) fn position(&self) -> u64 {
        self.next - (self.buffer.len() - self.taken) as u64
    }

    /// Goes on at `at`, without reading when that lies in the buffer.
    pub(super) fn seek(&mut self, at: u64) {
        let start = self.next - self.buffer.len() as u64;
        if at >= start && at <= self.next {
            self.taken = (at - start) as usize;
        } else {
            self.buffer.clear();
            self.taken = 0;
            self.next = at;
            self.ahead = FIRST;
        }
    }

    /// The bytes at hand, at least `want` of them (at most 256 KiB) unless the range ends before.
    pub(super) fn peek(&mut self, want: usize) -> Result<&[u8]> {
        if self.buffer.len() - self.taken < want.min(BUFFER) {
            self.buffer.drain(..self.taken);
            self.taken = 0;
            let had = self.buffer.len();
            let size = self.ahead.max(want).min(BUFFER);
            self.ahead = (2 * size).min(BUFFER);
            let room = (self.end.saturating_sub(self.next)).min(size.saturating_sub(had) as u64) as usize;
            self.buffer.resize(had + room, 0);
            let got = self.source.read_some(self.buffer.get_mut(had..).unwrap_or_default(), self.next)?;
            self.buffer.truncate(had + got);
            self.next += got as u64;
        }
        Ok(self.buffer.get(self.taken..).unwrap_or_default())
    }

    /// The next eight bytes, little-endian, if they are at hand.
    #[inline]
    pub(super) fn peek_word(&self) -> Option<u64> {
        self.buffer.get(self.taken..)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
    }

    /// Passes over `count` bytes of those that `peek` showed.
    pub(super) fn consume(&mut self, count: usize) {
        self.taken = (self.taken + count).min(self.buffer.len());
    }

    /// Exactly `N` bytes, or `None` where the range ends before.
    pub(super) fn array<const N: usize>(&mut self) -> Result<Option<[u8; N]>> {
        let bytes = self.peek(N)?.first_chunk::<N>().copied();
        if bytes.is_some() {
            self.consume(N);
        }
        Ok(bytes)
    }
}

impl Read for SourceReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut have = self.peek(1).map_err(io::Error::other)?;
        let got = have.read(buf)?;
        self.consume(got);
        Ok(got)
    }
}

impl io::BufRead for SourceReader<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.peek(1).map_err(io::Error::other)
    }

    fn consume(&mut self, count: usize) {
        Self::consume(self, count);
    }
}
