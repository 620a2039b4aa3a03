//! Images that are a flat table of units, each absent or whole somewhere in the file (VDI, Parallels): mapping, changing, checking and mending, by what an
//! entry means. What the header says, and what must be done to it, is the format's own.
//!
//! # Changing
//! A new unit is taken from the file's [`Tail`]; its bytes are durable before the entry that leads to it. Units stay where they are: zeros and discards make
//! holes in them, so that a cut leaves nothing worse than a unit that nothing leads to.

use crate::device::ZeroMode;
use crate::error::{Error, Kind, Result};
use crate::format::{CheckReport, Extent, FormatLimits, Place, Placement};
use crate::space::copy;
use crate::table::{Table, Width};
use crate::tail::Tail;
use crate::writeback::WriteBack;
use parking_lot::RwLock;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Runs of absent units are followed over at most this many at once.
const MAX_RUN: u64 = 4096;
/// A placement in a unit that is there ([`Placement::token`]).
const THERE: u64 = 0;
/// A placement in a new unit.
const NEW: u64 = 1;

/// What entries mean.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Meaning {
    pub(crate) width: Width,
    /// The entry of a unit that is not there.
    pub(crate) absent: u64,
    /// The entry of a unit of zeros, also where a parent has data.
    pub(crate) zero: Option<u64>,
    /// Entry `e` leads to the byte offset `base + e * step`; there lies the unit, behind `before` bytes of its own.
    pub(crate) base: u64,
    pub(crate) step: u64,
    pub(crate) before: u64,
    /// No unit begins before this byte offset.
    pub(crate) first: u64,
    /// No entry of a unit is larger, to begin with.
    pub(crate) largest: u64,
}

/// Where a unit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Absent,
    Zero,
    /// Its data lie at this byte offset.
    At(u64),
}

/// What an open image is made of.
pub(crate) struct Flat {
    pub(crate) writeback: Arc<WriteBack>,
    pub(crate) tail: Tail,
    pub(crate) meaning: Meaning,
    table: RwLock<Table>,
    table_at: u64,
    /// Bytes in a unit; a power of two.
    unit: u64,
    size: AtomicU64,
    /// No entry of a unit is larger; moves with the disk's end where the format has it so.
    largest: AtomicU64,
    pub(crate) writable: bool,
    /// A parent shows where a unit is absent.
    pub(crate) parent: bool,
}

/// What the header says of a [`Flat`].
pub(crate) struct Layout {
    pub(crate) table_at: u64,
    pub(crate) unit: u64,
    pub(crate) size: u64,
    pub(crate) writable: bool,
    pub(crate) parent: bool,
}

/// What a look at all entries has found.
#[derive(Default)]
pub(crate) struct Findings {
    /// Byte offset and length of units that are in order, ascending.
    pub(crate) sound: Vec<(u64, u64)>,
    /// Byte offset and index of those that lie over others.
    shared: Vec<(u64, u64)>,
    /// Indices of entries that lead nowhere.
    lost: Vec<u64>,
}

impl Flat {
    pub(crate) fn new(writeback: Arc<WriteBack>, meaning: Meaning, layout: &Layout) -> Self {
        let table = Table::new(writeback.clone(), layout.table_at, layout.size.div_ceil(layout.unit), meaning.width);
        Self {
            tail: Tail::new(writeback.clone()),
            writeback,
            meaning,
            table: RwLock::new(table),
            table_at: layout.table_at,
            unit: layout.unit,
            size: AtomicU64::new(layout.size),
            largest: AtomicU64::new(meaning.largest),
            writable: layout.writable,
            parent: layout.parent,
        }
    }

    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub(crate) fn largest(&self) -> u64 {
        self.largest.load(Ordering::Acquire)
    }

    /// Larger entries are possible from here on.
    pub(crate) fn set_largest(&self, entry: u64) {
        self.largest.store(entry, Ordering::Release);
    }

