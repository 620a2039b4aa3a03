//! xz: the index at the end of each stream gives all blocks' sizes (The .xz File Format, 1.2.1).
//!
//! A block is decoded by making a stream of it alone: the header of the stream that it is from, the block, an index of one record, a footer. The library then checks everything
//! that it would check in a whole stream.

use super::codec::{Codec, Context, coded_bytes};
use super::source::{Source, SourceReader};
use super::units::{Span, Units};
use crate::error::{Error, Result};
use liblzma::bufread::XzDecoder;
use liblzma::stream::{Action, Error as LzmaError, Status, Stream};
use std::io::{Cursor, Read};

const HEADER: u64 = 12;
const FOOTER: u64 = 12;
const MAGIC: [u8; 6] = [0xfd, b'7', b'z', b'X', b'Z', 0];
const FOOTER_MAGIC: [u8; 2] = [b'Y', b'Z'];

/// Which streams the units are from.
pub(super) struct Xz {
    /// Number of the first unit, and the stream's flags; ascending.
    streams: Vec<(usize, [u8; 2])>,
    memory_limit: u64,
}

/// One stream of the file.
struct StreamInfo {
    flags: [u8; 2],
    /// Where its first block begins.
    blocks_at: u64,
    /// Unpadded and decoded size of each block.
    blocks: Vec<(u64, u64)>,
}

/// Reads the indexes, from the file's end to its start.
pub(super) fn index(context: &Context<'_>) -> Result<(Units, Xz)> {
    let source = context.source;
    let mut streams = Vec::new();
    let mut end = source.len();
    let mut blocks = 0;
    loop {
        end = before_padding(source, end)?;
        let (stream, at) = stream_before(source, end)?;
        blocks += stream.blocks.len();
        if blocks > super::units::MAX_UNITS || streams.len() > super::units::MAX_UNITS {
            return Err(Error::unsupported("the xz stream has too many blocks: compress it with larger ones"));
        }
        streams.push(stream);
        end = at;
        if end == 0 {
            break;
        }
    }
    let mut units = Units::default();
    let mut xz = Xz { streams: Vec::new(), memory_limit: context.options.memory_limit };
    for stream in streams.into_iter().rev() {
        xz.streams.push((units.spans().len(), stream.flags));
        let mut at = stream.blocks_at;
        for (unpadded, len) in stream.blocks {
            units.push(len, at, unpadded)?;
            at += padded(unpadded);
        }
    }
    Ok((units, xz))
}

/// What a block of this "unpadded" length takes in the file. (The padding is inside it, before the check.)
fn padded(len: u64) -> u64 {
    len.next_multiple_of(4)
}

/// Where the stream padding before `end` begins: zeros, four at a time.
fn before_padding(source: &Source, mut end: u64) -> Result<u64> {
    const PART: u64 = 64 << 10;
    while end > 0 {
        let from = end.saturating_sub(PART);
        let bytes = source.range(from, end - from)?;
        let zeros = bytes.iter().rev().take_while(|byte| **byte == 0).count() as u64;
        if zeros < end - from {
            return Ok(end - zeros / 4 * 4);
        }
        end = from;
    }
    Ok(0)
}

fn cut_short(at: u64) -> Error {
    Error::corrupt("the xz stream is cut short or damaged: where it should end there is no stream footer").at_offset(at)
}

/// The stream that ends at `end`, and where it begins.
fn stream_before(source: &Source, end: u64) -> Result<(StreamInfo, u64)> {
    let footer_at = end.checked_sub(FOOTER).ok_or_else(|| cut_short(end))?;
    let footer: [u8; 12] = source.array(footer_at)?.ok_or_else(|| cut_short(footer_at))?;
    let [c0, c1, c2, c3, b0, b1, b2, b3, f0, f1, m0, m1] = footer;
    if [m0, m1] != FOOTER_MAGIC || crc32fast::hash(&[b0, b1, b2, b3, f0, f1]) != u32::from_le_bytes([c0, c1, c2, c3]) {
        return Err(cut_short(footer_at));
    }
    let index_len = (u64::from(u32::from_le_bytes([b0, b1, b2, b3])) + 1) * 4;
    let damaged =
        |what: &str| Error::corrupt(format!("the xz stream's index is damaged: {what}")).at_offset(footer_at.saturating_sub(index_len));
    let index_at = footer_at.checked_sub(index_len).ok_or_else(|| damaged("it begins before the file"))?;
    let blocks = read_index(&mut source.reader(index_at, footer_at), index_len, index_at)?
        .ok_or_else(|| damaged("its contents or checksum are wrong"))?;
    let total = blocks
        .iter()
        .try_fold(0_u64, |total, (unpadded, _)| total.checked_add(padded(*unpadded)))
        .ok_or_else(|| damaged("sizes are too large"))?;
    let at =
        index_at.checked_sub(total).and_then(|at| at.checked_sub(HEADER)).ok_or_else(|| damaged("its blocks begin before the file"))?;
    if source.array(at)? != Some(header([f0, f1])) {
        return Err(Error::corrupt("the xz stream is damaged: its header is not what its footer and index say").at_offset(at));
    }
    Ok((StreamInfo { flags: [f0, f1], blocks_at: at + HEADER, blocks }, at))
}

