//! QED: QEMU's image format of 2010, with two levels of tables and no reference counts.
//!
//! A header (`header.rs`), tables, clusters. [`crate::tree`] does most of the work. While clusters are added the header says that the image needs a check, which
//! is taken back by a clean close; an image that says so when it is opened for writing is checked, and what nothing leads to is cut off.
//!
//! # Backing files
//! The header can say that the backing file is raw. It has no word for any other format: QEMU then guesses, which a guest that had the file as its raw disk could
//! abuse. Here somebody has to say it.

mod header;

use crate::device::ZeroMode;
use crate::drivers::{Capabilities, Driver, Opened, ParentRef, Request};
use crate::error::{Error, Kind, Result};
use crate::format::{CheckReport, Extent, Format, FormatLimits, Placement};
use crate::store::Store;
use crate::table::Width;
use crate::tree::{Cluster, Layout, Shape, Tree};
use crate::writeback::WriteBack;
use header::{Header, MAGIC, feature, field};
use parking_lot::Mutex;
use std::sync::Arc;

/// QEMU's name of the format.
const NAME: &str = "qed";
/// The entry of a cluster of zeros.
const ZERO: u64 = 1;

/// The format's row in the table.
pub(crate) const DRIVER: Driver = Driver {
    name: NAME,
    aliases: &[],
    recognise: |h| h.has(0, MAGIC),
    can: Capabilities { read: true, write: true, discard: true, cheap_zero: true, parent: true, check: true, repair: true, grow: true },
    open,
};

/// An open QED image.
struct Qed {
    tree: Tree,
    header: Header,
    state: Mutex<State>,
}

#[derive(Clone, Copy)]
struct State {
    /// As they are in the file.
    features: u64,
    /// It needed a check when it was opened, and has not had it: that stays to be seen.
    unchecked: bool,
}

fn open(request: Request<'_>) -> Result<Opened> {
    if request.snapshot_name.is_some() {
        return Err(Error::unsupported("QED images have no internal snapshots"));
    }
    let header = Header::read(&*request.store)?;
    let writeback = Arc::new(WriteBack::new(vec![request.store], request.redo));
    let shape = Shape {
        width: Width::Le64,
        cluster_bits: header.cluster.trailing_zeros(),
        table_bits: header.entries().trailing_zeros(),
        zero: Some(ZERO),
        first: header.header_len,
        reuse: true,
        decode: |shape, raw| raw.is_multiple_of(shape.cluster()).then_some(Cluster::At(raw)),
    };
    let layout = Layout {
        top_at: header.top_at,
        top_entries: header.entries(),
        size: header.size,
        writable: request.writable,
        parent: header.backing.is_some(),
    };
    let parent = header.backing.clone().map(|name| ParentRef {
        names: vec![name],
        format: (header.features & feature::BACKING_IS_RAW != 0).then(|| "raw".to_owned()),
        verify: None,
    });
    let needs_check = header.features & feature::NEED_CHECK != 0;
    let state = Mutex::new(State { features: header.features, unchecked: needs_check });
    let image = Qed { tree: Tree::new(writeback.clone(), shape, &layout), header, state };
    if needs_check {
        image.after_no_close(request.writable, request.repair)?;
    }
    Ok(Opened { format: Arc::new(image), writeback, parent })
}

impl Qed {
    /// The image was not closed: before it is changed its tables must be in order.
    fn after_no_close(&self, writable: bool, repair: bool) -> Result<()> {
        if !writable || repair {
            tracing::warn!("the image was not closed cleanly");
            return Ok(());
        }
        let report = self.check(true)?;
        self.tree.writeback.drain(self)?;
        let left = report.corruptions.saturating_sub(report.corruptions_fixed);
        if left > 0 {
            return Err(Error::corrupt(format!(
                "the image was not closed cleanly and cannot be mended: {left} corruptions, the first: {}",
                report.notes.first().map_or("", String::as_str)
            )));
        }
        tracing::warn!(
            corruptions = report.corruptions,
            leaks = report.leaks,
            "the image was not closed cleanly: it was checked, and mended where that was needed"
        );
        Ok(())
    }

    /// Says in the header whether the image needs a check, durably.
    fn mark(&self, needs_check: bool) -> Result<()> {
        let mut state = self.state.lock();
        let new = state.features & !feature::NEED_CHECK | if needs_check { feature::NEED_CHECK } else { 0 };
        if new != state.features {
            self.tree.writeback.write_through(0, field::FEATURES, &new.to_le_bytes())?;
            state.features = new;
        }
        Ok(())
    }
}

impl Format for Qed {
    fn name(&self) -> &'static str {
        NAME
    }

    fn limits(&self) -> FormatLimits {
        self.tree.limits()
    }

    fn stores(&self) -> &[Arc<dyn Store>] {
        self.tree.writeback.stores()
    }

    fn map(&self, at: u64, want: u64) -> Result<Extent> {
        self.tree.map(at, want)
    }

    fn prepare(&self, at: u64, len: u64) -> Result<Placement> {
        self.tree.prepare(at, len)
    }

    fn commit(&self, placement: Placement) -> Result<()> {
        self.tree.commit(&placement)
    }

    fn cancel(&self, placement: Placement) {
        self.tree.cancel(&placement);
    }

    fn first_write(&self) -> Result<()> {
        self.tree.find_space()?;
        if self.header.autoclear != 0 {
            // Nothing here keeps up what such a bit may stand for.
            self.tree.writeback.write_through(0, field::AUTOCLEAR, &[0; 8])?;
        }
        self.mark(true)
    }

    fn zero(&self, at: u64, len: u64, mode: ZeroMode) -> Result<u64> {
        self.tree.zero(at, len, mode)
    }

    fn discard(&self, at: u64, len: u64) -> Result<u64> {
        self.tree.discard(at, len)
    }

    fn grow(&self, size: u64) -> Result<()> {
        let most = self.header.most();
        if size > most || !size.is_multiple_of(512) {
            return Err(Error::new(
                Kind::InvalidOption,
                format!("a disk of {size} bytes: this QED image can have whole sectors up to {most} bytes"),
            ));
        }
        self.tree.writeback.write_through(0, field::SIZE, &size.to_le_bytes())?;
        self.tree.set_size(size);
        Ok(())
    }

    fn check(&self, repair: bool) -> Result<CheckReport> {
        let report = self.tree.check(repair)?;
        if repair && report.corruptions == report.corruptions_fixed {
            self.state.lock().unchecked = false;
        }
        Ok(report)
    }

    fn describe(&self) -> serde_json::Value {
        serde_json::json!({
            "cluster-size": self.header.cluster,
            "table-size": self.header.table_clusters,
            "need-check": self.state.lock().features & feature::NEED_CHECK != 0,
        })
    }

    /// Takes back what [`Self::first_write`] has said.
    fn close(&self) -> Result<()> {
        if self.state.lock().unchecked { Ok(()) } else { self.mark(false) }
    }
}
