//! The configuration string of a `user:img` backstore: parsing, validation, printing.
//!
//! The kernel knows a backstore's configuration as `img/REST`, at most [`MAX_LEN`] bytes. REST is one of
//!
//! | form | meaning |
//! |---|---|
//! | `@key=value@key=value…` | an image, described by the keys of [`Spec`] |
//! | `@NAME` | an export that the daemon's configuration file defines |
//! | `/path/to/file` | short for `@file=/path/to/file`; taken as it is, nothing is unescaped |
//!
//! In the first two forms `@@` is a literal `@` and `%XX` (two hexadecimal digits) is any byte, so that a value can hold what
//! the kernel, rtslib and targetcli would cut or refuse: `,` (`%2C`), `:` (`%3A`), space (`%20`), quotes and bytes that are not UTF-8.
//!
//! This crate opens nothing and knows no image format: it says whether a string makes sense, and where it does not. Columns in
//! its errors are bytes of REST, counted from 1.

mod error;
mod spec;
mod syntax;
mod value;

pub use error::{Error, Problem};
pub use spec::{Discard, KEYS, Key, Spec, ZeroDetection};

use std::fmt;
use std::str::FromStr;

/// The handler's subtype: the part of the kernel's `dev_config` before the first `/`.
pub const SUBTYPE: &str = "img";

/// Longest `img/REST` in bytes. The kernel cuts what is longer, without a word (`TCMU_CONFIG_LEN` less its NUL).
pub const MAX_LEN: usize = 255;

/// What targetcli shows as the format of the configuration string (`ConfigDesc` on D-Bus).
pub const DESCRIPTION: &str = "\
@file=/path/to/image[@key=value...], or /path/to/image, or @NAME (an export of the configuration file).
Keys: file, id, format (driver), read-only, snapshot, snapshot-name, overlay, parent, parent-format, cache-size, \
discard, detect-zeroes, offset, size, partition, direct.
'@@' is a literal '@'; '%XX' is any byte: write ',' as %2C, ':' as %3A, space as %20.
Example: @id=disk0@file=/var/lib/images/disk0.qcow2@format=qcow2";

/// A parsed configuration string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Config {
    /// `@NAME`: an export of the daemon's configuration file.
    Export(String),
    /// `@key=value…` or a plain path.
    Image(Box<Spec>),
}

impl Config {
    /// Parses REST, the string without `img/`.
    ///
    /// # Errors
    /// The first thing that is wrong, with its column and, where there is one, its key.
    pub fn parse(rest: &[u8]) -> Result<Self, Error> {
        let limit = MAX_LEN - (SUBTYPE.len() + 1);
        if rest.len() > limit {
            return Err(Error::at(limit + 1, Problem::TooLong { len: rest.len() + SUBTYPE.len() + 1 }));
        }
        if let Some((at, byte)) = rest.iter().enumerate().find(|(_, byte)| matches!(byte, b',' | b'\n' | 0)) {
            return Err(Error::at(at + 1, Problem::CutByKernel { byte: *byte }));
        }
        match rest.first() {
            None => Err(Error::at(1, Problem::Empty)),
            Some(b'/') => Ok(Self::Image(Box::new(Spec::from_path(rest)))),
            Some(b'@') => Self::parse_items(rest),
            Some(_) => Err(Error::at(1, Problem::NoAt)),
        }
    }

    /// Parses `img/REST` as the kernel and D-Bus hand it over. A trailing newline, as `echo` leaves one in configfs, is dropped.
    ///
    /// # Errors
    /// As [`Config::parse`], or [`Problem::Subtype`] when it is not `img/…`.
    pub fn parse_dev_config(dev_config: &[u8]) -> Result<Self, Error> {
        let text = dev_config.strip_suffix(b"\n").unwrap_or(dev_config);
        match text.strip_prefix(SUBTYPE.as_bytes()).and_then(|rest| rest.strip_prefix(b"/")) {
            Some(rest) => Self::parse(rest),
            None => Err(Error::at(1, Problem::Subtype)),
        }
    }

    fn parse_items(rest: &[u8]) -> Result<Self, Error> {
        let items = syntax::items(rest)?;
        if let [only] = items.as_slice()
            && only.value.is_none()
        {
            return value::export_name(only).map(Self::Export);
        }
        Spec::from_items(&items).map(|spec| Self::Image(Box::new(spec)))
    }
}

impl FromStr for Config {
    type Err = Error;

    fn from_str(rest: &str) -> Result<Self, Error> {
        Self::parse(rest.as_bytes())
    }
}

/// Prints REST such that it parses to the same value, and such that kernel, rtslib, targetcli and a shell leave it alone.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Export(name) => write!(f, "@{name}"),
            Self::Image(spec) => spec.fmt(f),
        }
    }
}

/// The first byte of REST that the kernel would keep but rtslib or targetcli would refuse, or lose when they save and restore
/// the configuration: `:`, space, quotes, braces, control characters. For strings that come from there.
///
/// # Errors
/// [`Problem::UnsafeByte`] with its column.
pub fn check_targetcli(rest: &[u8]) -> Result<(), Error> {
    match rest.iter().position(|byte| !byte.is_ascii_graphic() || matches!(byte, b':' | b'"' | b'\'' | b'{' | b'}' | b'`')) {
        Some(at) => Err(Error::at(at + 1, Problem::UnsafeByte { byte: rest.get(at).copied().unwrap_or_default() })),
        None => Ok(()),
    }
}

/// Parses a number of bytes as the keys take it: decimal digits and an optional K, M, G or T (powers of 1024).
///
/// # Errors
/// What it should be.
pub fn parse_size(text: &str) -> Result<u64, &'static str> {
    value::size(text.as_bytes())
}

#[cfg(test)]
mod tests;
