//! The header of a QED image; all fields are little-endian.
//!
//! Source: QEMU's docs/interop/qed_spec.rst.

use crate::error::{Error, Result};
use crate::field::array;
use crate::store::Store;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// Bytes of the header.
pub(super) const LEN: usize = 64;
/// The signature.
pub(super) const MAGIC: &[u8; 4] = b"QED\0";
/// The longest name of a backing file, in bytes.
const MAX_NAME: u64 = 1023;

/// Bits of the incompatible features.
pub(super) mod feature {
    pub(crate) const BACKING: u64 = 1;
    pub(crate) const NEED_CHECK: u64 = 2;
    /// The backing file is raw, whatever is in it.
    pub(crate) const BACKING_IS_RAW: u64 = 4;
    pub(crate) const KNOWN: u64 = BACKING | NEED_CHECK | BACKING_IS_RAW;
}

/// Byte offsets of fields that change.
pub(super) mod field {
    pub(crate) const FEATURES: u64 = 16;
    pub(crate) const AUTOCLEAR: u64 = 32;
    pub(crate) const SIZE: u64 = 48;
}

/// A valid header.
#[derive(Clone, Debug)]
pub(super) struct Header {
    /// Bytes in a cluster; a power of two.
    pub(super) cluster: u64,
    /// Clusters in a table.
    pub(super) table_clusters: u64,
    /// Bytes before the first cluster that is not the header's.
    pub(super) header_len: u64,
    pub(super) features: u64,
    pub(super) autoclear: u64,
    /// Byte offset of the first-level table.
    pub(super) top_at: u64,
    /// Size of the disk in bytes.
    pub(super) size: u64,
    pub(super) backing: Option<PathBuf>,
}

impl Header {
    pub(super) fn read(store: &dyn Store) -> Result<Self> {
        let fail = |e| Error::io("cannot read the header", e);
        let mut bytes = [0; LEN];
        store.read_zero_filled(&mut bytes, 0).map_err(fail)?;
        let file_len = store.len().map_err(fail)?;
        let le32 = |at: usize| array(&bytes, at).map(u32::from_le_bytes).map(u64::from);
        let le64 = |at: usize| array(&bytes, at).map(u64::from_le_bytes);
        if !bytes.starts_with(MAGIC) {
            return Err(Error::invalid_format("this is no QED image: its signature is missing"));
        }
        let (cluster, table_clusters, header_clusters, features) = (le32(4)?, le32(8)?, le32(12)?, le64(16)?);
        if features & !feature::KNOWN != 0 {
            return Err(Error::unsupported(format!("this QED image has unknown features: bits {:#x}", features & !feature::KNOWN)));
        }
        if !cluster.is_power_of_two() || !(4096..=64 << 20).contains(&cluster) {
            return Err(Error::corrupt(format!("clusters of {cluster} bytes; allowed are powers of two from 4 KiB to 64 MiB")).at_offset(4));
        }
        if !table_clusters.is_power_of_two() || table_clusters > 16 {
            return Err(Error::corrupt(format!("tables of {table_clusters} clusters; allowed are 1, 2, 4, 8 and 16")).at_offset(8));
        }
        let header_len = header_clusters.checked_mul(cluster).filter(|len| *len >= cluster && *len <= i64::MAX as u64);
        let header_len = header_len.ok_or_else(|| Error::corrupt(format!("a header of {header_clusters} clusters")).at_offset(12))?;
        let (top_at, size, table_len) = (le64(40)?, le64(48)?, table_clusters * cluster);
        if !top_at.is_multiple_of(cluster) || top_at < header_len || top_at.checked_add(table_len).is_none_or(|end| end > file_len) {
            return Err(
                Error::corrupt(format!("the first-level table at {top_at:#x} lies outside the file or over the header")).at_offset(40)
            );
        }
        let mut header = Self { cluster, table_clusters, header_len, features, autoclear: le64(32)?, top_at, size, backing: None };
        if !size.is_multiple_of(512) || size > header.most() {
            return Err(Error::corrupt(format!("a disk of {size} bytes; such tables allow whole sectors up to {} bytes", header.most()))
                .at_offset(48));
        }
        if features & feature::BACKING != 0 {
            let (at, len) = (le32(56)?, le32(60)?);
            if len == 0 || len > MAX_NAME || at + len > header_len {
                return Err(
                    Error::corrupt(format!("the name of the backing file ({len} bytes at {at:#x}) lies outside the header")).at_offset(56)
                );
            }
            let mut name = vec![0; usize::try_from(len).unwrap_or(0)];
            store.read_zero_filled(&mut name, at).map_err(|e| Error::io("cannot read the backing file's name", e).at_offset(at))?;
            header.backing = Some(OsString::from_vec(name).into());
        }
        Ok(header)
    }

    /// Entries of a table.
    pub(super) fn entries(&self) -> u64 {
        self.table_clusters * self.cluster / 8
    }

    /// The largest disk that two levels of such tables allow, in bytes.
    pub(super) fn most(&self) -> u64 {
        self.entries().saturating_mul(self.entries()).saturating_mul(self.cluster).min(i64::MAX as u64 / 512 * 512)
    }
}
