//! A gzip member's header and trailer (RFC 1952).

use super::super::source::SourceReader;
use crate::error::{Error, Result};

/// Name and comment may not be longer: they are of no use here, and a damaged header must not make us read a whole file.
const MAX_TEXT: usize = 64 << 10;

/// Whether a file that starts with `bytes` is a gzip stream: magic, deflate, no reserved flag.
pub(in super::super) fn is_gzip(bytes: &[u8]) -> bool {
    matches!(bytes, [0x1f, 0x8b, 8, flags, ..] if flags & 0xe0 == 0)
}

/// A member's header, as far as it matters.
pub(in super::super) struct Header {
    /// Length of the whole bgzf block that this member is, if it says so in an extra field.
    pub(in super::super) block_len: Option<u64>,
}

/// What follows a member's deflate stream.
pub(super) struct Trailer {
    pub(super) crc: u32,
    /// Decoded length modulo 2^32.
    pub(super) len: u32,
}

/// Reads a member's header. `None`: no member begins here.
pub(in super::super) fn read_header(reader: &mut SourceReader<'_>) -> Result<Option<Header>> {
    let at = reader.position();
    if !is_gzip(reader.peek(10)?) {
        return Ok(None);
    }
    let cut = || Error::corrupt("the gzip stream is cut short: the file ends in a member's header").at_offset(at);
    let fixed: [u8; 10] = reader.array()?.ok_or_else(cut)?;
    let flags = fixed[3];
    let mut block_len = None;
    if flags & 4 != 0 {
        let len = usize::from(u16::from_le_bytes(reader.array()?.ok_or_else(cut)?));
        block_len = bgzf_block_len(reader.peek(len)?.get(..len).ok_or_else(cut)?);
        reader.consume(len);
    }
    for flag in [8, 16] {
        if flags & flag != 0 {
            let text = reader.peek(MAX_TEXT)?;
            let Some(len) = text.iter().position(|byte| *byte == 0) else {
                return Err(Error::corrupt("a gzip member's name or comment has no end").at_offset(at));
            };
            reader.consume(len + 1);
        }
    }
    if flags & 2 != 0 {
        reader.array::<2>()?.ok_or_else(cut)?;
    }
    Ok(Some(Header { block_len }))
}

/// The length of the bgzf block that `bytes` begin with.
pub(in super::super) fn block_len(bytes: &[u8]) -> Option<u64> {
    let [.., flags, _, _, _, _, _, _, low, high] = bytes.get(..12).filter(|bytes| is_gzip(bytes))? else { return None };
    let extra = bytes.get(12..12 + usize::from(u16::from_le_bytes([*low, *high])))?;
    if flags & 4 != 0 { bgzf_block_len(extra) } else { None }
}

/// The block length that the extra fields give: subfield `BC` of two bytes, the length less one (SAM specification, 4.1).
fn bgzf_block_len(mut extra: &[u8]) -> Option<u64> {
    while let [id1, id2, len @ .., _, _] = extra.get(..6).unwrap_or_default() {
        let &[low, high] = len else { return None };
        let len = u16::from_le_bytes([low, high]);
        if (id1, id2, len) == (&b'B', &b'C', 2) {
            return extra.get(4..6)?.first_chunk().map(|size| u64::from(u16::from_le_bytes(*size)) + 1);
        }
        extra = extra.get(4 + usize::from(len)..)?;
    }
    None
}

pub(super) fn read_trailer(reader: &mut SourceReader<'_>) -> Result<Trailer> {
    let at = reader.position();
    let Some([a, b, c, d, e, f, g, h]) = reader.array()? else {
        return Err(Error::corrupt("the gzip stream is cut short: the last member has no trailer").at_offset(at));
    };
    Ok(Trailer { crc: u32::from_le_bytes([a, b, c, d]), len: u32::from_le_bytes([e, f, g, h]) })
}
