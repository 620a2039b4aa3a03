//! Entries of the command ring: what the kernel wrote becomes a checked value, copied out once.
//!
//! Whatever the bytes are, parsing ends in a value or a [`RingFault`]; nothing is read outside of the entry.

use super::command::{Cdb, TaskManagement, TmrKind};
use super::grant::{Span, Spans};
use super::region::{OutOfRegion, Region};
use crate::tcmu::RingFault;
use crate::tcmu::abi::{self, command, tmr};
use std::sync::atomic::Ordering::Relaxed;

/// Where the ring and the data area are in the region, and what the kernel can do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub flags: u16,
    /// Start of the ring in the region, bytes.
    pub ring_start: u32,
    /// Size of the ring, bytes.
    pub ring_size: u32,
    /// End of the region, bytes. The data area reaches from the end of the ring to here.
    pub end: u64,
}

impl Geometry {
    /// Reads and checks the mailbox.
    pub fn read(region: &Region) -> Result<Self, RingFault> {
        let broken = |offset, size| RingFault::Geometry { offset, size, region: region.len() };
        let load = |offset| region.load_u32(offset, Relaxed).map_err(|OutOfRegion| broken(0, 0));
        let [v0, v1, f0, f1] = load(abi::mailbox::VERSION_FLAGS)?.to_ne_bytes();
        let version = u16::from_ne_bytes([v0, v1]);
        if version != abi::MAILBOX_VERSION {
            return Err(RingFault::Version(version));
        }
        let (offset, size) = (load(abi::mailbox::CMDR_OFF)?, load(abi::mailbox::CMDR_SIZE)?);
        let aligned = offset.is_multiple_of(abi::ENTRY_ALIGN) && size.is_multiple_of(abi::ENTRY_ALIGN);
        let end = u64::from(offset) + u64::from(size);
        if !aligned || (offset as usize) < abi::MAILBOX_SIZE || size < command::MIN_SIZE || end > region.len() as u64 {
            return Err(broken(offset, size));
        }
        Ok(Self { flags: u16::from_ne_bytes([f0, f1]), ring_start: offset, ring_size: size, end: region.len() as u64 })
    }

    /// The first byte of the data area.
    pub fn data_start(&self) -> u64 {
        u64::from(self.ring_start) + u64::from(self.ring_size)
    }

    /// Offset in the region of byte `within` of the entry at ring offset `at`.
    pub fn offset(&self, at: u32, within: u32) -> usize {
        self.ring_start as usize + at as usize + within as usize
    }

    /// Whether completions may be out of order.
    pub fn out_of_order(&self) -> bool {
        self.flags & abi::FLAG_OUT_OF_ORDER != 0
    }

    /// The place `len` bytes after `at`.
    pub fn advance(&self, at: u32, len: u32) -> u32 {
        ((u64::from(at) + u64::from(len)) % u64::from(self.ring_size)) as u32
    }

    /// How many bytes after `from` the place `to` comes.
    pub fn distance(&self, from: u32, to: u32) -> u32 {
        if to >= from { to - from } else { self.ring_size - from + to }
    }

    /// Checks that `value` can be the place of an entry.
    pub fn check_index(&self, name: &'static str, value: u32) -> Result<u32, RingFault> {
        if value < self.ring_size && value.is_multiple_of(abi::ENTRY_ALIGN) {
            Ok(value)
        } else {
            Err(RingFault::Index { name, value, size: self.ring_size })
        }
    }
}

/// The header of an entry, checked to lie between the cursor and the head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub at: u32,
    pub len: u32,
    pub op: u32,
    pub id: u16,
    pub kflags: u8,
}

impl Header {
    /// Reads the entry header at `at`; entries end at `head` or at the end of the ring.
    pub fn read(region: &Region, geometry: &Geometry, at: u32, head: u32) -> Result<Self, RingFault> {
        let outside = |OutOfRegion| RingFault::EntryLength { at, len: 0 };
        let len_op = region.load_u32(geometry.offset(at, 0), Relaxed).map_err(outside)?;
        let len = len_op & !abi::OP_MASK;
        let room = if head > at { head - at } else { geometry.ring_size - at };
        if len < abi::HEADER_SIZE || len > room {
            return Err(RingFault::EntryLength { at, len });
        }
        let id_flags = region.load_u32(geometry.offset(at, command::ID_FLAGS), Relaxed).map_err(outside)?;
        let [id0, id1, kflags, _] = id_flags.to_ne_bytes();
        Ok(Self { at, len, op: len_op & abi::OP_MASK, id: u16::from_ne_bytes([id0, id1]), kflags })
    }
}

/// A command, copied out of its entry.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub cdb: Cdb,
    pub data: Spans,
    pub bidi: Spans,
    pub shape: Shape,
}

/// What of an entry has to be copied to keep its command readable elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// All iovecs, of whatever kind.
    pub iovecs: u32,
    /// Offset of the CDB in the entry.
    pub cdb_at: u32,
    /// Length of the CDB.
    pub cdb_len: u32,
}

impl Shape {
    /// Bytes that the iovecs end at.
    pub fn iovecs_end(&self) -> u32 {
        command::IOV + self.iovecs * command::IOV_SIZE
    }

    /// Least length of an entry that can hold the command.
    pub fn need(&self) -> u32 {
        (self.iovecs_end() + self.cdb_len).next_multiple_of(abi::ENTRY_ALIGN)
    }
}

