//! A file that nobody will read after this process: it has no name, and syncing it is a waste of time.

use super::{FileStore, Store};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};

/// A file without a name, of limited length.
#[derive(Debug)]
pub struct ThrowAwayStore {
    file: FileStore,
    limit: u64,
}

impl ThrowAwayStore {
    /// Takes over an open file that may grow to `limit` bytes; `dir` is where it lies, for messages.
    pub fn new(file: File, dir: impl Into<PathBuf>, limit: u64) -> io::Result<Self> {
        Ok(Self { file: FileStore::new(file, dir)?, limit })
    }

    fn check(&self, end: Option<u64>) -> io::Result<()> {
        if end.is_some_and(|end| end <= self.limit) {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::StorageFull,
            format!("the throw-away overlay may have {} MiB, so that the file system does not become full", self.limit >> 20),
        ))
    }
}

impl Store for ThrowAwayStore {
    fn read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> io::Result<usize> {
        self.file.read_at(bufs, at)
    }

    fn try_read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> io::Result<Option<usize>> {
        self.file.try_read_at(bufs, at)
    }

    fn write_at(&self, bufs: &[IoSlice<'_>], at: u64) -> io::Result<()> {
        self.check(at.checked_add(bufs.iter().map(|buf| buf.len() as u64).sum()))?;
        self.file.write_at(bufs, at)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check(Some(len))?;
        self.file.set_len(len)
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<bool> {
        self.file.punch(at, len)
    }

    fn zero(&self, at: u64, len: u64) -> io::Result<bool> {
        self.file.zero(at, len)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn hole_or_data(&self, at: u64) -> io::Result<Option<(u64, bool)>> {
        self.file.hole_or_data(at)
    }

    fn path(&self) -> Option<&Path> {
        self.file.path()
    }
}
