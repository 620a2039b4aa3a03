//! The scratch file: decoded units that are too large for memory, or were expensive to decode, in a file without a name that vanishes with the process.
//!
//! The file is sparse and as long as the decoded stream; a unit lies where it lies in the stream. Units come and go whole, the least recently used first, within a limit of bytes.
//! A unit that is being read, or filled, stays.

use super::units::Span;
use crate::error::{Error, Kind, Result};
use parking_lot::{Condvar, Mutex};
use rustix::fs::{FallocateFlags, fallocate};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IoSliceMut, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes that are written, and told to those who wait, at a time.
const CHUNK: usize = 1 << 20;
/// Runs of zeros of this length are not written.
const HOLE: usize = 64 << 10;

/// A file in `dir` that has no name and is gone when it is closed.
pub(crate) fn nameless_file(dir: &Path) -> io::Result<File> {
    tempfile::tempfile_in(dir)
}

/// How many bytes a scratch file in `dir` may have if 5 % of the file system are to stay free.
pub(crate) fn room(dir: &Path) -> Result<u64> {
    let fs =
        rustix::fs::statvfs(dir).map_err(|error| Error::io("cannot tell the free space for a scratch file", error.into()).at_path(dir))?;
    let reserve = fs.f_blocks / 20;
    Ok(fs.f_bavail.saturating_sub(reserve).saturating_mul(fs.f_frsize))
}

/// The scratch file of one stream.
pub(super) struct Scratch {
    dir: PathBuf,
    file: File,
    limit: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    units: HashMap<usize, Slot>,
    /// Why the last attempt to fill a unit failed, for those who waited for it.
    failures: HashMap<usize, (Kind, String)>,
    used: u64,
    clock: u64,
}

struct Slot {
    at: u64,
    len: u64,
    /// Bytes from its start that are there.
    done: u64,
    filling: bool,
    pins: u32,
    used_at: u64,
}

impl Scratch {
    /// A file in `dir` that holds at most `limit` bytes.
    pub(super) fn new(dir: &Path, limit: u64) -> Result<Self> {
        let file = nameless_file(dir).map_err(|error| Error::io("cannot make a scratch file", error).at_path(dir))?;
        Ok(Self { dir: dir.to_path_buf(), file, limit, state: Mutex::default(), changed: Condvar::new() })
    }

    /// The unit if all of it is there.
    pub(super) fn find(&self, number: usize) -> Option<Pinned<'_>> {
        let mut state = self.state.lock();
        let now = state.tick();
        let slot = state.units.get_mut(&number).filter(|slot| !slot.filling)?;
        slot.pins += 1;
        slot.used_at = now;
        Some(Pinned { scratch: self, number })
    }

    /// The unit, its first `need` bytes at least. If nobody has done so it is filled from what `open` gives, all of it.
    pub(super) fn get<'r>(
        &self,
        number: usize,
        span: &Span,
        need: u64,
        open: impl FnOnce() -> Result<Box<dyn Read + 'r>>,
    ) -> Result<Pinned<'_>> {
        {
            let mut state = self.state.lock();
            let mut waited = false;
            loop {
                let now = state.tick();
                match state.units.get_mut(&number) {
                    Some(slot) if slot.done >= need || !slot.filling => {
                        slot.pins += 1;
                        slot.used_at = now;
                        return Ok(Pinned { scratch: self, number });
                    }
                    Some(_) => {
                        self.changed.wait(&mut state);
                        waited = true;
                    }
                    None => match state.failures.get(&number).filter(|_| waited) {
                        Some((kind, message)) => return Err(Error::new(*kind, message.clone())),
                        None => break,
                    },
                }
            }
            self.reserve(&mut state, number, span)?;
        }
        let mut filling = Filling { scratch: self, number, at: span.at, len: span.len, outcome: None };
        let filled = open().and_then(|from| filling.fill(from));
        filling.outcome = Some(filled.as_ref().copied().map_err(|error| (error.kind(), error.chain())));
        filled.map(|()| Pinned { scratch: self, number })
    }

    /// Keeps a unit that was decoded elsewhere, if there is room. It is a favour: nothing fails.
    pub(super) fn offer(&self, number: usize, span: &Span, bytes: &[u8]) {
        {
            let mut state = self.state.lock();
            if state.units.contains_key(&number) || self.reserve(&mut state, number, span).is_err() {
                return;
            }
        }
        let mut filling = Filling { scratch: self, number, at: span.at, len: span.len, outcome: None };
        match filling.fill(bytes) {
            Ok(()) => {
                filling.outcome = Some(Ok(()));
                drop(Pinned { scratch: self, number });
            }
            Err(error) => tracing::debug!("a decoded unit is not kept: {}", error.chain()),
        }
    }

    /// Makes room for a unit and enters it as being filled, with a pin for whoever fills it.
    fn reserve(&self, state: &mut State, number: usize, span: &Span) -> Result<()> {
        if span.len > self.limit {
            return Err(self.too_large(&format!("has a part that decodes to {} MiB", span.len >> 20)));
        }
        while state.used > self.limit - span.len {
            let idle =
                state.units.iter().filter(|(_, slot)| slot.pins == 0).min_by_key(|(_, slot)| slot.used_at).map(|(number, _)| *number);
            let Some(idle) = idle else {
                return Err(Error::new(Kind::NoSpace, "all of the scratch file is in use: allow it more space").at_path(&self.dir));
            };
            self.drop_unit(state, idle);
        }
        state.used += span.len;
        let used_at = state.tick();
        state.units.insert(number, Slot { at: span.at, len: span.len, done: 0, filling: true, pins: 1, used_at });
        Ok(())
    }

    fn drop_unit(&self, state: &mut State, number: usize) {
        if let Some(slot) = state.units.remove(&number) {
            state.used -= slot.len;
            let punched = fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, slot.at, slot.len);
            if let Err(error) = punched {
                tracing::debug!("cannot give back space of a scratch file: {error}");
            }
        }
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        for (n, part) in bytes.chunks(HOLE).enumerate() {
            if part.iter().any(|byte| *byte != 0) {
                self.file.write_all_at(part, at + (n * HOLE) as u64).map_err(|error| self.failed(error))?;
            }
        }
        Ok(())
    }

    fn failed(&self, error: io::Error) -> Error {
        Error::io("cannot write a decoded stream to a scratch file", error).at_path(&self.dir)
    }

    fn too_large(&self, what: &str) -> Error {
        Error::new(
            Kind::NoSpace,
            format!(
                "the stream {what}, which must go to a scratch file, and that may have {} MiB: allow more, or compress the file in blocks",
                self.limit >> 20
            ),
        )
        .at_path(&self.dir)
    }
}

