//! Restart points, and how a library that only knows whole streams is made to decode from one.
//!
//! A unit of a gzip stream begins and ends at any bit, also in the middle of a deflate block. For decoding it is made a complete deflate stream of its own:
//! 1. the window (what matches may refer to) as a stored block; its output is dropped again;
//! 2. empty blocks, so many that what follows has the same place in its byte as in the file. No bits need to be moved then, and stored blocks, which are aligned
//!    to bytes, stay valid;
//! 3. if the unit begins in the middle of a block, that block's header, not marked as last;
//! 4. the unit's bits as they are in the file;
//! 5. if the unit ends in the middle of a block, the end-of-block code; and an empty last block.
//!
//! The CRC-32 of each unit, taken when the index was made, proves that the result is right.

use super::super::bits::LsbWriter;
use super::super::source::Source;
use super::inflate::{OpenBlock, WINDOW};
use super::windows::Windows;
use crate::error::{Error, Result};
use libdeflater::Decompressor;
use std::cell::RefCell;

/// A unit's place in the deflate stream. All zero for units that read as zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Point {
    /// First bit, from the start of the file.
    pub(super) start: u64,
    /// The bit after the last.
    pub(super) end: u64,
    /// The block in whose middle it begins.
    pub(super) open: Option<OpenBlock>,
    /// The end-of-block code of the block in whose middle it ends.
    pub(super) end_code: Option<(u16, u8)>,
    /// CRC-32 of the decoded bytes.
    pub(super) crc: u32,
    /// Where its window is kept.
    pub(super) window_at: u64,
    /// How long that is, encoded; 0: there is none.
    pub(super) window_len: u32,
    /// The member's checksum is wrong: nobody knows which of its bytes are.
    pub(super) damaged: bool,
}

/// Two literals of length one, two distances of length one, and nothing but the end-of-block code: an empty dynamic block of an odd number of bits.
/// Bits in the order of the stream.
const ODD_FILLER: &[(u32, u32)] = &[
    (0b100, 3), // not last, dynamic
    (0, 5),     // 257 literals and lengths
    (1, 5),     // 2 distances
    (14, 4),    // 18 lengths of the code of code lengths:
    (0, 6),     //   16, 17: none
    (2, 3),     //   18: two bits
    (2, 3),     //   0: two bits
    (0, 15),    //   8, 7, 9, 6, 10
    (0, 24),    //   5, 11, 4, 12, 3, 13, 2, 14
    (1, 3),     //   1: one bit. Codes: 1 = 0, 0 = 10, 18 = 11
    (0b11, 2),  // 18:
    (127, 7),   //   138 zeros
    (0b11, 2),
    (95, 7), //   106 zeros
    (0b11, 2),
    (0, 7), //   11 zeros: 255 in all
    (0, 2), // literals 255 and 256: length 1
    (0, 2), // both distances: length 1
    (1, 1), // end of block
];
const ODD_FILLER_BITS: u64 = 103;
/// An empty block of the fixed code.
const EVEN_FILLER: (u32, u32) = (0b010, 10);
const LAST_BLOCK: (u32, u32) = (0b011, 10);

impl Point {
    /// Whole bytes of the file that hold the unit's bits: offset and length.
    pub(super) fn coded(&self) -> (u64, u64) {
        let from = self.start / 8;
        (from, self.end.div_ceil(8) - from)
    }

    /// Decodes the unit, `len` bytes, into the empty `out`.
    pub(super) fn decode(&self, source: &Source, windows: &Windows, len: usize, out: &mut Vec<u8>) -> Result<()> {
        let window = if self.window_len > 0 { windows.read(self.window_at, self.window_len)? } else { Vec::new() };
        let stream = self.stream(source, &window)?;
        let total = window.len() + len;
        out.try_reserve(total).map_err(|_| Error::new(crate::Kind::Io, "there is no memory for a decoded unit"))?;
        out.resize(total, 0);
        thread_local! {
            static INFLATE: RefCell<Decompressor> = RefCell::new(Decompressor::new());
        }
        let got = INFLATE.with_borrow_mut(|inflate| inflate.deflate_decompress(&stream, out));
        out.drain(..window.len());
        if !matches!(got, Ok(got) if got == total) || crc32fast::hash(out) != self.crc {
            return Err(Error::corrupt(
                "a part of the gzip stream does not decode to what it did when its index was made: the file changed, or is damaged",
            )
            .at_offset(self.start / 8));
        }
        Ok(())
    }

