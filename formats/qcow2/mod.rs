//! qcow2, versions 2 and 3.
//!
//! A file is a set of clusters. Two levels of tables lead from guest clusters to host clusters (`l1`, `l2`, `entry`, `mapping`); two more count the
//! references to every host cluster (`refcount`), because clusters are shared with internal snapshots (`snapshots`) and between compressed clusters
//! (`compressed`). What the image's header says is in `header`.
//!
//! Source: QEMU's docs/interop/qcow2.rst.

#![expect(dead_code, reason = "the write path uses the rest")]

mod compressed;
mod entry;
mod header;
mod l1;
mod l2;
mod mapping;
mod open;
mod snapshots;

pub use open::open;

use crate::error::{Error, Result};
use crate::format::{Extent, Format, FormatLimits, Unit};
use crate::store::Store;
use crate::writeback::WriteBack;
use entry::Geometry;
use header::Header;
use l1::L1;
use l2::L2Cache;
use snapshots::Snapshot;
use std::io::IoSliceMut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The driver of an open qcow2 image.
pub struct Qcow2 {
    stores: Vec<Arc<dyn Store>>,
    writeback: Arc<WriteBack>,
    geometry: Geometry,
    /// As it was at open; what changes since is kept elsewhere.
    header: Header,
    size: AtomicU64,
    l1: L1,
    l2: L2Cache,
    snapshots: Vec<Snapshot>,
}

impl Qcow2 {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Damage was found: says so, and keeps the image from being changed any more.
    fn damage(&self, what: String, at: u64) -> Error {
        Error::corrupt(what).at_offset(at)
    }

    fn file(&self) -> &dyn Store {
        &*self.stores[0]
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
            read_only: true,
            cheap_zero: self.geometry.version >= 3,
            can_discard: true,
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

    fn describe(&self) -> serde_json::Value {
        open::describe(self)
    }
}
