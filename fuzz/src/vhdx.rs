//! Small valid VHDX images, with and without a log to replay; damage to their fields, and checksums that fit again.
//!
//! The layout is the specification's ([MS-VHDX]); nothing here knows the code under test.

use super::input::Input;
use super::sparse::Sparse;
use std::sync::Arc;

const MIB: u64 = 1 << 20;
const MAX_DAMAGE: u64 = 6;
const LOG_AT: u64 = MIB;
const METADATA_AT: u64 = 2 * MIB;
const BAT_AT: u64 = 3 * MIB;
const LOG_ID: [u8; 16] = [7; 16];
const LOG_SECTOR: usize = 4096;
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGIONS: [u64; 2] = [192 << 10, 256 << 10];

/// The GUIDs of [MS-VHDX] as they lie in a file.
mod id {
    pub const BAT: u128 = 0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08;
    pub const METADATA: u128 = 0x8b7c_a206_4790_4b9a_b8fe_575f_050f_886e;
    pub const PARAMETERS: u128 = 0xcaa1_6737_fa36_4d43_b3b6_33f0_aa44_e76b;
    pub const SIZE: u128 = 0x2fa5_4224_cd1b_4876_b211_5dbe_d83b_f4b8;
    pub const DISK: u128 = 0xbeca_12ab_b2e6_4523_93ef_c309_e000_c746;
    pub const LOGICAL: u128 = 0x8141_bf1d_a96f_4709_ba47_f233_a8fa_ab5f;
    pub const PHYSICAL: u128 = 0xcda3_48c7_445d_4471_9cc9_e988_5251_c556;
    pub const LOCATOR: u128 = 0xa8d3_5f2d_b30b_454d_abf7_d3d8_4834_ab0c;
    pub const LOCATOR_TYPE: u128 = 0xb04a_efb7_d19e_4a81_b789_25b8_e944_5913;

    /// Mixed endian, as Microsoft writes them.
    pub fn bytes(guid: u128) -> [u8; 16] {
        let mut bytes = guid.to_be_bytes();
        bytes[..4].reverse();
        bytes[4..6].reverse();
        bytes[6..8].reverse();
        bytes
    }
}

struct Maker {
    store: Sparse,
    sector: u64,
    parent: bool,
    fixed: bool,
    size: u64,
    end: u64,
    /// Places that mean something: offset and width.
    fields: Vec<(u64, usize)>,
    telling: Vec<u64>,
    /// Entries of the log: offset in the file, length.
    entries: Vec<(u64, u64)>,
}

impl Maker {
    fn new(input: &mut Input<'_>) -> Self {
        let flags = input.u8();
        let size = if flags & 4 != 0 { 3 * MIB } else { 2 * MIB + 8 * 4096 };
        let sector = if flags & 8 != 0 { 4096 } else { 512 };
        let parent = flags & 1 != 0;
        let mut maker = Self {
            store: Sparse::default(),
            // The parent has sectors of 512 bytes.
            sector,
            parent,
            fixed: flags & 2 != 0 && !parent,
            size,
            end: 4 * MIB,
            fields: Vec::new(),
            telling: vec![MIB, 2 * MIB, 3 * MIB, 4 * MIB, 5 * MIB, 6 * MIB, size, 512, 4096, 1 << 23],
            entries: Vec::new(),
        };
        maker.store.put(0, b"vhdxfile");
        maker.headers(flags & 16 != 0);
        maker.regions();
        maker.metadata();
        maker.blocks(flags & 32 != 0);
        let _ = formats::store::Store::set_len(&maker.store, maker.end);
        if flags & 16 != 0 {
            maker.log(input);
        }
        maker
    }

    fn field(&mut self, at: u64, width: usize) {
        self.fields.push((at, width));
    }

    fn headers(&mut self, log: bool) {
        for (copy, at) in HEADERS.into_iter().enumerate() {
            let mut header = vec![0; 4096];
            header[..4].copy_from_slice(b"head");
            header[8] = copy as u8 + 5;
            header[16..32].fill(1);
            header[32..48].fill(2);
            if log {
                header[48..64].copy_from_slice(&LOG_ID);
            }
            header[66] = 1;
            header[68..72].copy_from_slice(&(MIB as u32).to_le_bytes());
            header[72..80].copy_from_slice(&LOG_AT.to_le_bytes());
            self.store.put(at, &header);
            for (field, width) in [(0, 4), (8, 8), (48, 8), (64, 2), (66, 2), (68, 4), (72, 8)] {
                self.field(at + field, width);
            }
        }
    }

