//! EXTENDED COPY (LID1): block to block, within a unit and between units that the program serves (SPC-4 6.3).
//!
//! Everything is checked before the first block is copied. The copy takes no lock for its whole length: as with any pair of
//! READ and WRITE, each piece is read and then written.

use crate::scsi::cdb::Cdb;
use crate::scsi::copy_results::Progress;
use crate::scsi::data::Data;
use crate::scsi::lun::{Command, Lun, State};
use crate::scsi::opcode::Reply;
use crate::scsi::sense::{Fault, Triple};
use crate::scsi::vpd;
use formats::ZeroMode;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;

/// Most target descriptors of one command.
pub const MAX_TARGETS: u16 = 8;
/// Most segment descriptors of one command.
pub const MAX_SEGMENTS: u16 = 16;
/// Longest list of descriptors in bytes.
pub const MAX_LIST: u32 = MAX_TARGETS as u32 * TARGET_LEN as u32 + MAX_SEGMENTS as u32 * 32;
/// Longest segment in bytes.
pub const MAX_SEGMENT: u32 = 256 << 20;
/// Segment descriptor: block device to block device.
pub const BLOCK_TO_BLOCK: u8 = 0x02;
/// Segment descriptor: block device to block device with byte offsets and a length in bytes.
pub const BLOCK_TO_BLOCK_OFFSET: u8 = 0x0A;
/// Target descriptor: identification descriptor.
pub const IDENTIFICATION: u8 = 0xE4;

/// Length of a target descriptor.
const TARGET_LEN: usize = 32;
/// Length of the parameter list's header.
const HEADER_LEN: usize = 16;
/// Bytes read and written at a time.
const CHUNK: u64 = 1 << 20;

/// The other logical units that a copy may read or write.
pub trait CopyPeers: Send + Sync {
    /// The unit with this NAA designator (VPD 83h).
    fn find(&self, naa: &[u8; 16]) -> Option<Lun>;
}

/// A checked segment: from bytes of one target to bytes of another.
struct Segment {
    source: usize,
    from: Range<u64>,
    destination: usize,
    to: u64,
}

pub fn extended_copy(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let list_len = cdb.u32(10);
    if list_len == 0 {
        return Ok(Reply::Done);
    }
    if !(HEADER_LEN as u32..=HEADER_LEN as u32 + MAX_LIST).contains(&list_len) {
        return Err(Triple::PARAMETER_LIST_LENGTH_ERROR.into());
    }
    let mut list = vec![0; usize::try_from(list_len).unwrap_or(0)];
    if data.copy_out(0, &mut list) < list.len() {
        return Err(Triple::INVALID_FIELD_IN_COMMAND_IU.into());
    }
    let header = Cdb::new(&list);
    let (targets_len, segments_len) = (usize::from(header.u16(2)), header.u32(8));
    if header.u32(12) != 0 {
        return Err(Triple::INLINE_DATA_LENGTH_EXCEEDED.into());
    }
    let segments_len = usize::try_from(segments_len).unwrap_or(usize::MAX);
    let descriptors = &list[HEADER_LEN..];
    if targets_len.checked_add(segments_len).is_none_or(|len| len > descriptors.len()) {
        return Err(Triple::PARAMETER_LIST_LENGTH_ERROR.into());
    }
    // LIST ID USAGE 11b: no result is kept, and the identifier means nothing.
    let id = (list[1] >> 3 & 3 != 3).then_some(list[0]);
    if let Some(id) = id {
        command.lun.copies.forget(id);
    }
    let (targets, rest) = descriptors.split_at(targets_len);
    if targets.len() > usize::from(MAX_TARGETS) * TARGET_LEN {
        return Err(Triple::TOO_MANY_TARGET_DESCRIPTORS.into());
    }
    let targets = targets_of(command, targets)?;
    let segments = segments_of(&targets, &rest[..segments_len], HEADER_LEN + targets_len)?;
    let mut progress = command.lun.copies.begin(id);
    for segment in &segments {
        copy(command, &targets, segment, &mut progress)?;
        progress.segment_done();
    }
    progress.finish();
    Ok(Reply::Done)
}

