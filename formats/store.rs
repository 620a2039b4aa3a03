//! Where an image's bytes are kept: positional access only, so that any number of threads share one store.

pub mod failing;
mod file;
mod memory;
mod part;
pub mod recording;
mod throw_away;

pub use file::FileStore;
pub use memory::MemoryStore;
pub(crate) use part::PartStore;
pub use throw_away::ThrowAwayStore;

use std::io::{self, IoSlice, IoSliceMut};
use std::path::Path;

/// A file or something like one. Calls may use up (advance) the buffer lists that they are lent mutably. Offsets are bytes from
/// its start; there is no cursor.
#[expect(clippy::len_without_is_empty, reason = "asking is an I/O that can fail; nobody asks whether an image file is empty")]
pub trait Store: Send + Sync {
    /// Reads until `bufs` are full or the store ends; returns how many bytes.
    fn read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> io::Result<usize>;

    /// Like `read_at` if no wait for a disk is needed; `None`: it would wait, nothing is known of the buffers.
    fn try_read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> io::Result<Option<usize>> {
        let _ = (bufs, at);
        Ok(None)
    }

    /// Writes all of `bufs`, extending the store where needed.
    fn write_at(&self, bufs: &[IoSlice<'_>], at: u64) -> io::Result<()>;

    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Cuts or extends (with zeros).
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes a range inside the length read as zeros and gives its space back. `false`: the store cannot, nothing was done.
    fn punch(&self, at: u64, len: u64) -> io::Result<bool>;

    /// Makes a range inside the length read as zeros, keeping or taking its space, without writing it. `false`: cannot, nothing was done.
    fn zero(&self, at: u64, len: u64) -> io::Result<bool>;

    /// Makes all completed writes durable, with whatever is needed to read them back (fdatasync).
    fn sync(&self) -> io::Result<()>;

    /// Length of the run at `at` that is all data or all hole, and whether it is data. `None`: the store does not know.
    fn hole_or_data(&self, at: u64) -> io::Result<Option<(u64, bool)>> {
        let _ = at;
        Ok(None)
    }

    /// The file behind it, for messages and for resolving relative names.
    fn path(&self) -> Option<&Path> {
        None
    }

    /// Reads all of `buf`; what lies beyond the end reads as zeros.
    fn read_zero_filled(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        let got = self.read_at(&mut [IoSliceMut::new(buf)], at)?;
        if let Some(rest) = buf.get_mut(got..) {
            rest.fill(0);
        }
        Ok(())
    }

    /// Reads all of `buf` or fails with `UnexpectedEof`.
    fn read_exact_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        let want = buf.len();
        let got = self.read_at(&mut [IoSliceMut::new(buf)], at)?;
        if got < want {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("the file ends {} bytes too early", want - got)));
        }
        Ok(())
    }

    /// Writes all of `buf`.
    fn write_all_at(&self, buf: &[u8], at: u64) -> io::Result<()> {
        self.write_at(&[IoSlice::new(buf)], at)
    }
}
