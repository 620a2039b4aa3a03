//! The crate's one error type: a small, matchable kind, the place where it happened, and the cause.
//!
//! Front ends map [`Kind`] to their own codes in one exhaustive `match`; people read the message.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// What went wrong, as far as a caller needs to tell cases apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The host's read or write failed (EIO and its like).
    Io,
    /// The file is not of the format that it was said or taken to be.
    InvalidFormat,
    /// The file is of the format and uses a feature that is not supported.
    Unsupported,
    /// The metadata of the image contradict themselves or the file.
    Corrupt,
    /// A request beyond the end of the device.
    OutOfBounds,
    /// A file that is needed does not exist.
    NotFound,
    /// A file may not be opened: permissions, or the gate's policy.
    Denied,
    /// Somebody else has the image open in a way that excludes us.
    Locked,
    /// A write to something that is read-only.
    ReadOnly,
    /// The host has no space left for an allocating write.
    NoSpace,
    /// An option makes no sense for this image, or a limit was exceeded.
    InvalidOption,
}

/// The result type of the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error with its place. `Display` prints this level alone; `source()` leads to the causes, which [`Error::chain`] joins.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    message: String,
    path: Option<PathBuf>,
    offset: Option<u64>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` that says `message`.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), path: None, offset: None, source: None }))
    }

    /// The metadata contradict themselves: says which, and how.
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::new(Kind::Corrupt, message)
    }

    /// A feature by name that is not supported.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(Kind::Unsupported, message)
    }

    /// Not of the format in question.
    pub fn invalid_format(message: impl Into<String>) -> Self {
        Self::new(Kind::InvalidFormat, message)
    }

    /// The host's error while doing `what` ("read L2 table").
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => Kind::NotFound,
            io::ErrorKind::PermissionDenied => Kind::Denied,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => Kind::NoSpace,
            io::ErrorKind::ReadOnlyFilesystem => Kind::ReadOnly,
            _ => Kind::Io,
        };
        let mut error = Self::new(kind, what);
        error.0.source = Some(Box::new(source));
        error
    }

    /// Adds the file, unless a deeper level has named one.
    #[must_use]
    pub fn at_path(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path.get_or_insert_with(|| path.as_ref().to_path_buf());
        self
    }

    /// Adds the byte offset in the file, unless a deeper level has named one.
    #[must_use]
    pub fn at_offset(mut self, offset: u64) -> Self {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// Puts this error under a new message of the same kind.
    #[must_use]
    pub fn context(self, message: impl Into<String>) -> Self {
        let mut outer = Self::new(self.kind(), message);
        outer.0.source = Some(Box::new(self));
        outer
    }

    /// The cause alone, for who has printed this level.
    pub fn into_source(self) -> Option<Box<dyn std::error::Error + Send + Sync>> {
        self.0.source
    }

    /// The kind, for matching.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The file that the error is about, if known.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The offset in the file that the error is about, if known, in bytes.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }

    /// The message with all its causes, joined by ": ", for one log line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.0.path {
            write!(f, "{}: ", path.display())?;
        }
        f.write_str(&self.0.message)?;
        if let Some(offset) = self.0.offset {
            write!(f, " (at byte {offset:#x})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|e| e as &(dyn std::error::Error + 'static))
    }
}
