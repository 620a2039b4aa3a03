//! Values of single keys: switches, sizes, numbers, names, paths.

use crate::error::{Error, Problem, printable};
use crate::spec::{Discard, ZeroDetection};
use crate::syntax::Item;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// Parses a value or says what would be right.
pub(crate) type Parsed<T> = Result<T, &'static str>;

pub(crate) fn switch(value: &[u8]) -> Parsed<bool> {
    match value {
        b"on" | b"yes" | b"true" | b"1" => Ok(true),
        b"off" | b"no" | b"false" | b"0" => Ok(false),
        _ => Err("'on' or 'off'"),
    }
}

const SIZE: &str = "a number of bytes, with K, M, G or T for powers of 1024";

/// Bytes: decimal digits and an optional K, M, G or T (powers of 1024, either case).
pub(crate) fn size(value: &[u8]) -> Parsed<u64> {
    let (digits, shift) = match value.split_last() {
        Some((b'k' | b'K', digits)) => (digits, 10),
        Some((b'm' | b'M', digits)) => (digits, 20),
        Some((b'g' | b'G', digits)) => (digits, 30),
        Some((b't' | b'T', digits)) => (digits, 40),
        _ => (value, 0),
    };
    decimal(digits).and_then(|number| number.checked_mul(1 << shift)).filter(|&size| i64::try_from(size).is_ok()).ok_or(SIZE)
}

pub(crate) fn nonzero_size(value: &[u8]) -> Parsed<u64> {
    size(value)
        .and_then(|size| if size == 0 { Err("larger than 0: a number of bytes, with K, M, G or T for powers of 1024") } else { Ok(size) })
}

/// The number of a partition, from 1.
pub(crate) fn partition(value: &[u8]) -> Parsed<u32> {
    decimal(value)
        .and_then(|number| u32::try_from(number).ok())
        .filter(|number| (1..=1024).contains(number))
        .ok_or("a partition's number, from 1")
}

pub(crate) fn discard(value: &[u8]) -> Parsed<Discard> {
    match value {
        b"unmap" | b"on" => Ok(Discard::Unmap),
        b"ignore" | b"off" => Ok(Discard::Ignore),
        _ => Err("'unmap' or 'ignore'"),
    }
}

pub(crate) fn zero_detection(value: &[u8]) -> Parsed<ZeroDetection> {
    match value {
        b"off" => Ok(ZeroDetection::Off),
        b"on" => Ok(ZeroDetection::On),
        b"unmap" => Ok(ZeroDetection::Unmap),
        _ => Err("'off', 'on' or 'unmap'"),
    }
}

/// A format's name in lower case; `None` for `auto`.
pub(crate) fn format(value: &[u8]) -> Parsed<Option<String>> {
    let name = text(value)?.to_ascii_lowercase();
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.' | b'+')) {
        return Err("the name of an image format, such as 'qcow2', 'raw' or 'auto'");
    }
    Ok((name != "auto").then_some(name))
}

/// Printable UTF-8.
pub(crate) fn text(value: &[u8]) -> Parsed<String> {
    match std::str::from_utf8(value) {
        Ok(text) if !text.chars().any(char::is_control) => Ok(text.to_owned()),
        _ => Err("printable UTF-8 text"),
    }
}

/// Any bytes but NUL.
pub(crate) fn path(value: &[u8]) -> Parsed<PathBuf> {
    if value.contains(&0) { Err("a path, which holds no NUL byte") } else { Ok(PathBuf::from(OsString::from_vec(value.to_vec()))) }
}

/// `@NAME`.
pub(crate) fn export_name(item: &Item) -> Result<String, Error> {
    if item.key.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')) {
        Ok(item.key.clone())
    } else {
        Err(Error::of_key(item.column, &item.key, Problem::BadName))
    }
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

pub(crate) fn bad(value: &[u8], expected: &'static str) -> Problem {
    Problem::BadValue { value: printable(value), expected }
}
