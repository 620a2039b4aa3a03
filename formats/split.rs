//! Split raw: a raw disk in several files, `disk.000` (or `disk.001`), `disk.001` and so on, one behind the other.
//!
//! There is no signature: the format is named, or guessed from the names of files that are there (and then guarded like a raw image whose format was
//! guessed). The pieces may be of any length; the disk ends with the last one, rounded up to a sector.

use crate::device::ZeroMode;
use crate::drivers::{Capabilities, Driver, Opened, Request};
use crate::error::{Error, Kind, Result};
use crate::format::{Extent, Format, FormatLimits, Place};
use crate::store::Store;
use crate::writeback::WriteBack;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The format's name; QEMU has none for it.
pub(crate) const NAME: &str = "split";
const SECTOR: u64 = 512;
/// Unit of locking, in bytes.
const UNIT: u64 = 4096;
/// Digits that a number has at least: fewer are versions of something more often than pieces.
const DIGITS: usize = 3;
/// The most pieces.
const MAX_PIECES: u32 = 4096;

/// The format's row in the table.
pub(crate) const DRIVER: Driver = Driver {
    name: NAME,
    aliases: &[],
    recognise: |_| false,
    can: Capabilities { read: true, write: true, discard: true, cheap_zero: true, parent: false, check: false, repair: false, grow: false },
    open,
};

/// A name that ends with a number.
struct Numbered {
    stem: Vec<u8>,
    number: u32,
    digits: usize,
}

impl Numbered {
    fn parse(path: &Path) -> Option<Self> {
        let name = path.file_name()?.as_bytes();
        let dot = name.iter().rposition(|b| *b == b'.').filter(|dot| *dot > 0)?;
        let digits = name.get(dot + 1..)?;
        if digits.len() < DIGITS || digits.len() > 9 || !digits.iter().all(u8::is_ascii_digit) {
            return None;
        }
        let number = std::str::from_utf8(digits).ok()?.parse().ok()?;
        Some(Self { stem: name.get(..=dot)?.to_vec(), number, digits: digits.len() })
    }

    /// The name of another piece.
    fn name(&self, number: u32) -> PathBuf {
        let mut name = self.stem.clone();
        name.extend(format!("{number:0digits$}", digits = self.digits).bytes());
        OsString::from_vec(name).into()
    }

    /// Whether this is the number of the first piece, as far as the files beside it tell.
    fn is_first(&self, path: &Path) -> bool {
        let there = |number| path.with_file_name(self.name(number)).is_file();
        self.number == 0 || self.number == 1 && !there(0)
    }
}

/// Whether a file is the first of several pieces, by its name and theirs.
pub(crate) fn is_first_of_many(path: &Path) -> bool {
    Numbered::parse(path).is_some_and(|name| name.is_first(path) && path.with_file_name(name.name(name.number + 1)).is_file())
}

fn open(request: Request<'_>) -> Result<Opened> {
    let name = Numbered::parse(request.path).ok_or_else(|| {
        Error::new(Kind::InvalidOption, "the name of the first piece of a split raw disk ends with .000 or .001, which this does not")
    })?;
    if !name.is_first(request.path) {
        return Err(Error::new(
            Kind::InvalidOption,
            "this is not the first piece of the disk: open that, whose name ends with .000 or .001",
        ));
    }
    let mut stores = vec![request.store];
    let mut number = name.number;
    loop {
        number += 1;
        match (request.open_file)(&name.name(number), request.writable) {
            Ok(store) if number <= MAX_PIECES => stores.push(store),
            Ok(_) => return Err(Error::unsupported(format!("a disk of more than {MAX_PIECES} pieces"))),
            Err(error) if error.kind() == Kind::NotFound => break,
            Err(error) => return Err(error),
        }
    }
    if request.path.with_file_name(name.name(number + 1)).is_file() {
        return Err(Error::new(
            Kind::NotFound,
            format!("the piece \"{}\" of the disk is missing, and the one behind it is there", name.name(number).display()),
        ));
    }
    let format = Split::new(stores.clone(), request.writable)?;
    Ok(Opened { format: Arc::new(format), writeback: Arc::new(WriteBack::new(stores, request.redo)), parent: None })
}

