//! gzip: one pass makes an index of restart points, from which any part is decoded alone.
//!
//! The index has a unit for about every MiB of decoded bytes, wherever that is in the stream: between deflate blocks if one ends near, otherwise in the middle of one. Units are
//! therefore of bounded size however the stream was made. Runs of zeros become units that need no decoding at all.

pub(super) mod header;
mod huffman;
mod inflate;
mod points;
mod windows;

use super::codec::{Codec, Context};
use super::sidecar::{Decoder, Encoder, Stored};
use super::source::Source;
use super::units::{Span, Units};
use crate::error::{Error, Result};
use header::{read_header, read_trailer};
use inflate::{Inflater, OpenBlock, Step};
use points::{MAX_WINDOW, Point};
pub(super) use windows::Windows;

/// The index: a point for each unit.
pub(super) struct Gzip {
    points: Vec<Point>,
    windows: Windows,
}

/// Decoded bytes between restart points, for a compressed file of `len` bytes: larger ones get fewer, so that the index stays small beside them.
fn spacing(len: u64) -> usize {
    match len >> 30 {
        0..4 => 1 << 20,
        4..16 => 2 << 20,
        _ => 4 << 20,
    }
}

/// Reads the whole stream and makes its index.
pub(super) fn index(context: &Context<'_>) -> Result<(Units, Gzip)> {
    let source = context.source;
    let spacing = spacing(source.len());
    let mut reader = source.reader(0, source.len());
    let mut pass = Pass {
        inflater: Inflater::new(&mut reader, spacing),
        units: Units::default(),
        gzip: Gzip { points: Vec::new(), windows: Windows::new(context.scratch_dir()) },
        compressor: windows::compressor(),
    };
    let mut progress = context.progress("indexing the gzip stream", source.len());
    let mut members = 0_u64;
    loop {
        let reader = pass.inflater.reader();
        let at = reader.position();
        if read_header(reader)?.is_none() {
            if members == 0 {
                return Err(Error::invalid_format("not a gzip stream"));
            }
            context.trailing_garbage("gzip", reader)?;
            break;
        }
        pass.member(at, spacing, |bit| progress.update(bit / 8))?;
        members += 1;
    }
    if !pass.gzip.points.is_empty() && pass.gzip.points.iter().all(|point| point.damaged) {
        return Err(Error::corrupt("the gzip stream is damaged: its checksum is wrong"));
    }
    Ok((pass.units, pass.gzip))
}

struct Pass<'a, 'b> {
    inflater: Inflater<'a, 'b>,
    units: Units,
    gzip: Gzip,
    compressor: libdeflater::Compressor,
}

impl Pass<'_, '_> {
    /// Indexes a member whose header, at `member_at`, was read.
    fn member(&mut self, member_at: u64, spacing: usize, mut tell: impl FnMut(u64)) -> Result<()> {
        let first_unit = self.gzip.points.len();
        let decoded_before = self.units.len();
        let mut crc = crc32fast::Hasher::new();
        self.inflater.begin_stream();
        let mut next = self.point(true)?;
        loop {
            let step = self.inflater.step(spacing)?;
            let enough = match step {
                Step::StreamEnd | Step::Limit => true,
                Step::BlockEnd => self.inflater.unit().len() >= spacing / 4 * 3,
            };
            if !enough {
                continue;
            }
            tell(self.inflater.bit_position());
            crc.combine(&self.cut(next, step, first_unit)?);
            if step == Step::StreamEnd {
                break;
            }
            next = self.point(false)?;
        }
        let trailer = read_trailer(self.inflater.reader())?;
        let len = self.units.len() - decoded_before;
        if trailer.len != len as u32 || trailer.crc != crc.finalize() {
            tracing::warn!("gzip member at byte {member_at:#x}: checksum or length is wrong; reads of its {len} bytes will fail");
            for point in self.gzip.points.iter_mut().skip(first_unit) {
                point.damaged = true;
            }
            // A run of zeros, which is never decoded, would not notice.
            self.units.unzero(first_unit);
        }
        Ok(())
    }

    /// A restart point here.
    fn point(&mut self, first: bool) -> Result<Point> {
        let mut point = Point { start: self.inflater.bit_position(), open: self.inflater.open_block(), ..Point::default() };
        let window = self.inflater.window();
        if !first && !window.is_empty() {
            (point.window_at, point.window_len) = self.gzip.windows.append(window, &mut self.compressor)?;
        }
        Ok(point)
    }

