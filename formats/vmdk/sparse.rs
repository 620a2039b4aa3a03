//! One sparse extent: where a grain lies.

use super::descriptor::SECTOR;
use super::header::{Header, Scheme};
use super::pages::Pages;
use super::slots::Slots;
use crate::error::{Error, Result};
use crate::store::Store;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// An open sparse extent.
pub(super) struct Sparse {
    pub(super) header: Header,
    /// Which of the format's stores.
    pub(super) store: usize,
    file: Arc<dyn Store>,
    /// Length of the file when last looked at, in bytes.
    file_len: AtomicU64,
    /// Free space; known from the first change on.
    pub(super) slots: Mutex<Option<Slots>>,
    /// Held by who puts a table into the directory.
    pub(super) new_table: Mutex<()>,
}

/// What the tables say of a grain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grain {
    /// Not here.
    Absent,
    /// Zeros.
    Zero,
    /// At this byte offset.
    Data(u64),
}

impl Sparse {
    pub(super) fn open(store: usize, file: Arc<dyn Store>) -> Result<Self> {
        let header = Header::read(&*file)?;
        let len = file.len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
        Ok(Self { header, store, file, file_len: AtomicU64::new(len), slots: Mutex::default(), new_table: Mutex::default() })
    }

    pub(super) fn file(&self) -> &dyn Store {
        &*self.file
    }

    /// Adds the file to an error about this extent.
    pub(super) fn explain(&self, error: Error) -> Error {
        match self.file.path() {
            Some(path) => error.at_path(path),
            None => error,
        }
    }

    /// Of `len` bytes at `at` in the file, how many are there.
    pub(super) fn in_file(&self, at: u64, len: u64) -> Result<u64> {
        let inside = |file_len: u64| file_len.saturating_sub(at).min(len);
        let known = inside(self.file_len.load(Ordering::Relaxed));
        if known == len {
            return Ok(known);
        }
        let file_len = self.file.len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
        self.file_len.store(file_len, Ordering::Relaxed);
        Ok(inside(file_len))
    }

    /// Makes the file at least so long.
    pub(super) fn extend(&self, len: u64) -> Result<()> {
        self.file.set_len(len).map_err(|e| Error::io(format!("cannot extend the file to {len} bytes"), e))?;
        self.file_len.fetch_max(len, Ordering::Relaxed);
        Ok(())
    }

    /// Number of grains.
    pub(super) fn grains(&self) -> u64 {
        self.header.capacity.div_ceil(self.header.grain)
    }

    /// Bytes of a grain table.
    pub(super) fn table_len(&self) -> u64 {
        self.header.per_table * self.header.scheme.width()
    }

