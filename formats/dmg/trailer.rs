//! The trailer of a DMG: the last 512 bytes, or a little before the end where something was appended. All fields are big-endian.

use crate::error::{Error, Result};
use crate::field::array;
use crate::store::Store;

/// How it begins: signature and version.
pub(super) const MAGIC: &[u8; 8] = b"koly\0\0\0\x04";
/// Bytes of it.
const LEN: usize = 512;
/// It begins in as many bytes before the end of the file.
const REACH: u64 = 1023;

/// What is of use in a trailer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trailer {
    /// Byte offset that chunks count from.
    pub(super) data_at: u64,
    /// Byte offset and length of the resource fork, and of the property list; inside the file, length 0 if there is none.
    pub(super) resources: (u64, u64),
    pub(super) list: (u64, u64),
    /// Size of the disk.
    pub(super) sectors: u64,
}

impl Trailer {
    pub(super) fn read(store: &dyn Store) -> Result<Self> {
        let fail = |e| Error::io("cannot read the trailer", e);
        let file_len = store.len().map_err(fail)?;
        let start = file_len.saturating_sub(REACH);
        let mut bytes = vec![0; usize::try_from(file_len - start).unwrap_or(0)];
        store.read_zero_filled(&mut bytes, start).map_err(fail)?;
        let place = (0..bytes.len().saturating_sub(LEN - 1)).rev().find(|at| bytes.get(*at..).is_some_and(|b| b.starts_with(MAGIC)));
        let place = place.ok_or_else(|| Error::invalid_format("this is no DMG image: it has no trailer"))?;
        let at = start + place as u64;
        let bytes = bytes.get(place..).unwrap_or_default();
        let be64 = |at: usize| array(bytes, at).map(u64::from_be_bytes);
        let segments = u32::from_be_bytes(array(bytes, 60)?);
        if segments > 1 {
            return Err(Error::unsupported(format!("this DMG image consists of {segments} files, which is not supported")));
        }
        let run = |what: &str, field: usize| -> Result<(u64, u64)> {
            let (from, len) = (be64(field)?, be64(field + 8)?);
            match from.checked_add(len) {
                Some(end) if end <= file_len => Ok((from, len)),
                _ => {
                    Err(Error::corrupt(format!("the {what} ({len} bytes at {from:#x}) lies outside the file")).at_offset(at + field as u64))
                }
            }
        };
        let data_at = be64(24)?;
        if data_at > file_len {
            return Err(Error::corrupt(format!("the data begin at {data_at:#x}, beyond the end of the file")).at_offset(at + 24));
        }
        Ok(Self { data_at, resources: run("resource fork", 40)?, list: run("property list", 216)?, sectors: be64(492)? })
    }
}
