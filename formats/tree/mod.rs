//! Images whose clusters are found by two levels of tables, and which count no references (QED, version 1 of qcow): mapping and changing, by what an entry
//! means. `check.rs` looks for damage and mends it. What the header says, and what must be done to it, is the format's own.
//!
//! # Changing
//! New clusters and tables are taken from the file's [`Tail`]. A cluster's bytes, and a new table's zeros, are durable before the entry that leads to them.
//! Clusters stay where they are: zeros and discards make holes in them, so that a cut leaves nothing worse than a cluster that nothing leads to.

mod check;

use crate::device::ZeroMode;
use crate::entries::Entries;
use crate::error::{Error, Result};
use crate::format::{Extent, FormatLimits, Place, Placement, Unit};
use crate::space::clear;
use crate::table::{Table, Width};
use crate::tail::Tail;
use crate::writeback::WriteBack;
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Runs of absent tables are followed over at most this many at once.
const MAX_RUN: u64 = 4096;
/// A placement has at most so many bytes, if that is more than a cluster.
const MAX_PLACEMENT: u64 = 4 << 20;

/// What entries mean, and how large things are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) width: Width,
    /// Bits of an offset inside a cluster.
    pub(crate) cluster_bits: u32,
    /// Bits of an index into a second-level table.
    pub(crate) table_bits: u32,
    /// The entry of a cluster of zeros, also where a parent has data.
    pub(crate) zero: Option<u64>,
    /// No table and no cluster begins before this byte offset.
    pub(crate) first: u64,
    /// Whether space that nothing leads to is known to be free.
    pub(crate) reuse: bool,
    /// What an entry that is neither 0 nor `zero` means; `None`: nothing.
    pub(crate) decode: fn(&Shape, u64) -> Option<Cluster>,
}

/// Where a cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cluster {
    Absent,
    Zero,
    /// As it is, at this byte offset.
    At(u64),
    /// Compressed: byte offset and length.
    Encoded(u64, u64),
}

impl Shape {
    pub(crate) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of a second-level table.
    pub(crate) fn table_len(&self) -> u64 {
        self.width.bytes() << self.table_bits
    }

    /// Bytes of the guest that a second-level table is for; `None`: more than there are.
    pub(crate) fn covered(&self) -> u64 {
        1 << (self.cluster_bits + self.table_bits).min(63)
    }
}

/// The first-level table.
pub(super) struct Top {
    table: Table,
    pub(super) at: u64,
    pub(super) entries: u64,
}

/// An open image.
pub(crate) struct Tree {
    pub(crate) writeback: Arc<WriteBack>,
    pub(crate) tail: Tail,
    pub(crate) shape: Shape,
    top: RwLock<Top>,
    entries: Entries,
    /// One second-level table is made at a time.
    making: Mutex<()>,
    size: AtomicU64,
    pub(crate) writable: bool,
    /// A parent shows where a cluster is absent.
    parent: bool,
}

/// What the header says of a [`Tree`].
pub(crate) struct Layout {
    pub(crate) top_at: u64,
    pub(crate) top_entries: u64,
    pub(crate) size: u64,
    pub(crate) writable: bool,
    pub(crate) parent: bool,
}

impl Tree {
    pub(crate) fn new(writeback: Arc<WriteBack>, shape: Shape, layout: &Layout) -> Self {
        let table = Table::new(writeback.clone(), layout.top_at, layout.top_entries, shape.width);
        Self {
            tail: Tail::new(writeback.clone()),
            entries: Entries::new(writeback.clone(), shape.width),
            writeback,
            shape,
            top: RwLock::new(Top { table, at: layout.top_at, entries: layout.top_entries }),
            making: Mutex::new(()),
            size: AtomicU64::new(layout.size),
            writable: layout.writable,
            parent: layout.parent,
        }
    }

    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub(crate) fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    pub(crate) fn limits(&self) -> FormatLimits {
        let hides = !self.parent || self.shape.zero.is_some();
        FormatLimits {
            size: self.size(),
            sector: 512,
            physical_sector: 4096,
            unit: self.shape.cluster(),
            read_only: !self.writable,
            cheap_zero: hides,
            can_discard: hides && self.tail.can_punch(),
            thin: true,
            holes_are_zeros: true,
        }
    }

    /// Byte offset and number of entries of the first-level table.
    pub(crate) fn top(&self) -> (u64, u64) {
        let top = self.top.read();
        (top.at, top.entries)
    }

    /// The first-level table is elsewhere now, and longer.
    pub(crate) fn move_top(&self, at: u64, entries: u64) {
        *self.top.write() = Top { table: Table::new(self.writeback.clone(), at, entries, self.shape.width), at, entries };
    }