/// The units that the target descriptors name.
fn targets_of(command: &Command<'_>, descriptors: &[u8]) -> Result<Vec<Arc<State>>, Fault> {
    let mut targets = Vec::new();
    if !descriptors.len().is_multiple_of(TARGET_LEN) {
        return Err(Triple::PARAMETER_LIST_LENGTH_ERROR.into());
    }
    for (index, descriptor) in descriptors.as_chunks::<TARGET_LEN>().0.iter().enumerate() {
        let at = HEADER_LEN + TARGET_LEN * index;
        if descriptor[0] != IDENTIFICATION {
            return Err(Triple::UNSUPPORTED_TARGET_DESCRIPTOR.into());
        }
        // The LU ID TYPE and NUL bits beside the device type are obsolete.
        if descriptor[1] & 0x1F != 0 {
            return Err(Triple::COPY_TARGET_WRONG_TYPE.into());
        }
        let target = find(command, descriptor).ok_or(Triple::COPY_TARGET_NOT_REACHABLE)?;
        let block_len = u32::from_be_bytes([0, descriptor[29], descriptor[30], descriptor[31]]);
        if block_len != target.block_size() {
            return Err(Fault::parameter(at + 29, None));
        }
        targets.push(target);
    }
    Ok(targets)
}

/// The unit with the designator of a target descriptor, which has to be the logical unit's NAA name.
fn find(command: &Command<'_>, descriptor: &[u8; TARGET_LEN]) -> Option<Arc<State>> {
    let (code_set, kind, len) = (descriptor[4] & 0x0F, descriptor[5] & 0x3F, descriptor[7]);
    if (code_set, kind, len) != (1, 3, 16) {
        return None;
    }
    let naa: [u8; 16] = descriptor[8..24].try_into().ok()?;
    if vpd::naa_of(command.lun).is_some_and(|own| own == naa) {
        return Some(command.lun.clone());
    }
    Some(command.lun.peers.as_ref()?.find(&naa)?.state)
}

/// Parses and checks the segment descriptors; `base` is where they begin in the parameter list.
fn segments_of(targets: &[Arc<State>], descriptors: &[u8], base: usize) -> Result<Vec<Segment>, Fault> {
    let mut segments = Vec::new();
    let mut at = 0;
    while at < descriptors.len() {
        let rest = &descriptors[at..];
        let (kind, expected) = match rest[0] {
            BLOCK_TO_BLOCK => (BLOCK_TO_BLOCK, 28),
            BLOCK_TO_BLOCK_OFFSET => (BLOCK_TO_BLOCK_OFFSET, 32),
            _ => return Err(Triple::UNSUPPORTED_SEGMENT_DESCRIPTOR.into()),
        };
        let descriptor = Cdb::new(rest.get(..expected).ok_or(Triple::PARAMETER_LIST_LENGTH_ERROR)?);
        if usize::from(descriptor.u16(2)) != expected - 4 {
            return Err(Fault::parameter(base + at + 2, None));
        }
        if segments.len() == usize::from(MAX_SEGMENTS) {
            return Err(Triple::TOO_MANY_SEGMENT_DESCRIPTORS.into());
        }
        let (source, destination) = (usize::from(descriptor.u16(4)), usize::from(descriptor.u16(6)));
        let from = targets.get(source).ok_or(Triple::COPY_TARGET_NOT_REACHABLE)?;
        let to = targets.get(destination).ok_or(Triple::COPY_TARGET_NOT_REACHABLE)?;
        let (from_block, to_block) = (u64::from(from.block_size()), u64::from(to.block_size()));
        let (len, from_offset, to_offset) = match kind {
            // DC: the number of blocks counts the destination's.
            BLOCK_TO_BLOCK => (u64::from(descriptor.u16(10)) * if descriptor.has(1, 0x02) { to_block } else { from_block }, 0, 0),
            _ => (u64::from(descriptor.u32(8)), u64::from(descriptor.u16(28)), u64::from(descriptor.u16(30))),
        };
        if len > u64::from(MAX_SEGMENT) {
            return Err(Fault::parameter(base + at + if kind == BLOCK_TO_BLOCK { 10 } else { 8 }, None));
        }
        let place = |unit: &State, lba: u64, offset: u64| {
            let block = u64::from(unit.block_size());
            let start = lba.checked_mul(block)?.checked_add(offset)?;
            let end = start.checked_add(len)?;
            (end <= unit.blocks() * block).then_some(start..end)
        };
        let from = place(from, descriptor.u64(12), from_offset).ok_or(Triple::COPY_ABORTED)?;
        let to = place(to, descriptor.u64(20), to_offset).ok_or(Triple::COPY_ABORTED)?.start;
        // Nothing is padded: whole blocks are replaced, or none.
        if len % to_block != 0 || to % to_block != 0 {
            return Err(Triple::COPY_ABORTED.into());
        }
        segments.push(Segment { source, from, destination, to });
        at += expected;
    }
    Ok(segments)
}

