//! VDI: VirtualBox's image format; dynamic, static and differencing.
//!
//! A header (`header.rs`), a map of blocks, the blocks, numbered as they lie in the file. [`crate::flat`] does most of the work.
//!
//! # The count of blocks
//! The header says how many blocks the file holds, and other programs put their next one behind that many. So the count is in the file before the entry of a
//! new block is: a cut between the two leaves a block that is counted and not used, never one that is used and not counted. Such blocks are used first later
//! on; `check` calls them leaks (QEMU's calls the difference an error), and mends them by moving the last blocks into their places.
//!
//! # Zeros
//! Since blocks are counted, none can be given up; zeroed and discarded ones become holes of the host's file. Where the map has no block yet, a word of its own
//! hides the parent's data.
//!
//! # Parents
//! A differencing image knows its parent by UUID alone. It is looked for among the files beside the image, and one directory up if the image lies in
//! one that is called `Snapshots`, as VirtualBox has it.

mod check;
mod header;
mod parent;

use crate::device::ZeroMode;
use crate::drivers::{Capabilities, Driver, Opened, Request};
use crate::error::{Error, Kind as ErrorKind, Result};
use crate::flat::{Flat, Layout, Meaning};
use crate::format::{CheckReport, Extent, Format, FormatLimits, Placement};
use crate::store::Store;
use crate::table::Width;
use crate::writeback::WriteBack;
use header::{ABSENT, ENTRY, Header, Kind, ZERO, field};
use parking_lot::Mutex;
use std::sync::Arc;
use uuid::Uuid;

/// QEMU's name of the format.
const NAME: &str = "vdi";

/// The format's row in the table.
pub(crate) const DRIVER: Driver = Driver {
    name: NAME,
    aliases: &[],
    recognise: |h| h.has(header::SIGNATURE.0, &header::SIGNATURE.1.to_le_bytes()),
    can: Capabilities { read: true, write: true, discard: true, cheap_zero: true, parent: true, check: true, repair: true, grow: true },
    open,
};

/// An open VDI.
struct Vdi {
    flat: Flat,
    header: Header,
    /// What changes in the header, as it is going to be in the file.
    state: Mutex<State>,
}

#[derive(Clone, Copy)]
struct State {
    /// The count of blocks.
    allocated: u64,
    /// UUID of the contents.
    modified: Uuid,
    /// Entries of the map.
    blocks: u64,
}

fn open(request: Request<'_>) -> Result<Opened> {
    if request.snapshot_name.is_some() {
        return Err(Error::unsupported("VDI images have no internal snapshots: VirtualBox keeps them as images of their own"));
    }
    let header = Header::read(&*request.store)?;
    let parent = (header.kind == Kind::Differencing).then(|| parent::of(&header, request.path)).transpose()?;
    let writeback = Arc::new(WriteBack::new(vec![request.store], request.redo));
    let meaning = Meaning {
        width: Width::Le32,
        absent: ABSENT,
        zero: Some(ZERO),
        base: header.data_at,
        step: header.block + header.extra,
        before: header.extra,
        first: header.data_at,
        largest: header.blocks.saturating_sub(1).min(ZERO - 1),
    };
    let layout = Layout {
        table_at: header.map_at,
        unit: header.block,
        size: header.size,
        writable: request.writable,
        parent: header.kind == Kind::Differencing,
    };
    let flat = Flat::new(writeback.clone(), meaning, &layout);
    let state = State { allocated: header.allocated, modified: header.own().1, blocks: header.blocks };
    Ok(Opened { format: Arc::new(Vdi { flat, header, state: Mutex::new(state) }), writeback, parent })
}

impl Vdi {
    /// Sets the count of blocks, before the entry of the last of them is.
    fn count(&self, allocated: u64) -> Result<()> {
        let mut state = self.state.lock();
        if allocated > state.allocated {
            self.put_count(allocated)?;
            state.allocated = allocated;
        }
        Ok(())
    }

    fn put_count(&self, allocated: u64) -> Result<()> {
        let count = u32::try_from(allocated).map_err(|_| Error::new(ErrorKind::NoSpace, "a VDI cannot hold more blocks"))?;
        self.flat.writeback.reserve(0, field::ALLOCATED as u64, &count.to_le_bytes())
    }

