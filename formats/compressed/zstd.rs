//! Zstandard (RFC 8878): frames decode alone. Their sizes come from a seek table (the seekable format), or from frame headers and a walk over block headers; frames that do not tell
//! their decoded size are decoded once to measure it, unless there is only one.

use super::codec::{Codec, Context, IN_MEMORY, coded_bytes};
use super::sidecar::{Decoder as Stored, Encoder, Stored as StoredWindows};
use super::source::{Source, SourceReader};
use super::units::{MAX_UNITS, Span, Units};
use super::workers::thread_count;
use crate::error::{Error, Kind, Result};
use std::cell::RefCell;
use std::io::{BufRead, Read};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use twox_hash::XxHash64;
use zstd::bulk::Decompressor;
use zstd::stream::read::Decoder;
use zstd::zstd_safe::DParameter;

const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Fields of the seek table's footer: number of frames, flags, magic.
const SEEK_FOOTER: u64 = 9;
const SEEK_MAGIC: [u8; 4] = [0xb1, 0xea, 0x92, 0x8f];
/// A seek table's frame is a skippable one of this number.
const SEEK_FRAME: [u8; 4] = [0x5e, 0x2a, 0x4d, 0x18];

/// What is known beside the frames' places.
pub(super) struct Zstd {
    /// Low halves of the decoded frames' XXH64, where the seek table has them.
    checksums: Vec<u32>,
    window_log: u32,
    /// The sizes had to be measured.
    measured: bool,
}

/// A frame that was found. `len`: decoded, if its header tells.
struct Frame {
    at: u64,
    coded_len: u64,
    len: Option<u64>,
}

pub(super) fn index(context: &Context<'_>) -> Result<(Units, Zstd)> {
    let window_log = context.options.memory_limit.max(1 << 10).ilog2().min(31);
    let mut zstd = Zstd { checksums: Vec::new(), window_log, measured: false };
    if let Some((units, checksums)) = seek_table(context.source)? {
        zstd.checksums = checksums;
        return Ok((units, zstd));
    }
    let mut frames = walk(context)?;
    if frames.iter().any(|frame| frame.len.is_none()) {
        measure(context, &mut frames, window_log)?;
        zstd.measured = true;
    }
    let mut units = Units::default();
    for frame in frames {
        units.push(frame.len.unwrap_or(0), frame.at, frame.coded_len)?;
    }
    Ok((units, zstd))
}

/// The units by the seek table at the end of the file; `None` if there is none that fits the file.
fn seek_table(source: &Source) -> Result<Option<(Units, Vec<u32>)>> {
    let Some(footer_at) = source.len().checked_sub(SEEK_FOOTER) else { return Ok(None) };
    let Some([c0, c1, c2, c3, flags, magic @ ..]) = source.array::<9>(footer_at)? else { return Ok(None) };
    let count = u32::from_le_bytes([c0, c1, c2, c3]);
    // Bits 2 to 6 are reserved.
    if magic != SEEK_MAGIC || flags & 0x7c != 0 || count as usize > MAX_UNITS {
        return Ok(None);
    }
    let has_checksums = flags & 0x80 != 0;
    let entry_len: u64 = if has_checksums { 12 } else { 8 };
    let table_len = u64::from(count) * entry_len;
    let Some(frame_at) = footer_at.checked_sub(table_len + 8) else { return Ok(None) };
    let Some([m0, m1, m2, m3, len @ ..]) = source.array::<8>(frame_at)? else { return Ok(None) };
    if [m0, m1, m2, m3] != SEEK_FRAME || u64::from(u32::from_le_bytes(len)) != table_len + SEEK_FOOTER {
        return Ok(None);
    }
    let mut units = Units::default();
    let mut checksums = Vec::new();
    let mut at = 0_u64;
    let mut reader = source.reader(frame_at + 8, footer_at);
    for _ in 0..count {
        let Some(coded_len) = reader.array()?.map(u32::from_le_bytes) else { return Ok(None) };
        let Some(len) = reader.array()?.map(u32::from_le_bytes) else { return Ok(None) };
        let checksum = if has_checksums { reader.array()?.map(u32::from_le_bytes) } else { None };
        if units.push(u64::from(len), at, u64::from(coded_len))? {
            checksums.extend(checksum);
        }
        at += u64::from(coded_len);
    }
    if at != frame_at {
        tracing::warn!("the seek table of the zstd stream does not fit the file and is not used");
        return Ok(None);
    }
    Ok(Some((units, checksums)))
}

