//! The arithmetic of an image and the bits of its table entries. Holds no state and reads no files.
//!
//! Source: QEMU's docs/interop/qcow2.rst, "Cluster mapping" and "Header".

use crate::error::{Error, Result};

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
/// Block offset in a refcount table entry: bits 9 to 63.
pub(super) const REFTABLE_OFFSET: u64 = 0xffff_ffff_ffff_fe00;

/// Sizes of an image's parts; constant while it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size in bytes: 9 to 21.
    pub cluster_bits: u32,
    /// log2 of the width of a refcount in bits: 0 to 6.
    pub refcount_order: u32,
}

impl Geometry {
    /// Bytes of a cluster.
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// log2 of the entries of an L2 table.
    pub fn l2_bits(self) -> u32 {
        self.cluster_bits - 3
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
    pub fn l2_entry(self, raw: u64) -> Result<Entry> {
        if raw & COMPRESSED != 0 {
            return Ok(self.compressed(raw));
        }
        if raw & L2_RESERVED != 0 {
            return Err(Error::corrupt(format!("the L2 entry {raw:#018x} has reserved bits set")));
        }
        let host = raw & OFFSET;
        if !self.aligned(host) {
            return Err(Error::corrupt(format!("the L2 entry {raw:#018x} points between clusters")));
        }
        let copied = raw & COPIED != 0;
        match (raw & ZERO != 0, host) {
            (true, _) if self.version < 3 => {
                Err(Error::corrupt(format!("the L2 entry {raw:#018x} has the zero flag, which version 2 does not know")))
            }
            (true, 0) => Ok(Entry::Zero { host: None, copied: false }),
            (true, host) => Ok(Entry::Zero { host: Some(host), copied }),
            (false, 0) => Ok(Entry::Unallocated),
            (false, host) => Ok(Entry::Data { host, copied }),
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

/// What a standard L2 entry says.
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
    /// Compressed data.
    Compressed {
        /// Host offset in bytes, of any alignment.
        host: u64,
        /// Bytes at most, up to the end of the last sector.
        len: u64,
    },
}

impl Entry {
    /// The host clusters that an entry refers to: offset of the first and bytes up to the end of the last.
    pub fn clusters(self, geometry: Geometry) -> Option<(u64, u64)> {
        match self {
            Self::Unallocated | Self::Zero { host: None, .. } => None,
            Self::Zero { host: Some(host), .. } | Self::Data { host, .. } => Some((host, geometry.cluster_size())),
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
        Geometry { version, cluster_bits, refcount_order: 4 }
    }

    #[test]
    fn standard_entries() {
        let g = geometry(16, 3);
        assert_eq!(g.l2_entry(0).unwrap(), Entry::Unallocated);
        assert_eq!(g.l2_entry(1).unwrap(), Entry::Zero { host: None, copied: false });
        assert_eq!(g.l2_entry(COPIED | 0x50001).unwrap(), Entry::Zero { host: Some(0x50000), copied: true });
        assert_eq!(g.l2_entry(0x50000).unwrap(), Entry::Data { host: 0x50000, copied: false });
        assert!(g.l2_entry(0x50200).is_err());
        assert!(g.l2_entry(0x50002).is_err());
        assert!(g.l2_entry(1 << 56 | 0x50000).is_err());
        assert!(geometry(16, 2).l2_entry(1).is_err());
    }

    #[test]
    fn compressed_entries() {
        // 64 KiB clusters: x = 54.
        let raw = COMPRESSED | 3 << 54 | 0x1_2345;
        let entry = geometry(16, 3).l2_entry(raw).unwrap();
        assert_eq!(entry, Entry::Compressed { host: 0x1_2345, len: 4 * 512 - 0x145 });
        assert_eq!(entry.clusters(geometry(16, 3)), Some((0x1_0000, 0x1_0000)));
        let spanning = geometry(16, 3).l2_entry(COMPRESSED | 3 << 54 | 0x1_fe00).unwrap();
        assert_eq!(spanning.clusters(geometry(16, 3)), Some((0x1_0000, 0x2_0000)));
        // 512-byte clusters: x = 61, one bit of sectors; offsets stay below 2^56.
        let entry = geometry(9, 3).l2_entry(COMPRESSED | 1 << 61 | u64::MAX >> 3).unwrap();
        assert_eq!(entry, Entry::Compressed { host: (1 << 56) - 1, len: 2 * 512 - 511 });
    }

    #[test]
    fn refcount_widths() {
        for (order, max, per_block) in [(0, 1, 1 << 19), (1, 3, 1 << 18), (3, 255, 1 << 16), (4, 65535, 1 << 15), (6, u64::MAX, 1 << 13)] {
            let g = Geometry { version: 3, cluster_bits: 16, refcount_order: order };
            assert_eq!((g.max_refcount(), g.refcounts_per_block()), (max, per_block));
        }
    }
}