/// The records of an index; `None`: it is damaged.
fn read_index(reader: &mut SourceReader<'_>, len: u64, at: u64) -> Result<Option<Vec<(u64, u64)>>> {
    let mut sum = crc32fast::Hasher::new();
    let mut byte = |reader: &mut SourceReader<'_>| -> Result<Option<u8>> {
        let byte: Option<[u8; 1]> = reader.array()?;
        Ok(byte.map(|[byte]| {
            sum.update(&[byte]);
            byte
        }))
    };
    let mut number = |reader: &mut SourceReader<'_>| -> Result<Option<u64>> {
        let mut number = 0;
        for n in 0..9 {
            let Some(next) = byte(reader)? else { return Ok(None) };
            number |= u64::from(next & 0x7f) << (7 * n);
            if next & 0x80 == 0 {
                return Ok((next != 0 || n == 0).then_some(number));
            }
        }
        Ok(None)
    };
    if number(reader)? != Some(0) {
        return Ok(None);
    }
    let Some(count) = number(reader)? else { return Ok(None) };
    if count > super::units::MAX_UNITS as u64 {
        return Err(Error::unsupported("the xz stream has too many blocks: compress it with larger ones"));
    }
    let mut blocks = Vec::new();
    for _ in 0..count {
        let (Some(unpadded), Some(decoded)) = (number(reader)?, number(reader)?) else { return Ok(None) };
        // "unpadded" of a block is 5 at least; all of them fit in 63 bits.
        if unpadded < 5 || unpadded > i64::MAX as u64 - 3 {
            return Ok(None);
        }
        blocks.push((unpadded, decoded));
    }
    while !(reader.position() - at).is_multiple_of(4) {
        if number(reader)? != Some(0) {
            return Ok(None);
        }
    }
    let whole = reader.position() - at + 4 == len;
    let stored: Option<[u8; 4]> = reader.array()?;
    Ok((whole && stored == Some(sum.finalize().to_le_bytes())).then_some(blocks))
}

/// A stream header with these flags.
fn header(flags: [u8; 2]) -> [u8; 12] {
    let [m0, m1, m2, m3, m4, m5] = MAGIC;
    let [c0, c1, c2, c3] = crc32fast::hash(&flags).to_le_bytes();
    [m0, m1, m2, m3, m4, m5, flags[0], flags[1], c0, c1, c2, c3]
}

/// The index and footer of a stream of one block.
fn index_and_footer(flags: [u8; 2], unpadded: u64, decoded: u64) -> Vec<u8> {
    let mut tail = vec![0, 1];
    for mut number in [unpadded, decoded] {
        while number >= 0x80 {
            tail.push(number as u8 | 0x80);
            number >>= 7;
        }
        tail.push(number as u8);
    }
    tail.resize(tail.len().next_multiple_of(4), 0);
    tail.extend_from_slice(&crc32fast::hash(&tail).to_le_bytes());
    let mut fields = ((tail.len() / 4 - 1) as u32).to_le_bytes().to_vec();
    fields.extend_from_slice(&flags);
    tail.extend_from_slice(&crc32fast::hash(&fields).to_le_bytes());
    tail.extend_from_slice(&fields);
    tail.extend_from_slice(&FOOTER_MAGIC);
    tail
}

/// A unit's span with the block's padding.
fn whole(span: &Span) -> Span {
    Span { coded_len: padded(span.coded_len), ..*span }
}

impl Xz {
    fn flags(&self, unit: usize) -> [u8; 2] {
        let after = self.streams.partition_point(|(first, _)| *first <= unit);
        after.checked_sub(1).and_then(|n| self.streams.get(n)).map_or([0, 0], |(_, flags)| *flags)
    }
}

