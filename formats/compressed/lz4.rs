//! LZ4 frames (LZ4 Frame Format 1.6): blocks of a frame decode alone if the frame says that they are independent, otherwise the frame is one unit.
//!
//! Nothing says how long a block gets, but that is the sum of its tokens' lengths, which a walk without decoding adds up. The index is kept.

use super::codec::{Codec, Context, coded_bytes};
use super::sidecar::{Decoder, Encoder, Stored};
use super::source::{Source, SourceReader};
use super::units::{MAX_UNITS, Span, Units};
use crate::error::{Error, Result};
use lz4_flex::frame::FrameDecoder;
use std::io::Read;
use twox_hash::XxHash32;

const MAGIC: [u8; 4] = [0x04, 0x22, 0x4d, 0x18];
/// Blocks shorter than this share a unit.
const SMALL: u64 = 64 << 10;
/// The bit of a block's size that says that it is stored as it is.
const STORED: u32 = 1 << 31;

/// How the units are made.
pub(super) struct Lz4 {
    /// Number of the first unit, and how it and those after it are made; ascending.
    frames: Vec<(usize, Form)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// Independent blocks, with or without checksums.
    Blocks { checksums: bool },
    /// A whole frame.
    Frame,
}

/// A frame's header, as far as it matters.
struct Header {
    independent: bool,
    checksums: bool,
    content_checksum: bool,
    content_len: Option<u64>,
    max_block: u32,
}

pub(super) fn index(context: &Context<'_>) -> Result<(Units, Lz4)> {
    let source = context.source;
    let mut reader = source.reader(0, source.len());
    let mut report = context.progress("finding the blocks of the lz4 stream", source.len());
    let mut units = Units::default();
    let mut lz4 = Lz4 { frames: Vec::new() };
    let mut frames = 0_u64;
    loop {
        let at = reader.position();
        match *reader.peek(8)? {
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, a, b, c, d, ..] => {
                let end = at + 8 + u64::from(u32::from_le_bytes([a, b, c, d]));
                if end > source.len() {
                    return Err(cut_short(at));
                }
                reader.seek(end);
            }
            [a, b, c, d, ..] if [a, b, c, d] == MAGIC => {
                let form = frame(&mut reader, &mut units, |at| report.update(at))?;
                if units.spans().len() > form.0 {
                    lz4.frames.push(form);
                }
                frames += 1;
            }
            [] => break,
            _ if frames == 0 => return Err(Error::invalid_format("not an lz4 stream")),
            _ => {
                context.trailing_garbage("lz4", &mut reader)?;
                break;
            }
        }
    }
    Ok((units, lz4))
}

fn cut_short(at: u64) -> Error {
    Error::corrupt("the lz4 stream is cut short: the file ends in the middle of a frame").at_offset(at)
}

/// Adds the units of the frame at the reader's position.
fn frame(reader: &mut SourceReader<'_>, units: &mut Units, mut tell: impl FnMut(u64)) -> Result<(usize, Form)> {
    let frame_at = reader.position();
    let header = header(reader)?;
    let first = units.spans().len();
    let mut total = 0_u64;
    // The blocks that will share a unit: where they begin, and their decoded length.
    let mut open = (reader.position(), 0_u64);
    let mut buffer = Vec::new();
    loop {
        let at = reader.position();
        tell(at);
        let size = u32::from_le_bytes(reader.array()?.ok_or_else(|| cut_short(at))?);
        if size == 0 {
            break;
        }
        let coded_len = size & !STORED;
        if coded_len > header.max_block {
            return Err(Error::corrupt(format!("an lz4 block of {coded_len} bytes is larger than its frame allows")).at_offset(at));
        }
        buffer.clear();
        buffer.resize(coded_len as usize, 0);
        reader.read_exact(&mut buffer).map_err(|_| cut_short(at))?;
        let len = if size & STORED != 0 { u64::from(coded_len) } else { decoded_len(&buffer).unwrap_or(u64::MAX) };
        if len > u64::from(header.max_block) {
            return Err(Error::corrupt("an lz4 block is damaged: it decodes to more than its frame allows, or has no end").at_offset(at));
        }
        if header.checksums {
            // Checked when the block is decoded.
            reader.array::<4>()?.ok_or_else(|| cut_short(at))?;
        }
        total += len;
        if header.independent {
            if open.1 > 0 && open.1 + len > SMALL {
                units.push(open.1, open.0, at - open.0)?;
                open = (at, 0);
            }
            open.1 += len;
        }
    }
    let end = reader.position();
    if header.content_checksum {
        reader.array::<4>()?.ok_or_else(|| cut_short(end))?;
    }
    if header.content_len.is_some_and(|len| len != total) {
        return Err(
            Error::corrupt("the lz4 frame is damaged: its blocks do not add up to the length that its header says").at_offset(frame_at)
        );
    }
    if header.independent {
        // Without the end mark.
        units.push(open.1, open.0, end - 4 - open.0)?;
        return Ok((first, Form::Blocks { checksums: header.checksums }));
    }
    units.push(total, frame_at, reader.position() - frame_at)?;
    Ok((first, Form::Frame))
}

