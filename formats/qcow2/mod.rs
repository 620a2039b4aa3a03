//! qcow2, versions 2 and 3.
//!
//! A file is a set of clusters. Two levels of tables lead from guest clusters to host clusters (`l1`, `l2`, `entry`, `mapping`); two more count the
//! references to every host cluster (`refcount`, `allocate`), because clusters are shared with internal snapshots (`snapshots`) and between compressed
//! clusters (`compressed`). Guest writes that need new clusters are in `write`, zeroing and discarding in `clear`; `metadata` knows which clusters must
//! not be overwritten. `create` makes new images. `check` compares refcounts and references, `repair` mends. What the image's header says is in `header`.
//!
//! Extended L2 entries say of each of a cluster's 32 subclusters where it is; the engine still maps and locks whole clusters. With an external data file
//! the guest's bytes lie in that, each at its own offset, and nothing of it is counted: the first of [`Format::stores`] has the metadata, the second
//! the data.
//!
//! # Order of changes
//! Raised refcounts and new tables are reservations, entries of L1 and L2 tables are publications (see [`crate::writeback`]). Refcounts are lowered
//! when the entries that referred to the cluster are durably gone.
//!
//! # Locks, in order
//! `table_locks` (making an L2 table), an L1 slot's `table`, the refcounts' state, `metadata`.
//!
//! Source: QEMU's docs/interop/qcow2.rst.

mod allocate;
mod bitmaps;
mod check;
mod clear;
pub(crate) mod compressed;
mod counts;
pub mod create;
mod entry;
mod grow;
mod header;
mod l1;
mod l2;
mod mapping;
mod metadata;
mod open;
mod refcount;
mod repair;
mod snapshots;
mod write;

pub use open::open;

use crate::device::ZeroMode;
use crate::error::{Error, Result};
use crate::format::{CheckReport, Extent, Format, FormatLimits, Placement, Unit};
use crate::store::Store;
use crate::writeback::{Freed, WriteBack};
use clear::Space;
use entry::Geometry;
use header::{AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA_FILE, Header, field, incompatible};
use l1::L1;
use l2::L2Cache;
use metadata::BITMAP_LIST;
use parking_lot::Mutex;
use refcount::Refcounts;
use snapshots::Snapshot;
use std::io::IoSliceMut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The driver of an open qcow2 image.
pub struct Qcow2 {
    stores: Vec<Arc<dyn Store>>,
    writeback: Arc<WriteBack>,
    geometry: Geometry,
    /// As it was at open; what changes since is kept elsewhere.
    header: Header,
    size: AtomicU64,
    /// The header does not have `size` yet.
    size_pending: AtomicBool,
    l1: L1,
    l2: L2Cache,
    snapshots: Vec<Snapshot>,
    /// Length of the snapshot table in bytes.
    snapshots_len: u64,
    /// Present if the image may be changed.
    refcounts: Option<Refcounts>,
    table_locks: Arc<[Mutex<()>]>,
    /// The incompatible feature bits as they are in the file.
    incompatible: Mutex<u64>,
    /// The autoclear feature bits as they are in the file.
    autoclear: Mutex<u64>,
    /// Damage was found: nothing is changed any more.
    damaged: AtomicBool,
}

impl Qcow2 {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Damage was found at host offset `at`: see [`Self::mark_damaged`].
    fn damage(&self, what: String, at: u64) -> Error {
        let error = Error::corrupt(what).at_offset(at);
        self.mark_damaged(&error);
        error
    }

    /// Keeps an image that was found damaged from being changed any more, now and, by its corrupt bit, later.
    fn mark_damaged(&self, error: &Error) {
        if self.refcounts.is_none() || self.damaged.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::error!(error = %error.chain(), "the image is damaged: it is marked so and not changed any more");
        if self.geometry.version >= 3
            && let Err(error) = self.set_incompatible(incompatible::CORRUPT, 0)
        {
            tracing::error!(error = %error.chain(), "the image could not be marked as damaged");
        }
    }

    /// Sets and clears incompatible feature bits, durably.
    fn set_incompatible(&self, set: u64, clear: u64) -> Result<()> {
        let mut bits = self.incompatible.lock();
        let new = *bits & !clear | set;
        if new != *bits {
            self.writeback.write_through(0, field::INCOMPATIBLE, &new.to_be_bytes())?;
            *bits = new;
        }
        Ok(())
    }