    /// Ends the unit that began at `point`, and gives its checksum. Zeros join zeros of the same member, whose first unit is `first_unit`.
    fn cut(&mut self, mut point: Point, step: Step, first_unit: usize) -> Result<crc32fast::Hasher> {
        let unit = self.inflater.unit();
        let mut crc = crc32fast::Hasher::new();
        crc.update(unit);
        point.crc = crc.clone().finalize();
        point.end = self.inflater.bit_position();
        point.end_code = if step == Step::Limit { self.inflater.open_block().map(|open| open.end_code) } else { None };
        let len = unit.len() as u64;
        let (coded_at, coded_len) = point.coded();
        let added = if is_zero(unit) {
            self.units.push_zeros(len, self.gzip.points.len() > first_unit)?
        } else {
            self.units.push(len, coded_at, coded_len)?
        };
        if added {
            self.gzip.points.push(point);
        }
        self.inflater.next_unit();
        Ok(crc)
    }
}

/// Whether there are only zeros.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

impl Codec for Gzip {
    fn name(&self) -> &'static str {
        "gzip"
    }

    fn decode(&self, source: &Source, number: usize, span: &Span, out: &mut Vec<u8>) -> Result<()> {
        let point = self.points.get(number).ok_or_else(|| Error::corrupt("the index of the gzip stream is too short"))?;
        if point.damaged {
            return Err(Error::corrupt("this member of the gzip stream is damaged: its checksum is wrong").at_offset(point.start / 8));
        }
        point.decode(source, &self.windows, span.len as usize, out)
    }

    fn save(&self, index: &mut Encoder) -> bool {
        let mut last = 0;
        for point in &self.points {
            index.put(point.start.wrapping_sub(last));
            index.put(point.end - point.start);
            last = point.end;
            index.put(u64::from(point.crc));
            index.put(u64::from(point.damaged) | u64::from(point.open.is_some()) << 1 | u64::from(point.end_code.is_some()) << 2);
            if let Some(open) = &point.open {
                index.put(point.start - open.header_at);
                index.put(u64::from(open.header_len));
            }
            if let Some((code, len)) = point.end_code {
                index.put(u64::from(code));
                index.put(u64::from(len));
            }
            index.put(point.window_at);
            index.put(u64::from(point.window_len));
        }
        true
    }

    fn windows(&self) -> Option<&Windows> {
        Some(&self.windows)
    }
}

/// The index as `save` stored it; `None` if it makes no sense for this file.
pub(super) fn restore(source: &Source, units: &Units, index: &mut Decoder<'_>, stored: Stored) -> Option<Gzip> {
    let file_bits = source.len().checked_mul(8)?;
    let mut points = Vec::with_capacity(units.spans().len());
    let mut last = 0_u64;
    for span in units.spans() {
        let start = last.wrapping_add(index.get()?);
        let end = start.checked_add(index.get()?).filter(|end| *end <= file_bits)?;
        last = end;
        let crc = u32::try_from(index.get()?).ok()?;
        let flags = index.get()?;
        let mut point = Point { start, end, crc, damaged: flags & 1 != 0, ..Point::default() };
        if flags & 2 != 0 {
            let header_at = start.checked_sub(index.get()?)?;
            // At most 17 bits, 19 lengths, and 316 code lengths of 7 bits with 7 more.
            let header_len = u32::try_from(index.get()?).ok().filter(|len| (3..5000).contains(len))?;
            point.open = Some(OpenBlock { header_at, header_len, end_code: (0, 0) });
        }
        if flags & 4 != 0 {
            point.end_code = Some((u16::try_from(index.get()?).ok()?, u8::try_from(index.get()?).ok().filter(|len| *len <= 15)?));
        }
        point.window_at = index.get()?;
        point.window_len = u32::try_from(index.get()?).ok().filter(|len| *len as usize <= MAX_WINDOW * 2)?;
        point.window_at.checked_add(u64::from(point.window_len)).filter(|end| *end <= stored.len)?;
        if !span.is_zero() && !point.damaged && (span.coded_at, span.coded_len) != point.coded() {
            return None;
        }
        points.push(point);
    }
    Some(Gzip { points, windows: Windows::stored(stored.file, stored.at, stored.len) })
}
