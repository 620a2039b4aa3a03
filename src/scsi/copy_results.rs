//! RECEIVE COPY STATUS and OPERATING PARAMETERS (LID1), and the results that are kept for the former (SPC-4 6.17, 6.18).

use crate::scsi::cdb::Cdb;
use crate::scsi::copy::{BLOCK_TO_BLOCK, BLOCK_TO_BLOCK_OFFSET, IDENTIFICATION, MAX_LIST, MAX_SEGMENT, MAX_SEGMENTS, MAX_TARGETS};
use crate::scsi::data::Data;
use crate::scsi::lun::Command;
use crate::scsi::opcode::Reply;
use crate::scsi::sense::Fault;
use parking_lot::Mutex;

/// Most results that are kept; the oldest goes first.
const MAX_KEPT: usize = 16;

/// The copies of one logical unit: those under way, and the last that ended.
#[derive(Default)]
pub struct Copies(Mutex<Vec<Copy>>);

/// COPY STATUS field.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    InProgress = 0x00,
    Done = 0x01,
    Failed = 0x02,
}

struct Copy {
    id: u8,
    status: Status,
    segments: u16,
    bytes: u64,
}

/// A copy under way. Dropped before it has finished it has failed.
pub struct Progress<'c> {
    copies: &'c Copies,
    id: Option<u8>,
    finished: bool,
}

impl Copies {
    /// A copy begins; its results are kept under `id`, if any, in place of an earlier one's.
    pub fn begin(&self, id: Option<u8>) -> Progress<'_> {
        if let Some(id) = id {
            let mut copies = self.0.lock();
            copies.retain(|copy| copy.id != id);
            if copies.len() == MAX_KEPT {
                copies.remove(0);
            }
            copies.push(Copy { id, status: Status::InProgress, segments: 0, bytes: 0 });
        }
        Progress { copies: self, id, finished: false }
    }

    /// What was kept under `id` is of no more use: a command with that identifier did not get as far as to begin.
    pub fn forget(&self, id: u8) {
        self.0.lock().retain(|copy| copy.id != id);
    }
}

impl Progress<'_> {
    /// So many more bytes are copied.
    pub fn bytes_done(&mut self, bytes: u64) {
        self.update(|copy| copy.bytes += bytes);
    }

    /// A segment is complete.
    pub fn segment_done(&mut self) {
        self.update(|copy| copy.segments += 1);
    }

    /// All segments are.
    pub fn finish(mut self) {
        self.finished = true;
        self.update(|copy| copy.status = Status::Done);
    }

    fn update(&self, change: impl FnOnce(&mut Copy)) {
        let mut copies = self.copies.0.lock();
        if let Some(copy) = copies.iter_mut().find(|copy| Some(copy.id) == self.id) {
            change(copy);
        }
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        if !self.finished {
            self.update(|copy| copy.status = Status::Failed);
        }
    }
}

/// The results are kept until they are asked for once after the copy's end.
pub fn copy_status(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let id = cdb.byte(2);
    let mut reply = [0; 12];
    {
        let mut copies = command.lun.copies.0.lock();
        let copy = copies.iter().find(|copy| copy.id == id).ok_or(Fault::cdb(2, None))?;
        reply[3] = 8;
        reply[4] = copy.status as u8;
        reply[5..7].copy_from_slice(&copy.segments.to_be_bytes());
        // Transfer count in bytes (units 0), or in KiB (1) where that does not fit.
        let (units, count) = match u32::try_from(copy.bytes) {
            Ok(bytes) => (0, bytes),
            Err(_) => (1, u32::try_from(copy.bytes >> 10).unwrap_or(u32::MAX)),
        };
        reply[7] = units;
        reply[8..].copy_from_slice(&count.to_be_bytes());
        if copy.status != Status::InProgress {
            copies.retain(|copy| copy.id != id);
        }
    }
    Ok(Reply::DataIn(data.reply(&reply, u64::from(cdb.u32(10)))))
}

pub fn operating_parameters(_: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let codes = [BLOCK_TO_BLOCK, BLOCK_TO_BLOCK_OFFSET, IDENTIFICATION];
    let mut reply = vec![0; 44];
    reply[4] = 0x01; // SNLID: a list identifier is not needed
    reply[8..10].copy_from_slice(&MAX_TARGETS.to_be_bytes());
    reply[10..12].copy_from_slice(&MAX_SEGMENTS.to_be_bytes());
    reply[12..16].copy_from_slice(&MAX_LIST.to_be_bytes());
    reply[16..20].copy_from_slice(&MAX_SEGMENT.to_be_bytes());
    reply[34..36].copy_from_slice(&(MAX_KEPT as u16).to_be_bytes());
    reply[36] = MAX_KEPT as u8;
    reply[37] = 9; // data segments in units of 2^9 bytes
    reply[43] = codes.len() as u8;
    reply.extend(codes);
    let len = u32::try_from(reply.len() - 4).unwrap_or(0);
    reply[..4].copy_from_slice(&len.to_be_bytes());
    Ok(Reply::DataIn(data.reply(&reply, u64::from(cdb.u32(10)))))
}
