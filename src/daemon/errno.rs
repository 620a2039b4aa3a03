//! Why a device is refused: a line for the log, an errno for the kernel.

use crate::tcmu;
use formats::Kind;
use nix::errno::Errno;
use std::fmt;

/// A refusal. The errno becomes that of whoever wrote to configfs; the text is the only place for the reason.
#[derive(Debug)]
pub struct Refusal {
    errno: Errno,
    text: String,
}

impl Refusal {
    /// A refusal with its reason.
    pub fn new(errno: Errno, text: impl Into<String>) -> Self {
        Self { errno, text: text.into() }
    }

    /// What the kernel is told; positive.
    pub fn errno(&self) -> i32 {
        self.errno as i32
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<formats::Error> for Refusal {
    fn from(error: formats::Error) -> Self {
        let errno = match error.kind() {
            Kind::Io | Kind::Corrupt => Errno::EIO,
            Kind::InvalidFormat | Kind::OutOfBounds | Kind::InvalidOption => Errno::EINVAL,
            Kind::Unsupported => Errno::EOPNOTSUPP,
            Kind::NotFound => Errno::ENOENT,
            Kind::Denied => Errno::EACCES,
            Kind::Locked => Errno::EBUSY,
            Kind::ReadOnly => Errno::EROFS,
            Kind::NoSpace => Errno::ENOSPC,
        };
        Self::new(errno, error.chain())
    }
}

impl From<cfgstring::Error> for Refusal {
    fn from(error: cfgstring::Error) -> Self {
        Self::new(Errno::EINVAL, error.to_string())
    }
}

impl From<tcmu::Error> for Refusal {
    fn from(error: tcmu::Error) -> Self {
        let errno = match &error {
            tcmu::Error::Busy { .. } => Errno::EBUSY,
            _ => Errno::EIO,
        };
        Self::new(errno, error.to_string())
    }
}
