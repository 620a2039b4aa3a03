//! The record of a completion in progress, kept in the part of the mailbox that the kernel does not use.
//!
//! A response overwrites the request in its slot, so a process that dies between writing the response and moving the tail would
//! leave a slot that is neither. The record says what was being done, and [`Intent::finish`] does the rest of it in the next
//! process. It needs no memory barriers against death: what a killed process leaves is the effect of its instructions up to one
//! point, in program order; release stores keep the compiler from reordering.

use super::entry::{Geometry, Header, Request, Shape};
use super::region::{OutOfRegion, Region};
use crate::tcmu::abi::{self, command, mailbox};
use smallvec::SmallVec;
use std::sync::atomic::Ordering::{Relaxed, Release};

/// Says that every command between tail and head can be read: whoever served this ring completed as we do.
const MARK: u32 = u32::from_ne_bytes(*b"imT1");

// The record's words, after the tail on its cache line and the next one.
const STEP: usize = 72;
const SLOT: usize = 76;
const SPARE: usize = 80;
const RESPONSE: usize = 84;
const READ_LEN: usize = 88;
const OWNER: usize = 92;
const SENSE: usize = 96;
const SENSE_MAX: usize = 24;
const MARK_AT: usize = 124;

const _: () = assert!(STEP >= mailbox::TAIL + 4 && SENSE + SENSE_MAX <= MARK_AT && MARK_AT + 4 == abi::MAILBOX_SIZE);

/// Nothing is in progress.
const STEP_NONE: u32 = 0;
/// The command in the slot is being copied to the spare slot.
const STEP_COPY: u32 = 1;
/// The response is being written to the slot.
const STEP_RESPOND: u32 = 2;

/// What the kernel gets for a command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Response {
    pub id: u16,
    pub status: u8,
    pub uflags: u8,
    pub read_len: u32,
    pub sense: SmallVec<[u8; 20]>,
}

/// One completion: `response` goes to `slot`, which is at the tail; if the command in the slot is another one that is not
/// completed, it moves to the slot of the command that is.
pub(super) struct Intent<'a> {
    pub slot: Header,
    pub moves: Option<(u32, Shape)>,
    pub response: &'a Response,
}

