//! The log as it is found in a file: its entries, which of them must be replayed, and their replay ([MS-VHDX] 2.3).
//!
//! Writing new entries is `log_writer.rs`.

use super::header::{Header, IN_PLACE_END, MIB};
use super::region::Region;
use crate::error::{Error, Result};
use crate::field::array;
use crate::store::Store;
use std::collections::BTreeMap;
use uuid::Uuid;

/// Unit of the log and of what it writes, in bytes.
pub(super) const SECTOR: usize = 4096;
/// Size of an entry's header and of a descriptor, in bytes.
pub(super) const HEADER: usize = 64;
pub(super) const DESCRIPTOR: usize = 32;
/// No file can be longer than a full 64 TiB disk with all its tables: what the log says beyond this is damage. Bytes.
const MAX_FILE: u64 = 1 << 47;

/// Sectors that an entry's header and `descriptors` descriptors take.
pub(super) fn descriptor_sectors(descriptors: u64) -> u64 {
    (HEADER as u64 + descriptors.saturating_mul(DESCRIPTOR as u64)).div_ceil(SECTOR as u64)
}

/// What one descriptor does.
enum Change {
    Zero {
        at: u64,
        len: u64,
    },
    /// The sector's inner bytes are in the entry's data sector of that number; its ends are here, since signatures stand in their place there.
    Write {
        at: u64,
        data: u64,
        leading: [u8; 8],
        trailing: [u8; 4],
    },
}

struct Entry {
    /// Byte offset in the log.
    start: u64,
    len: u64,
    tail: u64,
    sequence: u64,
    flushed_file_len: u64,
    last_file_len: u64,
    changes: Vec<Change>,
}

/// Where a replay goes: the file, or memory over it.
pub(super) trait Target {
    fn zero(&mut self, at: u64, len: u64) -> Result<()>;
    fn write(&mut self, at: u64, sector: Box<[u8; SECTOR]>) -> Result<()>;
    fn extend(&mut self, len: u64) -> Result<()>;
}

/// The ring of sectors.
struct Ring<'a> {
    store: &'a dyn Store,
    region: Region,
}

impl Ring<'_> {
    fn read(&self, at: u64, sector: &mut [u8; SECTOR]) -> Result<()> {
        let host = self.region.at.saturating_add(at % self.region.len);
        self.store.read_zero_filled(sector, host).map_err(|e| Error::io("cannot read the log", e).at_offset(host))
    }

    /// The valid entry that begins at `start`, if one does.
    ///
    /// Sectors of an entry after its first never look like an entry's first, so that valid entries cannot overlap: the scan of a log is linear in
    /// its length whatever it holds.
    fn entry(&self, start: u64, guid: Uuid) -> Result<Option<Entry>> {
        let mut sector = [0; SECTOR];
        self.read(start, &mut sector)?;
        if !sector.starts_with(b"loge") {
            return Ok(None);
        }
        let sum = u32::from_le_bytes(array(&sector, 4)?);
        let len = u64::from(u32::from_le_bytes(array(&sector, 8)?));
        let descriptors = u64::from(u32::from_le_bytes(array(&sector, 24)?));
        let mut entry = Entry {
            start,
            len,
            tail: u64::from(u32::from_le_bytes(array(&sector, 12)?)),
            sequence: u64::from_le_bytes(array(&sector, 16)?),
            flushed_file_len: u64::from_le_bytes(array(&sector, 48)?),
            last_file_len: u64::from_le_bytes(array(&sector, 56)?),
            changes: Vec::new(),
        };
        let whole = |n: u64| n.is_multiple_of(SECTOR as u64);
        if Uuid::from_bytes_le(array(&sector, 32)?) != guid
            || entry.sequence == 0
            || !whole(len)
            || len > self.region.len
            || !whole(entry.tail)
            || entry.tail >= self.region.len
            || descriptor_sectors(descriptors).saturating_mul(SECTOR as u64) > len
        {
            return Ok(None);
        }
        sector[4..8].fill(0);
        let mut crc = crc32c::crc32c(&sector);
        let (mut done, mut data) = (0, 0);
        for index in 0..descriptor_sectors(descriptors) {
            if index > 0 {
                self.read(start + index * SECTOR as u64, &mut sector)?;
                crc = crc32c::crc32c_append(crc, &sector);
            }
            let skip = if index == 0 { HEADER } else { 0 };
            for bytes in sector[skip..].chunks_exact(DESCRIPTOR) {
                if done == descriptors {
                    break;
                }
                done += 1;
                let at = u64::from_le_bytes(array(bytes, 16)?);
                if u64::from_le_bytes(array(bytes, 24)?) != entry.sequence || !whole(at) {
                    return Ok(None);
                }
                entry.changes.push(if bytes.starts_with(b"desc") {
                    data += 1;
                    Change::Write { at, data: data - 1, leading: array(bytes, 8)?, trailing: array(bytes, 4)? }
                } else if bytes.starts_with(b"zero") {
                    let len = u64::from_le_bytes(array(bytes, 8)?);
                    if !whole(len) {
                        return Ok(None);
                    }
                    Change::Zero { at, len }
                } else {
                    return Ok(None);
                });
            }
        }
        if descriptor_sectors(descriptors).saturating_add(data).saturating_mul(SECTOR as u64) != len {
            return Ok(None);
        }
        for index in 0..data {
            self.read(self.data_at(&entry, index), &mut sector)?;
            if !is_data(&sector, entry.sequence)? {
                return Ok(None);
            }
            crc = crc32c::crc32c_append(crc, &sector);
        }
        Ok((crc == sum).then_some(entry))
    }

    /// Where in the log an entry's data sector is.
    fn data_at(&self, entry: &Entry, index: u64) -> u64 {
        let before = descriptor_sectors(entry.changes.len() as u64).saturating_add(index);
        entry.start.saturating_add(before.saturating_mul(SECTOR as u64))
    }
}

