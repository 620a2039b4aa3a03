//! Small valid qcow2 images, and damage to their fields.
//!
//! The layout is the specification's (QEMU, docs/interop/qcow2.rst); nothing here knows the code under test.

use super::input::Input;
use super::sparse::Sparse;
use std::io::Write;
use std::sync::Arc;

/// Damaged fields of one image, at most.
const MAX_DAMAGE: u64 = 6;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Header fields: offset and width in bytes.
const FIELDS: &[(u64, usize)] = &[
    (0, 4),
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 1),
    (104, 8),
    (112, 4),
    (116, 4),
    (120, 4),
    (124, 4),
    (128, 8),
    (136, 8),
    (144, 8),
    (152, 8),
];

/// What kind of image.
struct Shape {
    version: u32,
    cluster_bits: u32,
    refcount_order: u32,
    zstd: bool,
    backing: bool,
    lazy: bool,
    snapshot: bool,
    bitmap: bool,
    size: u64,
}

impl Shape {
    fn choose(input: &mut Input<'_>) -> Self {
        let flags = input.u8();
        let version = if flags & 1 == 0 { 3 } else { 2 };
        let cluster_bits = input.choose(&[9, 9, 10, 12, 12, 14, 16]);
        let cluster = 1u64 << cluster_bits;
        Self {
            version,
            cluster_bits,
            refcount_order: if version == 3 { input.choose(&[4, 4, 4, 0, 1, 2, 3, 5, 6]) } else { 4 },
            zstd: version == 3 && flags & 2 != 0,
            backing: flags & 4 != 0,
            lazy: version == 3 && flags & 8 != 0,
            snapshot: flags & 16 != 0,
            bitmap: version == 3 && flags & 32 != 0,
            size: (100 * cluster).min(1 << 20) + if flags & 64 != 0 { 3 * 512 } else { 0 },
        }
    }
}

/// An image while it is made: clusters are handed out in order.
struct Maker {
    shape: Shape,
    store: Sparse,
    refcounts: Vec<u64>,
    /// Tables: where, how many entries, bytes of each.
    tables: Vec<(u64, u64, usize)>,
    /// Offsets and numbers that mean something.
    telling: Vec<u64>,
}

impl Maker {
    fn cluster(&self) -> u64 {
        1 << self.shape.cluster_bits
    }

    fn take(&mut self, clusters: u64) -> u64 {
        let at = self.refcounts.len() as u64 * self.cluster();
        self.refcounts.resize(self.refcounts.len() + clusters as usize, 1);
        self.telling.push(at);
        at
    }

    fn put64(&self, at: u64, value: u64) {
        self.store.put(at, &value.to_be_bytes());
    }

    fn table(&mut self, at: u64, entries: u64, width: usize) {
        self.tables.push((at, entries, width));
    }

    fn compressed(&self, content: &[u8]) -> Vec<u8> {
        if self.shape.zstd {
            return zstd::bulk::compress(content, 1).unwrap_or_default();
        }
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(content).and_then(|()| encoder.finish()).unwrap_or_default()
    }

