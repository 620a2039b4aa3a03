//! Which format is this? Signatures only; raw never wins, it is what is left.
//!
//! What a probe looks at is what [`crate::image::RawGuard`] protects: a new signature outside [`HEAD`] and [`TAIL`] must widen them.

use crate::drivers::DRIVERS;
use crate::error::{Error, Result};
use crate::store::Store;

/// Bytes from the start of a file that signatures lie in.
pub const HEAD: u64 = 4096;
/// Bytes from its end.
pub const TAIL: u64 = 1024;

/// The ends of a file.
#[derive(Debug, Default)]
pub struct Head {
    /// The first bytes, at most [`HEAD`].
    pub head: Vec<u8>,
    /// The last bytes, at most [`TAIL`].
    pub tail: Vec<u8>,
    /// Length of the file in bytes.
    pub len: u64,
}

impl Head {
    /// Reads the ends of a file.
    pub fn read(store: &dyn Store) -> Result<Self> {
        let fail = |e| Error::io("cannot read the file's first and last bytes", e);
        let len = store.len().map_err(fail)?;
        let mut head = vec![0; usize::try_from(len.min(HEAD)).unwrap_or(0)];
        store.read_zero_filled(&mut head, 0).map_err(fail)?;
        let mut tail = vec![0; usize::try_from(len.min(TAIL)).unwrap_or(0)];
        let start = len - tail.len() as u64;
        store.read_zero_filled(&mut tail, start).map_err(fail)?;
        Ok(Self { head, tail, len })
    }

    /// Whether `signature` stands at `at` from the start.
    pub fn has(&self, at: usize, signature: &[u8]) -> bool {
        at.checked_add(signature.len()).and_then(|end| self.head.get(at..end)) == Some(signature)
    }

    /// Whether `signature` stands `back` bytes before the end.
    pub fn has_at_end(&self, back: usize, signature: &[u8]) -> bool {
        let start = self.tail.len().checked_sub(back);
        start.and_then(|s| self.tail.get(s..s.checked_add(signature.len())?)) == Some(signature)
    }

    /// Big-endian u32 at `at`.
    pub fn be32(&self, at: usize) -> Option<u32> {
        self.head.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_be_bytes)
    }

    /// The format whose signature the file bears; `None`: it may be raw.
    pub fn recognise(&self) -> Option<&'static str> {
        DRIVERS.iter().find(|d| (d.recognise)(self)).map(|d| d.name)
    }
}