    fn regions(&mut self) {
        let mut table = vec![0; 64 << 10];
        table[..4].copy_from_slice(b"regi");
        table[8] = 2;
        for (index, (guid, at)) in [(id::METADATA, METADATA_AT), (id::BAT, BAT_AT)].into_iter().enumerate() {
            let entry = &mut table[16 + index * 32..48 + index * 32];
            entry[..16].copy_from_slice(&id::bytes(guid));
            entry[16..24].copy_from_slice(&at.to_le_bytes());
            entry[24..28].copy_from_slice(&(MIB as u32).to_le_bytes());
            entry[28] = 1;
        }
        for at in REGIONS {
            self.store.put(at, &table);
            for (field, width) in [(8, 4), (16, 8), (32, 8), (40, 4), (44, 4), (48, 8), (64, 8), (72, 4), (76, 4), (80, 8)] {
                self.field(at + field, width);
            }
        }
    }

    fn metadata(&mut self) {
        let flags = u32::from(self.parent) << 1 | u32::from(self.fixed);
        let mut items = vec![
            (id::PARAMETERS, 4, [(MIB as u32).to_le_bytes(), flags.to_le_bytes()].concat()),
            (id::SIZE, 6, self.size.to_le_bytes().to_vec()),
            (id::DISK, 6, vec![9; 16]),
            (id::LOGICAL, 6, (self.sector as u32).to_le_bytes().to_vec()),
            (id::PHYSICAL, 6, 4096u32.to_le_bytes().to_vec()),
        ];
        if self.parent {
            items.push((
                id::LOCATOR,
                4,
                locator(&[("parent_linkage", "{02020202-0202-0202-0202-020202020202}"), ("relative_path", "base")]),
            ));
        }
        let mut table = vec![0; 1024];
        table[..8].copy_from_slice(b"metadata");
        table[10] = items.len() as u8;
        self.field(METADATA_AT + 10, 2);
        let mut at = 64u64 << 10;
        for (index, (guid, flags, value)) in items.into_iter().enumerate() {
            let here = 32 + index * 32;
            let entry = &mut table[here..here + 32];
            entry[..16].copy_from_slice(&id::bytes(guid));
            entry[16..20].copy_from_slice(&(at as u32).to_le_bytes());
            entry[20..24].copy_from_slice(&(value.len() as u32).to_le_bytes());
            entry[24] = flags;
            for (field, width) in [(0, 8), (16, 4), (20, 4), (24, 4)] {
                self.field(METADATA_AT + here as u64 + field, width);
            }
            self.store.put(METADATA_AT + at, &value);
            for field in (0..value.len() as u64).step_by(4) {
                self.field(METADATA_AT + at + field, 4);
            }
            at += value.len().next_multiple_of(8) as u64;
        }
        self.store.put(METADATA_AT, &table);
    }

    fn blocks(&mut self, more: bool) {
        let chunk = (MIB << 3) * self.sector / MIB;
        let mut entry = |index: u64, value: u64| {
            self.store.put(BAT_AT + index * 8, &value.to_le_bytes());
            self.fields.push((BAT_AT + index * 8, 8));
        };
        let present = if self.fixed { 3 } else { 1 + u64::from(more) };
        for block in 0..self.size.div_ceil(MIB) {
            let partial = self.parent && block == 0;
            if block >= present {
                entry(block, [0, 1, 2, 3][block as usize % 4]);
                continue;
            }
            entry(block, self.end | if partial { 7 } else { 6 });
            self.store.put(self.end + block * 999, &[0x30 + block as u8; 5000]);
            self.end += MIB;
        }
        if self.parent {
            entry(chunk, self.end | 6);
            self.store.put(self.end, &[0x0f; 40]);
            self.end += MIB;
        }
    }

