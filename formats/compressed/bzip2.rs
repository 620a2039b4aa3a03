//! bzip2: blocks of at most 900 kB decode alone, but nothing says where they are or how long they get: one pass finds their magic numbers, which begin at any bit, another decodes each
//! block to measure it, on all processors at once. The index is kept.
//!
//! A block is decoded by making a stream of it alone: header, block, end mark, the block's CRC as that of the stream.

use super::bits::MsbWriter;
use super::codec::{Codec, Context, IN_MEMORY};
use super::sidecar::{Decoder, Encoder, Stored};
use super::source::Source;
use super::units::{MAX_UNITS, Span, Units};
use super::workers::thread_count;
use crate::error::{Error, Kind, Result};
use bzip2::{Decompress, Status};
use std::sync::atomic::{AtomicUsize, Ordering};

const BLOCK: u64 = 0x3141_5926_5359;
const END: u64 = 0x1772_4538_5090;
const MAGIC_BITS: u64 = 48;
const CRC_BITS: u64 = 32;
/// No encoder makes a block longer than this: 900 kB before the Huffman stage, which seldom adds.
const MAX_BLOCK_BITS: u64 = 8 * (2 << 20);

/// The blocks' places.
pub(super) struct Bzip2 {
    blocks: Vec<Block>,
}

/// A block: from its magic number to the next one, in bits from the start of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    start: u64,
    end: u64,
    /// `1` to `9`, from the stream's header.
    level: u8,
}

/// A magic number that was found, or what looks like one.
#[derive(Clone, Copy)]
struct Mark {
    bit: u64,
    is_end: bool,
}

pub(super) fn index(context: &Context<'_>) -> Result<(Units, Bzip2)> {
    let marks = scan(context)?;
    let blocks = blocks(context, &marks)?;
    let sizes = measure(context, &blocks)?;
    let mut units = Units::default();
    let mut bzip2 = Bzip2 { blocks: Vec::new() };
    for (block, len) in sizes {
        let (at, coded_len) = block.bytes();
        if units.push(len, at, coded_len)? {
            bzip2.blocks.push(block);
        }
    }
    Ok((units, bzip2))
}

/// All magic numbers in the file.
fn scan(context: &Context<'_>) -> Result<Vec<Mark>> {
    const MASK: u64 = (1 << MAGIC_BITS) - 1;
    let source = context.source;
    let mut report = context.progress("finding the blocks of the bzip2 stream", source.len());
    let mut reader = source.reader(0, source.len());
    let mut marks = Vec::new();
    let mut last = 0_u64;
    let mut at = 0_u64;
    loop {
        let bytes = reader.peek(1)?;
        let len = bytes.len();
        if len == 0 {
            return Ok(marks);
        }
        for byte in bytes {
            last = last << 8 | u64::from(*byte);
            at += 1;
            for shift in (0..8).rev() {
                let found = last >> shift & MASK;
                if (found == BLOCK || found == END) && at * 8 >= MAGIC_BITS + shift {
                    marks.push(Mark { bit: at * 8 - shift - MAGIC_BITS, is_end: found == END });
                }
            }
        }
        if marks.len() > MAX_UNITS {
            return Err(Error::unsupported("the bzip2 stream has too many blocks"));
        }
        reader.consume(len);
        report.update(at);
    }
}

