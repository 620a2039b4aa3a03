//! Dynamic and differencing VHD images: opening and mapping.

use super::footer::{Footers, Kind, MAX_SIZE, SECTOR};
use super::header::{self, ENTRY, Header};
use crate::bitmap::{BitOrder, Bitmaps};
use crate::device::ZeroMode;
use crate::drivers::ParentRef;
use crate::error::{Error, Result};
use crate::format::{CheckReport, Extent, Format, FormatLimits, Place, Placement};
use crate::space::Space;
use crate::store::Store;
use crate::table::{Table, Width};
use crate::writeback::{Freed, WriteBack};
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The entry of a block that is not there.
pub(super) const ABSENT: u64 = 0xFFFF_FFFF;
/// Noted of an entry, in memory: every bit of the block's bitmap is set.
const COMPLETE: u64 = 1 << 32;
/// Runs of absent blocks are followed over at most this many at once.
const MAX_RUN: u64 = 4096;

/// What changes place when the disk grows.
pub(super) struct Layout {
    pub(super) header: Header,
    pub(super) table: Table,
}

/// A block that is in the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    /// Byte offset of its bitmap; the data follow that.
    pub(super) at: u64,
    complete: bool,
    entry: u64,
}

/// An open dynamic or differencing VHD.
pub(super) struct Sparse {
    pub(super) writeback: Arc<WriteBack>,
    pub(super) writable: bool,
    pub(super) differencing: bool,
    pub(super) footers: Mutex<Footers>,
    /// Size of the disk in bytes.
    pub(super) size: AtomicU64,
    /// Length of the file when last looked at, in bytes.
    pub(super) file_len: AtomicU64,
    /// Bytes in a block.
    pub(super) block: u64,
    /// Bytes of the bitmap before each block.
    pub(super) bitmap_len: u64,
    pub(super) layout: RwLock<Layout>,
    pub(super) bitmaps: Bitmaps<512>,
    /// Free space; known from the first change on. Ends where the footer is.
    pub(super) space: Mutex<Option<Space>>,
}

impl Sparse {
    pub(super) fn open(writeback: Arc<WriteBack>, footers: Footers, writable: bool) -> Result<Self> {
        let store = writeback.stores().first().cloned().ok_or_else(|| Error::corrupt("the image has no file"))?;
        let header = Header::read(&*store, footers.footer.header_at())?;
        let file_len = store.len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
        let table = |size: u64| Table::new(writeback.clone(), header.table_at, size.div_ceil(header.block), Width::Be32);
        let room = header.entries.saturating_mul(header.block);
        let (mut size, current) = (footers.footer.size(), footers.footer.current_size());
        if size > room {
            size = current;
        }
        if size > MAX_SIZE || !size.is_multiple_of(SECTOR) || size > room {
            return Err(Error::corrupt(format!(
                "a disk of {size} bytes in a table of {} blocks of {} bytes",
                header.entries, header.block
            ))
            .at_offset(footers.end));
        }
        // A size by geometry that hides blocks with data is the wrong one.
        if size < current && current <= room && current <= MAX_SIZE && current.is_multiple_of(SECTOR) {
            let whole = table(current);
            for index in size.div_ceil(header.block)..current.div_ceil(header.block) {
                if whole.get(index)? != ABSENT {
                    tracing::warn!(
                        geometry = size,
                        current,
                        "the geometry of this VHD is smaller than the data that it holds; its size field is used"
                    );
                    size = current;
                    break;
                }
            }
        }
        Ok(Self {
            bitmaps: Bitmaps::new(writeback.clone(), BitOrder::MsbFirst),
            writable,
            differencing: footers.footer.kind() == Kind::Differencing,
            size: AtomicU64::new(size),
            file_len: AtomicU64::new(file_len),
            block: header.block,
            bitmap_len: header.bitmap_len(),
            layout: RwLock::new(Layout { table: table(size), header }),
            footers: Mutex::new(footers),
            space: Mutex::new(None),
            writeback,
        })
    }

    /// What a differencing image says of its parent.
    pub(super) fn parent(&self) -> Option<ParentRef> {
        if !self.differencing {
            return None;
        }
        let layout = self.layout.read();
        let (uuid, timestamp) = (layout.header.parent_uuid(), layout.header.parent_timestamp());
        Some(ParentRef {
            names: layout.header.names.clone(),
            format: Some(super::NAME.to_owned()),
            verify: Some(Box::new(move |parent| super::verify(parent, uuid, timestamp))),
        })
    }

    pub(super) fn store(&self) -> Result<&Arc<dyn Store>> {
        self.writeback.stores().first().ok_or_else(|| Error::corrupt("the image has no file"))
    }

    /// Bytes of a block with its bitmap.
    pub(super) fn block_len(&self) -> u64 {
        self.bitmap_len + self.block
    }

    /// Whether a run of bytes touches the copy of the footer, the header or the table.
    pub(super) fn touches_fixed(layout: &Layout, at: u64, len: u64) -> bool {
        let end = at.saturating_add(len);
        let table = layout.header.table_at;
        at < SECTOR
            || (at < layout.header.at.saturating_add(header::LEN) && layout.header.at < end)
            || (at < table.saturating_add(layout.header.entries * ENTRY) && table < end)
    }

