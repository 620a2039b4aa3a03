//! The arithmetic of an image and the bits of its table entries. Holds no state and reads no files.
//!
//! Source: QEMU's docs/interop/qcow2.rst, "Cluster mapping" and "Header".

use crate::error::{Error, Result};
use smallvec::SmallVec;

/// Bytes of an L1 table that are accepted, as in QEMU.
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
/// Bytes of a refcount table that are accepted, as in QEMU.
pub(super) const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Host offsets in table entries have this many bits.
const HOST_BITS: u32 = 56;

/// Host offset in an L1 or L2 entry: bits 9 to 55.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The cluster's refcount is 1: it may be changed where it is.
pub(super) const COPIED: u64 = 1 << 63;
/// The L2 entry describes a compressed cluster.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros (version 3, standard L2 entries).
pub(super) const ZERO: u64 = 1;
/// Bits of an L1 entry that must be zero.
pub(super) const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Bits of a standard L2 entry that must be zero.
pub(super) const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Subclusters of a cluster, where entries are extended.
pub(super) const SUBCLUSTERS: u32 = 32;
/// Bitmap of an extended L2 entry: every subcluster reads as zeros.
const ALL_ZERO: u64 = 0xffff_ffff_0000_0000;
/// Block offset in a refcount table entry: bits 9 to 63.
pub(super) const REFTABLE_OFFSET: u64 = 0xffff_ffff_ffff_fe00;

/// Sizes of an image's parts; constant while it is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Geometry {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size in bytes: 9 to 21.
    pub cluster_bits: u32,
    /// log2 of the width of a refcount in bits: 0 to 6.
    pub refcount_order: u32,
    /// L2 entries are extended: each has a bitmap of its subclusters (version 3, clusters of 16 KiB or more).
    pub extended: bool,
    /// The guest's clusters lie in a file of their own, each at its guest offset.
    pub data_file: bool,
}

/// An L2 entry as it is in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Raw {
    /// Where the cluster is.
    pub entry: u64,
    /// Of an extended entry: which subclusters are there (bits 0 to 31), which read as zeros (32 to 63). Otherwise 0.
    pub bitmap: u64,
}

impl Raw {
    /// Zeros, with nothing set aside.
    pub fn zeros(geometry: Geometry) -> Self {
        if geometry.extended { Self { entry: 0, bitmap: ALL_ZERO } } else { Self { entry: ZERO, bitmap: 0 } }
    }

    /// Zeros, with the cluster of this entry set aside.
    pub fn zeroed(self, geometry: Geometry) -> Self {
        if geometry.extended { Self { bitmap: ALL_ZERO, ..self } } else { Self { entry: self.entry | ZERO, ..self } }
    }

    /// The cluster at `host`, of which the subclusters of `mask` have data now and the others have what they had.
    pub fn with_data(self, geometry: Geometry, host: u64, mask: u32) -> Self {
        let entry = host | COPIED;
        if !geometry.extended {
            return Self { entry, bitmap: 0 };
        }
        let (data, zeros) = (u64::from(mask), u64::from(mask) << SUBCLUSTERS);
        Self { entry, bitmap: (self.bitmap & !zeros) | data }
    }

    /// Reads an entry; `bytes` is as long as one.
    pub fn decode(bytes: &[u8]) -> Self {
        Self { entry: super::header::be64(bytes, 0), bitmap: super::header::be64(bytes, 8) }
    }

    /// Appends the entry as it is to be in the file.
    pub fn encode(self, geometry: Geometry, into: &mut SmallVec<[u8; 256]>) {
        into.extend_from_slice(&self.entry.to_be_bytes());
        if geometry.extended {
            into.extend_from_slice(&self.bitmap.to_be_bytes());
        }
    }
}

impl Geometry {
    /// Bytes of a cluster.
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// log2 of the bytes of an L2 entry.
    fn entry_bits(self) -> u32 {
        if self.extended { 4 } else { 3 }
    }

    /// Bytes of an L2 entry.
    pub fn entry_size(self) -> u64 {
        1 << self.entry_bits()
    }

    /// Which of the image's files the guest's clusters are in.
    pub fn data_store(self) -> usize {
        usize::from(self.data_file)
    }

    /// log2 of the bytes that can be taken on their own within a cluster: a subcluster, or the cluster.
    pub fn part_bits(self) -> u32 {
        if self.extended { self.cluster_bits - SUBCLUSTERS.trailing_zeros() } else { self.cluster_bits }
    }

