//! Bit-exact splicing of streams: bits are appended to a byte vector in the order that the codec reads them.

/// Appends bits least significant first, as deflate packs them.
pub(super) struct LsbWriter<'a> {
    out: &'a mut Vec<u8>,
    held: u64,
    count: u32,
}

impl<'a> LsbWriter<'a> {
    pub(super) fn new(out: &'a mut Vec<u8>) -> Self {
        Self { out, held: 0, count: 0 }
    }

    /// Appends the low `count` (at most 32) bits of `bits`.
    pub(super) fn put(&mut self, bits: u32, count: u32) {
        let bits = u64::from(bits) & ((1_u64 << count) - 1);
        self.held |= bits << self.count;
        self.count += count;
        while self.count >= 8 {
            self.out.push(self.held as u8);
            self.held >>= 8;
            self.count -= 8;
        }
    }

    /// Appends `len` bits of `from`, starting with bit `at`.
    pub(super) fn put_run(&mut self, from: &[u8], at: u64, len: u64) {
        for bit in at..at + len {
            let byte = from.get((bit / 8) as usize).copied().unwrap_or(0);
            self.put(u32::from(byte >> (bit % 8)), 1);
        }
    }

    /// Ends in the middle of a byte: the bits of the last, unfinished byte, and how many they are.
    pub(super) fn into_partial(self) -> (u8, u32) {
        (self.held as u8, self.count)
    }

    /// Ends with the last byte filled up with zeros.
    pub(super) fn finish(self) {
        if self.count > 0 {
            self.out.push(self.held as u8);
        }
    }
}

/// Appends bits most significant first, as bzip2 packs them.
pub(super) struct MsbWriter<'a> {
    out: &'a mut Vec<u8>,
    held: u64,
    count: u32,
}

impl<'a> MsbWriter<'a> {
    pub(super) fn new(out: &'a mut Vec<u8>) -> Self {
        Self { out, held: 0, count: 0 }
    }

    /// Appends the low `count` (at most 48) bits of `bits`.
    pub(super) fn put(&mut self, bits: u64, count: u32) {
        let bits = bits & ((1_u64 << count) - 1);
        self.held = (self.held << count) | bits;
        self.count += count;
        while self.count >= 8 {
            self.count -= 8;
            self.out.push((self.held >> self.count) as u8);
        }
    }

    /// Appends `len` bits of `from`, starting with bit `at` (0 is the highest of the first byte).
    pub(super) fn put_run(&mut self, from: &[u8], at: u64, len: u64) {
        let get = |bit: u64| u64::from(from.get((bit / 8) as usize).copied().unwrap_or(0));
        let (mut bit, end) = (at, at + len);
        while bit < end && bit % 8 != 0 {
            self.put(get(bit) >> (7 - bit % 8), 1);
            bit += 1;
        }
        while end - bit >= 8 {
            self.put(get(bit), 8);
            bit += 8;
        }
        while bit < end {
            self.put(get(bit) >> (7 - bit % 8), 1);
            bit += 1;
        }
    }

    /// Ends with the last byte filled up with zeros.
    pub(super) fn finish(mut self) {
        if self.count > 0 {
            self.put(0, 8 - self.count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lsb_first() {
        let mut out = Vec::new();
        let mut bits = LsbWriter::new(&mut out);
        bits.put(0b1, 1);
        bits.put(0b01, 2);
        bits.put_run(&[0b1010_0000, 0b1], 5, 4);
        assert_eq!(bits.into_partial(), (0b110_1011, 7));
        let mut bits = LsbWriter::new(&mut out);
        bits.put(0x1ff, 9);
        bits.finish();
        assert_eq!(out, [0xff, 1]);
    }

    #[test]
    fn msb_first() {
        let mut out = Vec::new();
        let mut bits = MsbWriter::new(&mut out);
        bits.put(0b101, 3);
        bits.put_run(&[0b0000_0011, 0b1100_1100, 0b1000_0000], 6, 11);
        bits.finish();
        assert_eq!(out, [0b1011_1110, 0b0110_0100]);
    }
}