    /// A block, if it is there; its place checked.
    pub(super) fn find(&self, layout: &Layout, index: u64) -> Result<Option<Block>> {
        let entry = layout.table.get(index)?;
        let sector = entry & 0xFFFF_FFFF;
        if sector == ABSENT {
            return Ok(None);
        }
        let at = sector * SECTOR;
        if Self::touches_fixed(layout, at, self.block_len()) {
            return Err(Error::corrupt(format!("the allocation table places block {index} at {at:#x}, where it cannot be"))
                .at_offset(layout.table.place(index)));
        }
        Ok(Some(Block { at, complete: entry & COMPLETE != 0, entry }))
    }

    /// Whether all of a block's bits are set; if so, that is remembered.
    fn complete(&self, layout: &Layout, index: u64, block: Block) -> Result<bool> {
        if block.complete {
            return Ok(true);
        }
        if self.in_file(block.at, self.bitmap_len)? < self.bitmap_len {
            return Err(cut_short(block.at));
        }
        let sectors = self.block / SECTOR;
        let mut seen = 0;
        while seen < sectors {
            match self.bitmaps.run(block.at, seen, sectors - seen)? {
                (run, true) => seen += run,
                (_, false) => return Ok(false),
            }
        }
        layout.table.note(index, block.entry, block.entry | COMPLETE)?;
        Ok(true)
    }

    /// Of `len` bytes at `at` in the file, how many are there, before the footer.
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

    fn data(&self, at: u64, len: u64, in_place: bool) -> Result<Extent> {
        match self.in_file(at, len)? {
            0 => Err(cut_short(at)),
            len => Ok(Extent { len, place: Place::Data { store: 0, at, in_place: in_place && self.writable } }),
        }
    }
}

fn cut_short(at: u64) -> Error {
    Error::corrupt("the file has been cut short: a block that it should hold lies beyond its end").at_offset(at)
}

impl Format for Sparse {
    fn name(&self) -> &'static str {
        super::NAME
    }

    fn limits(&self) -> FormatLimits {
        FormatLimits {
            size: self.size.load(Ordering::Acquire),
            sector: SECTOR as u32,
            physical_sector: SECTOR as u32,
            unit: self.block,
            read_only: !self.writable,
            cheap_zero: true,
            can_discard: true,
            thin: true,
            holes_are_zeros: false,
        }
    }

    fn stores(&self) -> &[Arc<dyn Store>] {
        self.writeback.stores()
    }

    fn map(&self, at: u64, want: u64) -> Result<Extent> {
        let want = want.min(self.size.load(Ordering::Acquire).saturating_sub(at));
        let layout = self.layout.read();
        let (index, inside) = (at / self.block, at % self.block);
        let mut len = want.min(self.block - inside);
        let Some(block) = self.find(&layout, index)? else {
            let mut next = index + 1;
            // A damaged entry is the error of whoever asks for that block.
            while len < want && next - index < MAX_RUN && matches!(self.find(&layout, next), Ok(None)) {
                len = len.saturating_add(self.block).min(want);
                next += 1;
            }
            return Ok(Extent { len, place: if self.differencing { Place::Parent } else { Place::Zero { reserved: false } } });
        };
        let host = block.at + self.bitmap_len + inside;
        if self.complete(&layout, index, block)? {
            return self.data(host, len, true);
        }
        let sectors = (inside % SECTOR + len).div_ceil(SECTOR);
        let (run, here) = self.bitmaps.run(block.at, inside / SECTOR, sectors)?;
        let len = len.min(run * SECTOR - inside % SECTOR);
        // Without a parent the bits tell nothing that matters: other readers, QEMU among them, do not look at them, so that writers may have been
        // careless with them unnoticed. Those that do look must find what is written now: it goes through a placement, which sets them.
        if here || !self.differencing { self.data(host, len, here) } else { Ok(Extent { len, place: Place::Parent }) }
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

    fn reclaim(&self, freed: &[Freed]) -> Result<()> {
        self.reclaim_space(freed)
    }

    fn grow(&self, size: u64) -> Result<()> {
        self.grow_to(size)
    }

    fn check(&self, repair: bool) -> Result<CheckReport> {
        self.look_for_damage(repair)
    }

    fn identity(&self) -> Option<String> {
        Some(self.footers.lock().footer.uuid().to_string())
    }

    fn describe(&self) -> serde_json::Value {
        let mut map = super::describe(&self.footers.lock().footer, if self.differencing { "differencing" } else { "dynamic" });
        if let Some(map) = map.as_object_mut() {
            map.insert("block-size".to_owned(), self.block.into());
            if self.differencing {
                let layout = self.layout.read();
                let names: Vec<_> = layout.header.names.iter().map(|n| n.to_string_lossy().into_owned()).collect();
                map.insert("parent-names".to_owned(), names.into());
                map.insert("parent-uuid".to_owned(), layout.header.parent_uuid().to_string().into());
            }
        }
        map
    }
}
