//! A store that fails when a test wants it to: a full disk, a bad sector, a sync that reports that written data are lost.
//!
//! A write that fails may have been done in part, as the host's may. For tests only.

use super::Store;
use parking_lot::Mutex;
use std::io::{self, IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::Arc;

/// Which calls fail from now on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Writes that would make the file longer than this fail with "no space left".
    pub space: Option<u64>,
    /// Of so many writes one fails with "no space left" and leaves some of its bytes. 0: none.
    pub full_one_in: u32,
    /// Of so many writes, truncations and deallocations one fails with an input/output error. 0: none.
    pub error_one_in: u32,
    /// Of so many reads one fails with an input/output error. 0: none.
    pub read_error_one_in: u32,
    /// The next sync fails.
    pub sync: bool,
}

#[derive(Debug)]
struct State {
    faults: Faults,
    random: u64,
    failed: u64,
}

/// Another store, with faults.
pub struct FailingStore {
    inner: Arc<dyn Store>,
    state: Mutex<State>,
}

impl FailingStore {
    /// Passes everything on to `inner` until faults are set. `seed` decides which calls fail.
    pub fn new(inner: Arc<dyn Store>, seed: u64) -> Self {
        Self { inner, state: Mutex::new(State { faults: Faults::default(), random: seed | 1, failed: 0 }) }
    }

    /// Sets what fails from now on.
    pub fn set(&self, faults: Faults) {
        self.state.lock().faults = faults;
    }

    /// How many calls have failed so far.
    pub fn failed(&self) -> u64 {
        self.state.lock().failed
    }

    /// Whether this call is to fail, and a random number.
    fn fails(&self, one_in: impl FnOnce(&Faults) -> u32) -> (bool, u64) {
        let mut state = self.state.lock();
        // xorshift64
        let mut x = state.random;
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        state.random = x;
        let one_in = u64::from(one_in(&state.faults));
        let fails = one_in > 0 && (x >> 20).is_multiple_of(one_in);
        state.failed += u64::from(fails);
        (fails, x >> 32)
    }

    fn io_error(&self) -> io::Result<()> {
        if self.fails(|f| f.error_one_in).0 { Err(eio()) } else { Ok(()) }
    }
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(nix::libc::EIO)
}

fn enospc() -> io::Error {
    io::Error::from_raw_os_error(nix::libc::ENOSPC)
}

impl Store for FailingStore {
    fn read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> io::Result<usize> {
        if self.fails(|f| f.read_error_one_in).0 {
            return Err(eio());
        }
        self.inner.read_at(bufs, at)
    }

    fn write_at(&self, bufs: &[IoSlice<'_>], at: u64) -> io::Result<()> {
        self.io_error()?;
        let bytes: Vec<u8> = bufs.iter().flat_map(|b| b.iter().copied()).collect();
        let (full, random) = self.fails(|f| f.full_one_in);
        let room = match self.state.lock().faults.space {
            // Inside the present length there is space already.
            Some(space) => usize::try_from(space.max(self.inner.len()?).saturating_sub(at)).unwrap_or(usize::MAX),
            None => usize::MAX,
        };
        let room = if full { room.min(random as usize % (bytes.len() + 1)) } else { room };
        if full || room < bytes.len() {
            let part = room.min(bytes.len()) & !511;
            self.inner.write_all_at(&bytes[..part], at)?;
            self.state.lock().failed += u64::from(!full);
            return Err(enospc());
        }
        self.inner.write_at(bufs, at)
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.io_error()?;
        self.inner.set_len(len)
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<bool> {
        self.io_error()?;
        self.inner.punch(at, len)
    }

    fn zero(&self, at: u64, len: u64) -> io::Result<bool> {
        self.io_error()?;
        self.inner.zero(at, len)
    }

    fn sync(&self) -> io::Result<()> {
        if self.state.lock().faults.sync {
            let mut state = self.state.lock();
            state.faults.sync = false;
            state.failed += 1;
            return Err(eio());
        }
        self.inner.sync()
    }

    fn path(&self) -> Option<&Path> {
        self.inner.path()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    #[test]
    fn a_full_disk_takes_what_fits_and_says_so() {
        let inner = Arc::new(MemoryStore::new(vec![0; 1024]));
        let store = FailingStore::new(inner.clone(), 1);
        store.set(Faults { space: Some(1536), ..Faults::default() });
        let error = store.write_all_at(&[7; 1024], 1024).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(inner.len().unwrap(), 1536);
        store.write_all_at(&[8; 1024], 0).unwrap();
        store.set(Faults { sync: true, ..Faults::default() });
        store.sync().unwrap_err();
        store.sync().unwrap();
        assert_eq!(store.failed(), 2);
        store.set(Faults { error_one_in: 1, ..Faults::default() });
        store.write_all_at(&[8; 10], 0).unwrap_err();
        store.punch(0, 1).unwrap_err();
    }
}
