//! VHDX: Hyper-V's image format, as [MS-VHDX] specifies it; fixed, dynamic and differencing, with 512- and 4096-byte sectors.
//!
//! A file is a header section (`header.rs`, `region.rs`), a log (`log.rs`, `log_writer.rs`), the metadata (`metadata.rs`, `locator.rs`), a block allocation
//! table (`bat.rs`), and blocks anywhere between and behind those: payload blocks, and in differencing images sector bitmaps (`bitmap.rs`).
//!
//! # Opening
//! The newer valid header says whether the log must be replayed: into the file when it is writable, otherwise into memory (`overlay.rs`). Only then is
//! anything else looked at.
//!
//! # Changing
//! New blocks are taken from the free space of the file or from its end, filled, and then published by an entry of the table (`update.rs`). Everything
//! that is published goes through the log, many changes to an entry of it; headers are written in place, one copy after the other.

mod bat;
mod check;
mod grow;
mod header;
mod locator;
mod log;
mod log_writer;
mod metadata;
mod overlay;
mod region;
mod update;

use crate::bitmap::{BitOrder, Bitmaps};
use crate::device::ZeroMode;
use crate::drivers::{Capabilities, Driver, Opened, ParentRef, Request};
use crate::error::{Error, Result};
use crate::format::{CheckReport, Extent, Format, FormatLimits, Place, Placement};
use crate::redo::RedoLog;
use crate::space::Space;
use crate::store::Store;
use crate::writeback::{Freed, MetaWrite, WriteBack};
use bat::{Bat, Geometry, Payload};
use header::Headers;
use locator::Locator;
pub(crate) use locator::{below_root, separators};
use log_writer::LogWriter;
use metadata::Metadata;
use overlay::Overlay;
use parking_lot::{Mutex, RwLock};
use region::Regions;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use uuid::Uuid;

/// The format's row in the table.
pub(crate) const DRIVER: Driver = Driver {
    name: "vhdx",
    aliases: &[],
    recognise: |h| h.has(0, b"vhdxfile"),
    can: Capabilities { read: true, write: true, discard: true, cheap_zero: true, parent: true, check: true, repair: true, grow: true },
    open,
};

fn open(request: Request<'_>) -> Result<Opened> {
    if request.snapshot_name.is_some() {
        return Err(Error::unsupported("VHDX images have no internal snapshots"));
    }
    let image = Vhdx::open(request.store, request.writable, request.redo)?;
    let parent = image.parent();
    let writeback = image.writeback.clone();
    Ok(Opened { format: Arc::new(image), writeback, parent })
}

/// Runs of zeros, or of the parent's bytes, are followed over at most this many blocks at once.
const MAX_RUN: u64 = 4096;

/// What changes place when the disk grows.
struct Layout {
    regions: Regions,
    bat: Bat,
}

/// An open VHDX image.
pub struct Vhdx {
    writeback: Arc<WriteBack>,
    writable: bool,
    headers: Mutex<Headers>,
    metadata: Metadata,
    geometry: Geometry,
    locator: Option<Locator>,
    /// Size of the disk in bytes.
    size: AtomicU64,
    /// Length of the file when last looked at, in bytes.
    file_len: AtomicU64,
    layout: RwLock<Layout>,
    bitmaps: Bitmaps<4096>,
    log: Mutex<LogWriter>,
    /// Free space; known from the first change on.
    space: Mutex<Option<Space>>,
    /// Held while a sector bitmap is added.
    new_bitmap: Mutex<()>,
    /// The log was replayed when the image was opened.
    replayed: bool,
}

