//! Compressed loop images (cloop, version 2), read-only: blocks of equal length, each a zlib stream.
//!
//! Source: the structure of QEMU's driver "cloop".

use crate::drivers::{Driver, Opened, READ, Request};
use crate::error::{Error, Result};
use crate::field::array;
use crate::format::{Extent, Format, FormatLimits, MAX_UNIT, Place, Unit};
use crate::store::Store;
use crate::table::{Table, Width};
use crate::writeback::WriteBack;
use std::cell::RefCell;
use std::sync::Arc;

/// How a file begins: a script that mounts it.
const MAGIC: &[u8] = b"#!/bin/sh\n#V2.0 Format";
/// Byte offset of the block size, the number of blocks, and their places.
const HEADER_AT: u64 = 128;
const TABLE_AT: u64 = 136;

/// The format's row in the table.
pub(crate) const DRIVER: Driver = Driver { name: "cloop", aliases: &[], recognise: |h| h.has(0, MAGIC), can: READ, open };

thread_local! {
    static INFLATE: RefCell<libdeflater::Decompressor> = RefCell::new(libdeflater::Decompressor::new());
}

/// Fills `out` with what the zlib stream in `input` holds, which is exactly as much.
pub(crate) fn inflate(input: &[u8], out: &mut [u8]) -> bool {
    INFLATE.with_borrow_mut(|d| d.zlib_decompress(input, out)).is_ok_and(|n| n == out.len())
}

/// An open image.
struct Cloop {
    writeback: Arc<WriteBack>,
    /// Byte offsets of the blocks, and of the end of the last.
    places: Table,
    block: u64,
    blocks: u64,
    file_len: u64,
}

fn open(request: Request<'_>) -> Result<Opened> {
    if request.snapshot_name.is_some() {
        return Err(Error::unsupported("cloop images have no internal snapshots"));
    }
    let fail = |e| Error::io("cannot read the header", e);
    let mut magic = [0; MAGIC.len()];
    request.store.read_zero_filled(&mut magic, 0).map_err(fail)?;
    if magic != MAGIC {
        return Err(Error::invalid_format("this is no cloop image: its signature is missing"));
    }
    let mut bytes = [0; 8];
    request.store.read_zero_filled(&mut bytes, HEADER_AT).map_err(fail)?;
    let file_len = request.store.len().map_err(fail)?;
    let be32 = |at: usize| array(&bytes, at).map(u32::from_be_bytes).map(u64::from);
    let (block, blocks) = (be32(0)?, be32(4)?);
    if block == 0 || !block.is_multiple_of(512) || block > u64::from(MAX_UNIT) {
        return Err(Error::corrupt(format!("blocks of {block} bytes; allowed are whole sectors up to 64 MiB")).at_offset(HEADER_AT));
    }
    if TABLE_AT + (blocks + 1) * 8 > file_len {
        return Err(Error::corrupt(format!("the file ends inside the table of {blocks} blocks")).at_offset(TABLE_AT));
    }
    let writeback = Arc::new(WriteBack::unmirrored(vec![request.store]));
    let places = Table::new(writeback.clone(), TABLE_AT, blocks + 1, Width::Be64);
    let format = Cloop { writeback: writeback.clone(), places, block, blocks, file_len };
    Ok(Opened { format: Arc::new(format), writeback, parent: None })
}

impl Format for Cloop {
    fn name(&self) -> &'static str {
        "cloop"
    }

    fn limits(&self) -> FormatLimits {
        FormatLimits {
            size: self.block * self.blocks,
            sector: 512,
            physical_sector: 512,
            // Blocks can be any number of sectors.
            unit: 1 << self.block.trailing_zeros(),
            read_only: true,
            cheap_zero: false,
            can_discard: false,
            thin: false,
            holes_are_zeros: false,
        }
    }

    fn stores(&self) -> &[Arc<dyn Store>] {
        self.writeback.stores()
    }

    fn map(&self, at: u64, want: u64) -> Result<Extent> {
        let (index, skip) = (at / self.block, at % self.block);
        let unit = Unit { id: index, aux: 0, decoded_len: u32::try_from(self.block).unwrap_or(MAX_UNIT) };
        Ok(Extent { len: want.min(self.block - skip), place: Place::Encoded { unit, skip } })
    }

    fn decode(&self, unit: &Unit, out: &mut [u8]) -> Result<()> {
        let (start, end) = (self.places.get(unit.id)?, self.places.get(unit.id + 1)?);
        let corrupt = |what: &str| Error::corrupt(format!("block {} {what}", unit.id)).at_offset(start);
        // zlib makes nothing much longer.
        let most = self.block + self.block / 8 + 4096;
        let len = end.checked_sub(start).filter(|len| *len <= most && end <= self.file_len);
        let len = len.ok_or_else(|| corrupt("is said to lie where it cannot"))?;
        let mut input = vec![0; usize::try_from(len).unwrap_or(0)];
        let store = self.writeback.stores().first().ok_or_else(|| corrupt("has no file"))?;
        store.read_exact_at(&mut input, start).map_err(|e| Error::io("cannot read a compressed block", e).at_offset(start))?;
        if inflate(&input, out) { Ok(()) } else { Err(corrupt("cannot be decoded")) }
    }

    fn describe(&self) -> serde_json::Value {
        serde_json::json!({ "block-size": self.block })
    }
}
