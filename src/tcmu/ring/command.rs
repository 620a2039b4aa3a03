//! What a ring yields and takes back: commands, notices of task management, completions.

use super::Inner;
use super::grant::Grant;
use crate::tcmu::abi::{STATUS_CHECK_CONDITION, STATUS_GOOD};
use smallvec::SmallVec;
use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

/// The bytes of a CDB; those of up to 16 bytes need no allocation.
pub(super) type Cdb = SmallVec<[u8; 16]>;

/// How a command ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// SCSI status (SAM-5 5.3.1).
    pub status: u8,
    /// Sense data; only for CHECK CONDITION, at most 96 bytes.
    pub sense: SmallVec<[u8; 20]>,
    /// How many bytes at the start of the buffer are the answer, for a command that reads: the initiator gets those and is told
    /// the residual, or, where the kernel cannot tell it, gets zeros after them. `None`: the whole buffer is the answer, or
    /// the command does not read.
    ///
    /// What is left unfilled of a buffer may hold other people's data, and reaches the initiator with every status but CHECK
    /// CONDITION (and with that one, too, if this is set): so a command that reads must say how much. One that writes must
    /// say `None`: its payload has to stay whole until the kernel has its completion, for a successor that does it again.
    pub read_len: Option<u32>,
}

impl Completion {
    /// GOOD, the whole buffer being the answer.
    pub fn good() -> Self {
        Self::default()
    }

    /// GOOD, the first `len` bytes being the answer.
    pub fn good_with(len: u32) -> Self {
        Self { read_len: Some(len), ..Self::default() }
    }

    /// CHECK CONDITION.
    pub fn check_condition(sense: &[u8]) -> Self {
        Self { status: STATUS_CHECK_CONDITION, sense: SmallVec::from_slice(sense), read_len: None }
    }

    /// A status without sense data, for a command that does not read. See `read_len` for one that does.
    pub fn status(status: u8) -> Self {
        Self { status, ..Self::default() }
    }
}

/// A notice that an initiator, or the target itself, gave up commands. The commands must be completed all the same; their status
/// is ignored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskManagement {
    /// Why.
    pub kind: TmrKind,
    /// The ids of the commands.
    pub commands: Vec<u16>,
}

/// Kind of a task management request (SAM-5 7.1, and the kernel's own).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the standard's names
pub enum TmrKind {
    Unknown,
    AbortTask,
    AbortTaskSet,
    ClearAca,
    ClearTaskSet,
    LunReset,
    TargetWarmReset,
    TargetColdReset,
    /// PERSISTENT RESERVE OUT reset the logical unit.
    LunResetByReservation,
}

impl TmrKind {
    pub(super) fn from_raw(raw: u8) -> Self {
        match raw {
            1 => Self::AbortTask,
            2 => Self::AbortTaskSet,
            3 => Self::ClearAca,
            4 => Self::ClearTaskSet,
            5 => Self::LunReset,
            6 => Self::TargetWarmReset,
            7 => Self::TargetColdReset,
            128 => Self::LunResetByReservation,
            _ => Self::Unknown,
        }
    }
}

/// What was in the ring.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // nearly all are commands, and none is kept
pub enum Fetched {
    /// A command to execute and complete.
    Command(Command),
    /// Something to know; it needs no answer.
    TaskManagement(TaskManagement),
}

/// A SCSI command, and the obligation to complete it: one that is dropped completes itself with the ring's failure status.
///
/// It keeps the ring's memory mapped.
pub struct Command {
    /// Taken when the command is completed.
    ring: Option<Arc<Inner>>,
    pub(super) id: u16,
    pub(super) generation: u32,
    pub(super) recovered: bool,
    cdb: Cdb,
    data: Grant,
    bidi: Option<Box<Grant>>,
}

impl Command {
    pub(super) fn new(
        ring: Arc<Inner>,
        id: u16,
        generation: u32,
        recovered: bool,
        cdb: Cdb,
        data: Grant,
        bidi: Option<Box<Grant>>,
    ) -> Self {
        Self { ring: Some(ring), id, generation, recovered, cdb, data, bidi }
    }

    /// The kernel's id of the command, which is unique among those in flight on the device.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// The command descriptor block, of the length that its operation code says.
    pub fn cdb(&self) -> &[u8] {
        &self.cdb
    }

    /// The CDB, and the data buffer to fill or to read.
    pub fn parts(&mut self) -> (&[u8], Data<'_>) {
        (&self.cdb, Data { grant: &mut self.data })
    }

