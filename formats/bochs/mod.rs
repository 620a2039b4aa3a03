//! Bochs' growing images, read-only.
//!
//! A header, a catalog of extents, the extents, each behind a bitmap of its sectors: what is not set in it reads as zeros. The images of changes that belong to
//! another image ("Undoable", "Volatile") are refused by name.
//!
//! Source: the structures of Bochs' and QEMU's drivers.

use crate::bitmap::{BitOrder, Bitmaps};
use crate::drivers::{Driver, Opened, READ, Request};
use crate::error::{Error, Result};
use crate::field::array;
use crate::format::{Extent, Format, FormatLimits, Place};
use crate::store::Store;
use crate::table::{Table, Width};
use crate::tail::Tail;
use crate::writeback::WriteBack;
use std::sync::Arc;

const MAGIC: &[u8] = b"Bochs Virtual HD Image";
/// Bytes of the header that are read.
const HEADER: usize = 96;
const SECTOR: u64 = 512;
/// The entry of an extent that is not there.
const ABSENT: u64 = 0xFFFF_FFFF;
/// Runs of absent extents are followed over at most this many at once.
const MAX_RUN: u64 = 4096;

/// The format's row in the table.
pub(crate) const DRIVER: Driver = Driver { name: "bochs", aliases: &[], recognise: |h| h.has(0, MAGIC), can: READ, open };

/// An open image.
struct Bochs {
    tail: Tail,
    writeback: Arc<WriteBack>,
    catalog: Table,
    bitmaps: Bitmaps<512>,
    size: u64,
    /// Bytes in an extent; a power of two.
    extent: u64,
    /// Bytes of the bitmap before each.
    bitmap_len: u64,
    /// Byte offset of the first extent's bitmap.
    data_at: u64,
}

/// Text of a field that is padded with NULs.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|b| *b == 0).next().unwrap_or_default()).into_owned()
}

fn open(request: Request<'_>) -> Result<Opened> {
    if request.snapshot_name.is_some() {
        return Err(Error::unsupported("Bochs images have no internal snapshots"));
    }
    let fail = |e| Error::io("cannot read the header", e);
    let mut bytes = [0; HEADER];
    request.store.read_zero_filled(&mut bytes, 0).map_err(fail)?;
    let file_len = request.store.len().map_err(fail)?;
    if !bytes.starts_with(MAGIC) {
        return Err(Error::invalid_format("this is no Bochs image: its signature is missing"));
    }
    let (kind, subtype) = (text(&bytes[32..48]), text(&bytes[48..64]));
    if kind != "Redolog" || subtype != "Growing" {
        return Err(Error::unsupported(format!("Bochs images of the kind \"{kind}\", \"{subtype}\"; only growing ones are read")));
    }
    let le32 = |at: usize| array(&bytes, at).map(u32::from_le_bytes).map(u64::from);
    let size_at = match le32(64)? {
        0x1_0000 => 84,
        0x2_0000 => 88,
        other => return Err(Error::unsupported(format!("version {other:#x} of Bochs images; known are 1.0 and 2.0"))),
    };
    let (header, entries, bitmap, extent) = (le32(68)?, le32(72)?, le32(76)?, le32(80)?);
    let said = u64::from_le_bytes(array(&bytes, size_at)?);
    if !extent.is_power_of_two() || !(SECTOR..=8 << 20).contains(&extent) {
        return Err(Error::corrupt(format!("extents of {extent} bytes; allowed are powers of two from 512 bytes to 8 MiB")).at_offset(80));
    }
    if bitmap < (extent / SECTOR).div_ceil(8) || bitmap > 1 << 20 {
        return Err(Error::corrupt(format!("a bitmap of {bitmap} bytes for an extent of {extent}")).at_offset(76));
    }
    let data_at = header + entries * 4;
    if header < HEADER as u64 || data_at > file_len {
        return Err(Error::corrupt(format!("the catalog of {entries} extents at {header:#x} lies outside the file or over the header"))
            .at_offset(72));
    }
    let size = said / SECTOR * SECTOR;
    if size > entries * extent {
        return Err(
            Error::corrupt(format!("a disk of {said} bytes in a catalog of {entries} extents of {extent} bytes")).at_offset(size_at as u64)
        );
    }
    let writeback = Arc::new(WriteBack::unmirrored(vec![request.store]));
    let format = Bochs {
        tail: Tail::new(writeback.clone()),
        catalog: Table::new(writeback.clone(), header, entries, Width::Le32),
        bitmaps: Bitmaps::new(writeback.clone(), BitOrder::LsbFirst),
        size,
        extent,
        bitmap_len: bitmap.next_multiple_of(SECTOR),
        data_at,
        writeback: writeback.clone(),
    };
    Ok(Opened { format: Arc::new(format), writeback, parent: None })
}

impl Format for Bochs {
    fn name(&self) -> &'static str {
        "bochs"
    }

    fn limits(&self) -> FormatLimits {
        FormatLimits {
            size: self.size,
            sector: SECTOR as u32,
            physical_sector: SECTOR as u32,
            unit: self.extent,
            read_only: true,
            cheap_zero: false,
            can_discard: false,
            thin: true,
            holes_are_zeros: false,
        }
    }

    fn stores(&self) -> &[Arc<dyn Store>] {
        self.writeback.stores()
    }

    fn map(&self, at: u64, want: u64) -> Result<Extent> {
        let want = want.min(self.size.saturating_sub(at));
        let (index, inside) = (at / self.extent, at % self.extent);
        let mut len = want.min(self.extent - inside);
        let entry = self.catalog.get(index)?;
        let zeros = |len| Ok(Extent { len, place: Place::Zero { reserved: false } });
        if entry == ABSENT {
            let mut next = index + 1;
            while len < want && next - index < MAX_RUN && self.catalog.get(next).is_ok_and(|e| e == ABSENT) {
                len = len.saturating_add(self.extent).min(want);
                next += 1;
            }
            return zeros(len);
        }
        // 32 bits times less than 10 MiB.
        let place = self.data_at + entry * (self.bitmap_len + self.extent);
        if self.tail.in_file(place, self.bitmap_len)? < self.bitmap_len {
            return Err(Error::corrupt(format!("the catalog places extent {index} beyond the end of the file"))
                .at_offset(self.catalog.place(index)));
        }
        let sectors = (inside % SECTOR + len).div_ceil(SECTOR);
        let (run, here) = self.bitmaps.run(place, inside / SECTOR, sectors)?;
        let len = len.min(run * SECTOR - inside % SECTOR);
        if here { self.tail.data(place + self.bitmap_len + inside, len, false) } else { zeros(len) }
    }

    fn describe(&self) -> serde_json::Value {
        serde_json::json!({ "subformat": "growing", "extent-size": self.extent })
    }
}
