//! Errors of the TCMU interface. Each says what is wrong, where, and, where something can be done, what.

use std::io;
use std::path::PathBuf;

/// The result type of the module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong outside of a ring that runs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call on a path failed.
    #[error("{what} {}: {source}{}", path.display(), hint(source))]
    Path {
        /// What was done ("open", "write").
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The kernel module is not loaded.
    #[error("{} is missing: is the kernel module loaded? Try `modprobe {module}`", path.display())]
    ModuleMissing {
        /// The file or directory that the module would have made.
        path: PathBuf,
        /// The module.
        module: &'static str,
    },
    /// Somebody has the UIO device open.
    #[error("{} is in use: another process serves this device (is another daemon running?)", path.display())]
    Busy {
        /// The device node.
        path: PathBuf,
    },
    /// A value in sysfs or configfs that is not what its format says.
    #[error("{}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A name or value that the kernel could not take.
    #[error("{0}")]
    Invalid(String),
    /// The netlink family does not exist.
    #[error("the kernel has no netlink family TCM-USER: load its module with `modprobe target_core_user`")]
    NoFamily,
    /// Netlink failed.
    #[error("netlink: {what}: {source}")]
    Netlink {
        /// What was done.
        what: &'static str,
        /// The system's or the kernel's answer.
        source: io::Error,
    },
    /// The ring cannot be used, or no longer.
    #[error("ring of {device}: {fault}")]
    Ring {
        /// The device's name.
        device: String,
        /// Why.
        fault: RingFault,
    },
}

/// Why a ring cannot be used. The kernel never causes one of these unless it is of a kind that we do not know, or something
/// else writes to the shared memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingFault {
    /// Only version 2 is known.
    #[error("mailbox version {0} is not supported (2 is): the kernel is too old or too new")]
    Version(u16),
    /// Offsets and sizes in the mailbox contradict the size of the region.
    #[error("mailbox says that the ring is {size} bytes at {offset}, but the region has {region}")]
    Geometry {
        /// Start of the ring.
        offset: u32,
        /// Size of the ring.
        size: u32,
        /// Size of the region.
        region: usize,
    },
    /// The ring holds commands, and whoever served it before did not leave them readable.
    #[error("the ring holds commands of a daemon that did not keep them readable: it must be reset first (action/reset_ring)")]
    Foreign,
    /// A head or tail that is not a place in the ring.
    #[error("{name} is {value}, which is no entry of a ring of {size} bytes")]
    Index {
        /// Which.
        name: &'static str,
        /// Its value.
        value: u32,
        /// Size of the ring.
        size: u32,
    },
    /// The entry does not fit where it stands.
    #[error("entry at {at} has length {len}: out of alignment, or beyond the head or the end of the ring")]
    EntryLength {
        /// Offset in the ring.
        at: u32,
        /// The length.
        len: u32,
    },
    /// The entry is too short for the iovecs, the CDB or the ids that it says it has.
    #[error("entry at {at} of {len} bytes is too short for {what}")]
    EntryContent {
        /// Offset in the ring.
        at: u32,
        /// Its length.
        len: u32,
        /// For what.
        what: &'static str,
    },
    /// The CDB is not inside the entry.
    #[error("entry at {at} has its CDB at {cdb_off}, outside of the entry")]
    CdbOffset {
        /// Offset in the ring.
        at: u32,
        /// Offset of the CDB in the region.
        cdb_off: u64,
    },
    /// A data buffer is not inside the data area.
    #[error("command {id} has a buffer of {len} bytes at {base}, outside of the data area")]
    BufferBounds {
        /// The command.
        id: u16,
        /// Offset in the region.
        base: u64,
        /// Length.
        len: u64,
    },
    /// A data buffer overlaps another one in use.
    #[error("command {id} has a buffer at {base} that overlaps a buffer in use")]
    BufferOverlap {
        /// The command.
        id: u16,
        /// Offset in the region.
        base: u64,
    },
    /// Two commands at once have the same id.
    #[error("command id {id} is in use already")]
    DuplicateId {
        /// The id.
        id: u16,
    },
}

impl Error {
    /// The system's error behind this one, if there is one.
    pub fn io_kind(&self) -> Option<io::ErrorKind> {
        match self {
            Error::Path { source, .. } | Error::Netlink { source, .. } => Some(source.kind()),
            _ => None,
        }
    }
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => " (root is needed)",
        _ => "",
    }
}
