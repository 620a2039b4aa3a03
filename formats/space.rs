//! Free space of a file that keeps no record of it: what lies between the structures that are in use, and beyond its end.
//!
//! For formats whose tables say only what is used (VHD, VHDX). What is freed comes back here when nobody can reach it any more.

use crate::error::{Error, Result};
use crate::store::Store;
use std::collections::BTreeMap;

/// How much is cleared at once where the file system cannot do it, in bytes.
const STEP: u64 = 64 << 10;

/// Makes a range inside a file read as zeros: without writing them if the file system can.
pub(crate) fn clear(store: &dyn Store, at: u64, len: u64) -> Result<()> {
    let fail = |e| Error::io("cannot write zeros", e).at_offset(at);
    if store.zero(at, len).map_err(fail)? {
        return Ok(());
    }
    let zeros = vec![0; STEP as usize];
    let mut done = 0;
    while done < len {
        let count = STEP.min(len - done);
        store.write_all_at(zeros.get(..count as usize).unwrap_or_default(), at + done).map_err(fail)?;
        done += count;
    }
    Ok(())
}

/// Copies a range inside a file to another place in it.
pub(crate) fn copy(store: &dyn Store, from: u64, to: u64, len: u64) -> Result<()> {
    let mut bytes = vec![0; STEP as usize];
    let mut done = 0;
    while done < len {
        let bytes = bytes.get_mut(..STEP.min(len - done) as usize).unwrap_or_default();
        store.read_zero_filled(bytes, from + done).map_err(|e| Error::io("cannot read a block", e).at_offset(from + done))?;
        store.write_all_at(bytes, to + done).map_err(|e| Error::io("cannot write a block", e).at_offset(to + done))?;
        done += bytes.len() as u64;
    }
    Ok(())
}

/// Space that was handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    /// Byte offset.
    pub(crate) at: u64,
    /// It is known to read as zeros.
    pub(crate) zeroed: bool,
    /// It lies beyond the former end: the file must be extended before it is used.
    pub(crate) fresh: bool,
}

/// Two structures in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Overlap {
    /// Where the second one begins, in bytes.
    pub(crate) at: u64,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    len: u64,
    zeroed: bool,
}

/// The free space of one file.
#[derive(Debug)]
pub(crate) struct Space {
    /// By byte offset; no two of the same kind touch.
    free: BTreeMap<u64, Run>,
    /// Where the file ends, or will end, in bytes.
    end: u64,
}

impl Space {
    /// The space of a file that ends at `end`, between `used` runs (offset and length in bytes; sorted by this).
    ///
    /// # Errors
    /// The first overlap of two runs.
    pub(crate) fn new(used: &mut [(u64, u64)], end: u64) -> Result<Self, Overlap> {
        used.sort_unstable();
        let mut free = BTreeMap::new();
        let mut here = 0;
        for &(at, len) in used.iter() {
            if at < here {
                return Err(Overlap { at });
            }
            if at > here {
                free.insert(here, Run { len: at - here, zeroed: false });
            }
            here = at.saturating_add(len);
        }
        if here < end {
            free.insert(here, Run { len: end - here, zeroed: false });
        }
        Ok(Self { free, end: end.max(here) })
    }

    /// Where the file ends, with all that was handed out.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// Free bytes before the end.
    pub(crate) fn free(&self) -> u64 {
        self.free.values().map(|r| r.len).sum()
    }

    /// `len` bytes from the first run that has them, or else from beyond the end. `None`: there are no such offsets.
    pub(crate) fn take(&mut self, len: u64) -> Option<Taken> {
        if let Some((at, run)) = self.free.iter().find(|(_, r)| r.len >= len).map(|(at, r)| (*at, *r)) {
            self.free.remove(&at);
            if run.len > len {
                self.free.insert(at + len, Run { len: run.len - len, ..run });
            }
            return Some(Taken { at, zeroed: run.zeroed, fresh: false });
        }
        let at = self.end;
        self.end = at.checked_add(len).filter(|e| *e <= i64::MAX as u64)?;
        Some(Taken { at, zeroed: true, fresh: true })
    }