    pub(crate) fn limits(&self) -> FormatLimits {
        FormatLimits {
            size: self.size(),
            sector: 512,
            physical_sector: 4096,
            unit: self.unit,
            read_only: !self.writable,
            cheap_zero: true,
            can_discard: self.tail.can_punch(),
            thin: true,
            holes_are_zeros: true,
        }
    }

    /// Bytes that a unit takes in the file.
    pub(crate) fn taken_len(&self) -> u64 {
        self.meaning.before.saturating_add(self.unit)
    }

    fn decode(&self, index: u64, entry: u64, place: u64) -> Result<Unit> {
        let m = &self.meaning;
        if entry == m.absent {
            return Ok(Unit::Absent);
        }
        if Some(entry) == m.zero {
            return Ok(Unit::Zero);
        }
        let at = entry.checked_mul(m.step).and_then(|at| at.checked_add(m.base));
        let end = at.and_then(|at| at.checked_add(self.taken_len())).filter(|end| *end <= i64::MAX as u64);
        match at {
            Some(at) if end.is_some() && at >= m.first && entry <= self.largest() => Ok(Unit::At(at + m.before)),
            _ => Err(Error::corrupt(format!("the table's entry for block {index} is impossible: {entry:#x}")).at_offset(place)),
        }
    }

    fn find(&self, table: &Table, index: u64) -> Result<Unit> {
        self.decode(index, table.get(index)?, table.place(index))
    }

    /// See [`Format::map`](crate::format::Format::map).
    pub(crate) fn map(&self, at: u64, want: u64) -> Result<Extent> {
        let want = want.min(self.size().saturating_sub(at));
        let table = self.table.read();
        let (index, inside) = (at / self.unit, at % self.unit);
        let mut len = want.min(self.unit - inside);
        let unit = self.find(&table, index)?;
        let place = match unit {
            Unit::At(host) => return self.tail.data(host + inside, len, self.writable),
            Unit::Absent if self.parent => Place::Parent,
            Unit::Absent | Unit::Zero => Place::Zero { reserved: false },
        };
        let mut next = index + 1;
        // A damaged entry is the error of whoever asks for that unit.
        while len < want && next - index < MAX_RUN && self.find(&table, next).is_ok_and(|u| u == unit) {
            len = len.saturating_add(self.unit).min(want);
            next += 1;
        }
        Ok(Extent { len, place })
    }

    /// See [`Format::prepare`](crate::format::Format::prepare): one unit.
    pub(crate) fn prepare(&self, at: u64) -> Result<Placement> {
        let index = at / self.unit;
        let start = index * self.unit;
        let len = self.unit.min(self.size().saturating_sub(start));
        if let Unit::At(host) = self.find(&self.table.read(), index)? {
            return Ok(Placement { at: start, len, store: 0, host, zeroed: false, token: THERE });
        }
        let limit = self.largest().saturating_add(1).saturating_mul(self.meaning.step).saturating_add(self.meaning.base);
        let taken = self.tail.take(self.taken_len(), limit)?;
        Ok(Placement { at: start, len, store: 0, host: taken.at + self.meaning.before, zeroed: taken.zeroed, token: NEW })
    }

    /// The entry of the new unit that a placement is; `None`: the unit was there before.
    pub(crate) fn entry_of(&self, placement: &Placement) -> Option<u64> {
        let m = &self.meaning;
        (placement.token == NEW).then(|| (placement.host - m.before - m.base) / m.step)
    }

    /// Makes a placement's unit visible.
    pub(crate) fn commit(&self, placement: &Placement) -> Result<()> {
        match self.entry_of(placement) {
            Some(entry) => {
                let published = self.table.read().publish(placement.at / self.unit, entry);
                published.inspect_err(|_| self.cancel(placement))
            }
            None => Ok(()),
        }
    }

    pub(crate) fn cancel(&self, placement: &Placement) {
        if placement.token == NEW {
            self.tail.give(placement.host - self.meaning.before, self.taken_len());
        }
    }

