//! Decisions out of an input's bytes: numbers, choices, slices. An input that has ended gives zeros for ever, so that every input
//! means something, and the end of one says nothing new.

/// What is left of an input.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `len` bytes, fewer at the end.
    pub fn take(&mut self, len: usize) -> &'a [u8] {
        let (now, later) = self.0.split_at(len.min(self.0.len()));
        self.0 = later;
        now
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        self.take(usize::MAX)
    }

    fn number(&mut self, bytes: usize) -> u64 {
        self.take(bytes).iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte))
    }

    pub fn u8(&mut self) -> u8 {
        self.number(1) as u8
    }

    pub fn u16(&mut self) -> u16 {
        self.number(2) as u16
    }

    pub fn u32(&mut self) -> u32 {
        self.number(4) as u32
    }

    pub fn u64(&mut self) -> u64 {
        self.number(8)
    }

    pub fn flag(&mut self) -> bool {
        self.u8() & 1 == 1
    }

    /// A number below `limit` (0 if that is 0), from as few bytes as can hold it.
    pub fn below(&mut self, limit: u64) -> u64 {
        let bytes = (64 - limit.saturating_sub(1).leading_zeros() as usize).div_ceil(8);
        self.number(bytes).checked_rem(limit).unwrap_or(0)
    }

    pub fn choose<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A number that means something to a parser: small, near a limit, near something in `about`, or any.
    pub fn telling(&mut self, about: &[u64]) -> u64 {
        let near = u64::from(self.u8() % 5).wrapping_sub(2);
        match self.u8() % 8 {
            0 => self.u64(),
            1 => u64::from(self.u8()),
            2 => u64::from(self.u16()),
            3 => u64::from(self.u32()),
            4 => (1u64 << (self.u8() % 64)).wrapping_add(near),
            5 => u64::MAX.wrapping_add(near),
            _ if about.is_empty() => near,
            _ => self.choose(about).wrapping_add(if self.u8().is_multiple_of(4) { near } else { 0 }),
        }
    }
}
