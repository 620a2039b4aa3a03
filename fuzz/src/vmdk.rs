//! Small valid VMDK images, each a hosted sparse extent with its descriptor, and damage to their fields.
//!
//! The layout is that of "Virtual Disk Format 5.0", VMware 2011; nothing here knows the code under test.

use super::input::Input;
use super::sparse::Sparse;
use std::sync::Arc;

const MAX_DAMAGE: u64 = 6;
const SECTOR: u64 = 512;
/// Sectors of a grain.
const GRAIN: u64 = 8;
const DESCRIPTOR_AT: u64 = 1;
const DIRECTORY_AT: u64 = 4;
const COPY_AT: u64 = 3;

struct Maker {
    store: Sparse,
    end: u64,
    fields: Vec<(u64, usize)>,
    telling: Vec<u64>,
}

impl Maker {
    fn new(input: &mut Input<'_>) -> Self {
        let flags = input.u8();
        let (zeroed, redundant, child) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
        let per_table = input.choose(&[8, 16, 8, 512]);
        let sectors = 40 * GRAIN + if flags & 8 != 0 { 3 } else { 0 };
        let grains = sectors.div_ceil(GRAIN);
        let tables = grains.div_ceil(per_table);
        let mut maker =
            Self { store: Sparse::default(), end: 0, fields: Vec::new(), telling: vec![GRAIN, grains, tables, sectors, per_table] };
        let table_len = (per_table * 4).div_ceil(SECTOR);
        // Some tables are not there.
        let absent = if flags & 16 != 0 { input.u8() } else { 0 };
        let mut next = DIRECTORY_AT + 1;
        let mut places = Vec::new();
        for number in 0..tables {
            if absent >> (number % 8) & 1 == 1 {
                places.push(None);
                continue;
            }
            let copy = next + table_len;
            places.push(Some([next, copy]));
            for (directory, table) in [(DIRECTORY_AT, next), (COPY_AT, copy)] {
                maker.le32(directory * SECTOR + number * 4, table);
            }
            maker.telling.push(next);
            next += 2 * table_len;
        }
        // Grains where they belong, or a little behind.
        let overhead = next.next_multiple_of(GRAIN) + if flags & 32 != 0 { 3 } else { 0 };
        next = overhead;
        for index in [5, 0, 1, 30, 39, 9, 6].into_iter().filter(|index| *index < grains) {
            let Some([table, copy]) = places[(index / per_table) as usize] else { continue };
            let entry = if zeroed && index == 9 { 1 } else { next };
            for table in [table, copy] {
                maker.le32(table * SECTOR + index % per_table * 4, entry);
            }
            if entry == next {
                maker.store.put(next * SECTOR, &[0x40 + index as u8; (GRAIN * SECTOR) as usize]);
                maker.telling.push(next);
                next += GRAIN;
            }
        }
        maker.end = next * SECTOR;
        maker.header(sectors, per_table, overhead, u64::from(zeroed) << 2 | u64::from(redundant) << 1 | 1);
        let parent = if child { "parentCID=01234567\nparentFileNameHint=\"base\"" } else { "parentCID=ffffffff" };
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=5a3c1e00\n{parent}\ncreateType=\"monolithicSparse\"\nRW {sectors} SPARSE \"image\"\nddb.adapterType=\"ide\"\n"
        );
        maker.store.put(DESCRIPTOR_AT * SECTOR, text.as_bytes());
        maker.fields.extend((0..text.len() as u64 / 8).map(|n| (DESCRIPTOR_AT * SECTOR + n * 8, 8)));
        // Those of the tables three times as likely.
        for _ in 0..3 {
            maker.fields.extend((0..tables).flat_map(|n| [(DIRECTORY_AT * SECTOR + n * 4, 4), (COPY_AT * SECTOR + n * 4, 4)]));
            for [table, copy] in places.iter().flatten() {
                maker.fields.extend((0..per_table.min(8)).flat_map(|n| [(table * SECTOR + n * 4, 4), (copy * SECTOR + n * 4, 4)]));
            }
        }
        let _ = formats::store::Store::set_len(&maker.store, maker.end);
        maker
    }

    fn le32(&self, at: u64, value: u64) {
        self.store.put(at, &(value as u32).to_le_bytes());
    }

    fn header(&mut self, sectors: u64, per_table: u64, overhead: u64, flags: u64) {
        let mut bytes = vec![0; SECTOR as usize];
        bytes[..4].copy_from_slice(b"KDMV");
        let fields: [(u64, usize, u64); 10] = [
            (4, 4, if flags & 4 != 0 { 2 } else { 1 }),
            (8, 4, flags),
            (12, 8, sectors),
            (20, 8, GRAIN),
            (28, 8, DESCRIPTOR_AT),
            (36, 8, 2),
            (44, 4, per_table),
            (48, 8, COPY_AT),
            (56, 8, DIRECTORY_AT),
            (64, 8, overhead),
        ];
        for (at, width, value) in fields {
            bytes[at as usize..at as usize + width].copy_from_slice(&value.to_le_bytes()[..width]);
            self.fields.push((at, width));
        }
        bytes[73..77].copy_from_slice(b"\n \r\n");
        self.fields.extend([(72, 8), (77, 2)]);
        self.store.put(0, &bytes);
        self.telling.push(overhead);
    }

    fn damage(&self, input: &mut Input<'_>) {
        let (at, width) = match input.u8() % 8 {
            0..7 => input.choose(&self.fields),
            _ => (input.below(self.end), input.choose(&[1, 4, 8])),
        };
        let old = self.store.get(at, width).iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
        let value = match input.u8() % 8 {
            0 => old ^ 1 << (input.u8() % 64),
            1 => old.wrapping_add(1),
            2 => old.wrapping_sub(1),
            3 => old << 1,
            4 => u64::MAX,
            5 => input.choose(&self.telling),
            _ => input.telling(&self.telling),
        };
        self.store.put(at, &value.to_le_bytes()[..width]);
    }
}

/// A valid image of a kind that `input` chooses, damaged as it says; and whether it is still in order.
pub fn damaged(input: &mut Input<'_>) -> (Arc<Sparse>, bool) {
    let maker = Maker::new(input);
    let mut valid = true;
    for _ in 0..input.below(MAX_DAMAGE + 1) {
        maker.damage(input);
        valid = false;
    }
    if input.u8() % 32 == 2 {
        valid = false;
        let _ = formats::store::Store::set_len(&maker.store, input.below(maker.end));
    }
    (Arc::new(maker.store), valid)
}
