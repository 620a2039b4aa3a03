//! The tables of chunks ("mish"), and where they are: base64 in a property list of XML, or in a resource fork.
//!
//! Of the property list nothing is understood but the key `blkx` and the `data` in its array.

use super::codec::Method;
use super::trailer::Trailer;
use crate::error::{Error, Result};
use crate::field::array;
use crate::format::MAX_UNIT;
use crate::store::Store;

/// Bytes in a sector.
pub(super) const SECTOR: u64 = 512;
/// The longest property list or resource fork that is read, in bytes.
const MAX_LIST: u64 = 16 << 20;
/// Bytes before the chunks of a table, and in a chunk.
const TABLE_HEADER: usize = 204;
const ENTRY: usize = 40;

/// How a chunk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Zero,
    Raw,
    Coded(Method),
}

/// A run of sectors.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk {
    pub(super) sector: u64,
    pub(super) count: u64,
    pub(super) kind: Kind,
    /// Byte offset and length in the file.
    pub(super) at: u64,
    pub(super) len: u64,
}

/// All chunks of a file, by their first sector.
pub(super) fn read(store: &dyn Store, trailer: &Trailer) -> Result<Vec<Chunk>> {
    let (at, len) = if trailer.list.1 > 0 { trailer.list } else { trailer.resources };
    if len == 0 {
        return Err(Error::corrupt("the image has neither a property list nor a resource fork"));
    }
    if len > MAX_LIST {
        return Err(
            Error::unsupported(format!("a property list or resource fork of {len} bytes; at most {MAX_LIST} are read")).at_offset(at)
        );
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    store.read_exact_at(&mut bytes, at).map_err(|e| Error::io("cannot read the tables of chunks", e).at_offset(at))?;
    let tables = if trailer.list.1 > 0 { from_list(&bytes)? } else { from_resources(&bytes) };
    let mut chunks = Vec::new();
    for table in &tables {
        read_table(table, trailer.data_at, &mut chunks).map_err(|e| e.at_offset(at))?;
    }
    if chunks.is_empty() {
        return Err(Error::corrupt("the image has no chunks").at_offset(at));
    }
    chunks.sort_by_key(|chunk| chunk.sector);
    if let Some(pair) = chunks.windows(2).find(|pair| pair[0].sector + pair[0].count > pair[1].sector) {
        return Err(Error::corrupt(format!("two chunks are for sector {}", pair[1].sector)).at_offset(at));
    }
    Ok(chunks)
}

/// Where `needle` begins in `bytes`.
fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes.windows(needle.len()).position(|window| window == needle)
}

/// The decoded data of the array `blkx`.
fn from_list(bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
    const KEY: &[u8] = b"<key>blkx</key>";
    let start = find(bytes, KEY).ok_or_else(|| Error::corrupt("the property list has no key \"blkx\""))?;
    let rest = bytes.get(start + KEY.len()..).unwrap_or_default();
    let mut array = rest.get(..find(rest, b"</array>").unwrap_or(rest.len())).unwrap_or_default();
    let mut tables = Vec::new();
    while let Some(begin) = find(array, b"<data>") {
        array = array.get(begin + b"<data>".len()..).unwrap_or_default();
        let end = find(array, b"</data>").ok_or_else(|| Error::corrupt("the property list ends inside data"))?;
        let data = decode_base64(array.get(..end).unwrap_or_default())?;
        if data.starts_with(b"mish") {
            tables.push(data);
        }
        array = array.get(end..).unwrap_or_default();
    }
    Ok(tables)
}

/// The tables in a resource fork: its data section is a row of resources, each behind its length. What is no table is passed over.
fn from_resources(bytes: &[u8]) -> Vec<Vec<u8>> {
    let be32 = |bytes: &[u8], at: usize| array(bytes, at).map_or(0, |b| u32::from_be_bytes(b) as usize);
    let (start, len) = (be32(bytes, 0), be32(bytes, 8));
    let mut rest = bytes.get(start..).unwrap_or_default();
    rest = rest.get(..len.min(rest.len())).unwrap_or_default();
    let mut tables = Vec::new();
    while rest.len() > 4 {
        let len = be32(rest, 0);
        let Some(resource) = rest.get(4..4_usize.saturating_add(len)) else { break };
        if resource.starts_with(b"mish") {
            tables.push(resource.to_vec());
        }
        rest = rest.get(4 + len..).unwrap_or_default();
    }
    tables
}