    /// Runs `change` for each unit of a range until one is not done; returns how many bytes were.
    fn each_unit(&self, at: u64, len: u64, mut change: impl FnMut(&Table, u64, Unit) -> Result<bool>) -> Result<u64> {
        let table = self.table.read();
        let end = at.saturating_add(len);
        let mut here = at;
        while here < end {
            let index = here / self.unit;
            if !change(&table, index, self.find(&table, index)?)? {
                break;
            }
            here = (index + 1).saturating_mul(self.unit).min(end);
        }
        Ok(here - at)
    }

    /// Hides the parent in an absent unit. `false`: the format has no word for that.
    fn hide_parent(&self, table: &Table, index: u64) -> Result<bool> {
        match self.meaning.zero {
            _ if !self.parent => Ok(true),
            Some(zero) => table.publish(index, zero).map(|()| true),
            None => Ok(false),
        }
    }

    /// See [`Format::zero`](crate::format::Format::zero).
    pub(crate) fn zero(&self, at: u64, len: u64, mode: ZeroMode) -> Result<u64> {
        self.each_unit(at, len, |table, index, unit| match unit {
            Unit::At(host) => self.tail.clear(host, self.unit, mode),
            Unit::Zero => Ok(true),
            Unit::Absent => self.hide_parent(table, index),
        })
    }

    /// See [`Format::discard`](crate::format::Format::discard).
    pub(crate) fn discard(&self, at: u64, len: u64) -> Result<u64> {
        self.each_unit(at, len, |table, index, unit| match unit {
            Unit::At(host) => self.tail.punch(host, self.unit),
            Unit::Zero => Ok(true),
            Unit::Absent => self.hide_parent(table, index),
        })
    }

    /// Entries of the whole disk.
    fn each(&self, mut look: impl FnMut(u64, Result<Unit>)) -> Result<()> {
        let table = self.table.read();
        for index in 0..self.size().div_ceil(self.unit) {
            let entry = table.get(index)?;
            if entry != self.meaning.absent {
                look(index, self.decode(index, entry, table.place(index)));
            }
        }
        Ok(())
    }

    /// Looks at all entries, and counts what is wrong.
    pub(crate) fn inspect(&self, report: &mut CheckReport) -> Result<Findings> {
        let file_len = self.tail.file_len()?;
        let (mut found, mut findings) = (Vec::new(), Findings::default());
        self.each(|index, unit| match unit {
            Ok(Unit::At(at)) if at < file_len => found.push((at - self.meaning.before, index)),
            Ok(Unit::At(at)) => {
                report.corruption(format!("block {index} lies at {at:#x}, beyond the end of the file"));
                findings.lost.push(index);
            }
            Ok(_) => {}
            Err(error) => {
                report.corruption(error.to_string());
                findings.lost.push(index);
            }
        })?;
        report.allocated_units = found.len() as u64;
        found.sort_unstable();
        let mut stop = 0;
        for (at, index) in found {
            if at < stop {
                report.corruption(format!("block {index} lies over another block, at {at:#x}"));
                findings.shared.push((at, index));
            } else {
                stop = at.saturating_add(self.taken_len());
                findings.sound.push((at, self.taken_len()));
            }
        }
        Ok(findings)
    }

    /// What is free, for the first change: all between the units, up to `end` (or that of the last unit), and behind.
    ///
    /// # Errors
    /// `Corrupt` when something is wrong with the table: nothing may be changed.
    pub(crate) fn find_space(&self, end: u64) -> Result<()> {
        if self.tail.is_known() {
            return Ok(());
        }
        let mut report = CheckReport::default();
        let findings = self.inspect(&mut report)?;
        if report.corruptions > 0 {
            return Err(Error::corrupt(format!(
                "{}; nothing is written to this image (check shows all damage, and repairs what can be)",
                report.notes.first().map_or("", String::as_str)
            ))
            .at_offset(self.table_at));
        }
        self.begin(findings.sound, end)
    }

    /// The same after everything has been mended.
    pub(crate) fn find_space_anew(&self, end: u64) -> Result<()> {
        let findings = self.inspect(&mut CheckReport::default())?;
        self.begin(findings.sound, end)
    }

