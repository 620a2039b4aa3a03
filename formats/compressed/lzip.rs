//! lzip: each member's trailer gives its sizes, so members are found from the end of the file (lzip manual, "File format").

use super::codec::{Codec, Context, coded_bytes};
use super::source::Source;
use super::units::{MAX_UNITS, Span, Units};
use super::xz::{Explained, decode_whole, explain};
use crate::error::{Error, Result};
use liblzma::bufread::XzDecoder;
use liblzma::stream::Stream;
use std::io::Read;

/// Header of 6 bytes, trailer of 20, and no less than 10 between them.
const SMALLEST: u64 = 36;
const TRAILER: u64 = 20;

/// Members need no more than their place.
pub(super) struct Lzip {
    memory_limit: u64,
}

pub(super) fn index(context: &Context<'_>) -> Result<(Units, Lzip)> {
    let source = context.source;
    let mut members = Vec::new();
    let mut end = end_of_members(source)?;
    while end > 0 {
        let damaged = || {
            Error::corrupt(
                "the lzip file is cut short or damaged, or something else follows it: where a member should end there is no trailer",
            )
            .at_offset(end)
        };
        let trailer_at = end.checked_sub(TRAILER).ok_or_else(damaged)?;
        let trailer: [u8; 20] = source.array(trailer_at)?.ok_or_else(damaged)?;
        let [_, _, _, _, d0, d1, d2, d3, d4, d5, d6, d7, m0, m1, m2, m3, m4, m5, m6, m7] = trailer;
        let decoded = u64::from_le_bytes([d0, d1, d2, d3, d4, d5, d6, d7]);
        let len = u64::from_le_bytes([m0, m1, m2, m3, m4, m5, m6, m7]);
        let at = end.checked_sub(len).filter(|_| len >= SMALLEST).ok_or_else(damaged)?;
        if !matches!(source.array(at)?, Some([b'L', b'Z', b'I', b'P', 1])) {
            return Err(damaged());
        }
        if members.len() >= MAX_UNITS {
            return Err(Error::unsupported("the lzip file has too many members: compress it with larger ones"));
        }
        members.push((decoded, at, len));
        end = at;
    }
    let mut units = Units::default();
    for (decoded, at, len) in members.into_iter().rev() {
        units.push(decoded, at, len)?;
    }
    Ok((units, Lzip { memory_limit: context.options.memory_limit }))
}

/// The end of the last member: zeros after it are padding. (The last byte of a member is the highest of its length: zero. So at most that many zeros are kept.)
fn end_of_members(source: &Source) -> Result<u64> {
    let mut end = source.len();
    while end > 0 {
        let from = end.saturating_sub(64 << 10);
        let bytes = source.range(from, end - from)?;
        if let Some(last) = bytes.iter().rposition(|byte| *byte != 0) {
            let last = from + last as u64;
            // The length's lowest byte may be zero as well: the member is the one of the possible ends whose length leads to a header.
            for end in last + 1..=(last + 8).min(source.len()) {
                let Some(len) = end.checked_sub(8).map(|at| source.array(at)).transpose()?.flatten().map(u64::from_le_bytes) else {
                    continue;
                };
                let start = end.checked_sub(len).filter(|_| len >= SMALLEST);
                if let Some(start) = start
                    && matches!(source.array(start)?, Some([b'L', b'Z', b'I', b'P', 1]))
                {
                    return Ok(end);
                }
            }
            return Ok(source.len());
        }
        end = from;
    }
    Ok(0)
}

impl Codec for Lzip {
    fn name(&self) -> &'static str {
        "lzip"
    }

    fn decode(&self, source: &Source, _: usize, span: &Span, out: &mut Vec<u8>) -> Result<()> {
        let stream = Stream::new_lzip_decoder(self.memory_limit, 0).map_err(|error| explain(error, self.memory_limit))?;
        decode_whole(stream, &coded_bytes(source, span)?, span, self.memory_limit, out)
    }

    fn reader<'a>(&'a self, source: &'a Source, _: usize, span: &Span) -> Result<Box<dyn Read + 'a>> {
        let stream = Stream::new_lzip_decoder(self.memory_limit, 0).map_err(|error| explain(error, self.memory_limit))?;
        let coded = source.reader(span.coded_at, span.coded_at + span.coded_len);
        Ok(Box::new(Explained { from: XzDecoder::new_stream(coded, stream), memory_limit: self.memory_limit }))
    }
}