    /// The unit as a complete deflate stream whose output is the window and the unit.
    fn stream(&self, source: &Source, window: &[u8]) -> Result<Vec<u8>> {
        let (coded_at, coded_len) = self.coded();
        let mut stream = Vec::with_capacity(window.len() + coded_len as usize + 512);
        if let (false, Ok(len)) = (window.is_empty(), u16::try_from(window.len())) {
            stream.push(0);
            stream.extend_from_slice(&len.to_le_bytes());
            stream.extend_from_slice(&(!len).to_le_bytes());
            stream.extend_from_slice(window);
        }
        let mut bits = LsbWriter::new(&mut stream);
        let header_len = self.open.map_or(0, |open| u64::from(open.header_len));
        let mut phase = (self.start + 16 * 8 - header_len % 8) % 8;
        if phase % 2 == 1 {
            ODD_FILLER.iter().for_each(|(value, count)| bits.put(*value, *count));
            phase = (phase + 8 - ODD_FILLER_BITS % 8) % 8;
        }
        for _ in 0..phase / 2 {
            bits.put(EVEN_FILLER.0, EVEN_FILLER.1);
        }
        if let Some(open) = &self.open {
            let from = open.header_at / 8;
            let header = source.range(from, (open.header_at + header_len).div_ceil(8) - from)?;
            bits.put(0, 1);
            bits.put_run(&header, open.header_at % 8 + 1, header_len - 1);
        }
        let (partial, count) = bits.into_partial();
        debug_assert_eq!(u64::from(count), self.start % 8);
        let first = stream.len();
        source.append_range(coded_at, coded_len, &mut stream)?;
        if let Some(byte) = stream.get_mut(first) {
            *byte = (*byte & (0xff_u8 << count)) | partial;
        }
        let ends_in = (self.end % 8) as u32;
        let last = if ends_in == 0 { 0 } else { stream.pop().unwrap_or(0) };
        let mut bits = LsbWriter::new(&mut stream);
        bits.put(u32::from(last), ends_in);
        if let Some((code, len)) = self.end_code {
            bits.put(u32::from(code), u32::from(len));
        }
        bits.put(LAST_BLOCK.0, LAST_BLOCK.1);
        bits.finish();
        Ok(stream)
    }
}

/// The longest window, for the bounds of stored indexes.
pub(super) const MAX_WINDOW: usize = WINDOW;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fillers_are_empty_blocks_of_the_stated_length() {
        assert_eq!(ODD_FILLER.iter().map(|(_, count)| u64::from(*count)).sum::<u64>(), ODD_FILLER_BITS);
        for fillers in 0..40 {
            let mut stream = Vec::new();
            let mut bits = LsbWriter::new(&mut stream);
            for n in 0..fillers {
                if n % 3 == 1 {
                    bits.put(EVEN_FILLER.0, EVEN_FILLER.1);
                } else {
                    ODD_FILLER.iter().for_each(|(value, count)| bits.put(*value, *count));
                }
            }
            bits.put(LAST_BLOCK.0, LAST_BLOCK.1);
            bits.finish();
            let mut out = [0; 1];
            assert_eq!(Decompressor::new().deflate_decompress(&stream, &mut out), Ok(0), "{fillers} fillers");
            // A second inflater, which may be stricter about codes.
            let mut decoded = Vec::with_capacity(16);
            let status = flate2::Decompress::new(false).decompress_vec(&stream, &mut decoded, flate2::FlushDecompress::Finish);
            assert_eq!((status.unwrap(), decoded.len()), (flate2::Status::StreamEnd, 0));
        }
    }
}
