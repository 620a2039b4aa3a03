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
    /// Runs `change` unless it would change what the image is taken for. The device may be longer than the file, which then grows to the end of a write.
    pub(super) fn pass(
        &self,
        what: &Change<'_>,
        at: u64,
        file_len: u64,
        size: u64,
        read: impl Fn(&mut [u8], u64) -> Result<()>,
        change: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let len = match what {
            Change::Bytes(bufs) => crate::segments::total(bufs),
            Change::Zeros(len) => *len,
        };
        let end = at.saturating_add(len);
        let shortest = file_len.min(size);
        if at >= HEAD.min(size) && end <= shortest - TAIL.min(shortest) {
            return change();
        }
        let _one = self.one_at_a_time.lock();
        // The end of the file afterwards: where it is, where the write takes it, or that of the device.
        for would_end in [shortest, end.clamp(shortest, size), size] {
            look(would_end, |bytes, start| {
                read(bytes, start)?;
                overlay(bytes, start, what, at);
                Ok(())
            })?;
        }
        change()
    }

    /// Whether the image may grow from `old` to `new` bytes: its end moves, and what lies before it with it.
    pub(super) fn grow(&self, old: u64, new: u64, read: impl Fn(&mut [u8], u64) -> Result<()>) -> Result<()> {
        let _one = self.one_at_a_time.lock();
        look(new, |bytes, start| {
            let there = usize::try_from(old.saturating_sub(start)).unwrap_or(usize::MAX).min(bytes.len());
            read(&mut bytes[..there], start)
        })
    }
}

/// Refuses if a file of `len` bytes that holds what `read` gives bears a signature.
fn look(len: u64, read: impl Fn(&mut [u8], u64) -> Result<()>) -> Result<()> {
    let part = |start: u64, len: u64| -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        if len > 0 {
            read(&mut bytes, start)?;
        }
        Ok(bytes)
    };
    let tail = TAIL.min(len);
    let would_be = Head { head: part(0, HEAD.min(len))?, tail: part(len - tail, tail)?, len };
    // A stream may also begin with a skippable frame (zstd, lz4: 184D2A5xh), which `recognise` does not look behind.
    let skippable = matches!(would_be.head.get(..4), Some([0x50..=0x5F, 0x2A, 0x4D, 0x18]));
    let stream = || (skippable || crate::compressed::recognise(&would_be.head).is_some()).then_some("a compressed stream");
    match would_be.recognise().or_else(stream) {
        None => Ok(()),
        Some(name) => Err(Error::new(
            Kind::Denied,
            format!(
                "this would make the raw image look like {name}, and its format was not given when it was opened; refused, since the next opening could be led to other files (give format=raw to allow it)"
            ),
        )),
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