impl State {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }
}

/// A unit that is being filled; forgotten again unless that is completed.
struct Filling<'a> {
    scratch: &'a Scratch,
    number: usize,
    at: u64,
    len: u64,
    /// None: given up without a word, or by a panic.
    outcome: Option<Result<(), (Kind, String)>>,
}

impl Filling<'_> {
    fn fill(&mut self, mut from: impl Read) -> Result<()> {
        let mut chunk = vec![0; CHUNK.min(self.len as usize)];
        let mut done = 0;
        while done < self.len {
            let want = chunk.len().min((self.len - done) as usize);
            let got = read_full(&mut from, chunk.get_mut(..want).unwrap_or_default())?;
            if got == 0 {
                return Err(Error::corrupt(format!("a part of the stream ends after {done} of {} bytes", self.len)));
            }
            self.scratch.write(chunk.get(..got).unwrap_or_default(), self.at + done)?;
            done += got as u64;
            if let Some(slot) = self.scratch.state.lock().units.get_mut(&self.number) {
                slot.done = done;
            }
            self.scratch.changed.notify_all();
        }
        // The decoder checks its checksum at the end.
        if read_full(&mut from, &mut [0])? != 0 {
            return Err(Error::corrupt(format!("a part of the stream is longer than the {} bytes it should have", self.len)));
        }
        Ok(())
    }
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        let mut state = self.scratch.state.lock();
        if let Some(Ok(())) = self.outcome {
            state.failures.remove(&self.number);
            if let Some(slot) = state.units.get_mut(&self.number) {
                slot.filling = false;
            }
        } else {
            self.scratch.drop_unit(&mut state, self.number);
            if let Some(Err(failure)) = self.outcome.take() {
                state.failures.insert(self.number, failure);
            }
        }
        drop(state);
        self.scratch.changed.notify_all();
    }
}

/// A unit that stays while this lives.
pub(super) struct Pinned<'a> {
    scratch: &'a Scratch,
    number: usize,
}

impl Pinned<'_> {
    /// Fills `buf` from the stream's byte `at`, which with all of `buf` lies in the part of the unit that was asked for.
    pub(super) fn read(&self, bufs: &mut [IoSliceMut<'_>], mut at: u64) -> Result<()> {
        for buf in bufs {
            let mut left = &mut buf[..];
            while !left.is_empty() {
                let got = self
                    .scratch
                    .file
                    .read_at(left, at)
                    .map_err(|error| Error::io("cannot read the scratch file", error).at_path(&self.scratch.dir))?;
                if got == 0 {
                    // Zeros at the very end were not written.
                    left.fill(0);
                    at += left.len() as u64;
                    break;
                }
                at += got as u64;
                left = left.get_mut(got..).unwrap_or_default();
            }
        }
        Ok(())
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        if let Some(slot) = self.scratch.state.lock().units.get_mut(&self.number) {
            slot.pins = slot.pins.saturating_sub(1);
        }
    }
}

fn read_full(from: &mut impl Read, buf: &mut [u8]) -> Result<usize> {
    let mut got = 0;
    while let Some(rest) = buf.get_mut(got..).filter(|rest| !rest.is_empty()) {
        match from.read(rest) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io("cannot decode the compressed stream", error)),
        }
    }
    Ok(got)
}