/// Base64 with white space anywhere.
fn decode_base64(text: &[u8]) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0_u32, 0);
    for byte in text.iter().filter(|b| !b.is_ascii_whitespace()).take_while(|b| **b != b'=') {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return Err(Error::corrupt("data in the property list are not base64")),
        };
        bits = (bits << 6 | u32::from(value)) & 0xFF_FFFF;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Ok(bytes)
}

/// Adds the chunks of a table.
fn read_table(table: &[u8], data_at: u64, chunks: &mut Vec<Chunk>) -> Result<()> {
    let be64 = |bytes: &[u8], at: usize| array(bytes, at).map(u64::from_be_bytes);
    let (first, base) = (be64(table, 8)?, be64(table, 24)?);
    let count = u32::from_be_bytes(array(table, 200)?) as usize;
    let entries = table.get(TABLE_HEADER..).unwrap_or_default();
    if count > entries.len() / ENTRY {
        return Err(Error::corrupt(format!("a table of {count} chunks has room for {}", entries.len() / ENTRY)));
    }
    for entry in entries.chunks_exact(ENTRY).take(count) {
        let kind = match u32::from_be_bytes(array(entry, 0)?) {
            0 | 2 => Kind::Zero,
            1 => Kind::Raw,
            // A comment, and the end.
            0x7FFF_FFFE | 0xFFFF_FFFF => continue,
            other => {
                Kind::Coded(Method::by_number(other).ok_or_else(|| Error::unsupported(format!("chunks of kind {other:#x} are not known")))?)
            }
        };
        let (sector, sectors, at, len) = (be64(entry, 8)?, be64(entry, 16)?, be64(entry, 24)?, be64(entry, 32)?);
        if sectors == 0 {
            continue;
        }
        let sector = first.checked_add(sector);
        let fits = sector.and_then(|s| s.checked_add(sectors)).is_some_and(|end| end <= i64::MAX as u64 / SECTOR);
        let at = data_at.checked_add(base).and_then(|b| b.checked_add(at));
        let ends = at.and_then(|at| at.checked_add(len)).is_some_and(|end| end <= i64::MAX as u64);
        let (Some(sector), Some(at), true) = (sector, at, fits && (ends || kind == Kind::Zero)) else {
            return Err(Error::corrupt(format!("a chunk of {sectors} sectors lies where none can")));
        };
        match kind {
            Kind::Coded(_) if sectors > u64::from(MAX_UNIT) / SECTOR => {
                return Err(Error::unsupported(format!("a compressed chunk of {sectors} sectors; at most 64 MiB are decoded at once")));
            }
            // No encoder makes data much longer.
            Kind::Coded(_) if len > sectors * SECTOR * 2 + (64 << 10) => {
                return Err(Error::corrupt(format!("a chunk of {sectors} sectors is said to be compressed to {len} bytes")));
            }
            Kind::Raw if len < sectors * SECTOR => {
                return Err(Error::corrupt(format!("a plain chunk of {sectors} sectors has {len} bytes")));
            }
            _ => chunks.push(Chunk { sector, count: sectors, kind, at, len }),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_decoded() {
        assert_eq!(decode_base64(b" bWlz\n\taA==\n").unwrap(), b"mish");
        assert_eq!(decode_base64(b"AAEC/w").unwrap(), [0, 1, 2, 255]);
        assert!(decode_base64(b"AA*A").is_err());
    }

    #[test]
    fn data_outside_blkx_are_passed_over() {
        let list = b"<key>x</key><data>bWlzaA==</data><key>blkx</key><array><dict><key>Data</key><data>bWlzaGE=</data></dict></array><data>bWlzaGI=</data>";
        assert_eq!(from_list(list).unwrap(), [b"misha".to_vec()]);
        assert!(from_list(b"<key>blkx</key><array><data>bWlz").is_err());
    }
}
