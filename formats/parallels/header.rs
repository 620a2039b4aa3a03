//! The header of a Parallels image: 64 bytes, little-endian, with the allocation table right behind it.
//!
//! Source: QEMU's docs/interop/parallels.txt.

use crate::error::{Error, Result};
use crate::field::array;
use crate::store::Store;

/// Bytes of the header; the allocation table begins there.
pub(super) const LEN: usize = 64;
/// Magic of images whose table counts sectors, and of those whose table counts clusters.
pub(super) const MAGIC: [&[u8; 16]; 2] = [b"WithoutFreeSpace", b"WithouFreSpacExt"];
/// Bytes in a sector and in a table entry.
pub(super) const SECTOR: u64 = 512;
pub(super) const ENTRY: u64 = 4;
/// What the field `IN_USE` says while a program changes the image.
pub(super) const OPEN: u32 = 0x746F_6E59;

/// Byte offsets of fields that change.
pub(super) mod field {
    pub(crate) const ENTRIES: usize = 32;
    pub(crate) const SECTORS: usize = 36;
    pub(crate) const IN_USE: usize = 44;
}

/// A valid header.
#[derive(Clone, Debug)]
pub(super) struct Header {
    /// The table counts clusters.
    pub(super) extended: bool,
    /// Bytes in a cluster; a power of two.
    pub(super) cluster: u64,
    pub(super) entries: u64,
    /// Size of the disk in bytes.
    pub(super) size: u64,
    pub(super) in_use: u32,
    /// First byte that may belong to a cluster.
    pub(super) data_at: u64,
    /// Byte offset of the format's extension (bitmaps of changes), if there is one.
    pub(super) extension: Option<u64>,
}

impl Header {
    pub(super) fn read(store: &dyn Store) -> Result<Self> {
        let fail = |e| Error::io("cannot read the header", e);
        let mut bytes = [0; LEN];
        store.read_zero_filled(&mut bytes, 0).map_err(fail)?;
        let file_len = store.len().map_err(fail)?;
        let le32 = |at: usize| array(&bytes, at).map(u32::from_le_bytes);
        let le64 = |at: usize| array(&bytes, at).map(u64::from_le_bytes);
        let extended = bytes.starts_with(MAGIC[1]);
        if !extended && !bytes.starts_with(MAGIC[0]) {
            return Err(Error::invalid_format("this is no Parallels image: its signature is missing"));
        }
        let version = le32(16)?;
        if version != 2 {
            return Err(Error::unsupported(format!("version {version} of the Parallels format; only version 2 is known")));
        }
        let (cluster, entries) = (u64::from(le32(28)?) * SECTOR, u64::from(le32(field::ENTRIES)?));
        if !cluster.is_power_of_two() || cluster > 256 << 20 {
            return Err(
                Error::corrupt(format!("clusters of {cluster} bytes; supported are powers of two from 512 bytes to 256 MiB")).at_offset(28)
            );
        }
        // The older kind has a field of 32 bits.
        let sectors = if extended { le64(field::SECTORS)? } else { le64(field::SECTORS)? & 0xFFFF_FFFF };
        let size = sectors.checked_mul(SECTOR).filter(|s| *s <= entries * cluster);
        let size = size.ok_or_else(|| {
            Error::corrupt(format!("a disk of {sectors} sectors in a table of {entries} clusters of {cluster} bytes")).at_offset(36)
        })?;
        let table_end = LEN as u64 + entries * ENTRY;
        if table_end > file_len {
            return Err(Error::corrupt(format!("the file ends inside the allocation table of {entries} entries")).at_offset(LEN as u64));
        }
        let said = u64::from(le32(48)?) * SECTOR;
        let data_at = if said == 0 { table_end.next_multiple_of(SECTOR) } else { said };
        if data_at < table_end {
            return Err(Error::corrupt(format!("data begin at {data_at:#x}, inside the allocation table")).at_offset(48));
        }
        let extension = Some(le64(56)?.saturating_mul(SECTOR)).filter(|at| *at != 0);
        Ok(Self { extended, cluster, entries, size, in_use: le32(field::IN_USE)?, data_at, extension })
    }
}
