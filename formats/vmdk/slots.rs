//! The free space of a sparse extent: one bit per place of a grain in the file.
//!
//! Nothing in the file says what is free: it is what nothing refers to. Places are counted from an origin that the grains that are there agree on.

/// Bits of a word.
const WORD: u64 = 64;

/// Places that were handed out, next to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    /// Byte offset of the first.
    pub(super) at: u64,
    /// How many.
    pub(super) count: u64,
    /// They lie beyond the former end of the file.
    pub(super) fresh: bool,
}

/// Which places are in use.
#[derive(Debug)]
pub(super) struct Slots {
    used: Vec<u64>,
    /// Byte offset of place 0.
    origin: u64,
    /// Bytes of a place.
    grain: u64,
    /// Number of places in the file.
    len: u64,
    /// Of those, free ones.
    free: u64,
    /// No word before this one has a free place.
    hint: usize,
}

impl Slots {
    /// Of a file of `file_len` bytes, all free, with places of `grain` bytes one of which begins at `phase`.
    pub(super) fn new(file_len: u64, grain: u64, phase: u64) -> Self {
        let origin = phase % grain;
        let len = file_len.saturating_sub(origin).div_ceil(grain);
        let words = usize::try_from(len.div_ceil(WORD)).unwrap_or(0);
        Self { used: vec![0; words], origin, grain, len, free: len, hint: 0 }
    }

    /// Where the file ends, with all that was handed out, as a byte offset.
    pub(super) fn end(&self) -> u64 {
        self.origin.saturating_add(self.len.saturating_mul(self.grain))
    }

    /// Whether `at` is where a place begins.
    pub(super) fn is_place(&self, at: u64) -> bool {
        at >= self.origin && (at - self.origin).is_multiple_of(self.grain)
    }

    /// Takes the places that a range of bytes touches; whether any of them was taken before.
    pub(super) fn take_range(&mut self, at: u64, len: u64) -> bool {
        if len == 0 {
            return false;
        }
        let first = at.saturating_sub(self.origin) / self.grain;
        let end = at.saturating_add(len).saturating_sub(self.origin).div_ceil(self.grain);
        let mut taken = false;
        for slot in first..end.min(self.len) {
            taken |= !self.set(slot);
        }
        taken
    }

    /// Whether a range of bytes touches a place that is in use.
    pub(super) fn touches(&self, at: u64, len: u64) -> bool {
        let first = at.saturating_sub(self.origin) / self.grain;
        let end = at.saturating_add(len).saturating_sub(self.origin).div_ceil(self.grain);
        (first..end.min(self.len)).any(|slot| !self.is_free(slot))
    }

    /// Has the file end at `end` at least.
    pub(super) fn reach(&mut self, end: u64) {
        let len = end.saturating_sub(self.origin).div_ceil(self.grain);
        if len > self.len {
            self.free += len - self.len;
            self.len = len;
            self.used.resize(usize::try_from(len.div_ceil(WORD)).unwrap_or(0), 0);
        }
    }

    /// Takes a place; `false`: it was taken.
    fn set(&mut self, slot: u64) -> bool {
        let Some(word) = self.used.get_mut((slot / WORD) as usize) else { return false };
        let bit = 1 << (slot % WORD);
        if *word & bit != 0 {
            return false;
        }
        *word |= bit;
        self.free -= 1;
        true
    }

    fn is_free(&self, slot: u64) -> bool {
        slot < self.len && self.used.get((slot / WORD) as usize).is_some_and(|word| word >> (slot % WORD) & 1 == 0)
    }

    /// Up to `want` places next to each other: free ones, or else beyond the end, which must not come to lie behind `limit`. `None`: there are none.
    pub(super) fn take(&mut self, want: u64, limit: u64) -> Option<Taken> {
        if want == 0 {
            return None;
        }
        if self.free > 0 {
            while self.used.get(self.hint) == Some(&u64::MAX) {
                self.hint += 1;
            }
            let start = self.hint as u64 * WORD;
            if let Some(first) = (start..self.len).find(|slot| self.is_free(*slot)) {
                let count = (first..first.saturating_add(want)).take_while(|slot| self.is_free(*slot)).count() as u64;
                (first..first + count).for_each(|slot| {
                    self.set(slot);
                });
                return Some(Taken { at: self.origin + first * self.grain, count, fresh: false });
            }
        }
        let (first, at) = (self.len, self.end());
        let count = want.min(limit.saturating_sub(at) / self.grain);
        if count == 0 {
            return None;
        }
        self.len += count;
        self.free += count;
        self.used.resize(self.len.div_ceil(WORD) as usize, 0);
        (first..first + count).for_each(|slot| {
            self.set(slot);
        });
        Some(Taken { at, count, fresh: true })
    }

    /// Takes places back. What does not begin at a place is left in use.
    pub(super) fn give(&mut self, at: u64, len: u64) {
        if !self.is_place(at) {
            return;
        }
        let first = (at - self.origin) / self.grain;
        for slot in first..first.saturating_add(len / self.grain).min(self.len) {
            let Some(word) = self.used.get_mut((slot / WORD) as usize) else { return };
            let bit = 1 << (slot % WORD);
            if *word & bit != 0 {
                *word &= !bit;
                self.free += 1;
                self.hint = self.hint.min((slot / WORD) as usize);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_places_come_before_the_end() {
        let mut slots = Slots::new(1000, 100, 310);
        assert_eq!((slots.end(), slots.free), (1010, 10));
        assert!(!slots.take_range(0, 15));
        assert!(slots.take_range(0, 120), "the first two, one of them again");
        assert!(!slots.take_range(410, 100));
        assert!(slots.touches(500, 20) && !slots.touches(510, 500));
        let taken = |at, count, fresh| Some(Taken { at, count, fresh });
        assert_eq!(slots.take(9, u64::MAX), taken(210, 2, false));
        assert_eq!(slots.take(2, u64::MAX), taken(510, 2, false));
        assert_eq!(slots.take(9, u64::MAX), taken(710, 3, false));
        assert_eq!(slots.take(9, 1250), taken(1010, 2, true));
        assert_eq!(slots.take(9, 1250), None);
        slots.give(410, 100);
        slots.give(511, 100);
        assert_eq!(slots.free, 1);
        assert_eq!(slots.take(9, 0), taken(410, 1, false));
        slots.reach(1211);
        assert_eq!(slots.take(9, 0), taken(1210, 1, false));
    }

    #[test]
    fn many_places() {
        let mut slots = Slots::new(0, 512, 0);
        assert_eq!(slots.take(1000, u64::MAX), Some(Taken { at: 0, count: 1000, fresh: true }));
        (0..1000).rev().for_each(|n| slots.give(n * 512, 512));
        let mut seen = 0;
        while let Some(Taken { at, count, fresh: false }) = slots.take(7, u64::MAX) {
            assert_eq!(at, seen * 512);
            seen += count;
        }
        assert_eq!(seen, 1000);
    }
}
