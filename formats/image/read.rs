//! The read loop: from the map to the bytes, through the chain of parents.

use super::Image;
use crate::error::{Error, Result};
use crate::format::{MAX_UNIT, Place, Unit};
use crate::segments::CursorMut;
use std::io::IoSliceMut;
use std::sync::Arc;

impl Image {
    /// Fills the next `len` bytes of `into` from `at`. The range lies inside the device.
    pub(super) fn read_chain(&self, into: &mut CursorMut<'_, '_>, mut at: u64, mut len: u64) -> Result<()> {
        let _io = self.writeback.enter();
        let mut next = None;
        while len > 0 {
            let extent = match next.take() {
                Some(extent) => extent,
                None => self.format.map(at, len)?,
            };
            let mut run = extent.len.min(len);
            if run == 0 {
                return Err(Error::corrupt("the format returned an empty extent").at_path(&self.path).at_offset(at));
            }
            match extent.place {
                Place::Data { store, at: host, .. } => {
                    // Neighbours in the guest that are neighbours in the file are one read.
                    while run < len {
                        let more = self.format.map(at + run, len - run)?;
                        match more.place {
                            Place::Data { store: s, at: h, .. } if s == store && Some(h) == host.checked_add(run) && more.len > 0 => {
                                run += more.len.min(len - run)
                            }
                            _ => {
                                next = Some(more);
                                break;
                            }
                        }
                    }
                    self.read_store(into, store, host, run)?;
                }
                Place::Zero { .. } => into.zero(run),
                Place::Parent => self.read_parent(into, at, run)?,
                Place::Encoded { unit, skip } => {
                    let decoded = self.decoded(unit)?;
                    let start = usize::try_from(skip).unwrap_or(usize::MAX);
                    let bytes = usize::try_from(run).ok().and_then(|n| decoded.get(start..start.checked_add(n)?));
                    into.copy_from(bytes.ok_or_else(|| {
                        Error::corrupt("an encoded unit is shorter than its extent").at_path(&self.path).at_offset(unit.id)
                    })?);
                }
            }
            at += run;
            len -= run;
        }
        Ok(())
    }

    fn read_store(&self, into: &mut CursorMut<'_, '_>, store: usize, host: u64, len: u64) -> Result<()> {
        let mut parts = into.take(len);
        let got = self.store(store)?.read_at(&mut parts, host).map_err(|e| self.io_error("cannot read", e, store, host))?;
        if (got as u64) < len {
            // The file ends inside its last unit: what is not there reads as zeros. `read_at` may have used up the buffer list, so the
            // missing bytes are found again from its end.
            let missing = len - got as u64;
            let mut left = missing;
            for part in parts.iter_mut().rev() {
                let count = left.min(part.len() as u64);
                let start = part.len() - usize::try_from(count).unwrap_or(0);
                part[start..].fill(0);
                left -= count;
                if left == 0 {
                    break;
                }
            }
        }
        Ok(())
    }

    fn read_parent(&self, into: &mut CursorMut<'_, '_>, at: u64, len: u64) -> Result<()> {
        let Some(parent) = &self.parent else {
            into.zero(len);
            return Ok(());
        };
        let there = parent.size().saturating_sub(at).min(len);
        if there > 0 {
            parent.read_chain(into, at, there)?;
        }
        // A parent that is shorter than its child reads as zeros beyond its end.
        into.zero(len - there);
        Ok(())
    }

    /// A decoded unit, from the cache if it can.
    pub(super) fn decoded(&self, unit: Unit) -> Result<Arc<Vec<u8>>> {
        if unit.decoded_len > MAX_UNIT {
            return Err(Error::corrupt(format!("an encoded unit of {} bytes; the largest allowed is {MAX_UNIT}", unit.decoded_len))
                .at_path(&self.path));
        }
        let len = unit.decoded_len as usize;
        self.cache.get((self.id, unit.id), len, |out| {
            out.resize(len, 0);
            self.format.decode(&unit, out).map_err(|e| e.at_path(&self.path))
        })
    }

    /// The whole range in one piece of plain data, from the page cache. `false`: it is not.
    pub(super) fn try_read_data(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> Result<bool> {
        let len = crate::segments::total_mut(bufs);
        let _io = self.writeback.enter();
        if len == 0 {
            return Ok(true);
        }
        let extent = self.format.map(at, len)?;
        let Place::Data { store, at: host, .. } = extent.place else { return Ok(false) };
        if extent.len < len {
            return Ok(false);
        }
        let got = self.store(store)?.try_read_at(bufs, host).map_err(|e| self.io_error("cannot read", e, store, host))?;
        Ok(got == Some(usize::try_from(len).unwrap_or(usize::MAX)))
    }
}