/// The blocks between the marks, with the streams' headers and ends checked.
fn blocks(context: &Context<'_>, marks: &[Mark]) -> Result<Vec<Block>> {
    let source = context.source;
    let mut blocks: Vec<Block> = Vec::new();
    let mut marks = marks.iter().peekable();
    let mut at = 0;
    loop {
        // A stream begins at byte `at`.
        let level = match source.array(at)? {
            Some([b'B', b'Z', b'h', level @ b'1'..=b'9']) => level,
            _ if at == 0 => return Err(Error::invalid_format("not a bzip2 stream")),
            _ => {
                context.trailing_garbage("bzip2", &mut source.reader(at, source.len()))?;
                return Ok(blocks);
            }
        };
        let mut next = (at + 4) * 8;
        let mut combined = 0_u32;
        at = loop {
            while marks.peek().is_some_and(|mark| mark.bit < next) {
                marks.next();
            }
            let cut = || {
                Error::corrupt("the bzip2 stream is cut short or damaged: a block is followed neither by another nor by an end")
                    .at_offset(next / 8)
            };
            let mark = marks.next().ok_or_else(cut)?;
            // Behind the header there must be a mark at once; later ones are where they are.
            if mark.bit != next && next == (at + 4) * 8 {
                return Err(cut());
            }
            if let Some(open) = blocks.last_mut().filter(|open| open.end == 0) {
                open.end = mark.bit;
            }
            let crc = crc_at(source, mark.bit + MAGIC_BITS)?.ok_or_else(cut)?;
            if mark.is_end {
                if crc == combined {
                    break (mark.bit + MAGIC_BITS + CRC_BITS).div_ceil(8);
                }
                return Err(Error::corrupt("the bzip2 stream is damaged: the checksums of its blocks do not add up to that of its end")
                    .at_offset(mark.bit / 8));
            }
            combined = combined.rotate_left(1) ^ crc;
            blocks.push(Block { start: mark.bit, end: 0, level });
            next = mark.bit + MAGIC_BITS + CRC_BITS;
        };
    }
}

fn crc_at(source: &Source, bit: u64) -> Result<Option<u32>> {
    let Some(bytes) = source.array::<4>(bit / 8)? else { return Ok(None) };
    let mut wide = u64::from(u32::from_be_bytes(bytes)) << 8;
    if !bit.is_multiple_of(8) {
        let Some([last]) = source.array(bit / 8 + 4)? else { return Ok(None) };
        wide |= u64::from(last);
    }
    Ok(Some((wide >> (8 - bit % 8)) as u32))
}

/// Decodes all blocks to learn their sizes. Where a block does not decode the mark after it may have been data: then it is tried as one with the next.
fn measure(context: &Context<'_>, blocks: &[Block]) -> Result<Vec<(Block, u64)>> {
    let source = context.source;
    let mut report = context.progress("measuring the blocks of the bzip2 stream", blocks.len() as u64);
    let next = AtomicUsize::new(0);
    let run = |mut tell: Option<&mut dyn FnMut(u64)>| {
        let mut sizes = Vec::new();
        let mut out = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(block) = blocks.get(number) else { return sizes };
            sizes.push((number, block.measure(source, &mut out)));
            if let Some(tell) = &mut tell {
                tell(number as u64);
            }
        }
    };
    let mut sizes: Vec<(usize, Result<u64>)> = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        let helpers: Vec<_> = (1..thread_count().min(blocks.len())).map(|_| scope.spawn(|| run(None))).collect();
        sizes.extend(run(Some(&mut |done| report.update(done))));
        for helper in helpers {
            sizes.extend(helper.join().map_err(|_| Error::new(Kind::Io, "the bzip2 decoder panicked"))?);
        }
        Ok(())
    })?;
    sizes.sort_by_key(|(number, _)| *number);
    let mut measured: Vec<(Block, u64)> = Vec::new();
    let mut sizes = sizes.into_iter().zip(blocks);
    while let Some(((number, size), block)) = sizes.next() {
        match size {
            Ok(len) => measured.push((*block, len)),
            Err(error) if error.kind() != Kind::Corrupt => return Err(error),
            Err(error) => {
                let joined = blocks.get(number + 1).filter(|next| next.start == block.end).map(|next| Block { end: next.end, ..*block });
                let Some((joined, Ok(len))) = joined.map(|joined| (joined, joined.measure(source, &mut Vec::new()))) else {
                    return Err(error);
                };
                measured.push((joined, len));
                sizes.next();
            }
        }
    }
    Ok(measured)
}

