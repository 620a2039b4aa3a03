//! The header and its extensions: reading, and the limits that are enforced on it. Changes of single fields are made by those who
//! need them, in place, so that whatever else the header holds is kept.
//!
//! Source: QEMU's docs/interop/qcow2.rst, "Header" and "Header extensions"; limits as in QEMU.

use super::entry::{Geometry, MAX_L1_BYTES, MAX_REFTABLE_BYTES};
use crate::error::{Error, Result};
use crate::store::Store;

/// Offsets of header fields that are changed while an image is open, in bytes.
pub(super) mod field {
    pub const SIZE: u64 = 24;
    pub const L1_ENTRIES: u64 = 36;
    pub const REFTABLE_AT: u64 = 48;
    pub const INCOMPATIBLE: u64 = 72;
    pub const AUTOCLEAR: u64 = 88;
}

/// Incompatible feature bits.
pub(super) mod incompatible {
    pub const DIRTY: u64 = 1;
    pub const CORRUPT: u64 = 1 << 1;
    pub const DATA_FILE: u64 = 1 << 2;
    pub const COMPRESSION_TYPE: u64 = 1 << 3;
    pub const EXTENDED_L2: u64 = 1 << 4;
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2;
}

/// Compatible feature bit 0.
pub(super) const LAZY_REFCOUNTS: u64 = 1;
/// Autoclear feature bit 0: the bitmaps are up to date.
pub(super) const AUTOCLEAR_BITMAPS: u64 = 1;
/// Autoclear feature bit 1: the data file on its own is a raw image with the guest's bytes.
pub(super) const AUTOCLEAR_RAW_DATA_FILE: u64 = 1 << 1;

const MAGIC: u32 = 0x5146_49fb;
/// log2 of the smallest clusters that may have subclusters.
const MIN_EXTENDED_BITS: u32 = 14;
/// The longest backing file name.
const MAX_BACKING_NAME: u32 = 1023;
const MAX_SNAPSHOTS: u32 = 65536;
/// Bytes of header extensions that are looked at: they must lie in the first cluster.
const V2_LENGTH: u32 = 72;
const V3_LENGTH: u32 = 104;

/// Types of header extensions.
pub(super) mod extension {
    pub const END: u32 = 0;
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    pub const BITMAPS: u32 = 0x2385_2875;
    pub const DATA_FILE: u32 = 0x4441_5441;
}

/// How compressed clusters are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    Zlib,
    Zstd,
}

/// Where the persistent bitmaps are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BitmapsAt {
    pub count: u32,
    pub size: u64,
    pub at: u64,
}

/// The header as it was when the image was opened.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub geometry: Geometry,
    pub size: u64,
    pub crypt_method: u32,
    pub l1_entries: u32,
    pub l1_at: u64,
    pub reftable_at: u64,
    pub reftable_clusters: u32,
    pub snapshots: u32,
    pub snapshots_at: u64,
    pub incompatible: u64,
    pub compatible: u64,
    pub autoclear: u64,
    pub compression: Compression,
    /// Name of the backing file, as the image has it.
    pub backing: Option<Vec<u8>>,
    pub backing_format: Option<String>,
    pub data_file: Option<String>,
    pub bitmaps: Option<BitmapsAt>,
    /// Names of feature bits: kind (0 incompatible), bit, name.
    feature_names: Vec<(u8, u8, String)>,
}

