//! The first sector of a VDI: what kind of image it is, its sizes and its UUIDs. All fields are little-endian.
//!
//! Source: the structures of VirtualBox's VDI driver (version 1.1 of the header).

use crate::error::{Error, Result};
use crate::field::array;
use crate::store::Store;
use uuid::Uuid;

/// Bytes of the header that are read; all that is ever changed lies in this sector.
pub(super) const LEN: usize = 512;
/// The signature's byte offset, and the signature.
pub(super) const SIGNATURE: (usize, u32) = (0x40, 0xBEDA_107F);
/// An entry of the block map, in bytes.
pub(super) const ENTRY: u64 = 4;
/// Entries from this one on are no places of blocks.
pub(super) const ZERO: u64 = 0xFFFF_FFFE;
/// The entry of a block that is not there.
pub(super) const ABSENT: u64 = 0xFFFF_FFFF;

/// Byte offsets of fields that change.
pub(super) mod field {
    pub(crate) const SIZE: usize = 0x170;
    pub(crate) const BLOCKS: usize = 0x180;
    pub(crate) const ALLOCATED: usize = 0x184;
    pub(crate) const MODIFIED: usize = 0x198;
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Dynamic,
    Static,
    Differencing,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Dynamic => "dynamic",
            Self::Static => "static",
            Self::Differencing => "differencing",
        }
    }
}

/// A valid header.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) bytes: [u8; LEN],
    pub(super) kind: Kind,
    /// Byte offsets of the block map and of the first block.
    pub(super) map_at: u64,
    pub(super) data_at: u64,
    /// Size of the disk in bytes.
    pub(super) size: u64,
    /// Bytes in a block; a power of two.
    pub(super) block: u64,
    /// Bytes before each block that are not the guest's.
    pub(super) extra: u64,
    /// Entries of the map.
    pub(super) blocks: u64,
    /// Blocks in the file, as the header says.
    pub(super) allocated: u64,
}

impl Header {
    pub(super) fn read(store: &dyn Store) -> Result<Self> {
        let fail = |e| Error::io("cannot read the header", e);
        let mut bytes = [0; LEN];
        store.read_zero_filled(&mut bytes, 0).map_err(fail)?;
        let file_len = store.len().map_err(fail)?;
        let le32 = |at: usize| array(&bytes, at).map(u32::from_le_bytes).map(u64::from);
        if le32(SIGNATURE.0)? != u64::from(SIGNATURE.1) {
            return Err(Error::invalid_format("this is no VDI image: its signature is missing"));
        }
        let version = le32(0x44)?;
        if version >> 16 != 1 {
            return Err(Error::unsupported(format!("VDI version {}.{}; only version 1 is known", version >> 16, version & 0xFFFF)));
        }
        let kind = match le32(0x4C)? {
            1 => Kind::Dynamic,
            2 => Kind::Static,
            4 => Kind::Differencing,
            3 => return Err(Error::unsupported("VDI undo images (type 3) are not supported")),
            other => return Err(Error::corrupt(format!("a VDI of type {other}; there are 1 to 4")).at_offset(0x4C)),
        };
        let (map_at, data_at, block, extra) = (le32(0x154)?, le32(0x158)?, le32(0x178)?, le32(0x17C)?);
        let (size, blocks, allocated) = (u64::from_le_bytes(array(&bytes, field::SIZE)?), le32(field::BLOCKS)?, le32(field::ALLOCATED)?);
        if !block.is_power_of_two() || !(4096..=256 << 20).contains(&block) {
            return Err(
                Error::corrupt(format!("a block size of {block} bytes; allowed are powers of two from 4 KiB to 256 MiB")).at_offset(0x178)
            );
        }
        if !extra.is_multiple_of(512) || extra > 1 << 20 {
            return Err(Error::corrupt(format!("{extra} bytes before each block; allowed are whole sectors up to 1 MiB")).at_offset(0x17C));
        }
        // QEMU rounds up, too; VirtualBox makes no such disks.
        let size = size.checked_next_multiple_of(512).filter(|s| *s <= blocks * block);
        let size =
            size.ok_or_else(|| Error::corrupt(format!("the disk is larger than {blocks} blocks of {block} bytes")).at_offset(0x170))?;
        let map_end = map_at + blocks * ENTRY;
        if map_at < LEN as u64 || !map_at.is_multiple_of(512) || !data_at.is_multiple_of(512) || map_end > data_at || map_end > file_len {
            return Err(Error::corrupt(format!(
                "the map of {blocks} blocks at {map_at:#x} lies outside the file or over other structures (blocks begin at {data_at:#x})"
            ))
            .at_offset(0x154));
        }
        Ok(Self { bytes, kind, map_at, data_at, size, block, extra, blocks, allocated })
    }

    fn uuid(&self, at: usize) -> Uuid {
        Uuid::from_bytes_le(array(&self.bytes, at).unwrap_or_default())
    }

    /// The image's own UUID, and that of its present contents.
    pub(super) fn own(&self) -> (Uuid, Uuid) {
        (self.uuid(0x188), self.uuid(field::MODIFIED))
    }

    /// The same of the parent, if there is one.
    pub(super) fn parent(&self) -> (Uuid, Uuid) {
        (self.uuid(0x1A8), self.uuid(0x1B8))
    }

    /// The comment that some programs leave.
    pub(super) fn comment(&self) -> String {
        let text = self.bytes.get(0x54..0x154).unwrap_or_default();
        String::from_utf8_lossy(text.split(|b| *b == 0).next().unwrap_or_default()).into_owned()
    }
}

/// The UUID of a file that begins like this, if it is a VDI.
pub(super) fn uuid_in(head: &[u8]) -> Option<Uuid> {
    let signature = array(head, SIGNATURE.0).map(u32::from_le_bytes).ok()?;
    (signature == SIGNATURE.1).then(|| array(head, 0x188).ok().map(Uuid::from_bytes_le)).flatten()
}