/// Finds the frames by their headers and those of their blocks.
fn walk(context: &Context<'_>) -> Result<Vec<Frame>> {
    let source = context.source;
    let mut reader = source.reader(0, source.len());
    let mut progress = context.progress("finding the frames of the zstd stream", source.len());
    let mut frames = Vec::new();
    loop {
        let at = reader.position();
        progress.update(at);
        match *reader.peek(8)? {
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, a, b, c, d, ..] => {
                let end = at + 8 + u64::from(u32::from_le_bytes([a, b, c, d]));
                if end > source.len() {
                    return Err(cut_short(at));
                }
                reader.seek(end);
            }
            [a, b, c, d, ..] if [a, b, c, d] == MAGIC => {
                if frames.len() >= MAX_UNITS {
                    return Err(Error::unsupported("the zstd stream has too many frames: compress it with larger ones"));
                }
                frames.push(frame(&mut reader, source.len())?);
            }
            [] => return Ok(frames),
            _ if frames.is_empty() => return Err(Error::invalid_format("not a zstd stream")),
            _ => {
                context.trailing_garbage("zstd", &mut reader)?;
                return Ok(frames);
            }
        }
    }
}

fn cut_short(at: u64) -> Error {
    Error::corrupt("the zstd stream is cut short: the file ends in the middle of a frame").at_offset(at)
}

/// Passes over the frame that begins at the reader's position (RFC 8878, 3.1.1).
fn frame(reader: &mut SourceReader<'_>, file_len: u64) -> Result<Frame> {
    let at = reader.position();
    let cut = || cut_short(at);
    let [_, _, _, _, descriptor] = reader.array()?.ok_or_else(cut)?;
    let single_segment = descriptor & 0x20 != 0;
    if descriptor & 8 != 0 {
        return Err(Error::unsupported("the zstd frame uses a reserved feature").at_offset(at));
    }
    if !single_segment {
        reader.array::<1>()?.ok_or_else(cut)?;
    }
    let dictionary = match descriptor & 3 {
        0 => 0,
        1 => u32::from(u8::from_le_bytes(reader.array()?.ok_or_else(cut)?)),
        2 => u32::from(u16::from_le_bytes(reader.array()?.ok_or_else(cut)?)),
        _ => u32::from_le_bytes(reader.array()?.ok_or_else(cut)?),
    };
    if dictionary != 0 {
        return Err(Error::unsupported(format!("the zstd stream needs a dictionary (number {dictionary})")).at_offset(at));
    }
    let len = match descriptor >> 6 {
        0 if single_segment => Some(u64::from(u8::from_le_bytes(reader.array()?.ok_or_else(cut)?))),
        0 => None,
        1 => Some(u64::from(u16::from_le_bytes(reader.array()?.ok_or_else(cut)?)) + 256),
        2 => Some(u64::from(u32::from_le_bytes(reader.array()?.ok_or_else(cut)?))),
        _ => Some(u64::from_le_bytes(reader.array()?.ok_or_else(cut)?)),
    };
    loop {
        let block_at = reader.position();
        let [a, b, c] = reader.array()?.ok_or_else(cut)?;
        let header = u32::from_le_bytes([a, b, c, 0]);
        let on_disk = match header >> 1 & 3 {
            0 | 2 => header >> 3,
            1 => 1,
            _ => return Err(Error::corrupt("a zstd block is of the reserved type").at_offset(block_at)),
        };
        let end = block_at + 3 + u64::from(on_disk);
        if end > file_len {
            return Err(cut());
        }
        reader.seek(end);
        if header & 1 != 0 {
            break;
        }
    }
    if descriptor & 4 != 0 {
        reader.array::<4>()?.ok_or_else(cut)?;
    }
    Ok(Frame { at, coded_len: reader.position() - at, len })
}