impl Intent<'_> {
    /// Does it: afterwards the tail is behind the slot.
    pub fn perform(&self, region: &Region, geometry: &Geometry) -> Result<(), OutOfRegion> {
        let Response { id, status, uflags, read_len, sense } = self.response;
        let [id0, id1] = id.to_ne_bytes();
        region.store_u32(SLOT, self.slot.at, Relaxed)?;
        region.store_u32(RESPONSE, u32::from_ne_bytes([id0, id1, *status, *uflags]), Relaxed)?;
        region.store_u32(READ_LEN, *read_len, Relaxed)?;
        let kept = &sense[..sense.len().min(SENSE_MAX)];
        let [owner0, owner1] = self.slot.id.to_ne_bytes();
        region.store_u32(OWNER, u32::from_ne_bytes([owner0, owner1, kept.len() as u8, 0]), Relaxed)?;
        region.write(SENSE, kept)?;
        match &self.moves {
            Some((spare, shape)) => {
                region.store_u32(SPARE, *spare, Relaxed)?;
                region.store_u32(STEP, STEP_COPY, Release)?;
                barrier();
                Request::copy(region, geometry, &self.slot, *spare, shape)?;
                region.store_u32(STEP, STEP_RESPOND, Release)?;
            }
            None => region.store_u32(STEP, STEP_RESPOND, Release)?,
        }
        barrier();
        self.respond(region, geometry)
    }

    /// The last step: writes the response and moves the tail.
    fn respond(&self, region: &Region, geometry: &Geometry) -> Result<(), OutOfRegion> {
        let Response { id, status, uflags, read_len, sense } = self.response;
        let [id0, id1] = id.to_ne_bytes();
        let at = |within| geometry.offset(self.slot.at, within);
        region.store_u32(at(command::ID_FLAGS), u32::from_ne_bytes([id0, id1, self.slot.kflags, *uflags]), Relaxed)?;
        region.store_u32(at(command::STATUS), u32::from_ne_bytes([*status, 0, 0, 0]), Relaxed)?;
        region.store_u32(at(command::READ_LEN), *read_len, Relaxed)?;
        if *status == abi::STATUS_CHECK_CONDITION {
            // The kernel copies all of it: nothing of the request may be left in it.
            let mut bytes = [0u8; abi::SENSE_SIZE];
            let len = sense.len().min(abi::SENSE_SIZE);
            bytes[..len].copy_from_slice(&sense[..len]);
            region.write(at(command::SENSE), &bytes)?;
        }
        region.store_u32(mailbox::TAIL, geometry.advance(self.slot.at, self.slot.len), Release)?;
        barrier();
        region.store_u32(STEP, STEP_NONE, Relaxed)
    }

    /// Finishes what a killed process was doing, if it was. True if it did something.
    pub fn finish(region: &Region, geometry: &Geometry, tail: u32, head: u32) -> Result<bool, OutOfRegion> {
        let step = region.load_u32(STEP, Relaxed)?;
        let slot_at = region.load_u32(SLOT, Relaxed)?;
        let done = step == STEP_NONE || slot_at != tail || head == tail;
        let slot = if done { None } else { Header::read(region, geometry, slot_at, head).ok() };
        let [owner0, owner1, sense_len, _] = region.load_u32(OWNER, Relaxed)?.to_ne_bytes();
        let owner = u16::from_ne_bytes([owner0, owner1]);
        let [id0, id1, status, uflags] = region.load_u32(RESPONSE, Relaxed)?.to_ne_bytes();
        let id = u16::from_ne_bytes([id0, id1]);
        // The slot holds the command that it held, or the response; otherwise the record is of another time.
        let slot = slot.filter(|slot| {
            slot.op == abi::OP_CMD && slot.len >= command::MIN_SIZE && (slot.id == owner || (slot.id == id && step == STEP_RESPOND))
        });
        let Some(slot) = slot else {
            region.store_u32(STEP, STEP_NONE, Release)?;
            return Ok(false);
        };
        let mut sense = SmallVec::from_elem(0, usize::from(sense_len).min(SENSE_MAX));
        region.read(SENSE, &mut sense)?;
        let response = Response { id, status, uflags, read_len: region.load_u32(READ_LEN, Relaxed)?, sense };
        let intent = Intent { slot, moves: None, response: &response };
        if step == STEP_COPY {
            let spare = region.load_u32(SPARE, Relaxed)?;
            let request = Request::read(region, geometry, &slot);
            let room = Header::read(region, geometry, spare, head).map(|header| header.len);
            match (request, room) {
                (Ok(request), Ok(room)) if request.shape.need() <= room && spare != slot.at => {
                    Request::copy(region, geometry, &slot, spare, &request.shape)?;
                    region.store_u32(STEP, STEP_RESPOND, Release)?;
                    barrier();
                }
                _ => {
                    region.store_u32(STEP, STEP_NONE, Release)?;
                    return Ok(false);
                }
            }
        }
        intent.respond(region, geometry)?;
        Ok(true)
    }
}

/// Whether the ring bears our mark.
pub(super) fn is_marked(region: &Region) -> Result<bool, OutOfRegion> {
    Ok(region.load_u32(MARK_AT, Relaxed)? == MARK)
}

/// Marks a ring whose commands can all be read.
pub(super) fn mark(region: &Region) -> Result<(), OutOfRegion> {
    region.store_u32(STEP, STEP_NONE, Relaxed)?;
    region.store_u32(MARK_AT, MARK, Release)
}

/// Keeps the compiler from moving later stores before earlier ones.
fn barrier() {
    std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
}