fn is_data(sector: &[u8; SECTOR], sequence: u64) -> Result<bool> {
    let high = u64::from(u32::from_le_bytes(array(sector, 4)?));
    let low = u64::from(u32::from_le_bytes(array(sector, SECTOR - 4)?));
    Ok(sector.starts_with(b"data") && (high << 32 | low) == sequence)
}

/// The entries that must be replayed, oldest first.
pub(super) struct ActiveSequence<'a> {
    ring: Ring<'a>,
    entries: Vec<Entry>,
}

impl<'a> ActiveSequence<'a> {
    /// Finds the newest complete sequence of a log that is not empty ([MS-VHDX] 2.3.3).
    ///
    /// # Errors
    /// `Corrupt` when there is none, or when the file is shorter than it was when the sequence was written.
    pub(super) fn find(store: &'a dyn Store, header: &Header) -> Result<Self> {
        let ring = Ring { store, region: Region { at: header.log_at, len: u64::from(header.log_len) } };
        let mut entries = BTreeMap::new();
        let mut start = 0;
        while start < ring.region.len {
            start += match ring.entry(start, header.log)? {
                Some(entry) => {
                    let len = entry.len;
                    entries.insert(start, entry);
                    len
                }
                None => SECTOR as u64,
            };
        }
        let entries = newest(entries, ring.region.len).ok_or_else(|| {
            Error::corrupt("the image was not closed cleanly, and its log holds no complete sequence of entries to recover it from")
                .at_offset(header.log_at)
        })?;
        let this = Self { ring, entries };
        let len = store.len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
        let flushed = this.entries.last().map_or(0, |e| e.flushed_file_len);
        if len < flushed {
            return Err(Error::corrupt(format!(
                "the file has been cut short: it is {len} bytes long, its log knows of at least {flushed}"
            )));
        }
        Ok(this)
    }

