//! The header of version 1 of qcow; all fields are big-endian.
//!
//! Source: the structure of QEMU's driver "qcow".

use crate::error::{Error, Result};
use crate::field::array;
use crate::store::Store;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// Bytes of the header.
pub(super) const LEN: usize = 48;
/// The longest name of a backing file, in bytes.
const MAX_NAME: u64 = 1023;

/// Byte offsets of fields that change.
pub(super) mod field {
    pub(crate) const SIZE: usize = 24;
    pub(crate) const TOP: usize = 40;
}

/// A valid header.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) bytes: [u8; LEN],
    /// Size of the disk in bytes.
    pub(super) size: u64,
    pub(super) cluster_bits: u32,
    pub(super) table_bits: u32,
    /// Byte offset of the first-level table.
    pub(super) top_at: u64,
    pub(super) top_entries: u64,
    pub(super) backing: Option<PathBuf>,
    /// No table and no cluster begins before this byte offset.
    pub(super) first: u64,
}

impl Header {
    pub(super) fn read(store: &dyn Store) -> Result<Self> {
        let fail = |e| Error::io("cannot read the header", e);
        let mut bytes = [0; LEN];
        store.read_zero_filled(&mut bytes, 0).map_err(fail)?;
        let file_len = store.len().map_err(fail)?;
        let be32 = |at: usize| array(&bytes, at).map(u32::from_be_bytes).map(u64::from);
        let be64 = |at: usize| array(&bytes, at).map(u64::from_be_bytes);
        if !bytes.starts_with(b"QFI\xfb") || be32(4)? != 1 {
            return Err(Error::invalid_format("this is no qcow image of version 1"));
        }
        match be32(36)? {
            0 => {}
            1 => {
                return Err(Error::unsupported(
                    "this qcow image is encrypted with QEMU's old AES method, which is not secure and not supported (qemu-img convert can decrypt it)",
                ));
            }
            other => return Err(Error::corrupt(format!("encryption method {other}; there are 0 and 1")).at_offset(36)),
        }
        let (cluster_bits, table_bits) = (u32::from(bytes[32]), u32::from(bytes[33]));
        if !(9..=16).contains(&cluster_bits) || !(6..=13).contains(&table_bits) {
            return Err(Error::corrupt(format!(
                "clusters of 2^{cluster_bits} bytes and tables of 2^{table_bits} entries; allowed are 9 to 16 and 6 to 13"
            ))
            .at_offset(32));
        }
        let said = be64(field::SIZE)?;
        // QEMU rounds down: what is no whole sector cannot be asked for.
        let size = said / 512 * 512;
        if size == 0 || size > i64::MAX as u64 {
            return Err(Error::corrupt(format!("a disk of {said} bytes")).at_offset(24));
        }
        let (top_at, top_entries) = (be64(field::TOP)?, size.div_ceil(1 << (cluster_bits + table_bits)));
        let end = top_entries.checked_mul(8).and_then(|len| top_at.checked_add(len));
        if top_at < LEN as u64 || !top_at.is_multiple_of(8) || end.is_none_or(|end| end > file_len) {
            return Err(Error::corrupt(format!(
                "the first-level table of {top_entries} entries at {top_at:#x} lies outside the file or over the header"
            ))
            .at_offset(40));
        }
        let (name_at, name_len) = (be64(8)?, be32(16)?);
        let mut first = LEN as u64;
        let backing = if name_at == 0 || name_len == 0 {
            None
        } else {
            // In front of all tables and clusters.
            if name_len > MAX_NAME || name_at < LEN as u64 || name_at.checked_add(name_len).is_none_or(|end| end > file_len) {
                return Err(Error::corrupt(format!(
                    "the name of the backing file ({name_len} bytes at {name_at:#x}) lies outside the file"
                ))
                .at_offset(8));
            }
            let mut name = vec![0; usize::try_from(name_len).unwrap_or(0)];
            store
                .read_zero_filled(&mut name, name_at)
                .map_err(|e| Error::io("cannot read the backing file's name", e).at_offset(name_at))?;
            if name_at + name_len <= top_at {
                first = name_at + name_len;
            }
            Some(OsString::from_vec(name).into())
        };
        Ok(Self { bytes, size, cluster_bits, table_bits, top_at, top_entries, backing, first })
    }
}