impl Codec for Xz {
    fn name(&self) -> &'static str {
        "xz"
    }

    fn decode(&self, source: &Source, number: usize, span: &Span, out: &mut Vec<u8>) -> Result<()> {
        let flags = self.flags(number);
        let mut coded = header(flags).to_vec();
        coded.extend_from_slice(&coded_bytes(source, &whole(span))?);
        coded.extend_from_slice(&index_and_footer(flags, span.coded_len, span.len));
        let stream = Stream::new_stream_decoder(self.memory_limit, 0).map_err(|error| explain(error, self.memory_limit))?;
        decode_whole(stream, &coded, span, self.memory_limit, out)
    }

    fn reader<'a>(&'a self, source: &'a Source, number: usize, span: &Span) -> Result<Box<dyn Read + 'a>> {
        let flags = self.flags(number);
        let tail = index_and_footer(flags, span.coded_len, span.len);
        let block = source.reader(span.coded_at, span.coded_at + padded(span.coded_len));
        let coded = Cursor::new(header(flags)).chain(block).chain(Cursor::new(tail));
        let stream = Stream::new_stream_decoder(self.memory_limit, 0).map_err(|error| explain(error, self.memory_limit))?;
        Ok(Box::new(Explained { from: XzDecoder::new_stream(coded, stream), memory_limit: self.memory_limit }))
    }
}

/// Decodes all of `coded` into `out`.
pub(super) fn decode_whole(mut stream: Stream, coded: &[u8], span: &Span, memory_limit: u64, out: &mut Vec<u8>) -> Result<()> {
    out.resize(span.len as usize, 0);
    loop {
        let (read, written) = (stream.total_in(), stream.total_out());
        let input = coded.get(read as usize..).unwrap_or_default();
        let room = out.get_mut(written as usize..).unwrap_or_default();
        let status = stream.process(input, room, Action::Finish).map_err(|error| explain(error, memory_limit).at_offset(span.coded_at))?;
        if status == Status::StreamEnd {
            out.truncate(stream.total_out() as usize);
            return Ok(());
        }
        if (read, written) == (stream.total_in(), stream.total_out()) {
            return Err(
                Error::corrupt("a compressed block is damaged: it is longer than it should be, or has no end").at_offset(span.coded_at)
            );
        }
    }
}

/// The library's error in words that help.
pub(super) fn explain(error: LzmaError, memory_limit: u64) -> Error {
    match error {
        LzmaError::MemLimit => Error::unsupported(format!(
            "decoding needs more than the {} MiB of memory that it may have: allow it more, or compress with a smaller dictionary",
            memory_limit >> 20
        )),
        LzmaError::Mem => Error::new(crate::Kind::Io, "there is no memory for decoding"),
        LzmaError::Options => Error::unsupported("the stream was compressed with options that this decoder does not know"),
        error => Error::corrupt(format!("a compressed block is damaged: {error}")),
    }
}

/// A reader whose errors are explained.
pub(super) struct Explained<R> {
    pub(super) from: R,
    pub(super) memory_limit: u64,
}

impl<R: Read> Read for Explained<R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.from.read(buf).map_err(|error| match error.get_ref().and_then(|inner| inner.downcast_ref::<LzmaError>()) {
            Some(inner) => std::io::Error::new(std::io::ErrorKind::InvalidData, explain(*inner, self.memory_limit)),
            None => error,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_stream_of_one_block_is_made_as_xz_makes_it() {
        let output = Command::new("bash").args(["-c", "seq 100000 | xz -0c"]).output().unwrap();
        let original = output.stdout;
        assert!(output.status.success() && !original.is_empty(), "is xz-utils installed?");
        let store = crate::store::MemoryStore::new(original.clone());
        let source = Source::new(std::sync::Arc::new(store)).unwrap();
        let options = super::super::Options::default();
        let (units, xz) = index(&Context { source: &source, options: &options }).unwrap();
        let [span] = units.spans() else { panic!("{units:?}") };
        let mut made = header(xz.flags(0)).to_vec();
        made.extend_from_slice(&coded_bytes(&source, &whole(span)).unwrap());
        made.extend_from_slice(&index_and_footer(xz.flags(0), span.coded_len, span.len));
        assert!(made == original, "{:x?}\n{:x?}", &made[made.len() - 40..], &original[original.len() - 40..]);
    }
}