    /// One entry or two that change the table and the metadata, and make zeros.
    fn log(&mut self, input: &mut Input<'_>) {
        let mut at = LOG_AT;
        let first = 3u64;
        for sequence in first..first + 1 + u64::from(input.u8() & 1) {
            let bat = self.store.get(BAT_AT, LOG_SECTOR);
            let descriptors: [(bool, u64); 2] = [(true, BAT_AT), (false, 4 * MIB + 4096)];
            let mut entry = vec![0; 2 * LOG_SECTOR];
            entry[..4].copy_from_slice(b"loge");
            entry[8..12].copy_from_slice(&(2 * LOG_SECTOR as u32).to_le_bytes());
            // The tail is the first entry, at the start of the log.
            entry[16..24].copy_from_slice(&sequence.to_le_bytes());
            entry[24] = 2;
            entry[32..48].copy_from_slice(&LOG_ID);
            entry[48..56].copy_from_slice(&self.end.to_le_bytes());
            entry[56..64].copy_from_slice(&self.end.to_le_bytes());
            for (index, (data, to)) in descriptors.into_iter().enumerate() {
                let here = 64 + index * 32;
                entry[here..here + 4].copy_from_slice(if data { b"desc" } else { b"zero" });
                if data {
                    entry[here + 4..here + 8].copy_from_slice(&bat[LOG_SECTOR - 4..]);
                    entry[here + 8..here + 16].copy_from_slice(&bat[..8]);
                } else {
                    entry[here + 8..here + 16].copy_from_slice(&4096u64.to_le_bytes());
                }
                entry[here + 16..here + 24].copy_from_slice(&to.to_le_bytes());
                entry[here + 24..here + 32].copy_from_slice(&sequence.to_le_bytes());
                for (field, width) in [(0, 4), (4, 4), (8, 8), (16, 8), (24, 8)] {
                    self.field(at + here as u64 + field, width);
                }
            }
            entry[LOG_SECTOR..].copy_from_slice(&bat);
            entry[LOG_SECTOR..LOG_SECTOR + 4].copy_from_slice(b"data");
            entry[LOG_SECTOR + 4..LOG_SECTOR + 8].copy_from_slice(&((sequence >> 32) as u32).to_le_bytes());
            entry[2 * LOG_SECTOR - 4..].copy_from_slice(&(sequence as u32).to_le_bytes());
            self.store.put(at, &entry);
            for (field, width) in [(8, 4), (12, 4), (16, 8), (24, 4), (32, 8), (48, 8), (56, 8)] {
                self.field(at + field, width);
            }
            for field in 0..4 {
                self.field(at + LOG_SECTOR as u64 + 8 * (field + 1), 8);
            }
            self.entries.push((at, entry.len() as u64));
            at += entry.len() as u64;
        }
    }

    fn damage(&self, input: &mut Input<'_>) {
        let (at, width) = match input.u8() % 8 {
            0..7 => input.choose(&self.fields),
            _ => (input.below(self.end), input.choose(&[1, 4, 8])),
        };
        let old = self.store.get(at, width).iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
        let value = match input.u8() % 8 {
            0 => old ^ 1 << (input.u8() % 64),
            1 => old.wrapping_add(MIB),
            2 => old.wrapping_sub(MIB),
            3 => old.wrapping_add(1),
            4 => 0,
            // A place and a state of a block.
            5 => input.choose(&self.telling) | u64::from(input.u8() % 8),
            _ => input.telling(&self.telling),
        };
        self.store.put(at, &value.to_le_bytes()[..width]);
    }

    fn mend(&self) {
        for (at, len) in
            HEADERS.map(|at| (at, 4096)).into_iter().chain(REGIONS.map(|at| (at, 64 << 10))).chain(self.entries.iter().copied())
        {
            // What a log entry says of its own length counts.
            let said = u64::from(u32::from_le_bytes(self.store.get(at + 8, 4).try_into().unwrap_or_default()));
            let len = if at >= LOG_AT && said > 64 && said <= MIB { said } else { len };
            let mut bytes = self.store.get(at, len as usize);
            bytes[4..8].fill(0);
            self.store.put(at + 4, &crc32c::crc32c(&bytes).to_le_bytes());
        }
    }
}

fn locator(entries: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = id::bytes(id::LOCATOR_TYPE).to_vec();
    bytes.extend([0, 0, entries.len() as u8, 0]);
    let mut texts = Vec::new();
    for (key, value) in entries {
        let mut places = Vec::new();
        for text in [key, value] {
            let units: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
            places.push(((20 + entries.len() * 12 + texts.len()) as u32, units.len() as u16));
            texts.extend(units);
        }
        places.iter().for_each(|(at, _)| bytes.extend(at.to_le_bytes()));
        places.iter().for_each(|(_, len)| bytes.extend(len.to_le_bytes()));
    }
    bytes.extend(texts);
    bytes
}

/// A valid image of a kind that `input` chooses, damaged as it says; and whether it is still in order.
pub fn damaged(input: &mut Input<'_>) -> (Arc<Sparse>, bool) {
    let maker = Maker::new(input);
    let mut valid = true;
    let count = input.below(MAX_DAMAGE + 1);
    for _ in 0..count {
        maker.damage(input);
        valid = false;
    }
    let last = input.u8();
    if valid || last % 16 != 1 {
        maker.mend();
    }
    if last % 32 == 2 {
        valid = false;
        let _ = formats::store::Store::set_len(&maker.store, input.below(maker.end));
    }
    (Arc::new(maker.store), valid)
}
