//! Locks on image files that QEMU understands, so that a running VM, `qemu-img` and we exclude each other.
//!
//! QEMU locks single bytes of the file through the open file description (`F_OFD_SETLK`): byte 100 + p says "I use permission p", byte
//! 200 + p "I do not share p". Both are taken shared; a conflict shows as somebody else's lock on the opposite byte.

use crate::error::{Error, Kind, Result};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use std::fs::File;
use std::path::Path;

const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;
const USED: i64 = 100;
const UNSHARED: i64 = 200;

/// How an image file is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Reads, and relies on nobody writing: images opened read-only, backing files.
    Read,
    /// Reads and writes, alone.
    Write,
}

impl Use {
    fn used(self) -> &'static [i64] {
        match self {
            Self::Read => &[CONSISTENT_READ],
            Self::Write => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    fn unshared(self) -> &'static [i64] {
        &[WRITE, RESIZE]
    }
}

fn byte(kind: libc::c_int, at: i64) -> libc::flock {
    // Lock types and whence are small constants: the casts to the C field's width lose nothing.
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: at, l_len: 1, l_pid: 0 }
}

/// Locks `file` for `how`; the locks go with the last copy of the descriptor.
///
/// # Errors
/// `Locked` when somebody's use excludes ours, and says who where the kernel knows. `Io` when the file system has no such locks.
pub fn lock(file: &File, path: &Path, how: Use) -> Result<()> {
    let wanted = || how.used().iter().map(|p| USED + p).chain(how.unshared().iter().map(|p| UNSHARED + p));
    for at in wanted() {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&byte(libc::F_RDLCK, at))) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(locked(file, path, how)),
            Err(Errno::EINVAL | Errno::ENOLCK | Errno::EOPNOTSUPP) => {
                return Err(Error::new(
                    Kind::Io,
                    "the file system has no locks that would keep other programs from writing to the image at the same time (locking=off opens it without)",
                )
                .at_path(path));
            }
            Err(e) => return Err(Error::io("cannot lock the image", e.into()).at_path(path)),
        }
    }
    // Ours are set: of two that arrive at once at least one sees the other.
    let opposite = how.used().iter().map(|p| UNSHARED + p).chain(how.unshared().iter().map(|p| USED + p));
    for at in opposite {
        let mut probe = byte(libc::F_WRLCK, at);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut probe))
            .map_err(|e| Error::io("cannot ask for locks on the image", e.into()).at_path(path))?;
        if i32::from(probe.l_type) != libc::F_UNLCK {
            let error = locked(file, path, how);
            for at in wanted() {
                // Nothing to do about a failure here: the descriptor is closed by the caller, which unlocks everything.
                let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&byte(libc::F_UNLCK, at)));
            }
            return Err(error);
        }
    }
    Ok(())
}

fn locked(_file: &File, path: &Path, how: Use) -> Error {
    let what = match how {
        Use::Read => "another program has it open for writing (a running virtual machine, qemu-img, or another disk of this daemon)",
        Use::Write => "another program has it open (a running virtual machine, qemu-img, or another disk of this daemon)",
    };
    Error::new(
        Kind::Locked,
        format!("the image is in use: {what}; close it there first, or open it here read-only if the other only reads"),
    )
    .at_path(path)
}