    /// The parts of the cluster that begins at guest offset `start` which lie in `[from, to)`, as bits.
    pub fn parts(self, start: u64, from: u64, to: u64) -> u32 {
        let most = u64::from(SUBCLUSTERS);
        let index = |at: u64| (at.saturating_sub(start) >> self.part_bits()).min(most);
        let (first, end) = (index(from), index(to.saturating_add((1 << self.part_bits()) - 1)));
        let below = |n: u64| ((1u64 << n) - 1) as u32;
        below(end) & !below(first)
    }

    /// log2 of the entries of an L2 table.
    pub fn l2_bits(self) -> u32 {
        self.cluster_bits - self.entry_bits()
    }

    /// Entries of an L2 table.
    pub fn l2_entries(self) -> u64 {
        1 << self.l2_bits()
    }

    /// log2 of the guest bytes that an L2 table covers.
    pub fn table_bits(self) -> u32 {
        self.cluster_bits + self.l2_bits()
    }

    /// L1 entries that `size` guest bytes need.
    pub fn l1_entries_for(self, size: u64) -> u64 {
        size.div_ceil(1 << self.table_bits())
    }

    /// Index in its L2 table of the cluster of guest byte `at`.
    pub fn l2_index(self, at: u64) -> usize {
        ((at >> self.cluster_bits) & (self.l2_entries() - 1)) as usize
    }

    /// Offset of guest byte `at` in its cluster.
    pub fn in_cluster(self, at: u64) -> u64 {
        at & (self.cluster_size() - 1)
    }

    /// Whether a host or guest offset lies at the start of a cluster.
    pub fn aligned(self, at: u64) -> bool {
        self.in_cluster(at) == 0
    }

    /// Clusters that `len` bytes fill.
    pub fn clusters(self, len: u64) -> u64 {
        len.div_ceil(self.cluster_size())
    }

    /// Refcounts in a refcount block.
    pub fn refcounts_per_block(self) -> u64 {
        1 << (self.cluster_bits + 3 - self.refcount_order)
    }

    /// The largest refcount that fits the width.
    pub fn max_refcount(self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.refcount_order))
    }

    /// Bytes of a refcount table or L1 table rounded up to whole clusters.
    pub fn round_up(self, len: u64) -> u64 {
        self.clusters(len) << self.cluster_bits
    }

    /// What an L2 entry says.
    pub fn l2_entry(self, raw: Raw) -> Result<Entry> {
        let Raw { entry: raw, bitmap } = raw;
        let wrong = |why: &str| Err(Error::corrupt(format!("the L2 entry {raw:#018x} {why}")));
        if raw & COMPRESSED != 0 {
            return match () {
                () if self.data_file => wrong("is that of a compressed cluster, which cannot be in a data file"),
                () if bitmap != 0 => wrong("is that of a compressed cluster, but says that it has subclusters"),
                () => Ok(self.compressed(raw)),
            };
        }
        if raw & L2_RESERVED != 0 {
            return wrong("has reserved bits set");
        }
        let host = raw & OFFSET;
        if !self.aligned(host) {
            return wrong("points between clusters");
        }
        let copied = raw & COPIED != 0;
        // In a data file, offset 0 is a place like any other, and the flag says that it is meant.
        let place = (host != 0 || (self.data_file && copied)).then_some(host);
        if self.extended {
            if raw & ZERO != 0 {
                return wrong("has reserved bits set");
            }
            let (there, zero) = (bitmap as u32, (bitmap >> SUBCLUSTERS) as u32);
            if there & zero != 0 {
                return wrong("says of a subcluster that it has data and that it is zero");
            }
            return match (place, there, zero) {
                (None, 0, 0) => Ok(Entry::Unallocated),
                (None, 0, zero) => Ok(if zero == u32::MAX {
                    Entry::Zero { host: None, copied: false }
                } else {
                    Entry::Parts { host: None, copied: false, there: 0, zero }
                }),
                (None, ..) => wrong("has subclusters with data, but no cluster"),
                (Some(host), u32::MAX, _) => Ok(Entry::Data { host, copied }),
                (Some(_), 0, u32::MAX) => Ok(Entry::Zero { host: place, copied }),
                (Some(_), there, zero) => Ok(Entry::Parts { host: place, copied, there, zero }),
            };
        }
        match (raw & ZERO != 0, place) {
            (true, _) if self.version < 3 => wrong("has the zero flag, which version 2 does not know"),
            (true, None) => Ok(Entry::Zero { host: None, copied: false }),
            (true, host) => Ok(Entry::Zero { host, copied }),
            (false, None) => Ok(Entry::Unallocated),
            (false, Some(host)) => Ok(Entry::Data { host, copied }),
        }
    }

    fn compressed(self, raw: u64) -> Entry {
        // "x = 62 - (cluster_bits - 8)": below are the host offset's bits, from there on the number of additional sectors.
        let x = 62 - (self.cluster_bits - 8);
        let host = raw & ((1 << x) - 1) & ((1 << HOST_BITS) - 1);
        let sectors = (raw & !COPIED & !COMPRESSED) >> x;
        Entry::Compressed { host, len: (sectors + 1) * 512 - host % 512 }
    }
}

