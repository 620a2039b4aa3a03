//! What a format author writes: *where does this byte live*. The engine ([`crate::image`]) moves the bytes.
//!
//! A read-only format is `limits + map` (and `decode` when it stores encoded units). A writable one adds `prepare` and
//! `commit`, and as much of `zero` and `discard` as it can do cheaply.
//!
//! # Who calls what, and when
//! - `map` and `decode` are called by any number of threads at once, also while changes are under way elsewhere.
//! - `prepare`, `commit`, `cancel`, `zero`, `discard` are called under an exclusive lock of the engine on the units of
//!   [`FormatLimits::unit`] that the range touches: nobody changes the mapping of, or writes to, the same units meanwhile.
//!   Calls for different units run at once.
//! - The engine writes in place (to [`Place::Data`] with `in_place`) under a shared lock of those units.
//!
//! # Reuse of freed space
//! A reader may hold an old mapping while its range is discarded. Space that a change frees must therefore go to
//! [`crate::writeback::WriteBack::release`], which hands it back by [`Format::reclaim`] only when the change that freed it
//! is durable and every I/O that could have seen the old mapping has ended.

use crate::device::ZeroMode;
use crate::error::{Error, Result};
use crate::store::Store;
use crate::writeback::{Freed, MetaWrite};
use std::sync::Arc;

/// What a format is and can do; constant while open but for `size`.
#[derive(Clone, Copy, Debug)]
pub struct FormatLimits {
    /// Guest-visible size in bytes.
    pub size: u64,
    /// Logical sector in bytes: 512 or 4096.
    pub sector: u32,
    /// Physical sector in bytes.
    pub physical_sector: u32,
    /// Unit of mapping and locking in bytes, a power of two: cluster, block, grain. No extent that `map` returns straddles
    /// units in a way that a change to one unit alters the other.
    pub unit: u64,
    /// The file was opened without write access, or the format cannot be written.
    pub read_only: bool,
    /// `zero` works on whole units without writing data.
    pub cheap_zero: bool,
    /// `discard` frees space.
    pub can_discard: bool,
    /// Space is taken as it is needed.
    pub thin: bool,
    /// Holes of the host file inside [`Place::Data`] are this format's way to be thin (raw): maps show them as zeros.
    pub holes_are_zeros: bool,
}

/// Where a run of guest bytes lives.
#[derive(Clone)]
pub enum Place {
    /// As it is in a file, at this byte offset.
    Data {
        /// Which of [`Format::stores`].
        store: usize,
        /// Byte offset in it.
        at: u64,
        /// May be overwritten where it is (not shared with a snapshot, not a read-only file).
        in_place: bool,
    },
    /// Reads as zeros. `reserved`: space is set aside for it.
    Zero {
        /// Space is set aside in the file.
        reserved: bool,
    },
    /// This image says nothing: the parent's bytes, or zeros when there is none.
    Parent,
    /// Inside an encoded unit, `skip` bytes after its decoded start.
    Encoded {
        /// The unit to decode.
        unit: Unit,
        /// Bytes to skip in the decoded unit.
        skip: u64,
    },
}

/// An encoded unit (a compressed cluster): what [`Format::decode`] needs to find it, and what the cache knows it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Unit {
    /// Unique within the image for as long as it is open (the host offset, or an index of the format's own).
    pub id: u64,
    /// Meaning is the format's own (a host length, say).
    pub aux: u64,
    /// Length when decoded, in bytes; bounded by the format, at most [`MAX_UNIT`].
    pub decoded_len: u32,
}

/// The largest decoded unit that the engine accepts: 64 MiB.
pub const MAX_UNIT: u32 = 64 << 20;

/// A run of guest bytes and where it lives.
#[derive(Clone)]
pub struct Extent {
    /// Length in bytes; not 0, not more than was asked for.
    pub len: u64,
    /// Where.
    pub place: Place,
}

/// Space that `prepare` set aside for a write, to be given to `commit` or `cancel`.
#[derive(Debug)]
pub struct Placement {
    /// First guest byte covered. At or before the start asked for.
    pub at: u64,
    /// Guest bytes covered. What lies outside the write itself is filled by the engine from the old contents.
    pub len: u64,
    /// Which of [`Format::stores`].
    pub store: usize,
    /// Byte offset in it of guest byte `at`.
    pub host: u64,
    /// The whole placement is known to read as zeros in the file already, so that edges of zeros need no write.
    pub zeroed: bool,
    /// The format's own.
    pub token: u64,
}

/// A format's driver for one open file. See the module's text for the rules of concurrency.
pub trait Format: Send + Sync {
    /// QEMU's name of the format ("qcow2", "vpc").
    fn name(&self) -> &'static str;

    /// What it is and can do.
    fn limits(&self) -> FormatLimits;

    /// The files that [`Place::Data`] refers to; constant while open.
    fn stores(&self) -> &[Arc<dyn Store>];

    /// The run that starts at `at` (less than the size); its length is at most `want`. As long as is cheap to find out.
    fn map(&self, at: u64, want: u64) -> Result<Extent>;