/// A big-endian number at a fixed offset of a buffer that is known to be longer.
pub(super) fn be32(buf: &[u8], at: usize) -> u32 {
    buf.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

/// See [`be32`].
pub(super) fn be64(buf: &[u8], at: usize) -> u64 {
    buf.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}

fn invalid(message: impl Into<String>, at: u64) -> Error {
    Error::invalid_format(message).at_offset(at)
}

impl Header {
    /// Reads and checks the header of an image.
    ///
    /// # Errors
    /// `InvalidFormat` when this is no qcow2 image or its header contradicts itself; `Unsupported` for features by name.
    pub fn read(store: &dyn Store) -> Result<Self> {
        let mut start = [0u8; V3_LENGTH as usize + 8];
        let read = |buf: &mut [u8]| store.read_zero_filled(buf, 0).map_err(|e| Error::io("cannot read the qcow2 header", e));
        read(&mut start)?;
        if be32(&start, 0) != MAGIC {
            return Err(invalid("not a qcow2 image: the signature is missing", 0));
        }
        let version = be32(&start, 4);
        if !matches!(version, 2 | 3) {
            return Err(Error::unsupported(format!("qcow2 version {version} is not known (2 and 3 are)")).at_offset(4));
        }
        let cluster_bits = be32(&start, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(invalid(format!("impossible cluster size: 2^{cluster_bits} bytes (512 B to 2 MiB are allowed)"), 20));
        }
        let cluster = 1usize << cluster_bits;
        let length = if version == 2 { V2_LENGTH } else { be32(&start, 100) };
        if version == 3 && (length < V3_LENGTH || length as usize > cluster || length % 8 != 0) {
            return Err(invalid(format!("impossible header length: {length} bytes"), 100));
        }
        let v3 = |at: usize| if version == 3 { be64(&start, at) } else { 0 };
        let refcount_order = if version == 3 { be32(&start, 96) } else { 4 };
        if refcount_order > 6 {
            return Err(invalid(format!("impossible refcount width: 2^{refcount_order} bits (1 to 64 are allowed)"), 96));
        }
        let mut header = Self {
            geometry: Geometry {
                version,
                cluster_bits,
                refcount_order,
                extended: v3(72) & incompatible::EXTENDED_L2 != 0,
                data_file: v3(72) & incompatible::DATA_FILE != 0,
            },
            size: be64(&start, 24),
            crypt_method: be32(&start, 32),
            l1_entries: be32(&start, 36),
            l1_at: be64(&start, 40),
            reftable_at: be64(&start, 48),
            reftable_clusters: be32(&start, 56),
            snapshots: be32(&start, 60),
            snapshots_at: be64(&start, 64),
            incompatible: v3(72),
            compatible: v3(80),
            autoclear: v3(88),
            compression: Compression::Zlib,
            backing: None,
            backing_format: None,
            data_file: None,
            bitmaps: None,
            feature_names: Vec::new(),
        };
        let mut first = vec![0u8; cluster];
        read(&mut first)?;
        header.read_backing_name(&first)?;
        header.read_extensions(&first, length as usize)?;
        header.check_features(if length > V3_LENGTH { start[V3_LENGTH as usize] } else { 0 })?;
        header.check_limits()?;
        Ok(header)
    }

    fn read_backing_name(&mut self, first: &[u8]) -> Result<()> {
        let (at, len) = (be64(first, 8), be32(first, 16));
        if at == 0 {
            return Ok(());
        }
        let range = usize::try_from(at).ok().and_then(|a| Some(a..a.checked_add(len as usize)?));
        let name = range.and_then(|r| first.get(r)).filter(|_| len <= MAX_BACKING_NAME);
        let name =
            name.ok_or_else(|| invalid(format!("the backing file's name ({len} bytes at {at:#x}) does not fit the first cluster"), 8))?;
        // A length of 0 means that there is none.
        self.backing = (len > 0).then(|| name.to_vec());
        Ok(())
    }

    fn read_extensions(&mut self, first: &[u8], from: usize) -> Result<()> {
        let name_at = usize::try_from(be64(first, 8)).unwrap_or(0);
        let end = if name_at == 0 { first.len() } else { name_at.min(first.len()) };
        let mut at = from;
        while end.checked_sub(8).is_some_and(|last| at <= last) {
            let (kind, len) = (be32(first, at), be32(first, at + 4) as usize);
            if kind == extension::END {
                break;
            }
            let data = (at + 8).checked_add(len).filter(|e| *e <= end).and_then(|e| first.get(at + 8..e));
            let data = data.ok_or_else(|| invalid(format!("header extension {kind:#010x} ({len} bytes) is too long"), at as u64))?;
            let text = || String::from_utf8_lossy(data).trim_end_matches('\0').to_owned();
            match kind {
                extension::BACKING_FORMAT => self.backing_format = Some(text()),
                extension::DATA_FILE => self.data_file = Some(text()),
                extension::FEATURE_NAMES => {
                    let names = data.chunks_exact(48).filter_map(|c| {
                        let (kind, bit, name) = (*c.first()?, *c.get(1)?, c.get(2..)?);
                        let name = String::from_utf8_lossy(name);
                        Some((kind, bit, name.split('\0').next().unwrap_or_default().to_owned()))
                    });
                    self.feature_names = names.collect();
                }
                extension::BITMAPS if len >= 24 => {
                    self.bitmaps = Some(BitmapsAt { count: be32(data, 0), size: be64(data, 8), at: be64(data, 16) });
                }
                // Unknown ones stay where they are.
                _ => {}
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(())
    }

    fn check_features(&mut self, compression_type: u8) -> Result<()> {
        use incompatible::{COMPRESSION_TYPE, DATA_FILE, EXTENDED_L2, KNOWN};
        let unknown = self.incompatible & !KNOWN;
        if unknown != 0 {
            let names: Vec<String> = (0..64u8).filter(|bit| unknown >> bit & 1 == 1).map(|bit| self.feature_name(bit)).collect();
            let list = names.join(", ");
            return Err(
                Error::unsupported(format!("the image uses features that are not known here: {list}")).at_offset(field::INCOMPATIBLE)
            );
        }
        self.compression = match (self.incompatible & COMPRESSION_TYPE != 0, compression_type) {
            (false, 0) => Compression::Zlib,
            (true, 1) => Compression::Zstd,
            (true, 0) | (false, _) => return Err(invalid("the compression type and its feature bit contradict each other", 104)),
            (true, kind) => {
                return Err(Error::unsupported(format!("compression type {kind} is not known (0 zlib and 1 zstd are)")).at_offset(104));
            }
        };
        let refuse = |what: &str| Err(Error::unsupported(format!("{what} is not supported yet")));
        match self.crypt_method {
            0 => {}
            1 => {
                return Err(Error::unsupported(
                    "the image is encrypted with qcow2's old AES method, which is broken and not supported (qemu-img convert makes an image without it)",
                )
                .at_offset(32));
            }
            2 => return refuse("LUKS encryption inside qcow2"),
            other => return Err(invalid(format!("unknown encryption method {other}"), 32)),
        }
        if self.incompatible & DATA_FILE != 0 && self.snapshots > 0 {
            return Err(invalid("the image has a data file and internal snapshots, which exclude each other", 60));
        }
        if self.incompatible & EXTENDED_L2 != 0 && self.geometry.cluster_bits < MIN_EXTENDED_BITS {
            return Err(invalid("extended L2 entries need clusters of 16 KiB or more", 20));
        }
        Ok(())
    }

    fn feature_name(&self, bit: u8) -> String {
        let name = self.feature_names.iter().find(|(kind, b, name)| *kind == 0 && *b == bit && !name.is_empty());
        name.map_or_else(|| format!("incompatible feature bit {bit}"), |(_, _, name)| format!("{name:?} (bit {bit})"))
    }

    fn check_limits(&self) -> Result<()> {
        let g = self.geometry;
        if self.size > i64::MAX as u64 {
            return Err(invalid(format!("impossible size: {} bytes", self.size), field::SIZE));
        }
        if u64::from(self.l1_entries) * 8 > MAX_L1_BYTES {
            return Err(invalid(format!("the L1 table has {} entries; {} are allowed", self.l1_entries, MAX_L1_BYTES / 8), 36));
        }
        let needed = g.l1_entries_for(self.size);
        if u64::from(self.l1_entries) < needed {
            return Err(invalid(format!("the L1 table has {} entries where {needed} are needed", self.l1_entries), 36));
        }
        self.check_table("L1 table", self.l1_at, u64::from(self.l1_entries) * 8, 40)?;
        let reftable = u64::from(self.reftable_clusters) << g.cluster_bits;
        if reftable > MAX_REFTABLE_BYTES {
            return Err(invalid(format!("the refcount table is {reftable} bytes; {MAX_REFTABLE_BYTES} are allowed"), 56));
        }
        self.check_table("refcount table", self.reftable_at, reftable, 48)?;
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(invalid(format!("{} snapshots; {MAX_SNAPSHOTS} are allowed", self.snapshots), 60));
        }
        if self.snapshots > 0 {
            self.check_table("snapshot table", self.snapshots_at, 0, 64)?;
        }
        Ok(())
    }

    fn check_table(&self, what: &str, at: u64, len: u64, field: u64) -> Result<()> {
        let end = at.checked_add(len).filter(|e| *e <= i64::MAX as u64);
        if !self.geometry.aligned(at) || end.is_none() {
            return Err(invalid(format!("impossible place of the {what}: {len} bytes at {at:#x}"), field));
        }
        Ok(())
    }
}
