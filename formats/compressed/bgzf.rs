//! bgzf: gzip members of at most 64 KiB that tell their length in an extra field (SAM specification, section 4.1), as `bgzip` makes them.
//!
//! Where each block lies is told by a `.gzi` file beside the stream if there is one that fits, and otherwise by walking over the blocks' headers and trailers.

use super::codec::{Codec, Context, coded_bytes};
use super::gzip::header::{block_len, read_header};
use super::source::Source;
use super::units::{Span, Units};
use crate::error::{Error, Result};
use libdeflater::Decompressor;
use std::cell::RefCell;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufReader, Read};

/// The most a block decodes to.
const BLOCK: u64 = 64 << 10;
/// What `bgzip` puts at the end: a block of nothing.
const END: u64 = 28;

/// Blocks need no more than their place.
pub(super) struct Bgzf;

/// The blocks, or `None` if not all of the stream is bgzf.
pub(super) fn index(context: &Context<'_>) -> Result<Option<(Units, Bgzf)>> {
    let source = context.source;
    let mut reader = source.reader(0, source.len());
    if read_header(&mut reader)?.is_none_or(|header| header.block_len.is_none()) {
        return Ok(None);
    }
    let mut blocks = Blocks::new(source);
    let mut at = 0;
    if let Some(table) = read_gzi(source)? {
        for (next_at, next_decoded) in table {
            blocks.add(at, next_at - at, next_decoded - blocks.decoded)?;
            at = next_at;
        }
    }
    Ok(walk(context, blocks, at)?.map(|units| (units, Bgzf)))
}

/// Adds the blocks from `at` to the end. `None`: there is something else.
fn walk(context: &Context<'_>, mut blocks: Blocks, mut at: u64) -> Result<Option<Units>> {
    let source = context.source;
    let mut progress = context.progress("finding the blocks of the bgzf stream", source.len());
    let mut reader = source.reader(at, source.len());
    let mut last_is_empty = false;
    while at < source.len() {
        reader.seek(at);
        let Some(len) = read_header(&mut reader)?.and_then(|header| header.block_len) else {
            return Ok(None);
        };
        let Some(end) = at.checked_add(len).filter(|end| *end <= source.len() && len > 4) else {
            return Err(Error::corrupt("the bgzf stream is cut short: the file ends in the middle of a block").at_offset(at));
        };
        reader.seek(end - 4);
        let decoded = u64::from(u32::from_le_bytes(reader.array()?.unwrap_or_default()));
        if decoded > BLOCK {
            return Err(Error::corrupt(format!("a bgzf block says that it decodes to {decoded} bytes, which is too much")).at_offset(at));
        }
        blocks.add(at, len, decoded)?;
        last_is_empty = decoded == 0 && len == END;
        at = end;
        progress.update(at);
    }
    if !last_is_empty {
        tracing::warn!("the bgzf stream has no end marker: it may be cut short");
    }
    blocks.finish().map(Some)
}

/// Collects blocks to units: small blocks, and in large files all blocks, share one.
struct Blocks {
    units: Units,
    unit_len: u64,
    /// The unit that is being collected: place, length, decoded length.
    open: (u64, u64, u64),
    decoded: u64,
}

impl Blocks {
    fn new(source: &Source) -> Self {
        let unit_len = match source.len() >> 30 {
            0..16 => BLOCK,
            16..64 => 4 * BLOCK,
            _ => 16 * BLOCK,
        };
        Self { units: Units::default(), unit_len, open: (0, 0, 0), decoded: 0 }
    }

    fn add(&mut self, at: u64, len: u64, decoded: u64) -> Result<()> {
        if self.open.2 + decoded > self.unit_len {
            self.close(at)?;
        }
        self.open.1 += len;
        self.open.2 += decoded;
        self.decoded += decoded;
        Ok(())
    }

    fn close(&mut self, next_at: u64) -> Result<()> {
        let (at, len, decoded) = self.open;
        self.units.push(decoded, at, len)?;
        self.open = (next_at, 0, 0);
        Ok(())
    }

