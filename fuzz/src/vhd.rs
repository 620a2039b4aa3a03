//! Small valid VHD images, and damage to their fields with checksums that fit again.
//!
//! The layout is Microsoft's "Virtual Hard Disk Image Format Specification", 2006; nothing here knows the code under test.

use super::input::Input;
use super::sparse::Sparse;
use std::sync::Arc;

const MAX_DAMAGE: u64 = 6;
const HEADER_AT: u64 = 512;
const TABLE_AT: u64 = 1536;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Fixed,
    Dynamic,
    Differencing,
}

struct Maker {
    store: Sparse,
    kind: Kind,
    size: u64,
    block: u64,
    end: u64,
    fields: Vec<(u64, usize)>,
    telling: Vec<u64>,
    footers: Vec<u64>,
}

fn seal(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let sum = !bytes.iter().map(|b| u32::from(*b)).fold(0u32, u32::wrapping_add);
    bytes[at..at + 4].copy_from_slice(&sum.to_be_bytes());
}

impl Maker {
    fn new(input: &mut Input<'_>) -> Self {
        let flags = input.u8();
        let kind = [Kind::Dynamic, Kind::Differencing, Kind::Dynamic, Kind::Fixed][usize::from(flags % 4)];
        // Common are 2 MiB; smaller ones leave room for more of them.
        let block = input.choose(&[4096, 4096, 1 << 16, 1 << 19]);
        let size = if kind == Kind::Fixed { 20 * 512 } else { (40 * block).min(1 << 20) };
        let size = if flags & 4 != 0 { size + 512 } else { size };
        let mut maker = Self {
            store: Sparse::default(),
            kind,
            size,
            block,
            end: 0,
            fields: Vec::new(),
            telling: vec![512, 1536, size, block, size / block.max(1)],
            footers: Vec::new(),
        };
        match kind {
            Kind::Fixed => {
                maker.store.put(0, &vec![0x61; size as usize / 2]);
                maker.end = size;
            }
            _ => maker.blocks(input),
        }
        if flags & 8 == 0 || kind == Kind::Fixed {
            maker.footer(maker.end);
            maker.end += 512;
        }
        let _ = formats::store::Store::set_len(&maker.store, maker.end);
        maker
    }

    fn footer(&mut self, at: u64) {
        let mut bytes = vec![0; 512];
        bytes[..8].copy_from_slice(b"conectix");
        bytes[11] = 2;
        bytes[13] = 1;
        let data: u64 = if self.kind == Kind::Fixed { u64::MAX } else { HEADER_AT };
        bytes[16..24].copy_from_slice(&data.to_be_bytes());
        bytes[24..28].copy_from_slice(&700_000_000u32.to_be_bytes());
        bytes[28..32].copy_from_slice(b"win ");
        bytes[36..40].copy_from_slice(b"Wi2k");
        bytes[40..48].copy_from_slice(&self.size.to_be_bytes());
        bytes[48..56].copy_from_slice(&self.size.to_be_bytes());
        bytes[56..60].copy_from_slice(&[0, 100, 4, 17]);
        bytes[63] = match self.kind {
            Kind::Fixed => 2,
            Kind::Dynamic => 3,
            Kind::Differencing => 4,
        };
        bytes[68..84].fill(0x11);
        seal(&mut bytes, 64);
        self.store.put(at, &bytes);
        self.footers.push(at);
        for (field, width) in [(8, 4), (12, 4), (16, 8), (28, 4), (40, 8), (48, 8), (56, 2), (58, 1), (59, 1), (60, 4), (64, 4), (84, 1)] {
            self.fields.push((at + field, width));
        }
    }

    fn blocks(&mut self, input: &mut Input<'_>) {
        self.footer(0);
        let entries = self.size.div_ceil(self.block);
        self.end = TABLE_AT + (entries * 4).next_multiple_of(512);
        let mut header = vec![0; 1024];
        header[..8].copy_from_slice(b"cxsparse");
        header[8..16].fill(0xff);
        header[16..24].copy_from_slice(&TABLE_AT.to_be_bytes());
        header[25] = 1;
        header[28..32].copy_from_slice(&(entries as u32).to_be_bytes());
        header[32..36].copy_from_slice(&(self.block as u32).to_be_bytes());
        for (field, width) in [(16, 8), (24, 4), (28, 4), (32, 4), (36, 4), (64, 8), (576, 4), (580, 4), (584, 4), (592, 8), (600, 8)] {
            self.fields.push((HEADER_AT + field, width));
        }
        if self.kind == Kind::Differencing {
            header[40..56].fill(0x22);
            header[56..60].copy_from_slice(&700_000_000u32.to_be_bytes());
            header[64..72].copy_from_slice(b"\0b\0a\0s\0e");
            header[576..580].copy_from_slice(b"W2ru");
            header[580..584].copy_from_slice(&512u32.to_be_bytes());
            header[584..588].copy_from_slice(&8u32.to_be_bytes());
            header[592..600].copy_from_slice(&self.end.to_be_bytes());
            self.store.put(self.end, b"b\0a\0s\0e\0");
            self.end += 512;
        }
        seal(&mut header, 36);
        self.store.put(HEADER_AT, &header);
        self.store.put(TABLE_AT, &vec![0xff; (entries * 4).next_multiple_of(512) as usize]);
        let bitmap = (self.block / 512).div_ceil(8).next_multiple_of(512);
        for index in [2, 0, 3].into_iter().filter(|index| *index < entries) {
            self.store.put(TABLE_AT + index * 4, &((self.end / 512) as u32).to_be_bytes());
            self.telling.push(self.end / 512);
            let bits = if index == 0 { 0xff } else { input.u8() | 1 };
            self.store.put(self.end, &vec![bits; bitmap as usize]);
            for sector in 0..(self.block / 512).min(16) {
                self.store.put(self.end + bitmap + sector * 512, &[0x40 + index as u8; 512]);
            }
            self.fields.push((self.end, 8));
            self.end += bitmap + self.block;
        }
        self.telling.push(self.end / 512);
        for index in 0..entries.min(6) {
            // Three times as likely as others.
            self.fields.extend([(TABLE_AT + index * 4, 4); 3]);
        }
    }

    fn damage(&self, input: &mut Input<'_>) {
        let (at, width) = match input.u8() % 8 {
            0..7 => input.choose(&self.fields),
            _ => (input.below(self.end), input.choose(&[1, 4, 8])),
        };
        let old = self.store.get(at, width).iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
        let value = match input.u8() % 8 {
            0 => old ^ 1 << (input.u8() % 64),
            1 => old.wrapping_add(1),
            2 => old.wrapping_sub(1),
            3 => old << 1,
            4 => u64::MAX,
            5 => input.choose(&self.telling),
            _ => input.telling(&self.telling),
        };
        self.store.put(at, &value.to_be_bytes()[8 - width..]);
    }

    fn mend(&self) {
        let mend = |at: u64, len: usize, sum: usize| {
            let mut bytes = self.store.get(at, len);
            seal(&mut bytes, sum);
            self.store.put(at, &bytes);
        };
        self.footers.iter().for_each(|at| mend(*at, 512, 64));
        if self.kind != Kind::Fixed {
            mend(HEADER_AT, 1024, 36);
        }
    }
}

/// A valid image of a kind that `input` chooses.
pub fn valid(input: &mut Input<'_>) -> Arc<Sparse> {
    let maker = Maker::new(input);
    maker.mend();
    Arc::new(maker.store)
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
