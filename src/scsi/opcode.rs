//! The one table of commands: opcode and service action, which bits of the CDB are evaluated, who may run it when, how long
//! it may take, and the function that does it. Dispatch, REPORT SUPPORTED OPERATION CODES and `docs/scsi.md` are made of it.

use crate::scsi::cdb::Cdb;
use crate::scsi::data::Data;
use crate::scsi::lun::Command;
use crate::scsi::sense::Fault;
use crate::scsi::{
    atomic, capacity, copy, copy_results, defects, inquiry, io, log, mode, ports, provisioning, report_opcodes, sanitize, unit, verify,
    write_same,
};

/// What a command that ended well leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// No data-in.
    Done,
    /// The first so many bytes of the buffer are the answer.
    DataIn(u32),
    /// Nothing was done, because it would have had to wait. Only when the command may not.
    WouldBlock,
}

/// Does one command.
pub type Run = fn(&Command<'_>, &Cdb<'_>, &mut Data<'_, '_>) -> Result<Reply, Fault>;

/// Which way the data go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// No data.
    None,
    /// To the initiator.
    In,
    /// From the initiator.
    Out,
}

/// What a command needs of the logical unit's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Runs even while a unit attention is pending, and does not clear it, or while the medium is being sanitized.
    Always,
    /// Runs while the medium is being sanitized or formatted.
    Parameters,
    /// Reads the medium, or asks whether it is ready.
    Medium,
    /// Changes the medium: not when write-protected.
    Write,
}

/// Whether the command blocks the thread that runs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocking {
    /// Answered from memory.
    Never,
    /// A plain read: [`crate::scsi::Lun::try_execute`] can do it if the data are in memory.
    Read,
    /// May wait for a disk or another command.
    May,
}

/// When a command exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// On every logical unit.
    Always,
    /// When logical blocks can be unmapped (LBPME).
    Thin,
    /// When a logical block is no longer than a sector of the image, which a power cut does not tear.
    Atomic,
    /// When target port groups are known whose access states change in one of the ways of this mask (TPGS).
    Ports(u8),
    /// The kernel answers it, if it emulates reservations: it is reported, and refused should it come here.
    Kernel,
    /// The kernel answers it.
    KernelAlways,
}

/// A row of the table.
pub struct Entry {
    /// Operation code.
    pub opcode: u8,
    /// Service action, in the low 5 bits of byte 1.
    pub action: Option<u8>,
    /// Name as in the standards.
    pub name: &'static str,
    /// Which way the data go.
    pub direction: Direction,
    /// What it needs.
    pub access: Access,
    /// Whether it blocks.
    pub blocking: Blocking,
    /// When it exists.
    pub presence: Presence,
    /// CDB usage data: the bits that are evaluated; its length is the CDB's. Byte 0 is the opcode; bits of the service
    /// action are not in it.
    pub usage: &'static [u8],
    /// Bits that are accepted and have no effect: obsolete hints, and the group number.
    pub ignored: &'static [(usize, u8)],
    /// Bits of the usage that mean unmapping, not accepted where blocks cannot be unmapped.
    pub unmap_bits: Option<(usize, u8)>,
    /// Nominal and recommended timeout in seconds.
    pub timeout: (u32, u32),
    /// Does it.
    pub run: Run,
}

impl Entry {
    /// Bits of byte `at` that are accepted though they are not evaluated (or are the service action).
    pub fn ignored_bits(&self, at: usize) -> u8 {
        let action = if at == 1 && self.action.is_some() { 0x1F } else { 0 };
        self.ignored.iter().filter(|(byte, _)| *byte == at).fold(action, |bits, (_, mask)| bits | mask)
    }
}

/// Rows with the opcode, or `None` if the opcode is not known. Several rows have service actions.
pub fn rows(opcode: u8) -> Option<&'static [Entry]> {
    let first = usize::from(INDEX[usize::from(opcode)]);
    let rows = TABLE.get(first..)?;
    let count = rows.iter().take_while(|e| e.opcode == opcode).count();
    Some(&rows[..count])
}