impl Request {
    /// Reads the command in the entry `header`.
    pub fn read(region: &Region, geometry: &Geometry, header: &Header) -> Result<Self, RingFault> {
        let Header { at, len, .. } = *header;
        let short = |what| RingFault::EntryContent { at, len, what };
        if len < command::MIN_SIZE {
            return Err(short("a command"));
        }
        let word = |within| region.load_u32(geometry.offset(at, within), Relaxed).map_err(|OutOfRegion| short("a command"));
        let double = |within| region.load_u64(geometry.offset(at, within)).map_err(|OutOfRegion| short("its iovecs"));
        let counts = [word(command::IOV_CNT)?, word(command::IOV_BIDI_CNT)?, word(command::IOV_DIF_CNT)?];
        let iovecs = counts.iter().map(|&count| u64::from(count)).sum::<u64>();
        let iovecs_end = u64::from(command::IOV) + iovecs * u64::from(command::IOV_SIZE);
        if iovecs_end > u64::from(len) {
            return Err(short("its iovecs"));
        }
        let mut next = command::IOV;
        let mut spans = |count: u32| -> Result<Spans, RingFault> {
            let mut spans = Spans::new();
            for _ in 0..count {
                let span = Span { base: double(next)?, len: double(next + 8)? };
                next += command::IOV_SIZE;
                if span.len > 0 {
                    spans.push(span);
                }
            }
            Ok(spans)
        };
        let (data, bidi) = (spans(counts[0])?, spans(counts[1])?);

        let cdb_off = double(command::CDB_OFF)?;
        let outside = RingFault::CdbOffset { at, cdb_off };
        let cdb_at = cdb_off.checked_sub(geometry.offset(at, 0) as u64).filter(|&within| within < u64::from(len));
        let cdb_at = cdb_at.ok_or(outside)? as u32;
        let room = (len - cdb_at) as usize;
        let mut bytes = [0u8; abi::MAX_CDB.next_multiple_of(8)];
        let first = room.min(8);
        let read = |from: u32, into: &mut [u8]| region.read(geometry.offset(at, from), into).map_err(|OutOfRegion| short("its CDB"));
        read(cdb_at, &mut bytes[..first])?;
        let mut first_eight = [0u8; 8];
        first_eight.copy_from_slice(&bytes[..8]);
        let cdb_len = abi::cdb_len(first_eight);
        if cdb_len > room || cdb_len > abi::MAX_CDB || u64::from(cdb_at) < iovecs_end {
            return Err(short("its CDB"));
        }
        if cdb_len > first {
            read(cdb_at + first as u32, &mut bytes[first..cdb_len])?;
        }
        let shape = Shape { iovecs: iovecs as u32, cdb_at, cdb_len: cdb_len as u32 };
        Ok(Self { cdb: Cdb::from_slice(&bytes[..cdb_len]), data, bidi, shape })
    }

    /// Copies the command with id `id` from the entry at `from` to the entry at `to`, which has room for `shape.need()` bytes and
    /// keeps its length. Afterwards it reads as if the kernel had put it there.
    pub fn copy(region: &Region, geometry: &Geometry, from: &Header, to: u32, shape: &Shape) -> Result<(), OutOfRegion> {
        // The counts and the CDB's offset, the two unused words, and the iovecs.
        for within in (command::IOV_CNT..command::IOV).chain(command::IOV..shape.iovecs_end()).step_by(8) {
            let value = if within == command::CDB_OFF {
                geometry.offset(to, shape.iovecs_end()) as u64
            } else {
                region.load_u64(geometry.offset(from.at, within))?
            };
            region.store_u64(geometry.offset(to, within), value)?;
        }
        let mut bytes = [0u8; abi::MAX_CDB.next_multiple_of(8)];
        let cdb = bytes.get_mut(..shape.cdb_len as usize).ok_or(OutOfRegion)?;
        region.read(geometry.offset(from.at, shape.cdb_at), cdb)?;
        region.write(geometry.offset(to, shape.iovecs_end()), cdb)?;
        let [id0, id1] = from.id.to_ne_bytes();
        region.store_u32(geometry.offset(to, command::ID_FLAGS), u32::from_ne_bytes([id0, id1, from.kflags, 0]), Relaxed)
    }
}

impl TaskManagement {
    /// Reads the TMR entry `header`.
    pub(super) fn read(region: &Region, geometry: &Geometry, header: &Header) -> Result<Self, RingFault> {
        let Header { at, len, .. } = *header;
        let short = |what| RingFault::EntryContent { at, len, what };
        if len < tmr::IDS {
            return Err(short("a TMR"));
        }
        let word = |within| region.load_u32(geometry.offset(at, within), Relaxed).map_err(|OutOfRegion| short("a TMR"));
        let [kind, ..] = word(tmr::KIND)?.to_ne_bytes();
        let count = word(tmr::COUNT)?;
        if u64::from(tmr::IDS) + 2 * u64::from(count) > u64::from(len) {
            return Err(short("its command ids"));
        }
        let mut bytes = vec![0u8; 2 * count as usize];
        region.read(geometry.offset(at, tmr::IDS), &mut bytes).map_err(|OutOfRegion| short("its command ids"))?;
        let commands = bytes.as_chunks::<2>().0.iter().map(|id| u16::from_ne_bytes(*id)).collect();
        Ok(Self { kind: TmrKind::from_raw(kind), commands })
    }
}
