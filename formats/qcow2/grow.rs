//! Growing the guest's disk: a longer L1 table if need be, then the size.
//!
//! The header gets the new size only at the next flush, behind a drain: the engine has cleared by then what would show through in the new part, and a power
//! cut leaves either the old size or a new part of zeros.

use super::Qcow2;
use super::clear::Space;
use super::entry::MAX_L1_BYTES;
use super::header::field;
use crate::error::{Error, Kind, Result};
use crate::format::Place;
use crate::writeback::Freed;
use std::sync::atomic::Ordering;

impl Qcow2 {
    /// See [`Format::grow`](crate::format::Format::grow). The caller excludes everything else.
    pub(super) fn grow_to(&self, size: u64) -> Result<()> {
        self.changeable()?;
        let refuse = |why: String| Err(Error::new(Kind::InvalidOption, format!("the image cannot grow to {size} bytes: {why}")));
        let needed = self.geometry.l1_entries_for(size);
        if !size.is_multiple_of(512) {
            return refuse("sizes are multiples of 512".into());
        }
        if size > i64::MAX as u64 || needed * 8 > MAX_L1_BYTES {
            let most = (MAX_L1_BYTES / 8).checked_shl(self.geometry.table_bits()).map_or(i64::MAX as u64, |m| m.min(i64::MAX as u64));
            return refuse(format!("{most} is the most at this cluster size"));
        }
        if self.snapshots.iter().any(|s| s.disk_size.is_none()) {
            return refuse("its snapshots do not say which size they have (delete them first)".into());
        }
        if needed > self.l1.entries() {
            self.grow_l1(needed)?;
        }
        if self.raw_data_file() {
            self.grow_data_file(size)?;
        }
        let old = self.size.swap(size, Ordering::AcqRel);
        self.clear_beyond(old, size).inspect_err(|_| self.size.store(old, Ordering::Release))?;
        self.size_pending.store(true, Ordering::Release);
        Ok(())
    }

    /// Gives up clusters behind the old end, which an image has that was larger once: they would show as new space.
    fn clear_beyond(&self, old: u64, size: u64) -> Result<()> {
        let mut at = self.geometry.round_up(old);
        while at < size {
            let run = self.map_run(at, size - at)?;
            if !matches!(run.place, Place::Parent | Place::Zero { .. }) {
                // All of its cluster lies behind the end.
                let start = at - self.geometry.in_cluster(at);
                let len = self.geometry.round_up(at + run.len - start);
                let cleared = self.clear(start, len, Space::Free)?;
                if cleared < len.min(size - start) {
                    return Err(Error::unsupported("the image has data behind its end, which this version of the format cannot give up"));
                }
            }
            at += run.len;
        }
        Ok(())
    }

    /// Makes the data file as long as the disk, with zeros in the new part.
    fn grow_data_file(&self, size: u64) -> Result<()> {
        let (store, old) = (self.guest_file(), self.size());
        let len = store.len().map_err(|e| Error::io("cannot find out the length of the data file", e))?;
        if len > old {
            crate::space::clear(store, old, len.min(size).saturating_sub(old))?;
        }
        if len < size {
            store.set_len(size).map_err(|e| Error::io(format!("cannot extend the data file to {size} bytes"), e))?;
        }
        self.writeback.wrote_data(self.geometry.data_store());
        Ok(())
    }

    /// Puts a size that is not yet in the header there; what the size makes visible becomes durable first.
    pub(super) fn flush_size(&self) -> Result<()> {
        if self.size_pending.load(Ordering::Acquire) {
            self.writeback.drain(self)?;
            self.writeback.publish(0, field::SIZE, &self.size().to_be_bytes())?;
            self.size_pending.store(false, Ordering::Release);
        }
        Ok(())
    }

    fn grow_l1(&self, entries: u64) -> Result<()> {
        let refcounts = self.changeable()?;
        let g = self.geometry;
        let (old_at, old_entries) = (self.l1.at(), self.l1.entries());
        let (old_len, room) = (old_entries * 8, g.round_up(old_entries * 8));
        let at = if entries * 8 <= room {
            // The rest of its last cluster may hold anything.
            let rest = usize::try_from((entries - old_entries) * 8).unwrap_or(0);
            self.writeback.reserve(0, old_at + old_len, &vec![0; rest])?;
            old_at
        } else {
            let taken = self.noting_damage(refcounts.allocate_contiguous(g.clusters(entries * 8)))?;
            let mut bytes = self.l1.to_bytes(entries);
            bytes.resize(usize::try_from(g.round_up(entries * 8)).unwrap_or(0), 0);
            self.writeback.reserve(0, taken.at, &bytes)?;
            taken.at
        };
        let mut switch = [0; 12];
        switch[..4].copy_from_slice(&u32::try_from(entries).unwrap_or(0).to_be_bytes());
        switch[4..].copy_from_slice(&at.to_be_bytes());
        self.writeback.publish(0, field::L1_ENTRIES, &switch)?;
        self.l1.moved(at, entries);
        if at != old_at {
            refcounts.metadata.remove_run(old_at);
            refcounts.metadata.add_run(at, g.round_up(entries * 8), "L1 table");
            if room > 0 {
                self.writeback.release(Freed { store: 0, at: old_at, len: room });
            }
        }
        Ok(())
    }
}