    /// Fills `out` (`unit.decoded_len` bytes) with the decoded unit.
    fn decode(&self, unit: &Unit, out: &mut [u8]) -> Result<()> {
        let _ = (unit, out);
        Err(Error::unsupported("this format has no encoded units"))
    }

    /// Sets aside space for a write of `[at, at + len)`, or of a first part of it, that `map` does not allow in place. The
    /// placement begins at or before `at`, contains it, and is made visible only by `commit`.
    fn prepare(&self, at: u64, len: u64) -> Result<Placement> {
        let _ = (at, len);
        Err(read_only(self.name()))
    }

    /// Makes a placement visible: its data are in the file (not necessarily durable).
    fn commit(&self, placement: Placement) -> Result<()> {
        let _ = placement;
        Err(read_only(self.name()))
    }

    /// Gives a placement back, unused.
    fn cancel(&self, placement: Placement) {
        let _ = placement;
    }

    /// Called once, before the first change of the guest's data or of metadata after open: time to change a CID or a GUID, to clear autoclear bits.
    fn first_write(&self) -> Result<()> {
        Ok(())
    }

    /// Makes whole units read as zeros without writing data. `at` and `len` are multiples of the unit, or end at the end of the
    /// device. Returns how many bytes from `at` were done; 0 means it cannot (the engine writes zeros). Never called with `OnlyIfCheap`
    /// unless `cheap_zero`.
    fn zero(&self, at: u64, len: u64, mode: ZeroMode) -> Result<u64> {
        let _ = (at, len, mode);
        Ok(0)
    }

    /// Gives whole units back. They read as zeros afterwards (also where a parent has data). Alignment and result as for `zero`; bytes that are not
    /// done keep their contents.
    fn discard(&self, at: u64, len: u64) -> Result<u64> {
        let _ = (at, len);
        Ok(0)
    }

    /// Puts everything that is held back in the format's own memory into the write-back buffer. The engine drains that and syncs afterwards.
    fn flush(&self) -> Result<()> {
        Ok(())
    }

    /// For formats with a log of their own: writes the log entries that describe `writes`, which are about to be made. `true`: they are logged, and once
    /// a sync of the log is done the writes themselves need none before the next drain (which begins with one).
    fn log(&self, writes: &[MetaWrite]) -> Result<bool> {
        let _ = writes;
        Ok(false)
    }

    /// Space that may now be used again (see the module's text).
    fn reclaim(&self, freed: &[Freed]) -> Result<()> {
        let _ = freed;
        Ok(())
    }

    /// Grows the guest-visible size; new space reads as zeros, also where a parent has data.
    fn grow(&self, size: u64) -> Result<()> {
        let _ = size;
        Err(Error::unsupported(format!("a {} image cannot be resized", self.name())))
    }

    /// Looks at all metadata and, if asked, mends them. The device is otherwise idle.
    fn check(&self, repair: bool) -> Result<CheckReport> {
        let _ = repair;
        Err(Error::unsupported(format!("there is no check for {} images", self.name())))
    }

    /// What children of this image remember it by: a VHDX's DataWriteGuid, a VHD's or VDI's UUID, a VMDK's CID; as text, in the format's usual notation.
    fn identity(&self) -> Option<String> {
        None
    }

    /// Details for `info`, under "format-specific" in its JSON: a map of QEMU's own keys where it has them.
    fn describe(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// A clean end: everything is flushed, nothing will be called any more. Marks the file as closed where the format knows that.
    fn close(&self) -> Result<()> {
        Ok(())
    }
}

fn read_only(name: &str) -> Error {
    Error::new(crate::Kind::ReadOnly, format!("{name} images cannot be written"))
}

/// What `check` found. Counts as in `qemu-img check`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Contradictions that can lose data; those that were mended are among them.
    pub corruptions: u64,
    /// Space that nothing refers to; what was mended is among it.
    pub leaks: u64,
    /// Corruptions that were mended.
    pub corruptions_fixed: u64,
    /// Leaks that were mended.
    pub leaks_fixed: u64,
    /// Units of the image with data, zero or encoded.
    pub allocated_units: u64,
    /// Of those, encoded ones.
    pub encoded_units: u64,
    /// One line per finding, at most [`CheckReport::MAX_NOTES`].
    pub notes: Vec<String>,
}

impl CheckReport {
    /// How many findings are kept as text.
    pub const MAX_NOTES: usize = 1000;

    /// Counts a corruption.
    pub fn corruption(&mut self, note: impl Into<String>) {
        self.corruptions += 1;
        self.note(note);
    }

    /// Counts a leak.
    pub fn leak(&mut self, note: impl Into<String>) {
        self.leaks += 1;
        self.note(note);
    }

    /// Keeps a line of text, up to the limit.
    pub fn note(&mut self, note: impl Into<String>) {
        if self.notes.len() < Self::MAX_NOTES {
            self.notes.push(note.into());
        }
    }
}
