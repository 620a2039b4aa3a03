//! Writing the log: changes of metadata become entries, many to an entry.
//!
//! The buffer calls [`Vhdx::write_log`] when everything that the changes refer to is durable, and makes the changes in place when it returns. By the next
//! call they are durable too, so that every call begins a sequence of its own: its entry is its own tail.
//!
//! # What keeps a log valid at every instant
//! An entry is never longer than half the log. A new one therefore leaves the one before it whole, and a cut while it is written leaves that as the
//! newest: its changes are in place already, and making them again changes nothing.

use super::Vhdx;
use super::bat::{ENTRY, Entry, Payload};
use super::header::{Header, IN_PLACE_END, MIB};
use super::log::{DESCRIPTOR, HEADER, SECTOR, descriptor_sectors};
use super::region::Region;
use crate::error::{Error, Result};
use crate::field::{array, put};
use crate::writeback::MetaWrite;
use std::collections::BTreeMap;
use uuid::Uuid;

/// No entry is longer than this many sectors, whatever the log's size: it is put together in memory.
const MAX_SECTORS: u64 = 1024;

type Sector = Box<[u8; SECTOR]>;

/// Where the next entry goes.
#[derive(Debug)]
pub(super) struct LogWriter {
    region: Region,
    guid: Uuid,
    /// Byte offset in the log.
    next: u64,
    sequence: u64,
    /// The header names `guid`: the entries count.
    active: bool,
    /// A length that the file is known to have durably, in bytes.
    durable_len: u64,
}

impl LogWriter {
    /// A log without entries. `file_len` is the length of the file in bytes.
    pub(super) fn new(header: &Header, file_len: u64) -> Self {
        Self {
            region: Region { at: header.log_at, len: u64::from(header.log_len) },
            guid: Uuid::new_v4(),
            next: 0,
            sequence: 1,
            active: false,
            durable_len: file_len - file_len % MIB,
        }
    }

    /// How many sectors an entry can change.
    fn capacity(&self) -> usize {
        let sectors = (self.region.len / SECTOR as u64 / 2).min(MAX_SECTORS);
        let mut data = sectors.saturating_sub(1);
        while data > 0 && descriptor_sectors(data) + data > sectors {
            data -= 1;
        }
        usize::try_from(data).unwrap_or(usize::MAX)
    }

    /// An entry that makes `changes`.
    fn encode(&self, changes: &[(u64, Sector)]) -> Vec<u8> {
        let descriptors = descriptor_sectors(changes.len() as u64) as usize * SECTOR;
        let mut entry = vec![0; descriptors + changes.len() * SECTOR];
        let len = entry.len() as u64;
        put(&mut entry, 0, b"loge");
        put(&mut entry, 8, &(len as u32).to_le_bytes());
        put(&mut entry, 12, &(self.next as u32).to_le_bytes());
        put(&mut entry, 16, &self.sequence.to_le_bytes());
        put(&mut entry, 24, &(changes.len() as u32).to_le_bytes());
        put(&mut entry, 32, &self.guid.to_bytes_le());
        put(&mut entry, 48, &self.durable_len.to_le_bytes());
        put(&mut entry, 56, &self.durable_len.to_le_bytes());
        for (index, (at, sector)) in changes.iter().enumerate() {
            let here = HEADER + index * DESCRIPTOR;
            put(&mut entry, here, b"desc");
            put(&mut entry, here + 4, &sector[SECTOR - 4..]);
            put(&mut entry, here + 8, &sector[..8]);
            put(&mut entry, here + 16, &at.to_le_bytes());
            put(&mut entry, here + 24, &self.sequence.to_le_bytes());
            let here = descriptors + index * SECTOR;
            put(&mut entry, here, &sector[..]);
            put(&mut entry, here, b"data");
            put(&mut entry, here + 4, &((self.sequence >> 32) as u32).to_le_bytes());
            put(&mut entry, here + SECTOR - 4, &(self.sequence as u32).to_le_bytes());
        }
        let sum = crc32c::crc32c(&entry);
        put(&mut entry, 4, &sum.to_le_bytes());
        entry
    }
}