/// Position of the first row of each opcode; 255 if there is none.
static INDEX: [u8; 256] = index();

const fn index() -> [u8; 256] {
    assert!(TABLE.len() < 255);
    let mut index = [255; 256];
    let mut at = 0;
    while at < TABLE.len() {
        let opcode = TABLE[at].opcode as usize;
        assert!(at == 0 || TABLE[at - 1].opcode as usize <= opcode, "rows are sorted by opcode");
        assert!(TABLE[at].usage[0] == TABLE[at].opcode, "usage data begin with the opcode");
        if index[opcode] == 255 {
            index[opcode] = at as u8;
        }
        at += 1;
    }
    index
}

/// Defaults for the rows below.
const ROW: Entry = Entry {
    opcode: 0,
    action: None,
    name: "",
    direction: Direction::None,
    access: Access::Medium,
    blocking: Blocking::May,
    presence: Presence::Always,
    usage: &[],
    ignored: &[],
    unmap_bits: None,
    timeout: (1, 30),
    run: unit::test_unit_ready,
};

/// Timeout of commands whose work grows with a range that may be large.
const LONG: (u32, u32) = (10, 120);
/// Timeout of commands that work on the whole medium.
const VERY_LONG: (u32, u32) = (600, 86_400);

/// FUA_NV and RELADR, both obsolete, in byte 1 of reads and writes; the group number of 10-byte commands.
const IGNORED_10: &[(usize, u8)] = &[(1, 0x03), (6, 0x3F)];
/// The same of 12-byte commands.
const IGNORED_12: &[(usize, u8)] = &[(1, 0x03), (10, 0x3F)];
/// The same of 16-byte commands.
const IGNORED_16: &[(usize, u8)] = &[(1, 0x03), (14, 0x3F)];
/// The group number alone, where byte 1 has no obsolete bits.
const GROUP_10: &[(usize, u8)] = &[(6, 0x3F)];
const GROUP_12: &[(usize, u8)] = &[(10, 0x3F)];
const GROUP_16: &[(usize, u8)] = &[(14, 0x3F)];

const FF: u8 = 0xFF;