    fn make(&mut self) {
        let cluster = self.cluster();
        let l2_entries = cluster / 8;
        let l1_entries = self.shape.size.div_ceil(cluster * l2_entries);
        self.take(1);
        let reftable = self.take(1);
        let refblock = self.take(1);
        let l1 = self.take(1);
        let l2 = self.take(1);
        self.table(reftable, 4, 8);
        self.table(l1, l1_entries + 1, 8);
        self.table(l2, 24.min(l2_entries), 8);
        self.put64(reftable, refblock);
        // Some data, a zero cluster with and without space, two compressed clusters in one host cluster.
        for index in [0, 1, 2, 5, 9] {
            let at = self.take(1);
            let content: Vec<u8> = (0..cluster).map(|i| (i / 64 + index * 7 + 1) as u8).collect();
            self.store.put(at, &content);
            self.put64(l2 + index * 8, at | COPIED);
        }
        if self.shape.version == 3 {
            self.put64(l2 + 3 * 8, 1);
            let reserved = self.take(1);
            self.put64(l2 + 4 * 8, reserved | COPIED | 1);
        }
        let host = self.take(1);
        let first = self.compressed(&vec![0x41; cluster as usize]);
        let second = self.compressed(&(0..cluster).map(|i| (i / 8) as u8).collect::<Vec<u8>>());
        let mut at = host;
        let mut shared = 0;
        for (index, coded) in [(6, first), (7, second)] {
            // Refcounts of one bit cannot count two.
            if at + coded.len() as u64 > host + cluster || (shared == 1 && self.shape.refcount_order == 0) {
                break;
            }
            self.store.put(at, &coded);
            let sectors = (at + coded.len() as u64 - 1) / 512 - at / 512;
            self.put64(l2 + index * 8, COMPRESSED | sectors << (62 - (self.shape.cluster_bits - 8)) | at);
            at += coded.len() as u64;
            shared += 1;
        }
        self.store.put(host + cluster - 1, &[0]);
        self.refcounts[(host / cluster) as usize] = shared;
        let mut l2_flag = COPIED;
        let snapshots = if self.shape.snapshot && self.shape.refcount_order > 1 { self.snapshot(l1, l2, l1_entries) } else { 0 };
        if snapshots != 0 {
            // Everything that the L2 table refers to, and itself, is shared.
            l2_flag = 0;
            let used = self.refcounts.len();
            let table = self.store.get(l2, (l2_entries * 8) as usize);
            for (index, entry) in table.chunks_exact(8).enumerate() {
                let entry = u64::from_be_bytes(entry.try_into().unwrap_or_default());
                let host = if entry & COMPRESSED != 0 {
                    entry & ((1 << (62 - (self.shape.cluster_bits - 8))) - 1)
                } else {
                    entry & 0x00ff_ffff_ffff_fe00
                };
                if host != 0 && ((host / cluster) as usize) < used {
                    self.refcounts[(host / cluster) as usize] += 1;
                    if entry & COMPRESSED == 0 {
                        self.put64(l2 + index as u64 * 8, entry & !COPIED);
                    }
                }
            }
            self.refcounts[(l2 / cluster) as usize] += 1;
        }
        self.put64(l1, l2 | l2_flag);
        let bitmaps = if self.shape.bitmap { self.bitmap() } else { 0 };
        self.header(reftable, l1, l1_entries, snapshots, bitmaps);
        // The refcounts, in bits from the least significant of each byte up.
        let width = 1u64 << self.shape.refcount_order;
        for (number, count) in self.refcounts.clone().into_iter().enumerate() {
            let bit = number as u64 * width;
            if width >= 8 {
                self.store.put(refblock + bit / 8, &count.to_be_bytes()[8 - width as usize / 8..]);
            } else {
                let old = self.store.get(refblock + bit / 8, 1)[0];
                self.store.put(refblock + bit / 8, &[old | (count.min((1 << width) - 1) as u8) << (bit % 8)]);
            }
        }
        let entries = self.refcounts.len() as u64 + 3;
        self.table(refblock, entries * width.max(8) / 8, (width / 8).max(1) as usize);
        let end = self.refcounts.len() as u64 * cluster;
        if formats::store::Store::len(&self.store).unwrap_or(0) < end {
            self.store.put(end - 1, &[0]);
        }
    }

    /// A snapshot of everything. Returns where the snapshot table is.
    fn snapshot(&mut self, l1: u64, l2: u64, l1_entries: u64) -> u64 {
        let copy = self.take(1);
        self.table(copy, l1_entries, 8);
        self.put64(copy, l2);
        let table = self.take(1);
        let _ = l1;
        let mut entry = vec![0; 40 + 24];
        entry[..8].copy_from_slice(&copy.to_be_bytes());
        entry[8..12].copy_from_slice(&(l1_entries as u32).to_be_bytes());
        entry[12..14].copy_from_slice(&1u16.to_be_bytes());
        entry[14..16].copy_from_slice(&4u16.to_be_bytes());
        entry[36..40].copy_from_slice(&24u32.to_be_bytes());
        entry[48..56].copy_from_slice(&self.shape.size.to_be_bytes());
        entry.extend(b"1snap\0\0\0");
        self.store.put(table, &entry);
        self.table(table, 8, 8);
        table
    }

    /// A persistent bitmap with one cluster of bits. Returns where the directory is.
    fn bitmap(&mut self) -> u64 {
        let bits = self.take(1);
        self.store.put(bits, &[0x55; 64]);
        let table = self.take(1);
        let directory = self.take(1);
        self.put64(table, bits);
        self.table(table, 1, 8);
        let mut entry = vec![0; 24];
        entry[..8].copy_from_slice(&table.to_be_bytes());
        // One table entry, type 1, granularity 64 KiB, a name of four bytes.
        entry[8..12].copy_from_slice(&1u32.to_be_bytes());
        entry[16] = 1;
        entry[17] = 16;
        entry[18..20].copy_from_slice(&4u16.to_be_bytes());
        entry.extend(b"bits\0\0\0\0");
        self.store.put(directory, &entry);
        self.table(directory, 4, 8);
        directory
    }

