//! A store in memory: for tests, and for overlays that are thrown away.

use super::Store;
use parking_lot::RwLock;
use std::io::{self, IoSlice, IoSliceMut};

/// Bytes in memory.
#[derive(Debug, Default)]
pub struct MemoryStore(RwLock<Vec<u8>>);

impl MemoryStore {
    /// A store that holds `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(RwLock::new(bytes))
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        self.0.read().clone()
    }
}

fn index(at: u64) -> io::Result<usize> {
    usize::try_from(at).map_err(|_| io::ErrorKind::FileTooLarge.into())
}

impl Store for MemoryStore {
    fn read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> io::Result<usize> {
        let bytes = self.0.read();
        let mut rest = bytes.get(index(at)?..).unwrap_or(&[]);
        let mut done = 0;
        for buf in bufs {
            let count = buf.len().min(rest.len());
            buf[..count].copy_from_slice(&rest[..count]);
            rest = &rest[count..];
            done += count;
        }
        Ok(done)
    }

    fn write_at(&self, bufs: &[IoSlice<'_>], at: u64) -> io::Result<()> {
        let mut bytes = self.0.write();
        let mut at = index(at)?;
        for buf in bufs {
            let end = at.checked_add(buf.len()).ok_or(io::ErrorKind::FileTooLarge)?;
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[at..end].copy_from_slice(buf);
            at = end;
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.read().len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.write().resize(index(len)?, 0);
        Ok(())
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<bool> {
        self.zero(at, len)
    }

    fn zero(&self, at: u64, len: u64) -> io::Result<bool> {
        let mut bytes = self.0.write();
        let end = index(at.saturating_add(len))?.min(bytes.len());
        let start = index(at)?.min(end);
        bytes[start..end].fill(0);
        Ok(true)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