/// Every command, sorted by opcode.
pub const TABLE: &[Entry] = &[
    Entry {
        opcode: 0x00,
        name: "TEST UNIT READY",
        blocking: Blocking::Never,
        usage: &[0x00, 0, 0, 0, 0, 0],
        run: unit::test_unit_ready,
        ..ROW
    },
    Entry {
        opcode: 0x03,
        name: "REQUEST SENSE",
        direction: Direction::In,
        access: Access::Always,
        blocking: Blocking::Never,
        usage: &[0x03, 0x01, 0, 0, FF, 0],
        run: unit::request_sense,
        ..ROW
    },
    Entry {
        opcode: 0x04,
        name: "FORMAT UNIT",
        direction: Direction::Out,
        access: Access::Write,
        // FMTDATA, CMPLST and the defect list format.
        usage: &[0x04, 0x3F, 0, 0, 0, 0],
        timeout: VERY_LONG,
        run: sanitize::format_unit,
        ..ROW
    },
    Entry {
        opcode: 0x08,
        name: "READ (6)",
        direction: Direction::In,
        blocking: Blocking::Read,
        usage: &[0x08, 0x1F, FF, FF, FF, 0],
        run: io::read_6,
        ..ROW
    },
    Entry {
        opcode: 0x0A,
        name: "WRITE (6)",
        direction: Direction::Out,
        access: Access::Write,
        usage: &[0x0A, 0x1F, FF, FF, FF, 0],
        run: io::write_6,
        ..ROW
    },
    Entry {
        opcode: 0x12,
        name: "INQUIRY",
        direction: Direction::In,
        access: Access::Always,
        usage: &[0x12, 0x01, FF, FF, FF, 0],
        run: inquiry::inquiry,
        ..ROW
    },
    Entry {
        opcode: 0x15,
        name: "MODE SELECT (6)",
        direction: Direction::Out,
        access: Access::Parameters,
        usage: &[0x15, 0x11, 0, 0, FF, 0],
        run: mode::select_6,
        ..ROW
    },
    Entry { opcode: 0x16, name: "RESERVE (6)", presence: Presence::Kernel, usage: &[0x16, 0, 0, 0, 0, 0], run: unit::kernels_own, ..ROW },
    Entry { opcode: 0x17, name: "RELEASE (6)", presence: Presence::Kernel, usage: &[0x17, 0, 0, 0, 0, 0], run: unit::kernels_own, ..ROW },
    Entry {
        opcode: 0x1A,
        name: "MODE SENSE (6)",
        direction: Direction::In,
        access: Access::Parameters,
        blocking: Blocking::Never,
        usage: &[0x1A, 0x08, FF, FF, FF, 0],
        run: mode::sense_6,
        ..ROW
    },
    Entry { opcode: 0x1B, name: "START STOP UNIT", usage: &[0x1B, 0x01, 0, 0, 0x07, 0], run: unit::start_stop, ..ROW },
    Entry {
        opcode: 0x1D,
        name: "SEND DIAGNOSTIC",
        direction: Direction::Out,
        access: Access::Parameters,
        blocking: Blocking::Never,
        usage: &[0x1D, 0x04, 0, 0, 0, 0],
        run: unit::send_diagnostic,
        ..ROW
    },
    Entry {
        opcode: 0x25,
        name: "READ CAPACITY (10)",
        direction: Direction::In,
        blocking: Blocking::Never,
        usage: &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        // LBA and PMI are obsolete.
        ignored: &[(2, FF), (3, FF), (4, FF), (5, FF), (8, 0x01)],
        run: capacity::read_capacity_10,
        ..ROW
    },
    Entry {
        opcode: 0x28,
        name: "READ (10)",
        direction: Direction::In,
        blocking: Blocking::Read,
        usage: &[0x28, 0x18, FF, FF, FF, FF, 0, FF, FF, 0],
        ignored: IGNORED_10,
        run: io::read_10,
        ..ROW
    },
    Entry {
        opcode: 0x2A,
        name: "WRITE (10)",
        direction: Direction::Out,
        access: Access::Write,
        usage: &[0x2A, 0x18, FF, FF, FF, FF, 0, FF, FF, 0],
        ignored: IGNORED_10,
        run: io::write_10,
        ..ROW
    },
    Entry {
        opcode: 0x2E,
        name: "WRITE AND VERIFY (10)",
        direction: Direction::Out,
        access: Access::Write,
        usage: &[0x2E, 0x16, FF, FF, FF, FF, 0, FF, FF, 0],
        ignored: &[(1, 0x01), (6, 0x3F)],
        run: verify::write_and_verify_10,
        ..ROW
    },
    Entry {
        opcode: 0x2F,
        name: "VERIFY (10)",
        direction: Direction::Out,
        usage: &[0x2F, 0x16, FF, FF, FF, FF, 0, FF, FF, 0],
        ignored: &[(1, 0x01), (6, 0x3F)],
        run: verify::verify_10,
        ..ROW
    },
    Entry {
        opcode: 0x34,
        name: "PRE-FETCH (10)",
        usage: &[0x34, 0x02, FF, FF, FF, FF, 0, FF, FF, 0],
        ignored: &[(1, 0x01), (6, 0x3F)],
        run: io::prefetch_10,
        ..ROW
    },
    Entry {
        opcode: 0x35,
        name: "SYNCHRONIZE CACHE (10)",
        usage: &[0x35, 0x02, FF, FF, FF, FF, 0, FF, FF, 0],
        // SYNC_NV and RELADR are obsolete.
        ignored: &[(1, 0x05), (6, 0x3F)],
        timeout: LONG,
        run: io::synchronize_cache_10,
        ..ROW
    },
    Entry {
        opcode: 0x37,
        name: "READ DEFECT DATA (10)",
        direction: Direction::In,
        access: Access::Parameters,
        blocking: Blocking::Never,
        usage: &[0x37, 0, 0x1F, 0, 0, 0, 0, FF, FF, 0],
        run: defects::read_defect_data_10,
        ..ROW
    },
    Entry {
        opcode: 0x41,
        name: "WRITE SAME (10)",
        direction: Direction::Out,
        access: Access::Write,
        usage: &[0x41, 0x08, FF, FF, FF, FF, 0, FF, FF, 0],
        ignored: GROUP_10,
        unmap_bits: Some((1, 0x08)),
        timeout: LONG,
        run: write_same::write_same_10,
        ..ROW
    },
    Entry {
        opcode: 0x42,
        name: "UNMAP",
        direction: Direction::Out,
        access: Access::Write,
        presence: Presence::Thin,
        usage: &[0x42, 0, 0, 0, 0, 0, 0, FF, FF, 0],
        ignored: GROUP_10,
        timeout: LONG,
        run: provisioning::unmap,
        ..ROW
    },
    Entry {
        opcode: 0x48,
        action: Some(0x01),
        name: "SANITIZE, OVERWRITE",
        direction: Direction::Out,
        access: Access::Write,
        usage: &[0x48, 0xA0, 0, 0, 0, 0, 0, FF, FF, 0],
        timeout: VERY_LONG,
        run: sanitize::overwrite,
        ..ROW
    },
    Entry {
        opcode: 0x48,
        action: Some(0x02),
        name: "SANITIZE, BLOCK ERASE",
        access: Access::Write,
        presence: Presence::Thin,
        usage: &[0x48, 0xA0, 0, 0, 0, 0, 0, FF, FF, 0],
        timeout: VERY_LONG,
        run: sanitize::block_erase,
        ..ROW
    },
    Entry {
        opcode: 0x48,
        action: Some(0x1F),
        name: "SANITIZE, EXIT FAILURE MODE",
        access: Access::Write,
        usage: &[0x48, 0xA0, 0, 0, 0, 0, 0, FF, FF, 0],
        run: sanitize::exit_failure_mode,
        ..ROW
    },
    Entry {
        opcode: 0x4D,
        name: "LOG SENSE",
        direction: Direction::In,
        access: Access::Parameters,
        blocking: Blocking::Never,
        usage: &[0x4D, 0, FF, FF, 0, FF, FF, FF, FF, 0],
        run: log::log_sense,
        ..ROW
    },
    Entry {
        opcode: 0x55,
        name: "MODE SELECT (10)",
        direction: Direction::Out,
        access: Access::Parameters,
        usage: &[0x55, 0x11, 0, 0, 0, 0, 0, FF, FF, 0],
        run: mode::select_10,
        ..ROW
    },
    Entry {
        opcode: 0x56,
        name: "RESERVE (10)",
        presence: Presence::Kernel,
        usage: &[0x56, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        run: unit::kernels_own,
        ..ROW
    },
    Entry {
        opcode: 0x57,
        name: "RELEASE (10)",
        presence: Presence::Kernel,
        usage: &[0x57, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        run: unit::kernels_own,
        ..ROW
    },
    Entry {
        opcode: 0x5A,
        name: "MODE SENSE (10)",
        direction: Direction::In,
        access: Access::Parameters,
        blocking: Blocking::Never,
        usage: &[0x5A, 0x18, FF, FF, 0, 0, 0, FF, FF, 0],
        run: mode::sense_10,
        ..ROW
    },
    Entry {
        opcode: 0x5E,
        action: Some(0x00),
        name: "PERSISTENT RESERVE IN, READ KEYS",
        direction: Direction::In,
        presence: Presence::Kernel,
        usage: &[0x5E, 0, 0, 0, 0, 0, 0, FF, FF, 0],
        run: unit::kernels_own,
        ..ROW
    },
    Entry {
        opcode: 0x5E,
        action: Some(0x01),
        name: "PERSISTENT RESERVE IN, READ RESERVATION",
        direction: Direction::In,
        presence: Presence::Kernel,
        usage: &[0x5E, 0, 0, 0, 0, 0, 0, FF, FF, 0],
        run: unit::kernels_own,
        ..ROW
    },
    Entry {
        opcode: 0x5E,
        action: Some(0x02),
        name: "PERSISTENT RESERVE IN, REPORT CAPABILITIES",
        direction: Direction::In,
        presence: Presence::Kernel,
        usage: &[0x5E, 0, 0, 0, 0, 0, 0, FF, FF, 0],
        run: unit::kernels_own,
        ..ROW
    },
    Entry {
        opcode: 0x5E,
        action: Some(0x03),
        name: "PERSISTENT RESERVE IN, READ FULL STATUS",
        direction: Direction::In,
        presence: Presence::Kernel,
        usage: &[0x5E, 0, 0, 0, 0, 0, 0, FF, FF, 0],
        run: unit::kernels_own,
        ..ROW
    },
    Entry {
        opcode: 0x5F,
        action: Some(0x00),
        name: "PERSISTENT RESERVE OUT, REGISTER",
        direction: Direction::Out,
        presence: Presence::Kernel,
        usage: &[0x5F, 0, FF, 0, 0, FF, FF, FF, FF, 0],
        run: unit::kernels_own,
        ..ROW
    },
    Entry {
        opcode: 0x5F,
        action: Some(0x01),
        name: "PERSISTENT RESERVE OUT, RESERVE",
        direction: Direction::Out,
        presence: Presence::Kernel,
        usage: &[0x5F, 0, FF, 0, 0, FF, FF, FF, FF, 0],
        run: unit::kernels_own,
        ..ROW
    },
    Entry {
        opcode: 0x5F,
        action: Some(0x02),
        name: "PERSISTENT RESERVE OUT, RELEASE",
        direction: Direction::Out,
        presence: Presence::Kernel,
        usage: &[0x5F, 0, FF, 0, 0, FF, FF, FF, FF, 0],
        run: unit::kernels_own,
        ..ROW
    },
    Entry {
        opcode: 0x5F,
        action: Some(0x03),
        name: "PERSISTENT RESERVE OUT, CLEAR",
        direction: Direction::Out,
        presence: Presence::Kernel,
        usage: &[0x5F, 0, FF, 0, 0, FF, FF, FF, FF, 0],
        run: unit::kernels_own,
        ..ROW
    },
    Entry {
        opcode: 0x5F,
        action: Some(0x04),
        name: "PERSISTENT RESERVE OUT, PREEMPT",
        direction: Direction::Out,
        presence: Presence::Kernel,
        usage: &[0x5F, 0, FF, 0, 0, FF, FF, FF, FF, 0],
        run: unit::kernels_own,
        ..ROW
    },
    Entry {
        opcode: 0x5F,
        action: Some(0x05),
        name: "PERSISTENT RESERVE OUT, PREEMPT AND ABORT",
        direction: Direction::Out,
        presence: Presence::Kernel,
        usage: &[0x5F, 0, FF, 0, 0, FF, FF, FF, FF, 0],
        run: unit::kernels_own,
        ..ROW
    },
    Entry {
        opcode: 0x5F,
        action: Some(0x06),
        name: "PERSISTENT RESERVE OUT, REGISTER AND IGNORE EXISTING KEY",
        direction: Direction::Out,
        presence: Presence::Kernel,
        usage: &[0x5F, 0, FF, 0, 0, FF, FF, FF, FF, 0],
        run: unit::kernels_own,
        ..ROW
    },
    Entry {
        opcode: 0x5F,
        action: Some(0x07),
        name: "PERSISTENT RESERVE OUT, REGISTER AND MOVE",
        direction: Direction::Out,
        presence: Presence::Kernel,
        usage: &[0x5F, 0, FF, 0, 0, FF, FF, FF, FF, 0],
        run: unit::kernels_own,
        ..ROW
    },
    Entry {
        opcode: 0x83,
        action: Some(0x00),
        name: "EXTENDED COPY (LID1)",
        direction: Direction::Out,
        usage: &[0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0, FF, FF, FF, FF, 0, 0],
        timeout: LONG,
        run: copy::extended_copy,
        ..ROW
    },
    Entry {
        opcode: 0x84,
        action: Some(0x00),
        name: "RECEIVE COPY STATUS (LID1)",
        direction: Direction::In,
        blocking: Blocking::Never,
        usage: &[0x84, 0, FF, 0, 0, 0, 0, 0, 0, 0, FF, FF, FF, FF, 0, 0],
        run: copy_results::copy_status,
        ..ROW
    },
    Entry {
        opcode: 0x84,
        action: Some(0x03),
        name: "RECEIVE COPY OPERATING PARAMETERS",
        direction: Direction::In,
        access: Access::Parameters,
        blocking: Blocking::Never,
        usage: &[0x84, 0, 0, 0, 0, 0, 0, 0, 0, 0, FF, FF, FF, FF, 0, 0],
        run: copy_results::operating_parameters,
        ..ROW
    },
    Entry {
        opcode: 0x88,
        name: "READ (16)",
        direction: Direction::In,
        blocking: Blocking::Read,
        usage: &[0x88, 0x18, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0],
        ignored: IGNORED_16,
        run: io::read_16,
        ..ROW
    },
    Entry {
        opcode: 0x89,
        name: "COMPARE AND WRITE",
        direction: Direction::Out,
        access: Access::Write,
        usage: &[0x89, 0x18, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0, 0, FF, 0, 0],
        ignored: IGNORED_16,
        run: atomic::compare_and_write,
        ..ROW
    },
    Entry {
        opcode: 0x8A,
        name: "WRITE (16)",
        direction: Direction::Out,
        access: Access::Write,
        usage: &[0x8A, 0x18, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0],
        ignored: IGNORED_16,
        run: io::write_16,
        ..ROW
    },
    Entry {
        opcode: 0x8B,
        name: "ORWRITE (16)",
        direction: Direction::Out,
        access: Access::Write,
        usage: &[0x8B, 0x18, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0],
        ignored: IGNORED_16,
        run: atomic::or_write,
        ..ROW
    },
    Entry {
        opcode: 0x8E,
        name: "WRITE AND VERIFY (16)",
        direction: Direction::Out,
        access: Access::Write,
        usage: &[0x8E, 0x16, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0],
        ignored: GROUP_16,
        run: verify::write_and_verify_16,
        ..ROW
    },
    Entry {
        opcode: 0x8F,
        name: "VERIFY (16)",
        direction: Direction::Out,
        usage: &[0x8F, 0x16, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0],
        ignored: GROUP_16,
        run: verify::verify_16,
        ..ROW
    },
    Entry {
        opcode: 0x90,
        name: "PRE-FETCH (16)",
        usage: &[0x90, 0x02, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0],
        ignored: GROUP_16,
        run: io::prefetch_16,
        ..ROW
    },
    Entry {
        opcode: 0x91,
        name: "SYNCHRONIZE CACHE (16)",
        usage: &[0x91, 0x02, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0],
        ignored: &[(1, 0x04), (14, 0x3F)],
        timeout: LONG,
        run: io::synchronize_cache_16,
        ..ROW
    },
    Entry {
        opcode: 0x93,
        name: "WRITE SAME (16)",
        direction: Direction::Out,
        access: Access::Write,
        usage: &[0x93, 0x09, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0],
        ignored: GROUP_16,
        unmap_bits: Some((1, 0x08)),
        timeout: LONG,
        run: write_same::write_same_16,
        ..ROW
    },
    Entry {
        opcode: 0x9C,
        name: "WRITE ATOMIC (16)",
        direction: Direction::Out,
        access: Access::Write,
        presence: Presence::Atomic,
        usage: &[0x9C, 0x18, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0],
        ignored: GROUP_16,
        run: atomic::write_atomic,
        ..ROW
    },
    Entry {
        opcode: 0x9E,
        action: Some(0x10),
        name: "READ CAPACITY (16)",
        direction: Direction::In,
        blocking: Blocking::Never,
        usage: &[0x9E, 0, 0, 0, 0, 0, 0, 0, 0, 0, FF, FF, FF, FF, 0, 0],
        // LBA and PMI are obsolete.
        ignored: &[(2, FF), (3, FF), (4, FF), (5, FF), (6, FF), (7, FF), (8, FF), (9, FF), (14, 0x01)],
        run: capacity::read_capacity_16,
        ..ROW
    },
    Entry {
        opcode: 0x9E,
        action: Some(0x12),
        name: "GET LBA STATUS",
        direction: Direction::In,
        usage: &[0x9E, 0, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0],
        run: provisioning::get_lba_status,
        ..ROW
    },
    Entry {
        opcode: 0xA0,
        name: "REPORT LUNS",
        direction: Direction::In,
        presence: Presence::KernelAlways,
        usage: &[0xA0, 0, FF, 0, 0, 0, FF, FF, FF, FF, 0, 0],
        run: unit::kernels_own,
        ..ROW
    },
    Entry {
        opcode: 0xA3,
        action: Some(0x0A),
        name: "REPORT TARGET PORT GROUPS",
        direction: Direction::In,
        access: Access::Parameters,
        presence: Presence::Ports(ports::IMPLICIT | ports::EXPLICIT),
        usage: &[0xA3, 0xE0, 0, 0, 0, 0, FF, FF, FF, FF, 0, 0],
        run: ports::report,
        ..ROW
    },
    Entry {
        opcode: 0xA3,
        action: Some(0x0C),
        name: "REPORT SUPPORTED OPERATION CODES",
        direction: Direction::In,
        access: Access::Parameters,
        usage: &[0xA3, 0, 0x87, FF, FF, FF, FF, FF, FF, FF, 0, 0],
        run: report_opcodes::report,
        ..ROW
    },
    Entry {
        opcode: 0xA3,
        action: Some(0x0D),
        name: "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS",
        direction: Direction::In,
        access: Access::Parameters,
        blocking: Blocking::Never,
        usage: &[0xA3, 0, 0, 0, 0, 0, FF, FF, FF, FF, 0, 0],
        run: unit::task_management_functions,
        ..ROW
    },
    Entry {
        opcode: 0xA4,
        action: Some(0x0A),
        name: "SET TARGET PORT GROUPS",
        direction: Direction::Out,
        access: Access::Parameters,
        presence: Presence::Ports(ports::EXPLICIT),
        usage: &[0xA4, 0, 0, 0, 0, 0, FF, FF, FF, FF, 0, 0],
        run: ports::set,
        ..ROW
    },
    Entry {
        opcode: 0xA8,
        name: "READ (12)",
        direction: Direction::In,
        blocking: Blocking::Read,
        usage: &[0xA8, 0x18, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0],
        ignored: IGNORED_12,
        run: io::read_12,
        ..ROW
    },
    Entry {
        opcode: 0xAA,
        name: "WRITE (12)",
        direction: Direction::Out,
        access: Access::Write,
        usage: &[0xAA, 0x18, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0],
        ignored: IGNORED_12,
        run: io::write_12,
        ..ROW
    },
    Entry {
        opcode: 0xAE,
        name: "WRITE AND VERIFY (12)",
        direction: Direction::Out,
        access: Access::Write,
        usage: &[0xAE, 0x16, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0],
        ignored: GROUP_12,
        run: verify::write_and_verify_12,
        ..ROW
    },
    Entry {
        opcode: 0xAF,
        name: "VERIFY (12)",
        direction: Direction::Out,
        usage: &[0xAF, 0x16, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0],
        ignored: GROUP_12,
        run: verify::verify_12,
        ..ROW
    },
    Entry {
        opcode: 0xB7,
        name: "READ DEFECT DATA (12)",
        direction: Direction::In,
        access: Access::Parameters,
        blocking: Blocking::Never,
        usage: &[0xB7, 0x1F, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0],
        run: defects::read_defect_data_12,
        ..ROW
    },
];