    /// Whether a run of bytes touches what every lookup needs.
    fn touches_top(&self, top: &Top, at: u64, len: u64) -> bool {
        let end = top.at.saturating_add(top.entries.saturating_mul(self.shape.width.bytes()));
        at < self.shape.first || (at < end && top.at < at.saturating_add(len))
    }

    /// Byte offset of the second-level table of entry `slot`, if it has one.
    fn table_at(&self, top: &Top, slot: u64) -> Result<Option<u64>> {
        let at = top.table.get(slot)?;
        if at == 0 {
            return Ok(None);
        }
        let len = self.shape.table_len();
        let possible = at.is_multiple_of(self.shape.cluster())
            && at.checked_add(len).is_some_and(|end| end <= i64::MAX as u64)
            && !self.touches_top(top, at, len)
            && self.tail.in_file(at, len)? > 0;
        if possible {
            return Ok(Some(at));
        }
        Err(Error::corrupt(format!("entry {slot} of the first-level table is impossible: {at:#x}")).at_offset(top.table.place(slot)))
    }

    fn decode(&self, top: &Top, raw: u64, place: u64) -> Result<Cluster> {
        if raw == 0 {
            return Ok(Cluster::Absent);
        }
        if Some(raw) == self.shape.zero {
            return Ok(Cluster::Zero);
        }
        let found = (self.shape.decode)(&self.shape, raw).filter(|cluster| match *cluster {
            Cluster::At(at) => {
                at.checked_add(self.shape.cluster()).is_some_and(|end| end <= i64::MAX as u64)
                    && !self.touches_top(top, at, self.shape.cluster())
            }
            Cluster::Encoded(at, len) => len > 0 && at.checked_add(len).is_some() && !self.touches_top(top, at, len),
            _ => true,
        });
        found.ok_or_else(|| Error::corrupt(format!("the table entry of a cluster is impossible: {raw:#x}")).at_offset(place))
    }

    /// First-level index, and index in the second-level table.
    fn split(&self, at: u64) -> (u64, u64) {
        let number = at >> self.shape.cluster_bits;
        (number >> self.shape.table_bits, number & ((1 << self.shape.table_bits) - 1))
    }

    fn place_in(&self, table: u64, index: u64) -> u64 {
        table + index * self.shape.width.bytes()
    }

    /// See [`Format::map`](crate::format::Format::map).
    pub(crate) fn map(&self, at: u64, want: u64) -> Result<Extent> {
        let want = want.min(self.size().saturating_sub(at));
        let top = self.top.read();
        let (slot, index) = self.split(at);
        let nothing = if self.parent { Place::Parent } else { Place::Zero { reserved: false } };
        let Some(table) = self.table_at(&top, slot)? else {
            let covered = self.shape.covered();
            let mut len = want.min(covered - at % covered);
            let mut next = slot + 1;
            while len < want && next - slot < MAX_RUN && top.table.get(next).is_ok_and(|entry| entry == 0) {
                len = len.saturating_add(covered).min(want);
                next += 1;
            }
            return Ok(Extent { len, place: nothing });
        };
        let (cluster, inside) = (self.shape.cluster(), at & (self.shape.cluster() - 1));
        let most = ((1 << self.shape.table_bits) - index).min((inside + want).div_ceil(cluster));
        let place = self.place_in(table, index);
        let raws = self.entries.get(place, most)?;
        let mut raws = raws.into_iter();
        let first = self.decode(&top, raws.next().unwrap_or(0), place)?;
        let mut len = (cluster - inside).min(want);
        if !matches!(first, Cluster::Encoded(..)) {
            let mut count = 0;
            for raw in raws {
                count += 1;
                // A damaged entry is the error of whoever asks for that cluster.
                let Ok(next) = self.decode(&top, raw, 0) else { break };
                let goes_on = match (first, next) {
                    (Cluster::At(a), Cluster::At(b)) => a + count * cluster == b,
                    (a, b) => a == b,
                };
                if !goes_on {
                    break;
                }
                len = len.saturating_add(cluster).min(want);
            }
        }
        Ok(match first {
            Cluster::Absent => Extent { len, place: nothing },
            Cluster::Zero => Extent { len, place: Place::Zero { reserved: false } },
            Cluster::At(host) => self.tail.data(host + inside, len, self.writable)?,
            Cluster::Encoded(host, coded) => {
                let unit = Unit { id: host, aux: coded, decoded_len: u32::try_from(cluster).unwrap_or(u32::MAX) };
                Extent { len, place: Place::Encoded { unit, skip: inside } }
            }
        })
    }

