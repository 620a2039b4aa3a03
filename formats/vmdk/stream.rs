//! Compressed grains: each is a zlib stream (RFC 1950), behind a marker that says which grain it is and how long.

use super::descriptor::SECTOR;
use super::sparse::Sparse;
use crate::error::{Error, Result};
use crate::field::array;
use std::cell::RefCell;

thread_local! {
    static INFLATE: RefCell<libdeflater::Decompressor> = RefCell::new(libdeflater::Decompressor::new());
    static INPUT: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Bytes of the marker before a grain.
const MARKER: u64 = 12;
/// Bits of a byte offset in a file whose sectors are numbered by 32 bits.
const OFFSET_BITS: u32 = 41;

/// A grain's name among all of the disk: its extent's number, and its byte offset in that.
pub(super) fn unit_id(extent: usize, at: u64) -> u64 {
    (extent as u64) << OFFSET_BITS | at
}

/// The extent and the byte offset of a name.
pub(super) fn place(id: u64) -> (usize, u64) {
    ((id >> OFFSET_BITS) as usize, id & ((1 << OFFSET_BITS) - 1))
}

/// Fills `out` with grain `index`, which lies at `at`.
pub(super) fn decode(extent: &Sparse, at: u64, index: u64, out: &mut [u8]) -> Result<()> {
    let fail = |e| Error::io("cannot read a compressed grain", e);
    let longest = 2 * out.len() as u64;
    let (start, len) = if extent.header.markers {
        let mut marker = [0; MARKER as usize];
        extent.file().read_exact_at(&mut marker, at).map_err(fail)?;
        let (sector, len) = (u64::from_le_bytes(array(&marker, 0)?), u64::from(u32::from_le_bytes(array(&marker, 8)?)));
        if sector != index * (extent.header.grain / SECTOR) {
            return Err(Error::corrupt(format!(
                "the grain table says that grain {index} is here, but the grain says that it begins at sector {sector}"
            )));
        }
        if len == 0 || len > longest {
            return Err(Error::corrupt(format!("a compressed grain of {len} bytes; the most that makes sense is {longest}")));
        }
        (at + MARKER, len)
    } else {
        (at, longest)
    };
    let visible = extent.header.capacity.saturating_sub(index.saturating_mul(extent.header.grain)).min(out.len() as u64);
    INPUT.with_borrow_mut(|input| {
        input.resize(usize::try_from(len).unwrap_or(0), 0);
        extent.file().read_zero_filled(input, start).map_err(fail)?;
        let got = INFLATE.with_borrow_mut(|d| d.zlib_decompress(input, out)).ok().or_else(|| inflate_part(input, out));
        let got = got.ok_or_else(|| Error::corrupt("a compressed grain cannot be decoded"))?;
        // The last grain may end with the disk.
        if (got as u64) < visible {
            return Err(Error::corrupt(format!("a compressed grain holds {got} bytes instead of {}", out.len())));
        }
        out.get_mut(got..).unwrap_or_default().fill(0);
        Ok(())
    })
}

/// For streams with something behind their end.
fn inflate_part(input: &[u8], out: &mut [u8]) -> Option<usize> {
    let mut stream = flate2::Decompress::new(true);
    let status = stream.decompress(input, out, flate2::FlushDecompress::Finish).ok()?;
    (status == flate2::Status::StreamEnd).then(|| usize::try_from(stream.total_out()).ok()).flatten()
}
