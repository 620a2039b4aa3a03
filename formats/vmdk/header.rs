//! The headers of sparse extents: hosted ones (`KDMV`), those of ESX (`COWD`), and space-efficient ones.
//!
//! Hosted: "Virtual Disk Format 5.0", VMware 2011, "Hosted Sparse Extents" and "Stream-Optimized Compressed Sparse Extents". The other two are described
//! nowhere by VMware but for COWD in an older edition; their fields are those that QEMU reads.

use super::descriptor::SECTOR;
use crate::error::{Error, Result};
use crate::field::array;
use crate::store::Store;

/// The first bytes of a hosted extent.
pub(super) const HOSTED: &[u8; 4] = b"KDMV";
/// The first bytes of an ESX extent.
pub(super) const COWD: &[u8; 4] = b"COWD";
/// The first bytes of a space-efficient extent.
pub(super) const SESPARSE: [u8; 8] = 0xCAFE_BABE_u64.to_le_bytes();
/// The first bytes of a space-efficient extent's second header.
const VOLATILE: u64 = 0xCAFE_CAFE;

/// Flags of a hosted extent.
const NEWLINES: u32 = 1;
const REDUNDANT: u32 = 1 << 1;
const ZEROED_GRAINS: u32 = 1 << 2;
const COMPRESSED: u32 = 1 << 16;
const MARKERS: u32 = 1 << 17;
/// Flags that may be ignored are below.
const FIRST_INCOMPATIBLE: u32 = 1 << 16;

/// The grain directory lies at the end, and its place is in the footer.
const AT_END: u64 = u64::MAX;
/// The largest grain, in sectors: 64 MiB.
const MAX_GRAIN: u64 = crate::format::MAX_UNIT as u64 / SECTOR;
/// The most entries of a hosted grain table.
const MAX_TABLE: u64 = 512;
/// The most entries of a grain directory; as in QEMU.
const MAX_DIRECTORY: u64 = 32 << 20;

/// How entries are to be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scheme {
    /// Sectors, 4 bytes. `zeroed`: 1 is a grain of zeros.
    Hosted { zeroed: bool },
    /// Sectors, 4 bytes.
    Cowd,
    /// Numbers of tables and grains, 8 bytes, counted from these byte offsets.
    SeSparse { tables_at: u64, grains_at: u64 },
}

impl Scheme {
    /// Bytes of an entry.
    pub(super) fn width(self) -> u64 {
        if matches!(self, Self::SeSparse { .. }) { 8 } else { 4 }
    }
}

/// A valid header.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) scheme: Scheme,
    /// Length of the extent in bytes.
    pub(super) capacity: u64,
    /// Bytes of a grain, a power of two.
    pub(super) grain: u64,
    /// Entries of a grain table.
    pub(super) per_table: u64,
    /// Byte offset of the grain directory.
    pub(super) directory_at: u64,
    /// Entries of the grain directory.
    pub(super) directory_len: u64,
    /// Byte offset of its copy, which refers to copies of the tables.
    pub(super) redundant_at: Option<u64>,
    /// Byte offset of the embedded descriptor and its length.
    pub(super) descriptor: Option<(u64, u64)>,
    /// Where grains begin, as a byte offset.
    pub(super) overhead: u64,
    /// Grains are deflated.
    pub(super) compressed: bool,
    /// Compressed grains lie behind markers.
    pub(super) markers: bool,
    /// Why the extent cannot be written to.
    pub(super) fixed: Option<&'static str>,
}

fn le32(bytes: &[u8], at: usize) -> Result<u64> {
    array(bytes, at).map(|b| u64::from(u32::from_le_bytes(b)))
}

fn le64(bytes: &[u8], at: usize) -> Result<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

fn read(store: &dyn Store, at: u64) -> Result<[u8; SECTOR as usize]> {
    let mut bytes = [0; SECTOR as usize];
    store.read_zero_filled(&mut bytes, at).map_err(|e| Error::io("cannot read a header", e).at_offset(at))?;
    Ok(bytes)
}

/// Sectors as a byte offset or length.
fn bytes(sectors: u64, what: &str) -> Result<u64> {
    sectors
        .checked_mul(SECTOR)
        .filter(|b| *b <= i64::MAX as u64)
        .ok_or_else(|| Error::corrupt(format!("{what} of {sectors} sectors is beyond what files can have")))
}

impl Header {
    /// Reads the header of a sparse extent in `store`.
    ///
    /// # Errors
    /// `InvalidFormat` when it bears no signature; `Corrupt`; `Unsupported`.
    pub(super) fn read(store: &dyn Store) -> Result<Self> {
        let len = store.len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
        let first = read(store, 0)?;
        let header = if first.starts_with(HOSTED) {
            Self::hosted(store, &first, len)?
        } else if first.starts_with(COWD) {
            Self::cowd(&first)?
        } else if first.starts_with(&SESPARSE) {
            Self::sesparse(store, &first)?
        } else {
            return Err(Error::invalid_format("this is no sparse extent of a VMDK"));
        };
        header.check(len)?;
        Ok(header)
    }