impl Vhdx {
    /// Opens an image in `store`, and replays its log if it was not closed cleanly.
    ///
    /// # Errors
    /// `InvalidFormat`, `Unsupported` or `Corrupt`, with the byte offset; the host's.
    pub fn open(store: Arc<dyn Store>, writable: bool, redo: Box<dyn RedoLog>) -> Result<Self> {
        let mut headers = Headers::read(&*store)?;
        let replayed = !headers.current.log.is_nil();
        let (store, writeback) = if !replayed {
            (store.clone(), WriteBack::new(vec![store], redo))
        } else if writable {
            let writeback = WriteBack::new(vec![store.clone()], redo);
            recover(&*store, &mut headers, &writeback)?;
            (store, writeback)
        } else {
            let mut overlay = Overlay::new(store.clone()).map_err(|e| Error::io("cannot find out the length of the file", e))?;
            log::ActiveSequence::find(&*store, &headers.current)?.replay(&mut overlay)?;
            let store: Arc<dyn Store> = Arc::new(overlay);
            (store.clone(), WriteBack::new(vec![store], redo))
        };
        let writeback = Arc::new(writeback);
        let regions = Regions::read(&*store, &headers.current)?;
        let metadata = Metadata::read(&*store, regions.metadata)?;
        let geometry = Geometry::new(&metadata);
        let locator = metadata.locator.as_deref().map(Locator::parse).transpose()?;
        let bat = Bat::new(writeback.clone(), regions.bat, geometry.entries(metadata.size))?;
        let file_len = store.len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
        // A file that was cut off before its table must not pass for an empty disk.
        let table_end = regions.bat.at.saturating_add(geometry.entries(metadata.size).saturating_mul(bat::ENTRY));
        if table_end > file_len {
            return Err(Error::corrupt(format!("the block allocation table ends at {table_end}, and the file at {file_len}"))
                .at_offset(regions.bat.at));
        }
        let log_end = headers.current.log_at.saturating_add(u64::from(headers.current.log_len));
        if writable && log_end > file_len {
            return Err(Error::corrupt(format!(
                "the log ends at {log_end}, and the file at {file_len}: the image can be opened read-only, and copied"
            ))
            .at_offset(headers.current.log_at));
        }
        if writable && headers.current.sequence > header::MAX_SEQUENCE {
            return Err(Error::corrupt(
                "the header's sequence number leaves no room for changes: the image can be opened read-only, and copied",
            ));
        }
        Ok(Self {
            bitmaps: Bitmaps::new(writeback.clone(), BitOrder::LsbFirst),
            writeback,
            writable,
            log: Mutex::new(LogWriter::new(&headers.current, file_len)),
            headers: Mutex::new(headers),
            size: AtomicU64::new(metadata.size),
            metadata,
            geometry,
            locator,
            file_len: AtomicU64::new(file_len),
            layout: RwLock::new(Layout { regions, bat }),
            space: Mutex::new(None),
            new_bitmap: Mutex::new(()),
            replayed,
        })
    }

    /// What a differencing image says of its parent.
    fn parent(&self) -> Option<ParentRef> {
        let locator = self.locator.as_ref()?;
        let linkages = locator.linkages();
        Some(ParentRef {
            names: locator.names(),
            format: Some("vhdx".to_owned()),
            verify: Some(Box::new(move |parent| verify(parent, &linkages))),
        })
    }

    fn store(&self) -> Result<&Arc<dyn Store>> {
        self.writeback.stores().first().ok_or_else(|| Error::corrupt("the image has no file"))
    }

    /// Of `len` bytes at `at` in the file, how many are there.
    fn in_file(&self, at: u64, len: u64) -> Result<u64> {
        let inside = |file_len: u64| file_len.saturating_sub(at).min(len);
        let known = inside(self.file_len.load(Ordering::Relaxed));
        if known == len {
            return Ok(known);
        }
        let file_len = self.store()?.len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
        self.file_len.store(file_len, Ordering::Relaxed);
        Ok(inside(file_len))
    }