/// Copies a segment piece by piece; backwards where the destination lies behind an overlapping source.
fn copy(command: &Command<'_>, targets: &[Arc<State>], segment: &Segment, progress: &mut Progress<'_>) -> Result<(), Fault> {
    let (source, destination) = (&targets[segment.source], &targets[segment.destination]);
    let len = segment.from.end - segment.from.start;
    let chunks = len.div_ceil(CHUNK);
    let backwards = Arc::ptr_eq(source, destination) && segment.from.start < segment.to && segment.to < segment.from.end;
    let mut buffer = vec![0; usize::try_from(CHUNK.min(len)).unwrap_or(0)];
    for index in 0..chunks {
        let at = CHUNK * if backwards { chunks - 1 - index } else { index };
        let piece = CHUNK.min(len - at);
        let bytes = &mut buffer[..usize::try_from(piece).unwrap_or(0)];
        let zeros = on(command, source, |unit| read(unit, segment.from.start + at, bytes))?;
        on(command, destination, |unit| write(unit, segment.to + at, bytes, zeros))?;
        progress.bytes_done(piece);
    }
    on(command, destination, |unit| unit.settle(false))
}

/// Does something with a target. Another unit whose image is about to be replaced is not waited for: its replacement may be
/// waiting for this command.
fn on<R>(command: &Command<'_>, target: &Arc<State>, run: impl FnOnce(&Command<'_>) -> Result<R, Fault>) -> Result<R, Fault> {
    if Arc::ptr_eq(target, command.lun) {
        return run(command);
    }
    target.with_command(run).unwrap_or(Err(Triple::COPY_ABORTED.into()))
}

/// Fills `bytes`; true if the image knows without reading that they are zeros.
fn read(source: &Command<'_>, at: u64, bytes: &mut [u8]) -> Result<bool, Fault> {
    source.lun.operation.admit(0)?;
    let end = at + bytes.len() as u64;
    let _shared = source.lun.ranges.shared(at..end);
    let extent = source.device.map(at, end - at).map_err(|e| source.read_error(&e))?;
    if extent.zero && extent.len >= end - at {
        bytes.fill(0);
        return Ok(true);
    }
    source.device.read(&mut [IoSliceMut::new(bytes)], at).map_err(|e| source.read_error(&e))?;
    Ok(false)
}

fn write(destination: &Command<'_>, at: u64, bytes: &[u8], zeros: bool) -> Result<(), Fault> {
    destination.lun.operation.admit(0)?;
    destination.writable()?;
    let len = bytes.len() as u64;
    let _shared = destination.lun.ranges.shared(at..at + len);
    let result = if zeros && destination.can_unmap() {
        destination.device.zero(at, len, ZeroMode::MayUnmap)
    } else {
        destination.device.write(&[IoSlice::new(bytes)], at)
    };
    result.map_err(|e| destination.write_error(&e))
}