/// What an L2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// Nothing here: the backing file shows through.
    Unallocated,
    /// Zeros; a cluster may be set aside for later.
    Zero {
        /// The cluster set aside.
        host: Option<u64>,
        /// Its refcount is 1.
        copied: bool,
    },
    /// A cluster of data at this host offset.
    Data {
        /// Host offset in bytes.
        host: u64,
        /// Its refcount is 1.
        copied: bool,
    },
    /// A cluster whose subclusters differ from each other, or of which nothing is in use yet. What is neither there nor zero is the backing file's.
    Parts {
        /// Host offset in bytes, if there is a cluster.
        host: Option<u64>,
        /// Its refcount is 1.
        copied: bool,
        /// Subclusters with data, the first in the lowest bit.
        there: u32,
        /// Subclusters that read as zeros.
        zero: u32,
    },
    /// Compressed data.
    Compressed {
        /// Host offset in bytes, of any alignment.
        host: u64,
        /// Bytes at most, up to the end of the last sector.
        len: u64,
    },
}

impl Entry {
    /// Host offset of the cluster that is the guest cluster's own place, if there is one.
    pub fn host(self) -> Option<u64> {
        match self {
            Self::Data { host, .. } => Some(host),
            Self::Zero { host, .. } | Self::Parts { host, .. } => host,
            Self::Unallocated | Self::Compressed { .. } => None,
        }
    }