/// An open split raw disk.
struct Split {
    stores: Vec<Arc<dyn Store>>,
    /// Where each piece ends, in bytes of the disk; the last one at the end of its last sector.
    ends: Vec<u64>,
    writable: bool,
}

impl Split {
    fn new(stores: Vec<Arc<dyn Store>>, writable: bool) -> Result<Self> {
        let mut ends = Vec::with_capacity(stores.len());
        let mut end = 0u64;
        for store in &stores {
            let len = store.len().map_err(|e| Error::io("cannot find out the length of a piece", e))?;
            end = end
                .checked_add(len)
                .filter(|e| *e < i64::MAX as u64)
                .ok_or_else(|| Error::unsupported("pieces of more than 2^63 bytes"))?;
            ends.push(end);
        }
        if let Some(last) = ends.last_mut() {
            *last = last.next_multiple_of(SECTOR);
        }
        Ok(Self { stores, ends, writable })
    }

    fn size(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// The piece that byte `at` is in, its first byte, and the one behind its last.
    fn piece(&self, at: u64) -> Result<(usize, u64, u64)> {
        let number = self.ends.partition_point(|end| *end <= at);
        let end =
            *self.ends.get(number).ok_or_else(|| Error::new(Kind::OutOfBounds, format!("byte {at} lies beyond the end of the disk")))?;
        let start = number.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0);
        Ok((number, start, end))
    }

    /// Runs `change` on the parts of a range that lie inside the files, until one is not done; returns how much from its start was.
    fn each(&self, at: u64, len: u64, change: impl Fn(&dyn Store, u64, u64) -> std::io::Result<bool>) -> Result<u64> {
        let end = at.saturating_add(len).min(self.size());
        let mut here = at;
        while here < end {
            let (number, start, stop) = self.piece(here)?;
            let Some(store) = self.stores.get(number) else { break };
            let inside = store.len().map_err(|e| Error::io("cannot find out the length of a piece", e))?.saturating_sub(here - start);
            let count = inside.min(stop.min(end) - here);
            if count > 0 && !change(&**store, here - start, count).map_err(|e| Error::io("cannot deallocate", e).at_offset(here - start))? {
                break;
            }
            here = stop.min(end);
        }
        Ok(here - at)
    }
}

impl Format for Split {
    fn name(&self) -> &'static str {
        NAME
    }

    fn limits(&self) -> FormatLimits {
        FormatLimits {
            size: self.size(),
            sector: SECTOR as u32,
            physical_sector: 4096,
            unit: UNIT,
            read_only: !self.writable,
            cheap_zero: true,
            can_discard: true,
            thin: true,
            holes_are_zeros: true,
        }
    }

    fn stores(&self) -> &[Arc<dyn Store>] {
        &self.stores
    }

    fn map(&self, at: u64, want: u64) -> Result<Extent> {
        let (store, start, end) = self.piece(at)?;
        Ok(Extent { len: want.min(end - at), place: Place::Data { store, at: at - start, in_place: self.writable } })
    }

    fn zero(&self, at: u64, len: u64, mode: ZeroMode) -> Result<u64> {
        self.each(at, len, |store, at, len| if mode == ZeroMode::KeepAllocated { store.zero(at, len) } else { store.punch(at, len) })
    }

    fn discard(&self, at: u64, len: u64) -> Result<u64> {
        self.each(at, len, |store, at, len| store.punch(at, len))
    }

    fn describe(&self) -> serde_json::Value {
        let names = self.stores.iter().filter_map(|s| Some(s.path()?.to_string_lossy().into_owned()));
        serde_json::json!({ "pieces": names.collect::<Vec<_>>() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let name = Numbered::parse(Path::new("/a.b/disk.img.001")).unwrap();
        assert_eq!((name.number, name.name(12)), (1, PathBuf::from("disk.img.012")));
        for other in ["disk.01", "disk", ".001", "disk.00a", "disk.0000000001", "disk.+01"] {
            assert!(Numbered::parse(Path::new(other)).is_none(), "{other}");
        }
    }
}