    /// The state of a payload block, its place checked.
    fn payload(&self, layout: &Layout, block: u64) -> Result<Payload> {
        let index = self.geometry.payload(block);
        let entry = layout.bat.get(index)?;
        let corrupt = |why: String| {
            let at = layout.bat.region().at.saturating_add(index.saturating_mul(bat::ENTRY));
            Error::corrupt(format!("the allocation table's entry of block {block} {why}")).at_offset(at)
        };
        let payload = entry.payload().ok_or_else(|| corrupt(format!("has the unknown state {}", entry.0 & 7)))?;
        match payload {
            Payload::Full(at) | Payload::Partial(at) => {
                if at.checked_add(self.geometry.block).is_none_or(|e| e > i64::MAX as u64)
                    || layout.regions.touches_fixed(at, self.geometry.block)
                {
                    return Err(corrupt(format!("places it at {at:#x}, where it cannot be")));
                }
                if matches!(payload, Payload::Partial(_)) && !self.geometry.has_parent {
                    return Err(corrupt("says that a part of it is in a parent, and there is no parent".to_owned()));
                }
            }
            Payload::NotPresent | Payload::Zero => {}
        }
        Ok(payload)
    }

    /// Byte offset of the bits of a partially present block.
    fn bits_of(&self, layout: &Layout, block: u64) -> Result<u64> {
        let index = self.geometry.bitmap(block);
        let entry = layout.bat.get(index)?;
        let at =
            entry.bitmap().flatten().filter(|at| at.checked_add(header::MIB).is_some() && !layout.regions.touches_fixed(*at, header::MIB));
        let at = at.ok_or_else(|| {
            let place = layout.bat.region().at.saturating_add(index.saturating_mul(bat::ENTRY));
            Error::corrupt(format!(
                "block {block} is partially present, and the sector bitmap that says which part is missing or misplaced"
            ))
            .at_offset(place)
        })?;
        Ok(at.saturating_add(self.geometry.bits_at(block)))
    }

    /// An extent of data, as far as the file has them.
    fn data(&self, at: u64, len: u64) -> Result<Extent> {
        match self.in_file(at, len)? {
            0 => Err(Error::corrupt("the file has been cut short: a block that it should hold lies beyond its end").at_offset(at)),
            len => Ok(Extent { len, place: Place::Data { store: 0, at, in_place: self.writable } }),
        }
    }
}

/// Replays the log of an image that was not closed cleanly into its file.
pub(crate) fn finish_log(store: &Arc<dyn Store>) -> Result<()> {
    let mut headers = Headers::read(&**store)?;
    if headers.current.log.is_nil() {
        return Ok(());
    }
    recover(&**store, &mut headers, &WriteBack::unmirrored(vec![store.clone()]))
}

/// Replays the log into the file and marks it as empty. Repeated if cut short.
fn recover(store: &dyn Store, headers: &mut Headers, writeback: &WriteBack) -> Result<()> {
    log::ActiveSequence::find(store, &headers.current)?.replay(&mut log::InPlace(store))?;
    store.sync().map_err(|e| Error::io("cannot make the replayed log durable", e))?;
    headers.update(writeback, |h| {
        h.file_write = Uuid::new_v4();
        h.log = Uuid::nil();
    })
}

/// Whether an opened image is the parent that a child was made for.
fn verify(parent: &dyn Format, linkages: &[Uuid]) -> Result<()> {
    let Some(found) = parent.identity().and_then(|text| Uuid::parse_str(&text).ok()) else {
        return Err(Error::corrupt(format!("the parent is a {} image; a VHDX needs a VHDX", parent.name())));
    };
    if linkages.is_empty() {
        return Err(Error::corrupt("the parent locator does not say which state of the parent belongs to this image (no parent_linkage)"));
    }
    if linkages.contains(&found) {
        return Ok(());
    }
    Err(Error::corrupt(format!(
        "the parent is not the one that this image was made for, or it has been written to since: it has the identifier {found}, expected was {}",
        linkages.iter().map(Uuid::to_string).collect::<Vec<_>>().join(" or ")
    )))
}