impl Vhdx {
    /// Logs what is about to be written. When there is more than one entry can hold, all but the last of them are made in place as well.
    pub(super) fn write_log(&self, writes: &[MetaWrite]) -> Result<()> {
        let mut log = self.log.lock();
        let capacity = log.capacity();
        if capacity == 0 {
            return Err(Error::unsupported("the image has no log, and its metadata must not be changed without one"));
        }
        let changes = self.changed_sectors(&mut log, writes)?;
        let mut rest = &changes[..];
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(capacity));
            rest = later;
            let entry = log.encode(now);
            let (to_end, wrapped) = entry.split_at(entry.len().min((log.region.len - log.next) as usize));
            let store = self.store()?;
            for (at, bytes) in [(log.next, to_end), (0, wrapped)] {
                let at = log.region.at.saturating_add(at);
                store.write_all_at(bytes, at).map_err(|e| Error::io("cannot write the log", e).at_offset(at))?;
            }
            self.writeback.wrote_data(0);
            self.writeback.sync()?;
            log.next = (log.next + entry.len() as u64) % log.region.len;
            log.sequence += 1;
            if !log.active {
                let guid = log.guid;
                self.headers.lock().update(&self.writeback, |h| h.log = guid)?;
                log.active = true;
            }
            if !rest.is_empty() {
                for (at, sector) in now {
                    store.write_all_at(&sector[..], *at).map_err(|e| Error::io("cannot write metadata", e).at_offset(*at))?;
                }
                self.writeback.wrote_data(0);
                self.writeback.sync()?;
            }
        }
        Ok(())
    }

    /// The sectors that `writes` change, as they will be; in an order in which each refers only to what is before it, should they not all fit in one
    /// entry: the table last, and from its end, since the entry of a sector bitmap comes after those of the blocks that need it.
    fn changed_sectors(&self, log: &mut LogWriter, writes: &[MetaWrite]) -> Result<Vec<(u64, Sector)>> {
        let store = self.store()?;
        let layout = self.layout.read();
        let table = layout.bat.region();
        let mut sectors: BTreeMap<u64, Sector> = BTreeMap::new();
        for write in writes {
            let end = write.at.saturating_add(write.bytes.len() as u64);
            if write.at < IN_PLACE_END || log.region.overlaps(write.at, write.bytes.len() as u64) {
                return Err(Error::corrupt("a change of metadata that must not go through the log").at_offset(write.at));
            }
            let mut at = write.at;
            while at < end {
                let start = at - at % SECTOR as u64;
                let stop = end.min(start + SECTOR as u64);
                let sector = match sectors.entry(start) {
                    std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
                    std::collections::btree_map::Entry::Vacant(entry) => {
                        let mut sector = Box::new([0; SECTOR]);
                        store
                            .read_zero_filled(&mut sector[..], start)
                            .map_err(|e| Error::io("cannot read metadata", e).at_offset(start))?;
                        entry.insert(sector)
                    }
                };
                let from = write.bytes.get((at - write.at) as usize..(stop - write.at) as usize).unwrap_or_default();
                put(&mut sector[..], (at - start) as usize, from);
                at = stop;
            }
        }
        let (mut changes, mut last): (Vec<_>, Vec<_>) = sectors.into_iter().partition(|(at, _)| !table.overlaps(*at, SECTOR as u64));
        for (_, sector) in &last {
            // What the table refers to is durable, and the file that long with it.
            for entry in sector.chunks_exact(ENTRY as usize) {
                if let Some(Payload::Full(at) | Payload::Partial(at)) = Entry(u64::from_le_bytes(array(entry, 0)?)).payload() {
                    let end = at.saturating_add(self.geometry.block).min(self.file_len.load(std::sync::atomic::Ordering::Relaxed));
                    log.durable_len = log.durable_len.max(end - end % MIB);
                }
            }
        }
        last.reverse();
        changes.append(&mut last);
        Ok(changes)
    }

    /// Marks the log as empty: everything in it has been made in place.
    pub(super) fn close_log(&self) -> Result<()> {
        let mut log = self.log.lock();
        self.writeback.sync()?;
        let mut headers = self.headers.lock();
        if !headers.current.log.is_nil() {
            headers.update(&self.writeback, |h| h.log = Uuid::nil())?;
        }
        *log = LogWriter::new(&headers.current, self.file_len.load(std::sync::atomic::Ordering::Relaxed));
        Ok(())
    }
}