    /// The data buffer.
    pub fn data(&mut self) -> Data<'_> {
        Data { grant: &mut self.data }
    }

    /// The second buffer of a bidirectional command, which goes to the initiator; none for all others.
    pub fn bidi(&mut self) -> Option<Data<'_>> {
        self.bidi.as_deref_mut().map(|grant| Data { grant })
    }

    /// The command was in the ring when this process took it over: another process may have executed it, in part or whole.
    pub fn recovered(&self) -> bool {
        self.recovered
    }

    /// Completes the command. The kernel learns of it when the ring is [kicked](super::Ring::kick).
    pub fn complete(mut self, completion: Completion) {
        self.finish(completion);
    }

    #[cfg(test)]
    pub(super) fn spans(&self) -> &[super::grant::Span] {
        self.data.spans()
    }

    fn finish(&mut self, completion: Completion) {
        if let Some(ring) = self.ring.take() {
            ring.complete(self.id, self.generation, completion, &mut self.data, self.bidi.as_deref_mut());
        }
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        if let Some(ring) = &self.ring {
            tracing::error!(device = %ring.name, command = self.id, cdb = ?self.cdb, "command was dropped: completing it with an error");
            let completion = ring.failure.clone();
            self.finish(completion);
        }
    }
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Command").field("id", &self.id).field("cdb", &self.cdb).field("len", &self.data.len()).finish_non_exhaustive()
    }
}

/// The data buffer of a command, where it lies in the memory that is shared with the kernel.
#[derive(Debug)]
pub struct Data<'a> {
    grant: &'a mut Grant,
}

impl Data<'_> {
    /// The initiator's expected transfer length in bytes, which need not be what the CDB says.
    pub fn len(&self) -> u64 {
        self.grant.len()
    }

    /// Whether there is no buffer.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The buffer as the payload of a write.
    pub fn slices(&self) -> SmallVec<[IoSlice<'_>; 4]> {
        self.grant.slices()
    }

    /// The buffer as the place for the data of a read. It may hold old data of other commands until filled.
    pub fn slices_mut(&mut self) -> SmallVec<[IoSliceMut<'_>; 4]> {
        self.grant.slices_mut()
    }
}

/// What must be done about the part of a buffer that was not filled, so that it never reaches the initiator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfilled {
    /// Nothing: the kernel does not copy it.
    Withheld,
    /// The kernel is told how much to copy.
    Limit(u32),
    /// It must be zeroed from here on.
    ZeroFrom(u64),
}

impl Unfilled {
    /// For a completion of a command with `len` bytes of data.
    pub fn of(completion: &Completion, len: u64, kernel_takes_read_len: bool) -> Self {
        match (completion.status, completion.read_len) {
            (_, None) | (STATUS_CHECK_CONDITION, Some(0)) => Self::Withheld,
            (STATUS_GOOD, Some(filled)) if u64::from(filled) >= len => Self::Withheld,
            // The kernel takes a length of 0 as no length.
            (_, Some(filled)) if filled > 0 && kernel_takes_read_len => Self::Limit(filled),
            (_, Some(filled)) => Self::ZeroFrom(u64::from(filled)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unfilled_bytes_never_reach_the_initiator() {
        let of = |status, read_len, takes| Unfilled::of(&Completion { status, sense: SmallVec::new(), read_len }, 100, takes);
        for takes in [true, false] {
            assert_eq!(of(STATUS_GOOD, None, takes), Unfilled::Withheld);
            assert_eq!(of(STATUS_GOOD, Some(0), takes), Unfilled::ZeroFrom(0));
            assert_eq!(of(STATUS_GOOD, Some(100), takes), Unfilled::Withheld);
            assert_eq!(of(STATUS_GOOD, Some(u32::MAX), takes), Unfilled::Withheld);
            assert_eq!(of(STATUS_CHECK_CONDITION, None, takes), Unfilled::Withheld);
            assert_eq!(of(STATUS_CHECK_CONDITION, Some(0), takes), Unfilled::Withheld);
            assert_eq!(of(0x08, None, takes), Unfilled::Withheld);
            assert_eq!(of(0x28, Some(0), takes), Unfilled::ZeroFrom(0));
        }
        assert_eq!(of(STATUS_GOOD, Some(36), true), Unfilled::Limit(36));
        assert_eq!(of(STATUS_GOOD, Some(36), false), Unfilled::ZeroFrom(36));
        assert_eq!(of(STATUS_CHECK_CONDITION, Some(36), true), Unfilled::Limit(36));
    }
}