    fn begin(&self, sound: Vec<(u64, u64)>, end: u64) -> Result<()> {
        let m = &self.meaning;
        // A cut may have left the file longer, with anything in it.
        let steps = self.tail.file_len()?.saturating_sub(m.base).div_ceil(m.step);
        let whole = m.base.saturating_add(steps.saturating_mul(m.step)).min(i64::MAX as u64);
        let end = sound.last().map_or(0, |(at, len)| at.saturating_add(*len)).max(end).max(m.first).max(whole);
        let mut used = sound;
        used.push((0, m.first));
        self.tail.begin(used, end).map_err(|o| Error::corrupt("two blocks of the image are in one place of the file").at_offset(o.at))
    }

    /// Mends what `inspect` has found: entries that lead nowhere are given up, one of two units in one place gets a copy of its own.
    pub(crate) fn mend(&self, findings: Findings, end: u64, report: &mut CheckReport) -> Result<()> {
        if !self.writable {
            return Err(Error::new(Kind::ReadOnly, "the image is open read-only and cannot be repaired"));
        }
        let Findings { sound, shared, lost } = findings;
        self.begin(sound, end)?;
        // Their bytes are still to be read.
        for (at, _) in &shared {
            self.tail.take_at(*at, self.taken_len());
        }
        let table = self.table.read();
        for index in lost {
            table.publish(index, self.meaning.absent)?;
            report.corruptions_fixed += 1;
        }
        for (at, index) in shared {
            let taken = self.tail.take(self.taken_len(), u64::MAX)?;
            copy(&**self.tail.store()?, at, taken.at, self.taken_len())?;
            self.writeback.wrote_data(0);
            table.publish(index, (taken.at - self.meaning.base) / self.meaning.step)?;
            report.corruptions_fixed += 1;
        }
        Ok(())
    }

    /// Grows the disk within its table, whose entries up to `needed` are made absent first; `header` then writes the header.
    pub(crate) fn grow(&self, size: u64, header: impl FnOnce() -> Result<()>) -> Result<()> {
        let (old, needed) = (self.size().div_ceil(self.unit), size.div_ceil(self.unit));
        let new: Vec<u8> = (old..needed).flat_map(|_| self.meaning.width.encode(self.meaning.absent)).collect();
        if !new.is_empty() {
            self.writeback.write_through(0, self.table.read().place(old), &new)?;
        }
        header()?;
        *self.table.write() = Table::new(self.writeback.clone(), self.table_at, needed, self.meaning.width);
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// The largest entry in use, and the units that use one, for formats that count them.
    pub(crate) fn last_entry(&self, findings: &Findings) -> Option<u64> {
        findings.sound.last().map(|(at, _)| (at - self.meaning.base) / self.meaning.step)
    }

    /// Moves units into the gaps before them until there is none, for formats that cannot have gaps; returns where the last one ends.
    pub(crate) fn close_gaps(&self, report: &mut CheckReport) -> Result<u64> {
        let mut units = Vec::new();
        self.each(|index, unit| {
            if let Ok(Unit::At(at)) = unit {
                units.push((at - self.meaning.before, index));
            }
        })?;
        units.sort_unstable();
        let len = self.taken_len();
        let place = |number: usize| self.meaning.first + number as u64 * len;
        let count = units.len();
        // Those that lie behind where the last one belongs, to the places before that have none.
        let late: Vec<_> = units.iter().copied().filter(|(at, _)| *at >= place(count)).collect();
        let used: std::collections::BTreeSet<u64> = units.iter().map(|(at, _)| *at).collect();
        let gaps: Vec<u64> = (0..count).map(place).filter(|at| !used.contains(at)).collect();
        let table = self.table.read();
        for ((from, index), to) in late.into_iter().zip(gaps) {
            copy(&**self.tail.store()?, from, to, len)?;
            self.writeback.wrote_data(0);
            table.publish(index, (to - self.meaning.base) / self.meaning.step)?;
            report.note(format!("block {index} was moved from {from:#x} to {to:#x}"));
        }
        Ok(place(count))
    }
}
