//! Decoding tables of deflate's prefix codes (RFC 1951, 3.2).

/// What an entry of a table means, after its bits were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Symbol {
    /// A byte.
    Literal(u8),
    /// A match length or distance: `base` plus the next `extra` bits.
    Run {
        /// The smallest value.
        base: u16,
        /// How many bits follow that are added to it.
        extra: u8,
    },
    /// The end of the block.
    End,
    /// No code has these bits.
    Invalid,
}

/// Longest code in bits.
pub(super) const MAX_CODE: usize = 15;

const KIND_LITERAL: u32 = 0;
const KIND_RUN: u32 = 1 << 12;
const KIND_END: u32 = 2 << 12;
const KIND_INVALID: u32 = 3 << 12;
const KIND_DEEPER: u32 = 4 << 12;
const KINDS: u32 = 7 << 12;

/// A packed entry: bits 0–7 the length of the code, 8–11 the extra bits, 12–14 the kind, 16–31 the value.
#[derive(Clone, Copy)]
pub(super) struct Entry(u32);

impl Entry {
    pub(super) fn code_len(self) -> u32 {
        self.0 & 0xff
    }

    pub(super) fn is_literal(self) -> bool {
        self.0 & KINDS == KIND_LITERAL
    }

    pub(super) fn literal(self) -> u8 {
        (self.0 >> 16) as u8
    }

    pub(super) fn symbol(self) -> Symbol {
        match self.0 & KINDS {
            KIND_LITERAL => Symbol::Literal(self.literal()),
            KIND_RUN => Symbol::Run { base: (self.0 >> 16) as u16, extra: ((self.0 >> 8) & 15) as u8 },
            KIND_END => Symbol::End,
            _ => Symbol::Invalid,
        }
    }
}

/// A table for one code: looked up by the next `FIRST` bits, and by those after them where the code is longer.
pub(super) struct Table<const FIRST: usize> {
    first: Vec<u32>,
    deeper: Vec<u32>,
}

impl<const FIRST: usize> Table<FIRST> {
    pub(super) fn new() -> Self {
        Self { first: vec![KIND_INVALID; 1 << FIRST], deeper: Vec::new() }
    }

    /// Fills the table for the code whose symbols have the lengths `lens`; `meaning` gives each symbol's entry without length. Refuses codes that do not fill
    /// the space of codes exactly, but for those with one symbol or none, as zlib does. Returns false then.
    pub(super) fn build(&mut self, lens: &[u8], meaning: impl Fn(usize) -> u32) -> bool {
        let mut counts = [0_u32; MAX_CODE + 1];
        for len in lens {
            match counts.get_mut(usize::from(*len)) {
                Some(count) => *count += 1,
                None => return false,
            }
        }
        counts[0] = 0;
        let mut next = [0_u32; MAX_CODE + 2];
        for len in 1..=MAX_CODE {
            next[len + 1] = (next[len] + counts[len]) << 1;
            if next[len] + counts[len] > 1 << len {
                return false;
            }
        }
        let complete = next[MAX_CODE + 1] == 2 << MAX_CODE;
        let used: u32 = counts.iter().sum();
        let single = used == 0 || (used == 1 && counts[1] == 1);
        if !(complete || single) {
            return false;
        }
        self.first.fill(KIND_INVALID | 1);
        self.deeper.clear();
        for (symbol, len) in lens.iter().enumerate().filter(|(_, len)| **len > 0) {
            let len = usize::from(*len);
            let code = next[len];
            next[len] += 1;
            let reversed = (code.reverse_bits() >> (32 - len)) as usize;
            self.place(reversed, len, meaning(symbol) | len as u32);
        }
        true
    }

