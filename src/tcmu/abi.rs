//! Layout of the shared memory, after `linux/target_core_user.h` (mailbox version 2): constants only.
//!
//! One region per device: `[mailbox][command ring][data area]`, native endian. `cdb_off` and `iov_base` count from the start of
//! the region, `cmd_head` and `cmd_tail` from `cmdr_off`.

/// The only mailbox version that exists since Linux 4.1.
pub const MAILBOX_VERSION: u16 = 2;
/// Size of the mailbox in bytes.
pub const MAILBOX_SIZE: usize = 128;

/// The kernel accepts completions out of order.
pub const FLAG_OUT_OF_ORDER: u16 = 1 << 0;
/// The kernel honours [`UFLAG_READ_LEN`].
pub const FLAG_READ_LEN: u16 = 1 << 1;
/// The kernel may write TMR entries.
pub const FLAG_TMR: u16 = 1 << 2;
/// The kernel honours KEEP_BUF (not used here).
pub const FLAG_KEEP_BUF: u16 = 1 << 3;

/// Mailbox offsets in bytes.
pub mod mailbox {
    /// u16 version, u16 flags.
    pub const VERSION_FLAGS: usize = 0;
    /// u32: where the command ring starts.
    pub const CMDR_OFF: usize = 4;
    /// u32: size of the command ring in bytes.
    pub const CMDR_SIZE: usize = 8;
    /// u32, written by the kernel: where it will put the next entry.
    pub const HEAD: usize = 12;
    /// u32, written by us: the first entry that is not completed. On a cache line of its own; the rest of that line is unused by
    /// the kernel.
    pub const TAIL: usize = 64;
}

/// Entries start and end on multiples of this.
pub const ENTRY_ALIGN: u32 = 8;
/// Bytes of the header that every entry has: u32 `len_op`, u16 `cmd_id`, u8 `kflags`, u8 `uflags`.
pub const HEADER_SIZE: u32 = 8;
/// The bits of `len_op` that hold the opcode; the rest is the entry's length in bytes.
pub const OP_MASK: u32 = 7;
/// Filler up to the end of the ring.
pub const OP_PAD: u32 = 0;
/// A SCSI command.
pub const OP_CMD: u32 = 1;
/// A notice of a task management request.
pub const OP_TMR: u32 = 2;

/// We do not know the opcode of this entry.
pub const UFLAG_UNKNOWN_OP: u8 = 1;
/// `read_len` of the response is valid.
pub const UFLAG_READ_LEN: u8 = 2;

/// Offsets in a command entry, in bytes from the start of the entry.
pub mod command {
    /// u32 `cmd_id | kflags << 16 | uflags << 24` (as the fields lie in memory).
    pub const ID_FLAGS: u32 = 4;
    /// u32: number of iovecs of the data buffer.
    pub const IOV_CNT: u32 = 8;
    /// u32: number of iovecs of the second (data-in) buffer of a bidirectional command; they follow the others.
    pub const IOV_BIDI_CNT: u32 = 12;
    /// u32: number of protection information iovecs.
    pub const IOV_DIF_CNT: u32 = 16;
    /// u64: where the CDB is.
    pub const CDB_OFF: u32 = 24;
    /// The iovecs: u64 base, u64 length.
    pub const IOV: u32 = 48;
    /// Size of an iovec.
    pub const IOV_SIZE: u32 = 16;

    /// Response: u8 SCSI status, three bytes unused.
    pub const STATUS: u32 = 8;
    /// Response: u32 number of valid bytes of a read.
    pub const READ_LEN: u32 = 12;
    /// Response: sense data.
    pub const SENSE: u32 = 16;
    /// Least size of an entry: so that a response fits.
    pub const MIN_SIZE: u32 = SENSE + super::SENSE_SIZE as u32;
}

/// Offsets in a TMR entry.
pub mod tmr {
    /// u8 kind.
    pub const KIND: u32 = 8;
    /// u32 number of command ids.
    pub const COUNT: u32 = 12;
    /// u16 ids.
    pub const IDS: u32 = 32;
}

/// Bytes of sense data that a response has room for.
pub const SENSE_SIZE: usize = 96;
/// SAM status GOOD.
pub const STATUS_GOOD: u8 = 0x00;
/// SAM status CHECK CONDITION: the only one that comes with sense data.
pub const STATUS_CHECK_CONDITION: u8 = 0x02;

/// Longest CDB (SPC-5 4.2.3: variable length, 8 + 252 bytes).
pub const MAX_CDB: usize = 260;

/// Length of a CDB in bytes by its operation code, as the kernel itself computes it: by group (SPC-5 4.2.5.1), and for 7Fh from
/// the additional length in byte 7.
#[must_use]
pub fn cdb_len(first_eight: [u8; 8]) -> usize {
    const BY_GROUP: [u8; 8] = [6, 10, 10, 12, 16, 12, 10, 10];
    match first_eight[0] {
        0x7f => 8 + usize::from(first_eight[7]),
        opcode => usize::from(BY_GROUP[usize::from(opcode >> 5)]),
    }
}

const _: () = {
    assert!(command::MIN_SIZE == 112);
    assert!(command::IOV.is_multiple_of(ENTRY_ALIGN));
    assert!(mailbox::TAIL + 4 <= MAILBOX_SIZE);
    assert!(size_of::<usize>() == 8, "the layout is that of 64-bit kernels");
};
