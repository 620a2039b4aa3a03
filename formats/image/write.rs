//! The write loop: in place where the map allows it; otherwise into space that the format sets aside, with the old contents around it.

use super::Image;
use crate::device::ZeroMode;
use crate::error::{Error, Kind, Result};
use crate::format::{Format, Place, Placement};
use crate::segments::{Cursor, CursorMut, Parts};
use smallvec::SmallVec;
use std::io::{IoSlice, IoSliceMut};

/// How much of a range is changed under one exclusive lock, in bytes.
const EXCLUSIVE_STEP: u64 = 16 << 20;
/// How much old content is copied at once, in bytes.
const COPY_STEP: u64 = 1 << 20;
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A placement that is given back unless it is committed.
struct Pending<'a> {
    format: &'a dyn Format,
    placement: Option<Placement>,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if let Some(placement) = self.placement.take() {
            self.format.cancel(placement);
        }
    }
}

/// What `copy_old` does with bytes that read as zeros.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Zeros {
    /// The place holds unknown bytes: they must be written.
    Write,
    /// The place reads as zeros already.
    Skip,
}

impl Image {
    /// Writes `bufs` at `at`; the range lies inside the device.
    pub(super) fn write_data(&self, bufs: &[IoSlice<'_>], mut at: u64) -> Result<()> {
        let mut from = Cursor::new(bufs);
        let mut left = crate::segments::total(bufs);
        if left > 0 {
            let (start, end) = self.units(at, left);
            let _shared = self.ranges.shared(start, end);
            let done = self.write_in_place(&mut from, at, left)?;
            at += done;
            left -= done;
        }
        while left > 0 {
            let step = left.min(EXCLUSIVE_STEP);
            let (start, end) = self.units(at, step);
            let _exclusive = self.ranges.exclusive(start, end);
            let mut done = 0;
            while done < step {
                // Somebody may have allocated it meanwhile.
                let placed = self.write_in_place(&mut from, at + done, step - done)?;
                done += placed;
                if done < step {
                    done += self.write_placed(&mut from, at + done, step - done)?;
                }
            }
            at += done;
            left -= done;
        }
        Ok(())
    }

    /// Writes as much from `at` on as the map allows in place; returns how much. A lock on the units is held.
    fn write_in_place(&self, from: &mut Cursor<'_, '_>, at: u64, len: u64) -> Result<u64> {
        let _io = self.writeback.enter();
        let mut done = 0;
        let mut next = None;
        while done < len {
            let extent = match next.take() {
                Some(extent) => extent,
                None => self.format.map(at + done, len - done)?,
            };
            let Place::Data { store, at: host, in_place: true } = extent.place else { break };
            let mut run = extent.len.min(len - done);
            while done + run < len {
                let more = self.format.map(at + done + run, len - done - run)?;
                match more.place {
                    Place::Data { store: s, at: h, in_place: true } if s == store && Some(h) == host.checked_add(run) && more.len > 0 => {
                        run += more.len.min(len - done - run)
                    }
                    _ => {
                        next = Some(more);
                        break;
                    }
                }
            }
            if run == 0 {
                return Err(Error::corrupt("the format returned an empty extent").at_path(&self.path).at_offset(at));
            }
            self.store(store)?.write_at(&from.take(run), host).map_err(|e| self.io_error("cannot write", e, store, host))?;
            self.writeback.wrote_data(store);
            done += run;
        }
        Ok(done)
    }

    /// Sets space aside for a first part of the range, fills it and makes it visible; returns how much of the range that was. The units are
    /// held exclusively, and the map says that `at` is not to be written in place.
    fn write_placed(&self, from: &mut Cursor<'_, '_>, at: u64, len: u64) -> Result<u64> {
        // The longest first part that is not to be written in place.
        let mut want = 0;
        while want < len {
            let extent = self.format.map(at + want, len - want)?;
            if matches!(extent.place, Place::Data { in_place: true, .. }) || extent.len == 0 {
                break;
            }
            want += extent.len.min(len - want);
        }
        let placement = self.format.prepare(at, want.max(1))?;
        let (start, end, store, host, zeroed) =
            (placement.at, placement.at.saturating_add(placement.len), placement.store, placement.host, placement.zeroed);
        let mut pending = Pending { format: &*self.format, placement: Some(placement) };
        if start > at || end <= at {
            return Err(Error::corrupt("the format set aside another place than was asked for").at_path(&self.path));
        }
        let count = len.min(end - at);
        let zeros = if zeroed { Zeros::Skip } else { Zeros::Write };
        let to = |guest: u64| host + (guest - start);
        let (head, tail) = (at - start, end - (at + count));
        if head + tail <= COPY_STEP && !(zeroed && self.reads_zeros(start, head)? && self.reads_zeros(at + count, tail)?) {
            // Old bytes around the new ones, in one write.
            let before = self.old_bytes(start, head)?;
            let after = self.old_bytes(at + count, tail)?;
            let mut parts = Parts::new();
            parts.push(IoSlice::new(&before));
            for part in from.take(count) {
                parts.push(part);
            }
            parts.push(IoSlice::new(&after));
            self.store(store)?.write_at(&parts, host).map_err(|e| self.io_error("cannot write", e, store, host))?;
        } else {
            self.copy_old(start, head, store, to(start), zeros)?;
            self.store(store)?.write_at(&from.take(count), to(at)).map_err(|e| self.io_error("cannot write", e, store, to(at)))?;
            self.copy_old(at + count, tail, store, to(at + count), zeros)?;
        }
        self.writeback.wrote_data(store);
        if let Some(placement) = pending.placement.take() {
            self.format.commit(placement)?;
        }
        Ok(count)
    }

    /// Whether the range reads as zeros, as far as the maps tell. Beyond the end of the device everything does.
    fn reads_zeros(&self, mut at: u64, len: u64) -> Result<bool> {
        let end = at.saturating_add(len).min(self.size());
        while at < end {
            let extent = self.map_chain(at, end - at, 0)?;
            if !extent.zero {
                return Ok(false);
            }
            at += extent.len;
        }
        Ok(true)
    }

    /// The present contents of a range, which may reach beyond the end of the device (zeros there).
    fn old_bytes(&self, at: u64, len: u64) -> Result<SmallVec<[u8; 4096]>> {
        let mut bytes: SmallVec<[u8; 4096]> = smallvec::smallvec![0; usize::try_from(len).unwrap_or(0)];
        let inside = self.size().saturating_sub(at).min(len);
        if inside > 0 {
            self.read_chain(&mut CursorMut::new(&mut [IoSliceMut::new(&mut bytes)]), at, inside)?;
        }
        Ok(bytes)
    }

    /// Copies the present contents of a range to where they will be found.
    fn copy_old(&self, mut at: u64, len: u64, store: usize, mut host: u64, zeros: Zeros) -> Result<()> {
        let end = at.saturating_add(len);
        while at < end {
            let inside = self.size().saturating_sub(at).min(end - at);
            let (run, zero) = if inside == 0 {
                (end - at, true)
            } else {
                let extent = self.map_chain(at, inside, 0)?;
                (extent.len, extent.zero)
            };
            if zero {
                if zeros == Zeros::Write {
                    self.write_zeros(store, host, run)?;
                }
                at += run;
                host += run;
                continue;
            }
            let run = run.min(COPY_STEP);
            let bytes = self.old_bytes(at, run)?;
            self.store(store)?.write_all_at(&bytes, host).map_err(|e| self.io_error("cannot write", e, store, host))?;
            at += run;
            host += run;
        }
        Ok(())
    }

    /// Makes a range of a file read as zeros: cheaply if the file can, otherwise by writing them.
    fn write_zeros(&self, store: usize, host: u64, len: u64) -> Result<()> {
        let file = self.store(store)?;
        let fail = |e| self.io_error("cannot write zeros", e, store, host);
        // Beyond the end there is nothing to deallocate, and the length must grow as for a write.
        let inside = file.len().map_err(fail)?.saturating_sub(host).min(len);
        if inside == len && len >= COPY_STEP / 16 && file.zero(host, len).map_err(fail)? {
            return Ok(());
        }
        let mut done = 0;
        while done < len {
            let run = (len - done).min(ZEROS.len() as u64);
            file.write_all_at(&ZEROS[..usize::try_from(run).unwrap_or(0)], host + done).map_err(fail)?;
            done += run;
        }
        Ok(())
    }

    /// Makes a range read as zeros.
    pub(super) fn zero_range(&self, at: u64, len: u64, mode: ZeroMode) -> Result<()> {
        let limits = self.format.limits();
        if mode == ZeroMode::OnlyIfCheap && !limits.cheap_zero {
            return Err(Error::new(Kind::Unsupported, "zeroing is not cheaper than writing here"));
        }
        let (start, end) = self.whole_units(at, len);
        if start >= end {
            return self.write_zero_bytes(at, len);
        }
        let mut here = start;
        while here < end {
            let step = self.step_end(here, end) - here;
            let done = {
                let (a, b) = self.units(here, step);
                let _exclusive = self.ranges.exclusive(a, b);
                let done = self.format.zero(here, step, mode)?;
                self.writeback.changed_data();
                done
            };
            if done == 0 {
                // Only as long as nothing was done; what was begun is finished.
                if mode == ZeroMode::OnlyIfCheap && here == start {
                    return Err(Error::new(Kind::Unsupported, "zeroing is not cheaper than writing here"));
                }
                self.write_zero_bytes(here, step)?;
            }
            here += if done == 0 { step } else { done.min(step) };
        }
        self.write_zero_bytes(at, start - at)?;
        self.write_zero_bytes(end, at + len - end)
    }

    /// Gives back whole units of a range.
    pub(super) fn discard_range(&self, at: u64, len: u64) -> Result<()> {
        let (mut here, end) = self.whole_units(at, len);
        while here < end {
            let step = self.step_end(here, end) - here;
            let (a, b) = self.units(here, step);
            let _exclusive = self.ranges.exclusive(a, b);
            let done = self.format.discard(here, step)?;
            self.writeback.changed_data();
            if done == 0 && !self.format.limits().can_discard {
                // The host turned out to be unable to.
                break;
            }
            // The format cannot do this one; it may be able to do the next.
            here += if done == 0 { self.unit.min(step) } else { done.min(step) };
        }
        Ok(())
    }

    /// The whole units inside a range; the last unit of the device counts as whole.
    fn whole_units(&self, at: u64, len: u64) -> (u64, u64) {
        let end = at + len;
        let start = at.checked_next_multiple_of(self.unit).unwrap_or(u64::MAX).min(end);
        let whole = if end == self.size() { end } else { end & !(self.unit - 1) };
        (start, whole.max(start))
    }

    /// Where a step of bounded length from `here` ends: at a unit, or at `end`.
    fn step_end(&self, here: u64, end: u64) -> u64 {
        let step = EXCLUSIVE_STEP.max(self.unit);
        here.saturating_add(step).min(end)
    }

    /// Writes zeros through the write loop, but not where the range reads as zeros already.
    fn write_zero_bytes(&self, mut at: u64, len: u64) -> Result<()> {
        let end = at + len;
        while at < end {
            let extent = self.map_chain(at, end - at, 0)?;
            if extent.zero {
                at += extent.len;
                continue;
            }
            let mut left = extent.len.min(EXCLUSIVE_STEP);
            let chunk = (ZEROS.len() as u64).max(1);
            let mut parts: SmallVec<[IoSlice<'_>; 32]> = SmallVec::new();
            let run = left;
            while left > 0 {
                let count = left.min(chunk);
                parts.push(IoSlice::new(&ZEROS[..usize::try_from(count).unwrap_or(0)]));
                left -= count;
            }
            self.write_data(&parts, at)?;
            at += run;
        }
        Ok(())
    }
}
