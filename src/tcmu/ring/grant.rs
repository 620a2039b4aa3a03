//! The parts of the data area that belong to one command, lent as slices so that `preadv` and `pwritev` work straight on them.
//!
//! Why lending them is sound: the kernel fills a command's pages before it moves the head over the entry, and neither reads nor
//! writes nor recycles them until the command is completed (not on a timeout either: a timed-out command keeps its pages until
//! its late completion; a ring reset breaks this, see [`Ring`](super::Ring)). Within this process a page is lent to one command at a time: [`Occupied`] refuses an entry
//! whose buffers overlap each other or those of a command that is not completed, whatever the kernel says.

use super::region::{OutOfRegion, Region};
use crate::tcmu::RingFault;
use smallvec::SmallVec;
use std::io::{IoSlice, IoSliceMut};
use std::ptr::NonNull;

/// Pages are lent whole: the kernel hands out the data area in multiples of this, aligned to it.
const PAGE: u64 = 4096;

/// A run of bytes of the data area: offset in the region and length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub base: u64,
    pub len: u64,
}

/// Most commands have one buffer or a few.
pub(super) type Spans = SmallVec<[Span; 4]>;

/// The buffers of one command. Held by its [`Command`](super::Command) alone, which also holds the mapping.
#[derive(Debug)]
pub(super) struct Grant {
    spans: Spans,
    /// Start of the region.
    origin: Origin,
    len: u64,
}

#[derive(Clone, Copy, Debug)]
struct Origin(NonNull<u8>);

// SAFETY: the pointer leads to memory of which the parts that are used are lent to one `Grant` at a time; the memory lives as
// long as the mapping, which the owner of the `Grant` holds, and nothing in it belongs to a thread.
unsafe impl Send for Origin {}
// SAFETY: with a shared reference the memory can only be read.
unsafe impl Sync for Origin {}

impl Grant {
    /// The buffers `spans` of `region`. They must have been entered in [`Occupied`].
    pub fn new(region: &Region, spans: Spans) -> Result<Self, OutOfRegion> {
        let mut len = 0u64;
        for span in &spans {
            let offset = usize::try_from(span.base).map_err(|_| OutOfRegion)?;
            let bytes = usize::try_from(span.len).map_err(|_| OutOfRegion)?;
            region.pointer(offset, bytes)?;
            len = len.checked_add(span.len).ok_or(OutOfRegion)?;
        }
        Ok(Self { spans, origin: Origin(region.pointer(0, 0)?), len })
    }

    /// Sum of the lengths, in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    fn start(&self, span: &Span) -> *mut u8 {
        self.origin.0.as_ptr().wrapping_add(span.base as usize)
    }

    /// The buffers, to read from (the payload of a write).
    pub fn slices(&self) -> SmallVec<[IoSlice<'_>; 4]> {
        let lend = |span: &Span| {
            // SAFETY: `new` checked that the bytes are inside the mapping; they are lent to this grant alone (module
            // documentation), and the shared borrow of `self` keeps `slices_mut` away.
            IoSlice::new(unsafe { std::slice::from_raw_parts(self.start(span), span.len as usize) })
        };
        self.spans.iter().map(lend).collect()
    }

    /// The buffers, to fill (the data of a read).
    pub fn slices_mut(&mut self) -> SmallVec<[IoSliceMut<'_>; 4]> {
        let lend = |span: &Span| {
            // SAFETY: as in `slices`; the spans do not overlap, and the exclusive borrow of `self` covers them all.
            IoSliceMut::new(unsafe { std::slice::from_raw_parts_mut(self.start(span), span.len as usize) })
        };
        self.spans.iter().map(lend).collect()
    }

    /// Zeroes everything from byte `from` on.
    pub fn zero_from(&mut self, from: u64) {
        let mut skip = from;
        for slice in &mut self.slices_mut() {
            let start = skip.min(slice.len() as u64);
            skip -= start;
            slice[start as usize..].fill(0);
        }
    }
}

/// Which pages of the data area are lent out.
#[derive(Debug)]
pub(super) struct Occupied {
    /// One bit a page.
    pages: Vec<u64>,
    start: u64,
    end: u64,
    how: Granularity,
}

#[derive(Debug)]
enum Granularity {
    /// Kernels that complete out of order hand out whole pages.
    Pages,
    /// Older ones have one byte-wise circular buffer: pages are shared between commands, but not bytes. Few commands are in
    /// flight there.
    Bytes(Vec<Span>),
}

impl Occupied {
    /// Nothing is lent of the data area `start..end`.
    pub fn new(start: u64, end: u64, by_page: bool) -> Self {
        let how = if by_page { Granularity::Pages } else { Granularity::Bytes(Vec::new()) };
        let count = if by_page { end.div_ceil(PAGE).div_ceil(64) as usize } else { 0 };
        Self { pages: vec![0; count], start, end, how }
    }

    /// Enters the buffers of command `id`, all or none.
    pub fn take(&mut self, id: u16, spans: &[Span]) -> Result<(), RingFault> {
        for (index, span) in spans.iter().enumerate() {
            if let Err(fault) = self.take_one(id, *span) {
                self.release(&spans[..index]);
                return Err(fault);
            }
        }
        Ok(())
    }