impl Block {
    /// The bytes that hold it: offset and length.
    fn bytes(&self) -> (u64, u64) {
        (self.start / 8, self.end.div_ceil(8) - self.start / 8)
    }

    /// A stream of this block alone.
    fn stream(&self, source: &Source) -> Result<Vec<u8>> {
        if self.end - self.start > MAX_BLOCK_BITS {
            return Err(Error::corrupt("the bzip2 stream is damaged: a block is too long").at_offset(self.start / 8));
        }
        let (at, len) = self.bytes();
        let coded = source.range(at, len)?;
        let mut stream = Vec::with_capacity(coded.len() + 16);
        stream.extend_from_slice(&[b'B', b'Z', b'h', self.level]);
        let mut bits = MsbWriter::new(&mut stream);
        bits.put_run(&coded, self.start % 8, self.end - self.start);
        bits.put(END, MAGIC_BITS as u32);
        bits.put_run(&coded, self.start % 8 + MAGIC_BITS, CRC_BITS);
        bits.finish();
        Ok(stream)
    }

    /// Decodes all of the block into the empty `out`, which grows as needed.
    fn decode(&self, source: &Source, out: &mut Vec<u8>) -> Result<()> {
        let damaged = |why: &str| Error::corrupt(format!("a bzip2 block is damaged: {why}")).at_offset(self.start / 8);
        let stream = self.stream(source)?;
        let mut decoder = Decompress::new(false);
        loop {
            if out.len() == out.capacity() {
                if out.len() as u64 >= IN_MEMORY {
                    return Err(damaged("it decodes to more than any block can"));
                }
                out.try_reserve(out.len().max(1 << 20)).map_err(|_| Error::new(Kind::Io, "there is no memory for a decoded block"))?;
            }
            let before = (decoder.total_in(), decoder.total_out());
            let rest = stream.get(before.0 as usize..).unwrap_or_default();
            match decoder.decompress_vec(rest, out).map_err(|error| damaged(&error.to_string()))? {
                Status::StreamEnd => return Ok(()),
                _ if before == (decoder.total_in(), decoder.total_out()) && out.len() < out.capacity() => {
                    return Err(damaged("it has no end"));
                }
                _ => {}
            }
        }
    }

    fn measure(&self, source: &Source, out: &mut Vec<u8>) -> Result<u64> {
        out.clear();
        self.decode(source, out)?;
        Ok(out.len() as u64)
    }
}

impl Codec for Bzip2 {
    fn name(&self) -> &'static str {
        "bzip2"
    }

    fn decode(&self, source: &Source, number: usize, _: &Span, out: &mut Vec<u8>) -> Result<()> {
        let block = self.blocks.get(number).ok_or_else(|| Error::corrupt("the index of the bzip2 stream is too short"))?;
        block.decode(source, out)
    }

    fn save(&self, index: &mut Encoder) -> bool {
        for block in &self.blocks {
            index.put(block.start);
            index.put(block.end - block.start);
            index.put(u64::from(block.level));
        }
        true
    }
}

/// The index as `save` stored it; `None` if it makes no sense for this file.
pub(super) fn restore(source: &Source, units: &Units, index: &mut Decoder<'_>, _: Stored) -> Option<Bzip2> {
    let file_bits = source.len().checked_mul(8)?;
    let mut blocks = Vec::with_capacity(units.spans().len());
    for span in units.spans() {
        let start = index.get()?;
        let end = start.checked_add(index.get()?).filter(|end| *end <= file_bits)?;
        let level = u8::try_from(index.get()?).ok().filter(u8::is_ascii_digit)?;
        let block = Block { start, end, level };
        if block.bytes() != (span.coded_at, span.coded_len) || span.len > IN_MEMORY {
            return None;
        }
        blocks.push(block);
    }
    Some(Bzip2 { blocks })
}