    fn header(&mut self, reftable: u64, l1: u64, l1_entries: u64, snapshots: u64, bitmaps: u64) {
        let shape = &self.shape;
        let mut header = vec![0; 104];
        header[..4].copy_from_slice(b"QFI\xfb");
        header[4..8].copy_from_slice(&shape.version.to_be_bytes());
        header[20..24].copy_from_slice(&shape.cluster_bits.to_be_bytes());
        header[24..32].copy_from_slice(&shape.size.to_be_bytes());
        header[36..40].copy_from_slice(&(l1_entries as u32).to_be_bytes());
        header[40..48].copy_from_slice(&l1.to_be_bytes());
        header[48..56].copy_from_slice(&reftable.to_be_bytes());
        header[56..60].copy_from_slice(&1u32.to_be_bytes());
        header[60..64].copy_from_slice(&u32::from(snapshots != 0).to_be_bytes());
        header[64..72].copy_from_slice(&snapshots.to_be_bytes());
        if shape.version == 2 {
            header.truncate(72);
        } else {
            header[72..80].copy_from_slice(&(u64::from(shape.zstd) << 3).to_be_bytes());
            header[80..88].copy_from_slice(&u64::from(shape.lazy).to_be_bytes());
            header[88..96].copy_from_slice(&u64::from(bitmaps != 0).to_be_bytes());
            header[96..100].copy_from_slice(&shape.refcount_order.to_be_bytes());
            header[100..104].copy_from_slice(&112u32.to_be_bytes());
            header.extend([u8::from(shape.zstd), 0, 0, 0, 0, 0, 0, 0]);
        }
        if bitmaps != 0 {
            header.extend(0x2385_2875u32.to_be_bytes());
            header.extend(24u32.to_be_bytes());
            header.extend([0, 0, 0, 1, 0, 0, 0, 0]);
            header.extend(32u64.to_be_bytes());
            header.extend(bitmaps.to_be_bytes());
        }
        if shape.backing {
            header.extend(0xe279_2acau32.to_be_bytes());
            header.extend(3u32.to_be_bytes());
            header.extend(b"raw\0\0\0\0\0");
            header.extend([0; 8]);
            let at = header.len() as u64;
            header.extend(b"base");
            header[8..16].copy_from_slice(&at.to_be_bytes());
            header[16..20].copy_from_slice(&4u32.to_be_bytes());
        } else {
            header.extend([0; 8]);
        }
        self.store.put(0, &header);
        self.telling.extend([self.shape.size, l1_entries, 1, self.shape.cluster_bits.into()]);
    }

    fn damage(&self, input: &mut Input<'_>) {
        let cluster = self.cluster();
        let (at, width) = match input.u8() % 8 {
            0 | 1 => input.choose(FIELDS),
            2..7 => {
                let (at, entries, width) = input.choose(&self.tables);
                (at + input.below(entries) * width as u64, width)
            }
            // Anywhere.
            _ => (input.below(self.refcounts.len() as u64 * cluster), input.choose(&[1, 2, 4, 8])),
        };
        let old = self.store.get(at, width).iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
        let value = match input.u8() % 8 {
            0 => old ^ 1 << (input.u8() % 64),
            1 => old.wrapping_add(cluster),
            2 => old.wrapping_sub(cluster),
            3 => old.wrapping_add(1),
            4 => 0,
            // Flags on a place that means something.
            5 => input.choose(&self.telling) | COPIED,
            6 => input.choose(&self.telling) | COMPRESSED | input.below(4) << 60 | u64::from(input.u8()),
            _ => input.telling(&self.telling),
        };
        self.store.put(at, &value.to_be_bytes()[8 - width..]);
    }
}

fn maker(input: &mut Input<'_>) -> Maker {
    let shape = Shape::choose(input);
    let mut maker = Maker { shape, store: Sparse::default(), refcounts: Vec::new(), tables: Vec::new(), telling: Vec::new() };
    maker.make();
    maker
}

/// A valid image of a kind that `input` chooses.
pub fn valid(input: &mut Input<'_>) -> Arc<Sparse> {
    Arc::new(maker(input).store)
}

/// A valid image of a kind that `input` chooses, damaged as it says; and whether it is still in order.
pub fn damaged(input: &mut Input<'_>) -> (Arc<Sparse>, bool) {
    let maker = maker(input);
    let mut valid = true;
    let count = input.below(MAX_DAMAGE + 1);
    for _ in 0..count {
        maker.damage(input);
        valid = false;
    }
    if input.u8() % 32 == 1 {
        let len = input.below(maker.refcounts.len() as u64 * maker.cluster());
        valid = false;
        let _ = formats::store::Store::set_len(&maker.store, len);
    }
    (Arc::new(maker.store), valid)
}