    fn hosted(store: &dyn Store, first: &[u8], len: u64) -> Result<Self> {
        let Some(header) = Self::hosted_at(first)? else {
            // The stream's writer knew the place of the directory only at the end: marker, footer, marker of the end.
            let lost = || {
                Error::corrupt("the footer that should end this streamOptimized image is not there: the file is incomplete").at_offset(len)
            };
            let at = len.checked_sub(2 * SECTOR).filter(|at| *at >= 2 * SECTOR).ok_or_else(lost)?;
            let (marker, footer, end) = (read(store, at - SECTOR)?, read(store, at)?, read(store, at + SECTOR)?);
            let is = |marker: &[u8], kind: u64| Ok::<bool, Error>(le32(marker, 8)? == 0 && le32(marker, 12)? == kind);
            if !is(&marker, 3)? || !is(&end, 0)? || !footer.starts_with(HOSTED) {
                return Err(lost());
            }
            let again = || Error::corrupt("the footer refers to a footer").at_offset(at);
            let mut header = Self::hosted_at(&footer)?.ok_or_else(again)?;
            header.fixed.get_or_insert("its grain directory lies at its end");
            return Ok(header);
        };
        Ok(header)
    }

    /// A header or footer; `None`: the place of the directory is in the footer.
    fn hosted_at(head: &[u8]) -> Result<Option<Self>> {
        let (version, flags) = (le32(head, 4)?, le32(head, 8)? as u32);
        if !(1..=3).contains(&version) {
            return Err(Error::unsupported(format!("VMDK version {version}; known are 1 to 3")));
        }
        let unknown = flags & !(FIRST_INCOMPATIBLE - 1) & !(COMPRESSED | MARKERS);
        if unknown != 0 {
            return Err(Error::unsupported(format!("unknown features of VMDK extents (flags {unknown:#x})")));
        }
        if flags & NEWLINES != 0 && head.get(73..77) != Some(b"\n \r\n") {
            return Err(Error::corrupt("the line ends in the header were changed: the file was copied as if it were a text").at_offset(73));
        }
        let compressed = flags & COMPRESSED != 0;
        let method: [u8; 2] = array(head, 77)?;
        if compressed && u16::from_le_bytes(method) != 1 {
            return Err(Error::unsupported(format!("grains compressed by method {}; known is deflate (1)", u16::from_le_bytes(method))));
        }
        let (directory, redundant) = (le64(head, 56)?, le64(head, 48)?);
        if directory == AT_END {
            return Ok(None);
        }
        let (grain, per_table, capacity) = (le64(head, 20)?, le32(head, 44)?, le64(head, 12)?);
        if !(1..=MAX_TABLE).contains(&per_table) {
            return Err(Error::corrupt(format!("grain tables of {per_table} entries; allowed are 1 to {MAX_TABLE}")).at_offset(44));
        }
        let descriptor = (le64(head, 28)?, le64(head, 36)?);
        let has_descriptor = descriptor.0 != 0 && descriptor.1 != 0;
        Ok(Some(Self {
            scheme: Scheme::Hosted { zeroed: flags & ZEROED_GRAINS != 0 },
            capacity: bytes(capacity, "a capacity")?,
            grain: grain_bytes(grain)?,
            per_table,
            directory_at: bytes(directory, "an offset")?,
            directory_len: directory_len(capacity, grain, per_table)?,
            redundant_at: (flags & REDUNDANT != 0 && redundant != 0 && redundant != directory)
                .then(|| bytes(redundant, "an offset"))
                .transpose()?,
            descriptor: has_descriptor
                .then(|| Ok::<_, Error>((bytes(descriptor.0, "an offset")?, bytes(descriptor.1, "a descriptor")?)))
                .transpose()?,
            overhead: bytes(le64(head, 64)?, "an offset")?,
            compressed,
            markers: flags & MARKERS != 0,
            fixed: if compressed {
                Some("its grains are compressed (streamOptimized)")
            } else if grain < 8 {
                Some("its grains are smaller than 4 KiB")
            } else {
                None
            },
        }))
    }