fn header(reader: &mut SourceReader<'_>) -> Result<Header> {
    let at = reader.position();
    let cut = || cut_short(at);
    let bytes = reader.peek(19)?;
    let [_, _, _, _, flags, block_descriptor, ..] = *bytes else { return Err(cut()) };
    let has_len = flags & 8 != 0;
    let len = 6 + if has_len { 8 } else { 0 } + if flags & 1 != 0 { 4 } else { 0 };
    let (Some(descriptor), Some(check)) = (bytes.get(4..len), bytes.get(len)) else { return Err(cut()) };
    if (XxHash32::oneshot(0, descriptor) >> 8) as u8 != *check {
        return Err(Error::corrupt("the header of an lz4 frame is damaged: its checksum is wrong").at_offset(at));
    }
    if flags & 0xc2 != 0x40 || block_descriptor & 0x8f != 0 {
        return Err(Error::unsupported("the lz4 frame is of a later version of the format").at_offset(at));
    }
    if flags & 1 != 0 {
        return Err(Error::unsupported("the lz4 stream needs a dictionary").at_offset(at));
    }
    let max_block = match block_descriptor >> 4 {
        size @ 4..=7 => 1 << (8 + 2 * u32::from(size)),
        _ => return Err(Error::corrupt("an lz4 frame has blocks of no valid size").at_offset(at)),
    };
    let content_len = if has_len { bytes.get(6..).and_then(|bytes| bytes.first_chunk()).map(|len| u64::from_le_bytes(*len)) } else { None };
    let header =
        Header { independent: flags & 0x20 != 0, checksums: flags & 0x10 != 0, content_checksum: flags & 4 != 0, content_len, max_block };
    reader.consume(len + 1);
    Ok(header)
}

/// The decoded length of a block: the sum of its literals and matches. `None`: it is not valid.
fn decoded_len(mut block: &[u8]) -> Option<u64> {
    fn length(block: &mut &[u8], nibble: u8) -> Option<u64> {
        let mut total = u64::from(nibble);
        if nibble == 15 {
            loop {
                let (byte, rest) = block.split_first()?;
                *block = rest;
                total += u64::from(*byte);
                if *byte != 255 {
                    break;
                }
            }
        }
        Some(total)
    }
    let mut total = 0;
    loop {
        let (token, rest) = block.split_first()?;
        block = rest;
        let literals = length(&mut block, token >> 4)?;
        total += literals;
        block = block.get(usize::try_from(literals).ok()?..)?;
        if block.is_empty() {
            return Some(total);
        }
        block = block.get(2..)?;
        total += length(&mut block, token & 15)? + 4;
    }
}

impl Lz4 {
    fn form(&self, unit: usize) -> Form {
        let after = self.frames.partition_point(|(first, _)| *first <= unit);
        after.checked_sub(1).and_then(|n| self.frames.get(n)).map_or(Form::Frame, |(_, form)| *form)
    }
}

impl Codec for Lz4 {
    fn name(&self) -> &'static str {
        "lz4"
    }

    fn decode(&self, source: &Source, number: usize, span: &Span, out: &mut Vec<u8>) -> Result<()> {
        let damaged = |why: &dyn std::fmt::Display| Error::corrupt(format!("an lz4 block is damaged: {why}")).at_offset(span.coded_at);
        let coded = coded_bytes(source, span)?;
        let Form::Blocks { checksums } = self.form(number) else {
            FrameDecoder::new(coded.as_slice()).take(span.len + 1).read_to_end(out).map_err(|error| damaged(&error))?;
            return Ok(());
        };
        out.resize(span.len as usize, 0);
        let (mut rest, mut filled) = (coded.as_slice(), 0);
        while let Some((size, after)) = rest.split_first_chunk() {
            let size = u32::from_le_bytes(*size);
            let (block, after) = after.split_at_checked((size & !STORED) as usize).ok_or_else(|| damaged(&"it is longer than it was"))?;
            rest = after;
            if checksums {
                let (sum, after) = rest.split_first_chunk().ok_or_else(|| damaged(&"it has no checksum"))?;
                if XxHash32::oneshot(0, block) != u32::from_le_bytes(*sum) {
                    return Err(damaged(&"its checksum is wrong"));
                }
                rest = after;
            }
            let room = out.get_mut(filled..).unwrap_or_default();
            if size & STORED == 0 {
                filled += lz4_flex::block::decompress_into(block, room).map_err(|error| damaged(&error))?;
            } else {
                room.get_mut(..block.len()).ok_or_else(|| damaged(&"it is longer than it was"))?.copy_from_slice(block);
                filled += block.len();
            }
        }
        out.truncate(filled);
        Ok(())
    }

    fn reader<'a>(&'a self, source: &'a Source, _: usize, span: &Span) -> Result<Box<dyn Read + 'a>> {
        Ok(Box::new(FrameDecoder::new(source.reader(span.coded_at, span.coded_at + span.coded_len))))
    }

    fn save(&self, index: &mut Encoder) -> bool {
        index.put(self.frames.len() as u64);
        for (first, form) in &self.frames {
            index.put(*first as u64);
            index.put(match form {
                Form::Blocks { checksums } => u64::from(*checksums),
                Form::Frame => 2,
            });
        }
        true
    }
}

/// The index as `save` stored it; `None` if it makes no sense.
pub(super) fn restore(_: &Source, units: &Units, index: &mut Decoder<'_>, _: Stored) -> Option<Lz4> {
    let count = usize::try_from(index.get()?).ok().filter(|count| *count <= MAX_UNITS)?;
    let mut frames: Vec<(usize, Form)> = Vec::new();
    for _ in 0..count {
        let first = usize::try_from(index.get()?).ok().filter(|first| *first < units.spans().len())?;
        if frames.last().is_some_and(|(last, _)| *last >= first) || (frames.is_empty() && first != 0) {
            return None;
        }
        let form = match index.get()? {
            flag @ 0..=1 => Form::Blocks { checksums: flag == 1 },
            2 => Form::Frame,
            _ => return None,
        };
        frames.push((first, form));
    }
    Some(Lz4 { frames })
}