    /// An entry from its bytes.
    pub(super) fn decode(&self, bytes: &[u8]) -> u64 {
        match self.header.scheme {
            Scheme::SeSparse { .. } => bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b)),
            _ => bytes.first_chunk().map_or(0, |b| u64::from(u32::from_le_bytes(*b))),
        }
    }

    /// Byte offset of an entry of a directory.
    pub(super) fn directory_entry(&self, directory_at: u64, number: u64) -> u64 {
        directory_at.saturating_add(number.saturating_mul(self.header.scheme.width()))
    }

    /// Byte offset of grain table `number` of the directory at `directory_at`; `None`: there is none, and no grain of it is here.
    pub(super) fn table(&self, pages: &Pages, directory_at: u64, number: u64) -> Result<Option<u64>> {
        let place = self.directory_entry(directory_at, number);
        if number >= self.header.directory_len {
            return Err(self.explain(Error::corrupt(format!("there is no entry {number} in the grain directory")).at_offset(directory_at)));
        }
        let entry = pages.look(self.store, place, self.header.scheme.width(), |bytes| Ok(self.decode(bytes)))?;
        if entry == 0 {
            return Ok(None);
        }
        let at = match self.header.scheme {
            Scheme::Hosted { .. } | Scheme::Cowd => entry.checked_mul(SECTOR),
            Scheme::SeSparse { tables_at, .. } if entry >> 32 == 0x1000_0000 => {
                (entry & 0xFFFF_FFFF).checked_mul(self.table_len()).and_then(|at| at.checked_add(tables_at))
            }
            Scheme::SeSparse { .. } => None,
        };
        match at {
            Some(at) if !self.touches_fixed(at, self.table_len()) && self.in_file(at, self.table_len())? == self.table_len() => {
                Ok(Some(at))
            }
            _ => Err(self.explain(
                Error::corrupt(format!("entry {number} of the grain directory ({entry:#x}) leads to no grain table")).at_offset(place),
            )),
        }
    }

    /// Whether a run of bytes touches the header, the descriptor or a directory.
    pub(super) fn touches_fixed(&self, at: u64, len: u64) -> bool {
        let end = at.saturating_add(len);
        let directory = self.header.directory_len * self.header.scheme.width();
        let touches = |start: u64, size: u64| size > 0 && at < start.saturating_add(size) && start < end;
        touches(0, SECTOR)
            || touches(self.header.directory_at, directory)
            || self.header.redundant_at.is_some_and(|start| touches(start, directory))
            || self.header.descriptor.is_some_and(|(start, size)| touches(start, size))
    }

    /// Of tables (byte offset, directory, number; sorted), those that lie over an earlier one; the two directories may lead to the same table by the same number.
    pub(super) fn tables_over_others(&self, tables: &[(u64, u64, u64)]) -> Vec<(u64, u64, u64)> {
        let mut over = Vec::new();
        let mut last: Option<(u64, u64)> = None;
        for &(at, directory, number) in tables {
            match last {
                Some((start, owner)) if at < start.saturating_add(self.table_len()) && (at, number) != (start, owner) => {
                    over.push((at, directory, number));
                }
                _ => last = Some((at, number)),
            }
        }
        over
    }

    /// What an entry of a grain table says; `None`: nothing that makes sense.
    pub(super) fn grain(&self, entry: u64) -> Option<Grain> {
        let at = match self.header.scheme {
            _ if entry == 0 => return Some(Grain::Absent),
            Scheme::Hosted { zeroed: true } if entry == 1 => return Some(Grain::Zero),
            Scheme::Hosted { .. } | Scheme::Cowd => entry.checked_mul(SECTOR),
            Scheme::SeSparse { grains_at, .. } => match entry >> 60 {
                1 | 2 => return Some(Grain::Zero),
                3 => {
                    let number = (entry >> 48 & 0xFFF) | (entry & 0xFFFF_FFFF_FFFF) << 12;
                    number.checked_mul(self.header.grain).and_then(|at| at.checked_add(grains_at))
                }
                _ => None,
            },
        };
        at.filter(|at| !self.touches_fixed(*at, SECTOR)).map(Grain::Data)
    }

    /// The entry of grain `index` in the table at `table`, as a byte offset.
    pub(super) fn table_entry(&self, table: u64, index: u64) -> u64 {
        table.saturating_add(index % self.header.per_table * self.header.scheme.width())
    }

    /// Where grain `index` lies, and for how many grains from it on (at most `most`) that goes on: not here, zeros, or next to each other in the file.
    /// Not further than is cheap to find out.
    pub(super) fn lookup(&self, pages: &Pages, index: u64, most: u64) -> Result<(Grain, u64)> {
        let per_table = self.header.per_table;
        let most = most.min(per_table - index % per_table).max(1);
        let Some(table) = self.table(pages, self.header.directory_at, index / per_table)? else { return Ok((Grain::Absent, most)) };
        let (place, width) = (self.table_entry(table, index), self.header.scheme.width());
        let (found, run) = pages.look(self.store, place, most * width, |bytes| {
            let mut grains = bytes.chunks_exact(width as usize).map(|entry| self.grain(self.decode(entry)));
            let first = grains.next().flatten().ok_or_else(|| {
                self.explain(Error::corrupt(format!("the grain table places grain {index} where it cannot be")).at_offset(place))
            })?;
            let mut run = 1;
            for grain in grains {
                let goes_on = match first {
                    Grain::Data(at) => Grain::Data(at.saturating_add(run * self.header.grain)),
                    other => other,
                };
                // What makes no sense is the error of whoever asks for that grain.
                if grain != Some(goes_on) {
                    break;
                }
                run += 1;
            }
            Ok((first, run))
        })?;
        let Grain::Data(at) = found else { return Ok((found, run)) };
        // A file may end inside its last grain; the rest reads as zeros.
        let there = self.in_file(at, run * self.header.grain)?.div_ceil(self.header.grain);
        if there == 0 {
            return Err(self.explain(
                Error::corrupt(format!("grain {index} lies at {at:#x}, beyond the end of the file, which has been cut short"))
                    .at_offset(place),
            ));
        }
        Ok((found, there))
    }
}
