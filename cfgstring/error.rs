//! What can be wrong with a configuration string, and where.

use crate::spec::KEYS;
use std::fmt::{self, Write as _};

/// A fault of a configuration string. `Display` gives the column, the key and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Error {
    column: usize,
    key: Option<String>,
    problem: Problem,
}

/// The kind of fault.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// Nothing after `img/`.
    Empty,
    /// It is not `img/…`.
    Subtype,
    /// It starts neither with `@` nor with `/`.
    NoAt,
    /// Longer than the kernel keeps.
    TooLong {
        /// Length in bytes with `img/`.
        len: usize,
    },
    /// A byte at which the kernel ends the string.
    CutByKernel {
        /// The byte.
        byte: u8,
    },
    /// A byte that rtslib or targetcli refuse or lose.
    UnsafeByte {
        /// The byte.
        byte: u8,
    },
    /// `%` without two hexadecimal digits.
    BadEscape,
    /// An `@` with no key after it.
    NoKey,
    /// A key without `=`.
    NoEquals,
    /// A key that does not exist.
    UnknownKey {
        /// The key that was probably meant.
        nearest: Option<&'static str>,
    },
    /// A key (or its synonym) for the second time.
    Duplicate {
        /// Column of the first one.
        first: usize,
    },
    /// `key=` with nothing behind it.
    EmptyValue,
    /// A value that the key does not take.
    BadValue {
        /// The value as given, made printable.
        value: String,
        /// What the key takes.
        expected: &'static str,
    },
    /// Two keys that contradict each other.
    Conflict {
        /// The other key.
        other: &'static str,
        /// Why.
        why: &'static str,
    },
    /// No `file`.
    NoFile,
    /// A name of an export that could not be one.
    BadName,
}

impl Error {
    pub(crate) fn at(column: usize, problem: Problem) -> Self {
        Self { column, key: None, problem }
    }

    pub(crate) fn of_key(column: usize, key: &str, problem: Problem) -> Self {
        Self { column, key: Some(key.to_owned()), problem }
    }

    /// Where: a byte of the string after `img/`, counted from 1.
    pub fn column(&self) -> usize {
        self.column
    }

    /// The key that is at fault, as far as there is one.
    pub fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// What `Display` says, without the column: for values that do not come from a string.
    pub fn reason(&self) -> String {
        Reason(self).to_string()
    }

    /// What is wrong.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "column {}: {}", self.column, Reason(self))
    }
}

struct Reason<'a>(&'a Error);

impl fmt::Display for Reason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.0.key.as_deref().unwrap_or_default();
        match &self.0.problem {
            Problem::Empty => f.write_str("the configuration string is empty: it should be @file=/path/to/image or @NAME"),
            Problem::Subtype => write!(f, "not a configuration string of this handler: it should start with '{}/'", crate::SUBTYPE),
            Problem::NoAt => f.write_str("should start with '@' (@file=/path/to/image) or be an absolute path"),
            Problem::TooLong { len } => {
                write!(
                    f,
                    "the configuration string is {len} bytes with '{}/'; the kernel cuts it after {}. ",
                    crate::SUBTYPE,
                    crate::MAX_LEN
                )?;
                f.write_str("Define a named export in the configuration file, or use a shorter path (a symbolic link)")
            }
            Problem::CutByKernel { byte } => {
                write!(f, "the kernel cuts the configuration string at {}: write it as %{byte:02X}", byte_name(*byte))
            }
            Problem::UnsafeByte { byte } => {
                write!(f, "targetcli cannot keep {} in a configuration string: write it as %{byte:02X}", byte_name(*byte))
            }
            Problem::BadEscape => f.write_str("'%' should be followed by two hexadecimal digits; a literal '%' is written %25"),
            Problem::NoKey => f.write_str("a key should follow '@' (a literal '@' in a value is written '@@')"),
            Problem::NoEquals => write!(f, "'{key}' should be followed by '=' and a value (a literal '@' in a value is written '@@')"),
            Problem::UnknownKey { nearest: Some(nearest) } => write!(f, "unknown key '{key}'; did you mean '{nearest}'?"),
            Problem::UnknownKey { nearest: None } => {
                write!(f, "unknown key '{key}'; the keys are ")?;
                for (index, known) in KEYS.iter().enumerate() {
                    write!(f, "{}{}", if index == 0 { "" } else { ", " }, known.name())?;
                }
                Ok(())
            }
            Problem::Duplicate { first } => write!(f, "'{key}' was given before, at column {first}: give it once"),
            Problem::EmptyValue => write!(f, "'{key}' has no value: give one, or leave the key out"),
            Problem::BadValue { value, expected } => write!(f, "'{key}' cannot be '{value}': it should be {expected}"),
            Problem::Conflict { other, why } => write!(f, "'{key}' contradicts '{other}': {why}"),
            Problem::NoFile => f.write_str("'file' is missing: add @file=/path/to/image"),
            Problem::BadName => {
                write!(f, "'{key}' is no name of an export: letters, digits and '.', '_', '-' are allowed. ")?;
                f.write_str("For a file write @file=/path/to/image")
            }
        }
    }
}

fn byte_name(byte: u8) -> String {
    match byte {
        b'\n' => "a newline".to_owned(),
        b' ' => "a space".to_owned(),
        0 => "a NUL byte".to_owned(),
        byte if byte.is_ascii_graphic() => format!("'{}'", char::from(byte)),
        byte => format!("the byte {byte:#04x}"),
    }
}

/// Bytes as text for a message: what is not printable appears as `\xNN`.
pub(crate) fn printable(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() {
                text.extend(c.escape_default());
            } else {
                text.push(c);
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}