    fn finish(mut self) -> Result<Units> {
        self.close(0)?;
        Ok(self.units)
    }
}

/// The `.gzi` file's pairs: where a block begins, in the file and decoded. `None` if there is none, or if it does not fit the stream.
fn read_gzi(source: &Source) -> Result<Option<Vec<(u64, u64)>>> {
    let Some(path) = source.store().path() else { return Ok(None) };
    let mut name = OsString::from(path);
    name.push(".gzi");
    let Ok(file) = File::open(&name) else { return Ok(None) };
    match read_pairs(&file, source) {
        Some(pairs) if spot_check(source, &pairs)? => Ok(Some(pairs)),
        _ => {
            tracing::warn!("{}: does not belong to this version of the stream and is not used", name.display());
            Ok(None)
        }
    }
}

fn read_pairs(file: &File, source: &Source) -> Option<Vec<(u64, u64)>> {
    let len = file.metadata().ok()?.len();
    let mut file = BufReader::new(file);
    let mut number = || -> Option<u64> {
        let mut bytes = [0; 8];
        file.read_exact(&mut bytes).ok()?;
        Some(u64::from_le_bytes(bytes))
    };
    let count = number()?;
    if count.checked_mul(16)?.checked_add(8)? != len || count > source.len() / END {
        return None;
    }
    let mut pairs = Vec::new();
    let mut last = (0, 0);
    for _ in 0..count {
        let pair = (number()?, number()?);
        if pair.0 <= last.0 || pair.1 < last.1 || pair.1 - last.1 > BLOCK || pair.0 >= source.len() {
            return None;
        }
        pairs.push(pair);
        last = pair;
    }
    Some(pairs)
}

/// Whether blocks begin where some of the pairs say, and have the lengths that they say. The rest is checked when it is decoded.
fn spot_check(source: &Source, pairs: &[(u64, u64)]) -> Result<bool> {
    let mut reader = source.reader(0, source.len());
    let samples = 64.min(pairs.len());
    for sample in 0..=samples {
        // Entry 0 is not stored: the first block begins at 0.
        let entry = (sample * pairs.len()).checked_div(samples).unwrap_or(0);
        let (at, decoded) = if entry == 0 { (0, 0) } else { pairs.get(entry - 1).copied().unwrap_or_default() };
        reader.seek(at);
        let Some(len) = read_header(&mut reader)?.and_then(|header| header.block_len) else { return Ok(false) };
        let Some((next_at, next_decoded)) = pairs.get(entry) else { continue };
        if at + len != *next_at {
            return Ok(false);
        }
        let Some(size) = source.array(next_at - 4)?.map(u32::from_le_bytes) else { return Ok(false) };
        if decoded + u64::from(size) != *next_decoded {
            return Ok(false);
        }
    }
    Ok(true)
}

impl Codec for Bgzf {
    fn name(&self) -> &'static str {
        "bgzf"
    }

    fn decode(&self, source: &Source, _: usize, span: &Span, out: &mut Vec<u8>) -> Result<()> {
        thread_local! {
            static INFLATE: RefCell<Decompressor> = RefCell::new(Decompressor::new());
        }
        let coded = coded_bytes(source, span)?;
        let damaged = |at: u64, why: &str| Error::corrupt(format!("a bgzf block is damaged: {why}")).at_offset(at);
        out.resize(span.len as usize, 0);
        let mut filled = 0;
        let mut at = 0_usize;
        while at < coded.len() {
            let place = span.coded_at + at as u64;
            let len = coded.get(at..).and_then(block_len).ok_or_else(|| damaged(place, "it has no header"))?;
            let block = coded.get(at..at + len as usize).ok_or_else(|| damaged(place, "it is longer than it was"))?;
            let room = out.get_mut(filled..).unwrap_or_default();
            let got = INFLATE
                .with_borrow_mut(|inflate| inflate.gzip_decompress(block, room))
                .map_err(|error| damaged(place, &error.to_string()))?;
            filled += got;
            at += len as usize;
        }
        out.truncate(filled);
        Ok(())
    }
}