    /// The second-level table of entry `slot`, made if need be.
    fn table_for(&self, top: &Top, slot: u64) -> Result<u64> {
        if let Some(at) = self.table_at(top, slot)? {
            return Ok(at);
        }
        let _one = self.making.lock();
        if let Some(at) = self.table_at(top, slot)? {
            return Ok(at);
        }
        let len = self.shape.table_len().next_multiple_of(self.shape.cluster());
        let taken = self.tail.take(len, i64::MAX as u64)?;
        let publish = || {
            if !taken.zeroed {
                clear(&**self.tail.store()?, taken.at, len)?;
                self.writeback.wrote_data(0);
            }
            top.table.publish(slot, taken.at)
        };
        publish().inspect_err(|_| self.tail.give(taken.at, len))?;
        Ok(taken.at)
    }

    /// See [`Format::prepare`](crate::format::Format::prepare): clusters of one table.
    pub(crate) fn prepare(&self, at: u64, len: u64) -> Result<Placement> {
        let top = self.top.read();
        let (slot, index) = self.split(at);
        self.table_for(&top, slot)?;
        let cluster = self.shape.cluster();
        let start = at & !(cluster - 1);
        let most = ((1 << self.shape.table_bits) - index).min((MAX_PLACEMENT >> self.shape.cluster_bits).max(1));
        let count = (at - start).saturating_add(len).div_ceil(cluster).clamp(1, most);
        let taken = self.tail.take(count * cluster, i64::MAX as u64)?;
        let len = (count * cluster).min(self.size().saturating_sub(start));
        Ok(Placement { at: start, len, store: 0, host: taken.at, zeroed: taken.zeroed, token: count })
    }

    /// Makes a placement's clusters visible.
    pub(crate) fn commit(&self, placement: &Placement) -> Result<()> {
        let top = self.top.read();
        let (slot, index) = self.split(placement.at);
        let table = self.table_for(&top, slot)?;
        let places = (0..placement.token).map(|i| placement.host + (i << self.shape.cluster_bits));
        // If this fails some may be in use already: none is given back.
        self.entries.publish(self.place_in(table, index), places)
    }

    pub(crate) fn cancel(&self, placement: &Placement) {
        self.tail.give(placement.host, placement.token << self.shape.cluster_bits);
    }

    /// Runs `change` for each cluster of a range that is not an absent one without a parent, until one is not done; returns how many bytes were.
    fn each_cluster(&self, at: u64, len: u64, mut change: impl FnMut(&Top, u64, Cluster) -> Result<bool>) -> Result<u64> {
        let top = self.top.read();
        let end = at.saturating_add(len);
        let mut here = at;
        while here < end {
            let (slot, index) = self.split(here);
            let (cluster, next) = match self.table_at(&top, slot)? {
                None if !self.parent => {
                    here = (slot + 1).saturating_mul(self.shape.covered()).min(end);
                    continue;
                }
                None => (Cluster::Absent, here + self.shape.cluster()),
                Some(table) => {
                    let place = self.place_in(table, index);
                    let raw = self.entries.get(place, 1)?.first().copied().unwrap_or(0);
                    (self.decode(&top, raw, place)?, here + self.shape.cluster())
                }
            };
            if (self.parent || cluster != Cluster::Absent) && !change(&top, here, cluster)? {
                break;
            }
            here = next.min(end);
        }
        Ok(here - at)
    }

    /// Puts an entry in the place of a cluster's.
    fn replace(&self, top: &Top, at: u64, entry: u64) -> Result<()> {
        let (slot, index) = self.split(at);
        let table = self.table_for(top, slot)?;
        self.entries.publish(self.place_in(table, index), [entry])
    }

    /// Has a cluster that is not in the file as it is read as zeros. `false`: the format has no word for that.
    fn make_zero(&self, top: &Top, at: u64) -> Result<bool> {
        match self.shape.zero {
            Some(zero) if self.parent => self.replace(top, at, zero).map(|()| true),
            _ if self.parent => Ok(false),
            _ => self.replace(top, at, 0).map(|()| true),
        }
    }

    /// See [`Format::zero`](crate::format::Format::zero).
    pub(crate) fn zero(&self, at: u64, len: u64, mode: ZeroMode) -> Result<u64> {
        self.each_cluster(at, len, |top, at, cluster| match cluster {
            Cluster::At(host) => self.tail.clear(host, self.shape.cluster(), mode),
            Cluster::Zero => Ok(true),
            Cluster::Absent | Cluster::Encoded(..) => self.make_zero(top, at),
        })
    }

    /// See [`Format::discard`](crate::format::Format::discard).
    pub(crate) fn discard(&self, at: u64, len: u64) -> Result<u64> {
        self.each_cluster(at, len, |top, at, cluster| match cluster {
            Cluster::At(host) => self.tail.punch(host, self.shape.cluster()),
            Cluster::Zero => Ok(true),
            Cluster::Absent | Cluster::Encoded(..) => self.make_zero(top, at),
        })
    }
}