    /// Makes the changes, in order.
    pub(super) fn replay(&self, target: &mut dyn Target) -> Result<()> {
        let log = self.ring.region;
        let allowed = |at: u64, len: u64| -> Result<()> {
            let end = at.checked_add(len).filter(|e| *e <= MAX_FILE);
            if end.is_none() || at < IN_PLACE_END || (len > 0 && log.overlaps(at, len)) {
                return Err(Error::corrupt(format!("the log would change {len} bytes at {at:#x}, where it must not")).at_offset(log.at));
            }
            Ok(())
        };
        // Looked at before the first one is made: a log is replayed whole or not at all.
        for change in self.entries.iter().flat_map(|e| &e.changes) {
            match change {
                Change::Zero { at, len } => allowed(*at, *len)?,
                Change::Write { at, .. } => allowed(*at, SECTOR as u64)?,
            }
        }
        let last = self.entries.last().map_or(0, |e| e.last_file_len);
        let last = last.checked_next_multiple_of(MIB).filter(|l| *l <= MAX_FILE);
        let last = last.ok_or_else(|| Error::corrupt("the log knows of a file longer than any VHDX can be").at_offset(log.at))?;
        for entry in &self.entries {
            for change in &entry.changes {
                match change {
                    Change::Zero { at, len } => target.zero(*at, *len)?,
                    Change::Write { at, data, leading, trailing } => {
                        let mut sector = Box::new([0; SECTOR]);
                        self.ring.read(self.ring.data_at(entry, *data), &mut sector)?;
                        sector[..8].copy_from_slice(leading);
                        sector[SECTOR - 4..].copy_from_slice(trailing);
                        target.write(*at, sector)?;
                    }
                }
            }
        }
        target.extend(last)
    }
}

/// Of all runs of entries that follow each other, the newest whose last entry's tail lies in it; from that tail on.
fn newest(mut entries: BTreeMap<u64, Entry>, ring: u64) -> Option<Vec<Entry>> {
    let next =
        |e: &Entry| entries.get(&((e.start + e.len) % ring)).filter(|n| e.sequence.checked_add(1) == Some(n.sequence)).map(|n| n.start);
    let follows: BTreeMap<u64, u64> = entries.values().filter_map(|e| Some((e.start, next(e)?))).collect();
    let followers: std::collections::BTreeSet<u64> = follows.values().copied().collect();
    let mut best: Option<(u64, Vec<u64>)> = None;
    for first in entries.keys().filter(|s| !followers.contains(s)) {
        let mut run = vec![*first];
        let mut last = *first;
        while let Some(next) = follows.get(&last) {
            run.push(*next);
            last = *next;
        }
        let Some(head) = entries.get(&last) else { continue };
        let Some(tail) = run.iter().position(|s| *s == head.tail) else { continue };
        if best.as_ref().is_none_or(|(sequence, _)| head.sequence > *sequence) {
            best = Some((head.sequence, run.split_off(tail)));
        }
    }
    Some(best?.1.iter().filter_map(|start| entries.remove(start)).collect())
}

/// Replays into the file itself.
pub(super) struct InPlace<'a>(pub(super) &'a dyn Store);

impl InPlace<'_> {
    fn len(&self) -> Result<u64> {
        self.0.len().map_err(|e| Error::io("cannot find out the length of the file", e))
    }
}

impl Target for InPlace<'_> {
    fn zero(&mut self, at: u64, len: u64) -> Result<()> {
        let fail = |e| Error::io("cannot replay the log", e).at_offset(at);
        let end = at.saturating_add(len);
        let old = self.len()?;
        let inside = end.min(old).saturating_sub(at);
        if inside > 0 && !self.0.zero(at, inside).map_err(fail)? && !self.0.punch(at, inside).map_err(fail)? {
            let zeros = vec![0; MIB as usize];
            let mut done = 0;
            while done < inside {
                let run = (inside - done).min(MIB);
                self.0.write_all_at(zeros.get(..run as usize).unwrap_or_default(), at + done).map_err(fail)?;
                done += run;
            }
        }
        self.extend(if len > 0 { end } else { 0 })
    }

    fn write(&mut self, at: u64, sector: Box<[u8; SECTOR]>) -> Result<()> {
        self.0.write_all_at(&*sector, at).map_err(|e| Error::io("cannot replay the log", e).at_offset(at))
    }

    fn extend(&mut self, len: u64) -> Result<()> {
        if len > self.len()? {
            self.0.set_len(len).map_err(|e| Error::io(format!("cannot extend the file to {len} bytes"), e))?;
        }
        Ok(())
    }
}