    /// Before the first change: nothing here keeps up what an autoclear bit may stand for.
    fn clear_autoclear(&self) -> Result<()> {
        let Some(refcounts) = &self.refcounts else { return Ok(()) };
        let mut bits = self.autoclear.lock();
        let mut keep = if self.raw_data_file() { AUTOCLEAR_RAW_DATA_FILE } else { 0 };
        if let Some(at) = self.header.bitmaps.filter(|_| *bits & AUTOCLEAR_BITMAPS != 0) {
            let file_len = self.file_len()?;
            // Only where the list is what it claims to be may it be written to.
            let list = refcounts.metadata.what(at.at) == Some(BITMAP_LIST) && refcounts.count(at.at)? == 1;
            if list && bitmaps::mark_in_use(&self.writeback, at, file_len).is_ok() {
                keep |= AUTOCLEAR_BITMAPS;
            }
        }
        if *bits != keep {
            self.writeback.write_through(0, field::AUTOCLEAR, &keep.to_be_bytes())?;
            *bits = keep;
        }
        Ok(())
    }

    fn file_len(&self) -> Result<u64> {
        self.file().len().map_err(|e| Error::io("cannot find out the length of the file", e))
    }

    fn file(&self) -> &dyn Store {
        &*self.stores[0]
    }

    /// Where the guest's clusters are.
    fn guest_file(&self) -> &dyn Store {
        self.stores.get(self.geometry.data_store()).map_or_else(|| self.file(), |store| &**store)
    }

    /// The data file is to be what a raw image with the guest's bytes is. Where something shows through from below it cannot be.
    fn raw_data_file(&self) -> bool {
        self.geometry.data_file && self.header.autoclear & AUTOCLEAR_RAW_DATA_FILE != 0 && self.header.backing.is_none()
    }
}

impl Format for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn limits(&self) -> FormatLimits {
        FormatLimits {
            size: self.size(),
            sector: 512,
            physical_sector: 4096,
            unit: self.geometry.cluster_size(),
            read_only: self.refcounts.is_none(),
            cheap_zero: self.geometry.version >= 3,
            // Version 2 cannot say that a cluster is zero where a parent shows through.
            can_discard: self.geometry.version >= 3 || self.header.backing.is_none(),
            thin: true,
            holes_are_zeros: false,
        }
    }

    fn stores(&self) -> &[Arc<dyn Store>] {
        &self.stores
    }

    fn map(&self, at: u64, want: u64) -> Result<Extent> {
        self.map_run(at, want)
    }

    fn decode(&self, unit: &Unit, out: &mut [u8]) -> Result<()> {
        // At most two clusters (see `Entry::Compressed`).
        let len = usize::try_from(unit.aux).unwrap_or(0).min(2 << 21);
        compressed::with_input(len, |input| {
            // The last sector may lie beyond the end of the file.
            let got = self.file().read_at(&mut [IoSliceMut::new(input)], unit.id);
            let got = got.map_err(|e| Error::io("cannot read a compressed cluster", e).at_offset(unit.id))?;
            let input = input.get(..got).unwrap_or_default();
            compressed::decode(self.header.compression, input, out).map_err(|e| e.at_offset(unit.id))
        })
    }

    fn prepare(&self, at: u64, len: u64) -> Result<Placement> {
        self.prepare_write(at, len)
    }

    fn commit(&self, placement: Placement) -> Result<()> {
        self.commit_write(&placement)
    }

    fn cancel(&self, placement: Placement) {
        self.cancel_write(&placement);
    }

    fn first_write(&self) -> Result<()> {
        self.clear_autoclear()
    }

    fn zero(&self, at: u64, len: u64, mode: ZeroMode) -> Result<u64> {
        self.clear(at, len, if mode == ZeroMode::MayUnmap { Space::Free } else { Space::Keep })
    }

    fn discard(&self, at: u64, len: u64) -> Result<u64> {
        self.clear(at, len, Space::Free)
    }

    fn flush(&self) -> Result<()> {
        self.flush_size()
    }

    fn grow(&self, size: u64) -> Result<()> {
        self.grow_to(size)
    }

    fn reclaim(&self, freed: &[Freed]) -> Result<()> {
        self.reclaim_clusters(freed)
    }

    fn check(&self, repair: bool) -> Result<CheckReport> {
        self.check_image(repair)
    }

    fn describe(&self) -> serde_json::Value {
        open::describe(self)
    }
}