    /// Undoes a [`take`](Self::take) whose space could not be had: what lies beyond the file's end is not free space of it.
    pub(crate) fn untake(&mut self, taken: Taken, len: u64) {
        if taken.fresh && taken.at.checked_add(len) == Some(self.end) {
            self.end = taken.at;
        } else {
            self.give(taken.at, len, false);
        }
    }

    /// Takes exactly this run out, if all of it is free.
    pub(crate) fn take_at(&mut self, at: u64, len: u64) -> bool {
        let Some((start, run)) = self.free.range(..=at).next_back().map(|(s, r)| (*s, *r)) else { return false };
        let (end, stop) = (at.saturating_add(len), start.saturating_add(run.len));
        if end > stop {
            return false;
        }
        self.free.remove(&start);
        if at > start {
            self.free.insert(start, Run { len: at - start, ..run });
        }
        if stop > end {
            self.free.insert(end, Run { len: stop - end, ..run });
        }
        true
    }

    /// Takes space back. `zeroed`: it is known to read as zeros.
    pub(crate) fn give(&mut self, at: u64, len: u64, zeroed: bool) {
        let (mut start, mut end) = (at, at.saturating_add(len));
        if start >= end {
            return;
        }
        if let Some((before, run)) = self.free.range(..start).next_back().map(|(s, r)| (*s, *r))
            && before.saturating_add(run.len) == start
            && run.zeroed == zeroed
        {
            self.free.remove(&before);
            start = before;
        }
        if let Some(run) = self.free.get(&end).copied()
            && run.zeroed == zeroed
        {
            self.free.remove(&end);
            end = end.saturating_add(run.len);
        }
        self.free.insert(start, Run { len: end - start, zeroed });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_taken_before_the_end() {
        let mut space = Space::new(&mut [(30, 10), (0, 10), (15, 5)], 50).unwrap();
        assert_eq!(space.free(), 25);
        assert_eq!(space.take(5), Some(Taken { at: 10, zeroed: false, fresh: false }));
        assert_eq!(space.take(10), Some(Taken { at: 20, zeroed: false, fresh: false }));
        assert_eq!(space.take(12), Some(Taken { at: 50, zeroed: true, fresh: true }));
        assert_eq!((space.end(), space.free()), (62, 10));
        space.give(20, 10, true);
        assert_eq!(space.take(4), Some(Taken { at: 20, zeroed: true, fresh: false }));
        assert_eq!(space.take(u64::MAX), None);
    }

    #[test]
    fn space_beyond_the_end_that_could_not_be_had_is_not_free() {
        let mut space = Space::new(&mut [(0, 100)], 100).unwrap();
        let taken = space.take(10).unwrap();
        space.untake(taken, 10);
        assert_eq!((space.end(), space.free()), (100, 0));
        assert_eq!(space.take(10), Some(Taken { at: 100, zeroed: true, fresh: true }));
    }

    #[test]
    fn neighbours_join() {
        let mut space = Space::new(&mut [(0, 100)], 100).unwrap();
        space.give(10, 10, false);
        space.give(30, 10, false);
        space.give(20, 10, false);
        assert_eq!(space.take(30), Some(Taken { at: 10, zeroed: false, fresh: false }));
        space.give(10, 30, false);
        assert!(space.take_at(15, 5));
        assert!(!space.take_at(14, 2));
        assert!(!space.take_at(38, 3));
        assert_eq!(space.free(), 25);
    }

    #[test]
    fn overlaps_are_found() {
        assert_eq!(Space::new(&mut [(0, 10), (20, 10), (9, 2)], 50).unwrap_err(), Overlap { at: 9 });
    }
}