    /// The host clusters of the image's own file that an entry refers to: offset of the first and bytes up to the end of the last.
    pub fn clusters(self, geometry: Geometry) -> Option<(u64, u64)> {
        match self {
            _ if geometry.data_file => None,
            Self::Unallocated | Self::Zero { host: None, .. } | Self::Parts { host: None, .. } => None,
            Self::Zero { host: Some(host), .. } | Self::Parts { host: Some(host), .. } | Self::Data { host, .. } => {
                Some((host, geometry.cluster_size()))
            }
            Self::Compressed { host, len } => {
                let start = host - geometry.in_cluster(host);
                // `host` has at most 56 bits and `len` at most 23.
                Some((start, geometry.round_up(host + len) - start))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(cluster_bits: u32, version: u32) -> Geometry {
        Geometry { version, cluster_bits, refcount_order: 4, ..Geometry::default() }
    }

    fn plain(entry: u64) -> Raw {
        Raw { entry, bitmap: 0 }
    }

    #[test]
    fn extended_entries() {
        let g = Geometry { extended: true, ..geometry(16, 3) };
        let entry = |entry, bitmap| g.l2_entry(Raw { entry, bitmap });
        assert_eq!(entry(0, 0).unwrap(), Entry::Unallocated);
        assert_eq!(entry(0, ALL_ZERO).unwrap(), Entry::Zero { host: None, copied: false });
        assert_eq!(entry(0, 3 << 32).unwrap(), Entry::Parts { host: None, copied: false, there: 0, zero: 3 });
        assert_eq!(entry(COPIED | 0x50000, 0xffff_ffff).unwrap(), Entry::Data { host: 0x50000, copied: true });
        assert_eq!(entry(0x50000, ALL_ZERO).unwrap(), Entry::Zero { host: Some(0x50000), copied: false });
        assert_eq!(entry(0x50000, 0).unwrap(), Entry::Parts { host: Some(0x50000), copied: false, there: 0, zero: 0 });
        assert_eq!(entry(0x50000, 6 << 32 | 1).unwrap(), Entry::Parts { host: Some(0x50000), copied: false, there: 1, zero: 6 });
        // Both bits of a subcluster; data without a cluster; the flag of standard entries; a compressed cluster with subclusters.
        for (raw, bitmap) in [(0x50000, 1 << 32 | 1), (0, 1), (0x50001, 0), (COMPRESSED | 0x50000, 1)] {
            assert!(entry(raw, bitmap).is_err(), "{raw:#x} {bitmap:#x}");
        }
        assert_eq!((g.l2_entries(), g.part_bits(), g.table_bits()), (4096, 11, 28));
        // 2 KiB parts: those that are touched, in this cluster.
        assert_eq!(
            (g.parts(0x10000, 0x10000, 0x20000), g.parts(0x10000, 0, 0x10800), g.parts(0x10000, 0x107ff, 0x11001)),
            (u32::MAX, 1, 7)
        );
        assert_eq!(g.parts(0x10000, 0x1f800, 0x50000), 1 << 31);
        let some = Raw { entry: 0, bitmap: 7 << 32 }.with_data(g, 0x50000, 6);
        assert_eq!(some, Raw { entry: 0x50000 | COPIED, bitmap: 1 << 32 | 6 });
    }

    #[test]
    fn entries_for_a_data_file() {
        let g = Geometry { data_file: true, ..geometry(16, 3) };
        assert_eq!(g.l2_entry(plain(0)).unwrap(), Entry::Unallocated);
        assert_eq!(g.l2_entry(plain(COPIED)).unwrap(), Entry::Data { host: 0, copied: true });
        assert_eq!(g.l2_entry(plain(COPIED | ZERO)).unwrap(), Entry::Zero { host: Some(0), copied: true });
        assert!(g.l2_entry(plain(COMPRESSED | 0x50000)).is_err());
    }

    #[test]
    fn standard_entries() {
        let g = geometry(16, 3);
        assert_eq!(g.l2_entry(plain(0)).unwrap(), Entry::Unallocated);
        assert_eq!(g.l2_entry(plain(1)).unwrap(), Entry::Zero { host: None, copied: false });
        assert_eq!(g.l2_entry(plain(COPIED | 0x50001)).unwrap(), Entry::Zero { host: Some(0x50000), copied: true });
        assert_eq!(g.l2_entry(plain(0x50000)).unwrap(), Entry::Data { host: 0x50000, copied: false });
        assert!(g.l2_entry(plain(0x50200)).is_err());
        assert!(g.l2_entry(plain(0x50002)).is_err());
        assert!(g.l2_entry(plain(1 << 56 | 0x50000)).is_err());
        assert!(geometry(16, 2).l2_entry(plain(1)).is_err());
    }

    #[test]
    fn compressed_entries() {
        // 64 KiB clusters: x = 54.
        let raw = COMPRESSED | 3 << 54 | 0x1_2345;
        let entry = geometry(16, 3).l2_entry(plain(raw)).unwrap();
        assert_eq!(entry, Entry::Compressed { host: 0x1_2345, len: 4 * 512 - 0x145 });
        assert_eq!(entry.clusters(geometry(16, 3)), Some((0x1_0000, 0x1_0000)));
        let spanning = geometry(16, 3).l2_entry(plain(COMPRESSED | 3 << 54 | 0x1_fe00)).unwrap();
        assert_eq!(spanning.clusters(geometry(16, 3)), Some((0x1_0000, 0x2_0000)));
        // 512-byte clusters: x = 61, one bit of sectors; offsets stay below 2^56.
        let entry = geometry(9, 3).l2_entry(plain(COMPRESSED | 1 << 61 | u64::MAX >> 3)).unwrap();
        assert_eq!(entry, Entry::Compressed { host: (1 << 56) - 1, len: 2 * 512 - 511 });
    }

    #[test]
    fn refcount_widths() {
        for (order, max, per_block) in [(0, 1, 1 << 19), (1, 3, 1 << 18), (3, 255, 1 << 16), (4, 65535, 1 << 15), (6, u64::MAX, 1 << 13)] {
            let g = Geometry { refcount_order: order, ..geometry(16, 3) };
            assert_eq!((g.max_refcount(), g.refcounts_per_block()), (max, per_block));
        }
    }
}