    /// Where blocks end that the header counts, in bytes.
    fn counted_end(&self) -> u64 {
        let m = &self.flat.meaning;
        m.base.saturating_add(self.state.lock().allocated.min(self.flat.largest().saturating_add(1)).saturating_mul(m.step))
    }
}

impl Format for Vdi {
    fn name(&self) -> &'static str {
        NAME
    }

    fn limits(&self) -> FormatLimits {
        FormatLimits { thin: self.header.kind != Kind::Static, ..self.flat.limits() }
    }

    fn stores(&self) -> &[Arc<dyn Store>] {
        self.flat.writeback.stores()
    }

    fn map(&self, at: u64, want: u64) -> Result<Extent> {
        self.flat.map(at, want)
    }

    fn prepare(&self, at: u64, _len: u64) -> Result<Placement> {
        self.flat.prepare(at)
    }

    fn commit(&self, placement: Placement) -> Result<()> {
        if let Some(entry) = self.flat.entry_of(&placement) {
            self.count(entry + 1).inspect_err(|_| self.flat.cancel(&placement))?;
        }
        self.flat.commit(&placement)
    }

    fn cancel(&self, placement: Placement) {
        self.flat.cancel(&placement);
    }

    /// Finds the free space, and gives the contents another UUID, so that children of this image notice.
    fn first_write(&self) -> Result<()> {
        self.flat.find_space(self.counted_end())?;
        let modified = Uuid::new_v4();
        self.flat.writeback.write_through(0, field::MODIFIED as u64, &modified.to_bytes_le())?;
        self.state.lock().modified = modified;
        Ok(())
    }

    fn zero(&self, at: u64, len: u64, mode: ZeroMode) -> Result<u64> {
        self.flat.zero(at, len, mode)
    }

    fn discard(&self, at: u64, len: u64) -> Result<u64> {
        self.flat.discard(at, len)
    }

    fn grow(&self, size: u64) -> Result<()> {
        if self.header.kind == Kind::Static {
            return Err(Error::unsupported("a static VDI cannot grow: all its blocks are in the file from the start"));
        }
        let blocks = size.div_ceil(self.header.block);
        let room = ((self.header.data_at - self.header.map_at) / ENTRY).min(ZERO);
        if blocks > room {
            let most = room.saturating_mul(self.header.block);
            return Err(Error::unsupported(format!(
                "this VDI cannot grow beyond {most} bytes: blocks follow its map, which has no room for more"
            )));
        }
        if !size.is_multiple_of(512) {
            return Err(Error::new(ErrorKind::InvalidOption, format!("{size} is no multiple of 512")));
        }
        self.flat.writeback.drain(self)?;
        let mut state = self.state.lock();
        let blocks = blocks.max(state.blocks);
        self.flat.grow(size, || {
            // One sector, which cannot be torn: the size and the length of the map.
            let mut sector = [0; header::LEN];
            self.flat.writeback.read(0, 0, &mut sector)?;
            crate::field::put(&mut sector, field::SIZE, &size.to_le_bytes());
            crate::field::put(&mut sector, field::BLOCKS, &u32::try_from(blocks).unwrap_or(u32::MAX).to_le_bytes());
            self.flat.writeback.write_through(0, 0, &sector)
        })?;
        state.blocks = blocks;
        // No entry is larger than the map is long.
        self.flat.set_largest(blocks.saturating_sub(1).min(ZERO - 1));
        Ok(())
    }

    fn check(&self, repair: bool) -> Result<CheckReport> {
        self.look_for_damage(repair)
    }

    fn identity(&self) -> Option<String> {
        Some(self.header.own().0.to_string())
    }

    fn describe(&self) -> serde_json::Value {
        let (own, _) = self.header.own();
        let (parent, parent_modified) = self.header.parent();
        let state = *self.state.lock();
        let mut map = serde_json::json!({
            "subformat": self.header.kind.name(),
            "block-size": self.header.block,
            "allocated-blocks": state.allocated,
            "uuid": own.to_string(),
            "modification-uuid": state.modified.to_string(),
            "comment": self.header.comment(),
        });
        if let Some(map) = map.as_object_mut().filter(|_| self.header.kind == Kind::Differencing) {
            map.insert("parent-uuid".to_owned(), parent.to_string().into());
            map.insert("parent-modification-uuid".to_owned(), parent_modified.to_string().into());
        }
        map
    }
}