/// Decodes the frames that do not tell their size, all processors at once.
fn measure(context: &Context<'_>, frames: &mut [Frame], window_log: u32) -> Result<()> {
    let unknown: Vec<(usize, u64, u64)> =
        frames.iter().enumerate().filter(|(_, frame)| frame.len.is_none()).map(|(n, frame)| (n, frame.at, frame.coded_len)).collect();
    let total = unknown.iter().map(|(_, _, len)| len).sum();
    let mut report = context.progress("measuring the frames of the zstd stream", total);
    let (next, done) = (AtomicUsize::new(0), AtomicU64::new(0));
    let source = context.source;
    let run = |mut tell: Option<&mut dyn FnMut(u64)>| -> Result<Vec<(usize, u64)>> {
        let mut sizes = Vec::new();
        while let Some((number, at, len)) = unknown.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut reader = frame_reader(source.reader(*at, at + len), window_log)?;
            let decoded = count(&mut reader).map_err(|error| Error::io("cannot decode a zstd frame", error).at_offset(*at))?;
            sizes.push((*number, decoded));
            let done = done.fetch_add(*len, Ordering::Relaxed) + len;
            if let Some(tell) = &mut tell {
                tell(done);
            }
        }
        Ok(sizes)
    };
    let mut sizes = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        let helpers: Vec<_> = (1..thread_count().min(unknown.len())).map(|_| scope.spawn(|| run(None))).collect();
        sizes.extend(run(Some(&mut |done| report.update(done)))?);
        for helper in helpers {
            let measured = helper.join().map_err(|_| Error::new(Kind::Io, "the zstd decoder panicked"))?;
            sizes.extend(measured?);
        }
        Ok(())
    })?;
    for (number, len) in sizes {
        if let Some(frame) = frames.get_mut(number) {
            frame.len = Some(len);
        }
    }
    Ok(())
}

fn count(reader: &mut impl Read) -> std::io::Result<u64> {
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0;
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok(total),
            got => total += got as u64,
        }
    }
}

fn frame_reader<'a>(from: impl BufRead + 'a, window_log: u32) -> Result<Decoder<'a, impl BufRead + 'a>> {
    let failed = |error| Error::io("cannot start a zstd decoder", error);
    let mut decoder = Decoder::with_buffer(from).map_err(failed)?.single_frame();
    decoder.set_parameter(DParameter::WindowLogMax(window_log)).map_err(failed)?;
    Ok(decoder)
}

impl Codec for Zstd {
    fn name(&self) -> &'static str {
        "zstd"
    }

    fn decode(&self, source: &Source, number: usize, span: &Span, out: &mut Vec<u8>) -> Result<()> {
        thread_local! {
            static DECODER: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
        }
        let coded = coded_bytes(source, span)?;
        let damaged = |why: &dyn std::fmt::Display| Error::corrupt(format!("a zstd frame is damaged: {why}")).at_offset(span.coded_at);
        DECODER.with_borrow_mut(|decoder| -> Result<()> {
            let decoder = match decoder {
                Some(decoder) => decoder,
                none => none.insert(Decompressor::new().map_err(|error| Error::io("cannot start a zstd decoder", error))?),
            };
            decoder.decompress_to_buffer(&coded, out).map_err(|error| damaged(&error))?;
            Ok(())
        })?;
        match self.checksums.get(number) {
            Some(checksum) if *checksum != XxHash64::oneshot(0, out) as u32 => Err(damaged(&"its checksum is wrong")),
            _ => Ok(()),
        }
    }

    fn reader<'a>(&'a self, source: &'a Source, _: usize, span: &Span) -> Result<Box<dyn Read + 'a>> {
        Ok(Box::new(frame_reader(source.reader(span.coded_at, span.coded_at + span.coded_len), self.window_log)?))
    }

    fn save(&self, index: &mut Encoder) -> bool {
        index.put(u64::from(self.window_log));
        self.measured && self.checksums.is_empty()
    }
}

/// An index whose sizes had to be measured.
pub(super) fn restore(_: &Source, units: &Units, index: &mut Stored<'_>, _: StoredWindows) -> Option<Zstd> {
    let window_log = u32::try_from(index.get()?).ok().filter(|log| (10..=31).contains(log))?;
    units.spans().iter().all(|span| !span.is_zero()).then_some(Zstd { checksums: Vec::new(), window_log, measured: true })
}

// A frame that fits in memory is decoded in one call, which needs no window.
const _: () = assert!(IN_MEMORY <= u32::MAX as u64);