impl Format for Vhdx {
    fn name(&self) -> &'static str {
        "vhdx"
    }

    fn limits(&self) -> FormatLimits {
        FormatLimits {
            size: self.size.load(Ordering::Acquire),
            sector: self.metadata.sector,
            physical_sector: self.metadata.physical_sector,
            unit: self.geometry.block,
            read_only: !self.writable,
            cheap_zero: true,
            can_discard: !self.metadata.fixed,
            thin: !self.metadata.fixed,
            holes_are_zeros: false,
        }
    }

    fn stores(&self) -> &[Arc<dyn Store>] {
        self.writeback.stores()
    }

    fn map(&self, at: u64, want: u64) -> Result<Extent> {
        let want = want.min(self.size.load(Ordering::Acquire).saturating_sub(at));
        let layout = self.layout.read();
        let (block, inside) = (at / self.geometry.block, at % self.geometry.block);
        let len = want.min(self.geometry.block - inside);
        match self.payload(&layout, block)? {
            Payload::Full(host) => self.data(host + inside, len),
            Payload::Partial(host) => {
                let sector = self.geometry.sector;
                let sectors = (inside % sector + len).div_ceil(sector);
                let (run, here) = self.bitmaps.run(self.bits_of(&layout, block)?, inside / sector, sectors)?;
                let len = len.min(run * sector - inside % sector);
                if here { self.data(host + inside, len) } else { Ok(Extent { len, place: Place::Parent }) }
            }
            first @ (Payload::NotPresent | Payload::Zero) => {
                let parent = first == Payload::NotPresent && self.geometry.has_parent;
                let mut len = len;
                let mut next = block + 1;
                while len < want && next - block < MAX_RUN {
                    let same = match self.payload(&layout, next) {
                        Ok(Payload::NotPresent) => parent == self.geometry.has_parent,
                        Ok(Payload::Zero) => !parent,
                        // Whoever asks for that block gets the error.
                        _ => false,
                    };
                    if !same {
                        break;
                    }
                    len = len.saturating_add(self.geometry.block).min(want);
                    next += 1;
                }
                Ok(Extent { len, place: if parent { Place::Parent } else { Place::Zero { reserved: false } } })
            }
        }
    }

    fn prepare(&self, at: u64, len: u64) -> Result<Placement> {
        self.place(at, len)
    }

    fn commit(&self, placement: Placement) -> Result<()> {
        self.publish_placement(&placement)
    }

    fn cancel(&self, placement: Placement) {
        self.cancel_placement(&placement);
    }

    fn first_write(&self) -> Result<()> {
        self.begin_changes()
    }

    fn zero(&self, at: u64, len: u64, mode: ZeroMode) -> Result<u64> {
        self.zero_blocks(at, len, mode)
    }

    fn discard(&self, at: u64, len: u64) -> Result<u64> {
        self.discard_blocks(at, len)
    }

    fn log(&self, writes: &[MetaWrite]) -> Result<bool> {
        self.write_log(writes)?;
        Ok(true)
    }

    fn reclaim(&self, freed: &[Freed]) -> Result<()> {
        self.reclaim_space(freed)
    }

    fn grow(&self, size: u64) -> Result<()> {
        self.grow_to(size)
    }

    fn check(&self, repair: bool) -> Result<CheckReport> {
        self.look_for_damage(repair)
    }

    fn close(&self) -> Result<()> {
        if self.writable { self.close_log() } else { Ok(()) }
    }

    fn identity(&self) -> Option<String> {
        Some(self.headers.lock().current.data_write.to_string())
    }

    fn describe(&self) -> serde_json::Value {
        let header = self.headers.lock().current;
        let subformat = match (self.geometry.has_parent, self.metadata.fixed) {
            (true, _) => "differencing",
            (false, true) => "fixed",
            (false, false) => "dynamic",
        };
        let mut map = serde_json::json!({
            "subformat": subformat,
            "block-size": self.geometry.block,
            "log-size": header.log_len,
            "log-replayed": self.replayed,
            "disk-id": self.metadata.disk_id.to_string(),
            "data-write-guid": header.data_write.to_string(),
        });
        if let (Some(map), Some(locator)) = (map.as_object_mut(), &self.locator) {
            let entries = locator.entries.iter().map(|(k, v)| (k.clone(), v.clone().into()));
            map.insert("parent-locator".to_owned(), serde_json::Value::Object(entries.collect()));
        }
        map
    }
}
