//! The scatter/gather memory lent to one command: the ring's own pages, which serve data-out or data-in as the CDB says.
//!
//! Owns the walk over segments: sub-ranges, copies, comparison, and the rule that a data-in reply leaves no byte of an
//! earlier command in the buffer. Does not know CDBs, and never allocates for the usual number of segments.

use smallvec::SmallVec;
use std::io::{IoSlice, IoSliceMut};

/// Segments that fit on the stack when a sub-range of the buffer is lent on.
const INLINE: usize = 64;

/// Segments to write from.
pub type Slices<'x> = SmallVec<[IoSlice<'x>; INLINE]>;
/// Segments to read into.
pub type SlicesMut<'x> = SmallVec<[IoSliceMut<'x>; INLINE]>;

/// The buffer of one command. Its length is the initiator's expected transfer length, which need not agree with the CDB.
pub struct Data<'b, 'a> {
    segments: &'b mut [IoSliceMut<'a>],
    len: u64,
}

impl<'b, 'a> Data<'b, 'a> {
    /// Lends `segments` to one command, in order.
    pub fn new(segments: &'b mut [IoSliceMut<'a>]) -> Self {
        let len = segments.iter().map(|s| s.len() as u64).sum();
        Self { segments, len }
    }

    /// Length of the whole buffer in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The command came with no buffer.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Answers a data-in command: as much of `reply` as the buffer and the allocation length take; the rest of the buffer
    /// becomes zeros. Returns how many bytes of the buffer are valid.
    pub fn reply(&mut self, reply: &[u8], allocation_len: u64) -> u32 {
        let valid = self.len.min(allocation_len).min(reply.len() as u64);
        let mut rest = reply;
        for segment in self.segments.iter_mut() {
            let take = rest.len().min(segment.len());
            let (head, tail) = rest.split_at(take);
            segment[..take].copy_from_slice(head);
            rest = tail;
        }
        self.zero_from(valid);
        u32::try_from(valid).unwrap_or(u32::MAX)
    }

    /// Zeroes the buffer from byte `at` to its end.
    pub fn zero_from(&mut self, at: u64) {
        let mut skip = at;
        for segment in self.segments.iter_mut() {
            let skipped = clamp(skip, segment.len());
            segment[skipped..].fill(0);
            skip -= skipped as u64;
        }
    }

    /// Copies from byte `at` of the buffer; returns how many bytes there were, up to `into.len()`.
    pub fn copy_out(&self, at: u64, into: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices(at, into.len() as u64) {
            into[done..done + slice.len()].copy_from_slice(slice);
            done += slice.len();
        }
        done
    }

    /// The sub-range `at..at + len` of the buffer, cut short at its end, to write from.
    pub fn slices(&self, at: u64, len: u64) -> Slices<'_> {
        let mut skip = at;
        let mut want = len;
        let mut slices = Slices::new();
        for segment in self.segments.iter() {
            let start = clamp(skip, segment.len());
            skip -= start as u64;
            let take = clamp(want, segment.len() - start);
            if take > 0 {
                slices.push(IoSlice::new(&segment[start..start + take]));
                want -= take as u64;
            }
        }
        slices
    }

    /// The first `len` bytes of the buffer, cut short at its end, to read into.
    pub fn slices_mut(&mut self, len: u64) -> SlicesMut<'_> {
        let mut want = len;
        let mut slices = SlicesMut::new();
        for segment in self.segments.iter_mut() {
            let take = clamp(want, segment.len());
            if take > 0 {
                slices.push(IoSliceMut::new(&mut segment[..take]));
                want -= take as u64;
            }
        }
        slices
    }

    /// The offset within `other` of the first byte that differs from the buffer at `at`, where the buffer ends too.
    pub fn first_difference(&self, at: u64, other: &[u8]) -> Option<usize> {
        let mut done = 0;
        for slice in &self.slices(at, other.len() as u64) {
            let against = &other[done..done + slice.len()];
            if **slice != *against {
                return Some(done + slice.iter().zip(against).take_while(|(a, b)| a == b).count());
            }
            done += slice.len();
        }
        (done < other.len()).then_some(done)
    }
}

/// `want`, but no more than `have`.
fn clamp(want: u64, have: usize) -> usize {
    usize::try_from(want).map_or(have, |want| want.min(have))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A buffer of `bytes` cut into segments of the lengths given (the last takes the rest), lent to `run`.
    fn with<R>(bytes: &mut [u8], cuts: &[usize], run: impl FnOnce(&mut Data<'_, '_>) -> R) -> R {
        let mut segments = Vec::new();
        let mut rest = bytes;
        for &cut in cuts {
            let (head, tail) = rest.split_at_mut(cut);
            segments.push(IoSliceMut::new(head));
            rest = tail;
        }
        segments.push(IoSliceMut::new(rest));
        run(&mut Data::new(&mut segments))
    }

    #[test]
    fn reply_is_cut_and_the_rest_is_zeroed() {
        let mut bytes = [0xEE; 10];
        assert_eq!(with(&mut bytes, &[1, 0, 3], |d| d.reply(b"abcdef", 5)), 5);
        assert_eq!(&bytes, b"abcde\0\0\0\0\0");
        let mut bytes = [0xEE; 4];
        assert_eq!(with(&mut bytes, &[1], |d| d.reply(b"abcdef", 255)), 4);
        assert_eq!(&bytes, b"abcd");
    }

    #[test]
    fn sub_ranges_cross_segments() {
        let mut bytes = *b"0123456789";
        with(&mut bytes, &[3, 1, 4], |d| {
            let mut out = [0; 5];
            assert_eq!(d.copy_out(2, &mut out), 5);
            assert_eq!(&out, b"23456");
            assert_eq!(d.copy_out(8, &mut out), 2);
            assert_eq!(d.copy_out(80, &mut out), 0);
            assert_eq!(d.slices_mut(4).iter().map(|s| s.len()).collect::<Vec<_>>(), [3, 1]);
            assert_eq!(d.first_difference(2, b"2345"), None);
            assert_eq!(d.first_difference(2, b"23x5"), Some(2));
            assert_eq!(d.first_difference(8, b"89a"), Some(2));
        });
    }
}
