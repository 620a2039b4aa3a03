//! Keeps a guest from turning its raw disk into an image of another format.
//!
//! A guest owns every byte of a raw disk. If the disk's format is guessed at each opening, a guest that writes, say, a qcow2 header naming a host
//! file as its backing file would be served that file next time. So while a raw image is open whose format was guessed, writes after which the guess would
//! come out differently are refused. Naming the format ("raw") when opening lifts that.

use crate::error::{Error, Kind, Result};
use crate::probe::{HEAD, Head, TAIL};
use parking_lot::Mutex;
use std::io::IoSlice;

/// Watches the first and last bytes of a raw image.
#[derive(Debug, Default)]
pub struct RawGuard {
    /// Two writes, each harmless, must not make a signature together unseen.
    one_at_a_time: Mutex<()>,
}

impl RawGuard {
    /// Runs `change` unless it would change what the image is taken for.
    pub(super) fn pass(
        &self,
        what: &Change<'_>,
        at: u64,
        size: u64,
        read: impl Fn(&mut [u8], u64) -> Result<()>,
        change: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let len = match what {
            Change::Bytes(bufs) => crate::segments::total(bufs),
            Change::Zeros(len) => *len,
        };
        let head = HEAD.min(size);
        let tail = size - TAIL.min(size);
        if at >= head && at.saturating_add(len) <= tail {
            return change();
        }
        let _one = self.one_at_a_time.lock();
        let look = |start: u64, len: u64| -> Result<Vec<u8>> {
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            read(&mut bytes, start)?;
            overlay(&mut bytes, start, what, at);
            Ok(bytes)
        };
        let would_be = Head { head: look(0, head)?, tail: look(tail, size - tail)?, len: size };
        if let Some(name) = would_be.recognise() {
            return Err(Error::new(
                Kind::Denied,
                format!(
                    "the guest's write would make this raw image look like {name}, and its format was not given when it was opened; refused, since the next opening could be led to other files (give format=raw to allow it)"
                ),
            ));
        }
        change()
    }
}

/// What a guest wants to do to a range.
pub(super) enum Change<'a> {
    /// Write these.
    Bytes(&'a [IoSlice<'a>]),
    /// Make so many bytes read as zeros.
    Zeros(u64),
}

/// Lays what would be written at `at` over `bytes`, which begin at `start`.
fn overlay(bytes: &mut [u8], start: u64, what: &Change<'_>, mut at: u64) {
    let end = start + bytes.len() as u64;
    let mut lay = |at: u64, len: u64, source: Option<&[u8]>| {
        let (from, to) = (at.max(start), at.saturating_add(len).min(end));
        if from < to {
            let into = &mut bytes[(from - start) as usize..(to - start) as usize];
            match source {
                Some(source) => into.copy_from_slice(&source[(from - at) as usize..(to - at) as usize]),
                None => into.fill(0),
            }
        }
    };
    match what {
        Change::Zeros(len) => lay(at, *len, None),
        Change::Bytes(bufs) => {
            for buf in *bufs {
                lay(at, buf.len() as u64, Some(buf));
                at += buf.len() as u64;
            }
        }
    }
}