    /// Puts an entry wherever the next bits begin with the code `reversed` (first bit lowest) of `len` bits.
    fn place(&mut self, reversed: usize, len: usize, entry: u32) {
        if len <= FIRST {
            for slot in self.first.iter_mut().skip(reversed).step_by(1 << len) {
                *slot = entry;
            }
            return;
        }
        let deeper_bits = MAX_CODE - FIRST;
        let (prefix, rest) = (reversed & ((1 << FIRST) - 1), reversed >> FIRST);
        let Some(slot) = self.first.get_mut(prefix) else { return };
        if *slot & KINDS != KIND_DEEPER {
            *slot = KIND_DEEPER | ((self.deeper.len() as u32) << 16);
            self.deeper.resize(self.deeper.len() + (1 << deeper_bits), KIND_INVALID | 1);
        }
        let start = (*slot >> 16) as usize;
        let table = self.deeper.get_mut(start..start + (1 << deeper_bits)).unwrap_or_default();
        for slot in table.iter_mut().skip(rest).step_by(1 << (len - FIRST)) {
            *slot = entry;
        }
    }

    /// The entry for the code that the lowest bits of `bits` begin with.
    #[inline]
    pub(super) fn find(&self, bits: u64) -> Entry {
        let entry = self.first.get(bits as usize & ((1 << FIRST) - 1)).copied().unwrap_or(KIND_INVALID);
        if entry & KINDS != KIND_DEEPER {
            return Entry(entry);
        }
        let rest = (bits >> FIRST) as usize & ((1 << (MAX_CODE - FIRST)) - 1);
        Entry(self.deeper.get((entry >> 16) as usize + rest).copied().unwrap_or(KIND_INVALID))
    }
}

/// Entries of the literal and length alphabet, without code length.
pub(super) fn literal_or_length(symbol: usize) -> u32 {
    const BASE: [u16; 29] =
        [3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258];
    const EXTRA: [u8; 29] = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];
    match symbol {
        0..=255 => KIND_LITERAL | (symbol as u32) << 16,
        256 => KIND_END,
        _ => run(&BASE, &EXTRA, symbol - 257),
    }
}

/// Entries of the distance alphabet, without code length.
pub(super) fn distance(symbol: usize) -> u32 {
    const BASE: [u16; 30] = [
        1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289,
        16385, 24577,
    ];
    const EXTRA: [u8; 30] = [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13];
    run(&BASE, &EXTRA, symbol)
}

/// Entries of the alphabet of code lengths, without code length.
pub(super) fn code_length(symbol: usize) -> u32 {
    KIND_LITERAL | (symbol as u32) << 16
}

fn run(base: &[u16], extra: &[u8], at: usize) -> u32 {
    match (base.get(at), extra.get(at)) {
        (Some(base), Some(extra)) => KIND_RUN | u32::from(*extra) << 8 | u32::from(*base) << 16,
        _ => KIND_INVALID,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fixed_code_decodes() {
        let mut lens = [8_u8; 288];
        lens[144..256].fill(9);
        lens[256..280].fill(7);
        let mut table = Table::<11>::new();
        assert!(table.build(&lens, literal_or_length));
        let end = table.find(0);
        assert_eq!((end.symbol(), end.code_len()), (Symbol::End, 7));
        // 'A' is 0x30 + 0x41 in eight bits, first bit first.
        let a = table.find(u64::from(0x71_u8.reverse_bits()));
        assert_eq!((a.symbol(), a.code_len()), (Symbol::Literal(b'A'), 8));
    }

    #[test]
    fn long_codes_use_the_second_table() {
        // One code of each length 1 to 14, two of 15: complete.
        let lens: Vec<u8> = (1..=15).chain([15]).collect();
        let mut table = Table::<9>::new();
        assert!(table.build(&lens, code_length));
        for (symbol, len) in lens.iter().enumerate() {
            let bits = if symbol == 15 { 0x7fff } else { (1_u64 << symbol) - 1 };
            let found = table.find(bits);
            assert_eq!((found.symbol(), found.code_len()), (Symbol::Literal(symbol as u8), u32::from(*len)));
        }
    }

    #[test]
    fn codes_that_do_not_fit_are_refused() {
        let mut table = Table::<9>::new();
        assert!(!table.build(&[1, 1, 1], code_length), "too many codes");
        assert!(!table.build(&[2, 2, 2], code_length), "a gap");
        assert!(!table.build(&[2], code_length), "one code, but not of one bit");
        assert!(table.build(&[0, 1], code_length));
        assert_eq!(table.find(1).symbol(), Symbol::Invalid);
        assert!(table.build(&[0, 0], code_length));
    }
}