    fn cowd(head: &[u8]) -> Result<Self> {
        let version = le32(head, 4)?;
        if version != 1 {
            return Err(Error::unsupported(format!("COWD version {version}; known is 1")));
        }
        let (capacity, grain, per_table) = (le32(head, 12)?, le32(head, 16)?, 4096);
        let (directory_len, needed) = (le32(head, 24)?, directory_len(capacity, grain, per_table)?);
        if directory_len < needed {
            return Err(Error::corrupt(format!("a grain directory of {directory_len} entries, of which {needed} are needed")).at_offset(24));
        }
        Ok(Self {
            scheme: Scheme::Cowd,
            capacity: bytes(capacity, "a capacity")?,
            grain: grain_bytes(grain)?,
            per_table,
            directory_at: bytes(le32(head, 20)?, "an offset")?,
            directory_len: needed,
            redundant_at: None,
            descriptor: None,
            overhead: 0,
            compressed: false,
            markers: false,
            fixed: Some("it is an ESX sparse extent (COWD)"),
        })
    }

    fn sesparse(store: &dyn Store, head: &[u8]) -> Result<Self> {
        let version = le64(head, 8)?;
        if version != 0x0000_0002_0000_0001 {
            return Err(Error::unsupported(format!("seSparse version {version:#x}; known is 2.1")));
        }
        let (capacity, grain, table) = (le64(head, 16)?, le64(head, 24)?, le64(head, 32)?);
        if grain != 8 || table != 64 {
            return Err(Error::unsupported(format!("seSparse grains of {grain} sectors and tables of {table}; known are 8 and 64")));
        }
        let offset = |at: usize| bytes(le64(head, at)?, "an offset");
        let second = read(store, offset(80)?)?;
        if le64(&second, 0)? != VOLATILE {
            return Err(Error::corrupt("the volatile header of a seSparse extent is not there").at_offset(offset(80)?));
        }
        if le64(&second, 24)? != 0 {
            return Err(Error::unsupported(
                "this seSparse extent was not closed cleanly, and its journal is still to be replayed (open it with VMware once)",
            ));
        }
        let per_table = table * SECTOR / 8;
        let needed = directory_len(capacity, grain, per_table)?;
        if bytes(le64(head, 136)?, "a grain directory")? / 8 < needed {
            return Err(Error::corrupt("the grain directory is shorter than the disk").at_offset(136));
        }
        Ok(Self {
            scheme: Scheme::SeSparse { tables_at: offset(144)?, grains_at: offset(192)? },
            capacity: bytes(capacity, "a capacity")?,
            grain: grain_bytes(grain)?,
            per_table,
            directory_at: offset(128)?,
            directory_len: needed,
            redundant_at: None,
            descriptor: None,
            overhead: 0,
            compressed: false,
            markers: false,
            fixed: Some("it is a space-efficient extent (seSparse)"),
        })
    }

    /// Whether what the header speaks of lies in a file of `len` bytes.
    fn check(&self, len: u64) -> Result<()> {
        let cut = |what: &str, end: u64| {
            Error::corrupt(format!("the file has {len} bytes, and its {what} ends at {end}: it has been cut short")).at_offset(len)
        };
        let directory = self.directory_len.saturating_mul(self.scheme.width());
        let mut places = vec![(0, SECTOR)];
        places.extend(self.descriptor);
        for at in std::iter::once(self.directory_at).chain(self.redundant_at) {
            let end = at.saturating_add(directory);
            if end > len {
                return Err(cut("grain directory", end));
            }
            if directory > 0 {
                places.push((at, directory));
            }
        }
        places.sort_unstable();
        if let Some([_, (at, _)]) = places.windows(2).find_map(|pair| match pair {
            [a, b] if a.0.saturating_add(a.1) > b.0 => Some([*a, *b]),
            _ => None,
        }) {
            return Err(Error::corrupt("of header, descriptor and grain directories two lie in one place").at_offset(at));
        }
        if self.overhead > len {
            return Err(cut("overhead", self.overhead));
        }
        if let Some((at, size)) = self.descriptor
            && (size > super::descriptor::MAX_LEN || at.saturating_add(size) > len)
        {
            return Err(Error::corrupt(format!("an embedded descriptor of {size} bytes at {at}")).at_offset(28));
        }
        Ok(())
    }
}

fn grain_bytes(sectors: u64) -> Result<u64> {
    if !sectors.is_power_of_two() || sectors > MAX_GRAIN {
        return Err(Error::corrupt(format!("grains of {sectors} sectors; allowed are powers of two up to {MAX_GRAIN}")));
    }
    Ok(sectors * SECTOR)
}

/// Entries that the directory of an extent of `capacity` sectors has.
fn directory_len(capacity: u64, grain: u64, per_table: u64) -> Result<u64> {
    let grain = grain_bytes(grain)? / SECTOR;
    let needed = capacity.div_ceil(grain.saturating_mul(per_table).max(1));
    if needed > MAX_DIRECTORY {
        return Err(Error::corrupt(format!("a grain directory of {needed} entries; allowed are {MAX_DIRECTORY}")));
    }
    Ok(needed)
}