    fn take_one(&mut self, id: u16, span: Span) -> Result<(), RingFault> {
        let end = span.base.checked_add(span.len).filter(|&end| span.base >= self.start && end <= self.end);
        let end = end.ok_or(RingFault::BufferBounds { id, base: span.base, len: span.len })?;
        let overlap = RingFault::BufferOverlap { id, base: span.base };
        match &mut self.how {
            Granularity::Pages => {
                let mut words = PageMasks::new(span.base, end);
                if words.clone().any(|(word, mask)| self.pages.get(word).is_none_or(|bits| bits & mask != 0)) {
                    return Err(overlap);
                }
                words.try_for_each(|(word, mask)| self.pages.get_mut(word).map(|bits| *bits |= mask)).ok_or(overlap)
            }
            Granularity::Bytes(taken) => {
                if taken.iter().any(|other| span.base < other.base + other.len && other.base < end) {
                    return Err(overlap);
                }
                taken.push(span);
                Ok(())
            }
        }
    }

    /// Takes the buffers out again.
    pub fn release(&mut self, spans: &[Span]) {
        for span in spans {
            match &mut self.how {
                Granularity::Pages => {
                    for (word, mask) in PageMasks::new(span.base, span.base.saturating_add(span.len)) {
                        if let Some(bits) = self.pages.get_mut(word) {
                            *bits &= !mask;
                        }
                    }
                }
                Granularity::Bytes(taken) => {
                    if let Some(index) = taken.iter().position(|other| other == span) {
                        taken.swap_remove(index);
                    }
                }
            }
        }
    }
}

/// The words of the page bitmap, each with the bits, that a run of bytes touches.
#[derive(Clone)]
struct PageMasks {
    next: u64,
    end: u64,
}

impl PageMasks {
    fn new(base: u64, end: u64) -> Self {
        Self { next: base / PAGE, end: if end > base { end.div_ceil(PAGE) } else { base / PAGE } }
    }
}

impl Iterator for PageMasks {
    type Item = (usize, u64);

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.end {
            return None;
        }
        let bit = self.next % 64;
        let count = (64 - bit).min(self.end - self.next);
        let mask = (u64::MAX >> (64 - count)) << bit;
        let word = (self.next / 64) as usize;
        self.next += count;
        Some((word, mask))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(base: u64, len: u64) -> Span {
        Span { base, len }
    }

    #[test]
    fn page_masks_cover_exactly_the_touched_pages() {
        for (base, end) in [(0, 1), (4095, 4097), (0, 64 * PAGE), (63 * PAGE, 65 * PAGE), (PAGE, 200 * PAGE + 1), (5, 5)] {
            let mut pages = Vec::new();
            for (word, mask) in PageMasks::new(base, end) {
                pages.extend((0..64).filter(|bit| mask >> bit & 1 == 1).map(|bit| word as u64 * 64 + bit));
            }
            let wanted: Vec<u64> = if end > base { (base / PAGE..end.div_ceil(PAGE)).collect() } else { Vec::new() };
            assert_eq!(pages, wanted, "{base}..{end}");
        }
    }

    #[test]
    fn a_page_is_lent_once() {
        let mut occupied = Occupied::new(2 * PAGE, 300 * PAGE, true);
        occupied.take(1, &[span(2 * PAGE, PAGE), span(4 * PAGE, 512)]).unwrap();
        // The rest of a page that is lent in part is not free.
        let fault = occupied.take(2, &[span(3 * PAGE, PAGE), span(4 * PAGE + 512, 512)]).unwrap_err();
        assert_eq!(fault, RingFault::BufferOverlap { id: 2, base: 4 * PAGE + 512 });
        // The refused command left nothing behind.
        occupied.take(2, &[span(3 * PAGE, PAGE)]).unwrap();
        occupied.release(&[span(2 * PAGE, PAGE), span(4 * PAGE, 512)]);
        occupied.take(3, &[span(4 * PAGE, 296 * PAGE)]).unwrap();
        assert!(matches!(occupied.take(4, &[span(PAGE, 1)]), Err(RingFault::BufferBounds { .. })));
        assert!(matches!(occupied.take(4, &[span(300 * PAGE, 1)]), Err(RingFault::BufferBounds { .. })));
        assert!(matches!(occupied.take(4, &[span(u64::MAX, 2)]), Err(RingFault::BufferBounds { .. })));
    }

    #[test]
    fn overlap_within_a_command_is_refused() {
        for by_page in [true, false] {
            let mut occupied = Occupied::new(0, 100 * PAGE, by_page);
            assert!(occupied.take(1, &[span(0, 2 * PAGE), span(PAGE, PAGE)]).is_err());
            occupied.take(1, &[span(0, 2 * PAGE), span(2 * PAGE, PAGE)]).unwrap();
        }
    }

    #[test]
    fn bytes_of_a_page_can_be_shared_on_old_kernels() {
        let mut occupied = Occupied::new(0, 100 * PAGE, false);
        occupied.take(1, &[span(0, 512)]).unwrap();
        occupied.take(2, &[span(512, 512)]).unwrap();
        assert!(occupied.take(3, &[span(1023, 2)]).is_err());
        occupied.release(&[span(512, 512)]);
        occupied.take(3, &[span(1023, 2)]).unwrap();
    }
}
