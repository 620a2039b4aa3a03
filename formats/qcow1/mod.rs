//! Version 1 of qcow ("qcow" in QEMU), the predecessor of qcow2: two levels of tables, no reference counts, clusters that may be compressed.
//!
//! A header (`header.rs`), tables, clusters. [`crate::tree`] does most of the work. Compressed clusters lie anywhere, several in a sector; one that is written to
//! gets a place of its own, and its compressed bytes are lost space, as with QEMU: the format has no way to find them again. For the same reason no leaks are
//! counted. The format has no word for zeros that hide a backing file.
//!
//! The format does not say what a backing file is: somebody has to.

mod header;

use crate::device::ZeroMode;
use crate::drivers::{Capabilities, Driver, Opened, ParentRef, Request};
use crate::error::{Error, Kind, Result};
use crate::field::put;
use crate::format::{CheckReport, Extent, Format, FormatLimits, Placement, Unit};
use crate::qcow2::compressed;
use crate::store::Store;
use crate::table::Width;
use crate::tree::{Cluster, Layout, Shape, Tree};
use crate::writeback::WriteBack;
use header::{Header, field};
use std::io::IoSliceMut;
use std::sync::Arc;

/// QEMU's name of the format.
const NAME: &str = "qcow";
/// The bit of an entry that says that its cluster is compressed.
const COMPRESSED: u64 = 1 << 63;
/// The longest first-level table that is made, in bytes.
const MAX_TOP: u64 = 32 << 20;

/// The format's row in the table.
pub(crate) const DRIVER: Driver = Driver {
    name: NAME,
    aliases: &["qcow1"],
    recognise: |h| h.has(0, b"QFI\xfb") && h.be32(4) == Some(1),
    can: Capabilities { read: true, write: true, discard: true, cheap_zero: true, parent: true, check: true, repair: true, grow: true },
    open,
};

/// An open image.
struct Qcow1 {
    tree: Tree,
    header: Header,
}

fn decode(shape: &Shape, raw: u64) -> Option<Cluster> {
    if raw & COMPRESSED == 0 {
        return Some(Cluster::At(raw));
    }
    let bits = 63 - shape.cluster_bits;
    Some(Cluster::Encoded(raw & ((1 << bits) - 1), raw >> bits & (shape.cluster() - 1)))
}

fn open(request: Request<'_>) -> Result<Opened> {
    if request.snapshot_name.is_some() {
        return Err(Error::unsupported("qcow images of version 1 have no internal snapshots"));
    }
    let header = Header::read(&*request.store)?;
    let writeback = Arc::new(WriteBack::new(vec![request.store], request.redo));
    let shape = Shape {
        width: Width::Be64,
        cluster_bits: header.cluster_bits,
        table_bits: header.table_bits,
        zero: None,
        first: header.first,
        reuse: false,
        decode,
    };
    let layout = Layout {
        top_at: header.top_at,
        top_entries: header.top_entries,
        size: header.size,
        writable: request.writable,
        parent: header.backing.is_some(),
    };
    let parent = header.backing.clone().map(|name| ParentRef { names: vec![name], format: None, verify: None });
    let format = Arc::new(Qcow1 { tree: Tree::new(writeback.clone(), shape, &layout), header });
    Ok(Opened { format, writeback, parent })
}

impl Qcow1 {
    /// A copy of the first-level table with room for `entries`, durable at a place of its own.
    fn longer_top(&self, entries: u64) -> Result<u64> {
        let (at, old) = self.tree.top();
        let len = (entries * 8).next_multiple_of(self.tree.shape.cluster());
        let mut table = vec![0; usize::try_from(len).map_err(|_| Error::unsupported("the first-level table would be too long"))?];
        let own = usize::try_from(old * 8).unwrap_or(0).min(table.len());
        self.tree.writeback.read(0, at, table.get_mut(..own).unwrap_or_default())?;
        let taken = self.tree.tail.take(len, i64::MAX as u64)?;
        self.tree.writeback.write_through(0, taken.at, &table)?;
        Ok(taken.at)
    }
}

impl Format for Qcow1 {
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

    fn decode(&self, unit: &Unit, out: &mut [u8]) -> Result<()> {
        // Less than a cluster.
        let len = usize::try_from(unit.aux).unwrap_or(0).min(out.len());
        compressed::with_input(len, |input| {
            let got = self.tree.tail.store()?.read_at(&mut [IoSliceMut::new(input)], unit.id);
            let got = got.map_err(|e| Error::io("cannot read a compressed cluster", e).at_offset(unit.id))?;
            if compressed::fill_from_deflate(input.get(..got).unwrap_or_default(), out) {
                return Ok(());
            }
            Err(Error::corrupt("a compressed cluster cannot be decoded").at_offset(unit.id))
        })
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
        self.tree.find_space()
    }

    fn zero(&self, at: u64, len: u64, mode: ZeroMode) -> Result<u64> {
        self.tree.zero(at, len, mode)
    }

    fn discard(&self, at: u64, len: u64) -> Result<u64> {
        self.tree.discard(at, len)
    }

    fn grow(&self, size: u64) -> Result<()> {
        if !size.is_multiple_of(512) {
            return Err(Error::new(Kind::InvalidOption, format!("{size} is no multiple of 512")));
        }
        let (mut at, mut entries) = self.tree.top();
        let needed = size.div_ceil(self.tree.shape.covered());
        if needed.saturating_mul(8) > MAX_TOP {
            return Err(Error::unsupported(format!(
                "clusters of {} bytes are too small for a disk of that size",
                self.tree.shape.cluster()
            )));
        }
        self.tree.writeback.drain(self)?;
        if needed > entries {
            at = self.longer_top(needed)?;
            entries = needed;
        }
        // One write inside a sector, which cannot be torn.
        let mut header = self.header.bytes;
        put(&mut header, field::SIZE, &size.to_be_bytes());
        put(&mut header, field::TOP, &at.to_be_bytes());
        self.tree.writeback.write_through(0, 0, &header)?;
        self.tree.move_top(at, entries);
        self.tree.set_size(size);
        Ok(())
    }

    fn check(&self, repair: bool) -> Result<CheckReport> {
        self.tree.check(repair)
    }

    fn describe(&self) -> serde_json::Value {
        serde_json::json!({
            "cluster-size": self.tree.shape.cluster(),
            "table-entries": 1_u64 << self.header.table_bits,
        })
    }
}
