//! The dynamic header: where the allocation table is, how large blocks are, and what a differencing image says of its parent.

use super::footer::{MAX_SIZE, SECTOR, checksum};
use crate::error::{Error, Result};
use crate::field::{array, put, utf16};
use crate::store::Store;
use crate::vhdx::{below_root, separators};
use std::path::PathBuf;
use uuid::Uuid;

/// Size of the header, in bytes.
pub(super) const LEN: u64 = 1024;
/// The longest name of a parent that is read, in bytes.
const MAX_NAME: u64 = 64 << 10;
/// An entry of the table, in bytes.
pub(super) const ENTRY: u64 = 4;

/// A valid header.
#[derive(Clone, Debug)]
pub(super) struct Header {
    bytes: Vec<u8>,
    /// Byte offset of the header itself.
    pub(super) at: u64,
    /// Byte offset of the allocation table.
    pub(super) table_at: u64,
    /// Entries in it.
    pub(super) entries: u64,
    /// Bytes in a block; a power of two.
    pub(super) block: u64,
    /// Names of the parent, in the order in which they are to be tried.
    pub(super) names: Vec<PathBuf>,
    /// Runs of the file that hold such names.
    pub(super) locators: Vec<(u64, u64)>,
}

impl Header {
    pub(super) fn read(store: &dyn Store, at: u64) -> Result<Self> {
        let corrupt = |what: String| Error::corrupt(what).at_offset(at);
        let file_len = store.len().map_err(|e| Error::io("cannot find out the length of the file", e))?;
        if at < SECTOR || at.checked_add(LEN).is_none_or(|end| end > file_len) {
            return Err(corrupt(format!("the footer places the dynamic header at {at:#x}, outside the file")));
        }
        let mut bytes = vec![0; LEN as usize];
        store.read_zero_filled(&mut bytes, at).map_err(|e| Error::io("cannot read the dynamic header", e).at_offset(at))?;
        if !bytes.starts_with(b"cxsparse") {
            return Err(corrupt("the dynamic header has no signature".to_owned()));
        }
        if u32::from_be_bytes(array(&bytes, 36)?) != checksum(&bytes, 36) {
            return Err(corrupt("the dynamic header has a wrong checksum".to_owned()));
        }
        let version = u32::from_be_bytes(array(&bytes, 24)?);
        if version >> 16 != 1 {
            return Err(Error::unsupported(format!("version {version:#x} of the dynamic header; only 1.0 is known")));
        }
        let block = u64::from(u32::from_be_bytes(array(&bytes, 32)?));
        if !block.is_power_of_two() || !(4096..=256 << 20).contains(&block) {
            return Err(corrupt(format!("a block size of {block} bytes; allowed are powers of two from 4 KiB to 256 MiB")));
        }
        let (table_at, entries) = (u64::from_be_bytes(array(&bytes, 16)?), u64::from(u32::from_be_bytes(array(&bytes, 28)?)));
        let inside = table_at.checked_add(entries * ENTRY).is_some_and(|end| end <= file_len);
        let apart = table_at >= at.saturating_add(LEN) || table_at.saturating_add(entries * ENTRY) <= at;
        if !inside || !apart || table_at < SECTOR {
            return Err(corrupt(format!(
                "the allocation table of {entries} entries at {table_at:#x} lies outside the file or over other structures"
            )));
        }
        let mut header = Self { bytes, at, table_at, entries, block, names: Vec::new(), locators: Vec::new() };
        header.read_locators(store, file_len)?;
        Ok(header)
    }

    pub(super) fn parent_uuid(&self) -> Uuid {
        Uuid::from_bytes(array(&self.bytes, 40).unwrap_or_default())
    }

    /// When the parent was last changed when the child was made: seconds since 2000-01-01.
    pub(super) fn parent_timestamp(&self) -> u32 {
        array(&self.bytes, 56).map_or(0, u32::from_be_bytes)
    }

    /// Sector bitmap before each block, in bytes: whole sectors.
    pub(super) fn bitmap_len(&self) -> u64 {
        (self.block / SECTOR / 8).next_multiple_of(SECTOR).max(SECTOR)
    }

    /// The first sector of a header with another table. It alone differs, so that the change cannot be torn.
    pub(super) fn with_table(&self, table_at: u64, entries: u64) -> Result<Self> {
        let count = u32::try_from(entries).ok().filter(|_| entries * ENTRY <= MAX_SIZE);
        let count = count.ok_or_else(|| Error::unsupported("the allocation table would be too long"))?;
        let mut header = Self { table_at, entries, ..self.clone() };
        put(&mut header.bytes, 16, &table_at.to_be_bytes());
        put(&mut header.bytes, 28, &count.to_be_bytes());
        let sum = checksum(&header.bytes, 36);
        put(&mut header.bytes, 36, &sum.to_be_bytes());
        Ok(header)
    }

    /// The bytes of the first sector.
    pub(super) fn first_sector(&self) -> &[u8] {
        self.bytes.get(..SECTOR as usize).unwrap_or_default()
    }

    /// Reads the parent's names: relative ones, then absolute ones below the root directory, at last each file name alone beside the image.
    fn read_locators(&mut self, store: &dyn Store, file_len: u64) -> Result<()> {
        let (mut relative, mut absolute) = (Vec::new(), Vec::new());
        for entry in self.bytes.get(576..).unwrap_or_default().chunks_exact(24).take(8) {
            let code: [u8; 4] = array(entry, 0)?;
            let (space, len) = (u64::from(u32::from_be_bytes(array(entry, 4)?)), u64::from(u32::from_be_bytes(array(entry, 8)?)));
            let at = u64::from_be_bytes(array(entry, 16)?);
            if code == [0; 4] || len == 0 || at.checked_add(len).is_none_or(|end| end > file_len) {
                continue;
            }
            // Some programs give the space in sectors, some in bytes.
            let space = if space < len { space * SECTOR } else { space }.max(len);
            self.locators.push((at, space));
            let mut text = vec![0; len.min(MAX_NAME) as usize];
            store.read_zero_filled(&mut text, at).map_err(|e| Error::io("cannot read a parent locator", e).at_offset(at))?;
            let wide = || utf16(text.chunks_exact(2).filter_map(|u| Some(u16::from_le_bytes(u.try_into().ok()?))));
            match &code {
                b"W2ru" => relative.push(separators(&wide())),
                b"W2ku" => absolute.push(below_root(&wide())),
                b"Wi2r" => relative.push(separators(String::from_utf8_lossy(&text).trim_end_matches('\0'))),
                b"Wi2k" => absolute.push(below_root(String::from_utf8_lossy(&text).trim_end_matches('\0'))),
                b"MacX" => {
                    let url = String::from_utf8_lossy(&text);
                    let path = unescaped(url.trim_end_matches('\0').trim_start_matches("file://").trim_start_matches("localhost"));
                    if path.starts_with('/') { absolute.push(path) } else { relative.push(path) }
                }
                _ => {}
            }
        }
        let name =
            utf16(self.bytes.get(64..576).unwrap_or_default().chunks_exact(2).filter_map(|u| Some(u16::from_be_bytes(u.try_into().ok()?))));
        let name = separators(&name);
        if !name.is_empty() {
            if name.contains('/') { absolute.push(below_root(&name)) } else { relative.push(name) }
        }
        let beside: Vec<String> = relative.iter().chain(&absolute).filter_map(|n| n.rsplit('/').next()).map(str::to_owned).collect();
        for name in relative.into_iter().chain(absolute).chain(beside).filter(|n| !n.is_empty()).map(PathBuf::from) {
            if !self.names.contains(&name) {
                self.names.push(name);
            }
        }
        Ok(())
    }
}

/// A URL's path with its %XX as bytes.
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        let escaped = (*first == b'%').then(|| after.get(..2).and_then(|hex| std::str::from_utf8(hex).ok())).flatten();
        match escaped.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = after.get(2..).unwrap_or_default();
            }
            None => bytes.push(*first),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_unescaped() {
        assert_eq!(unescaped("/a%20b%2"), "/a b%2");
        assert_eq!(unescaped("%41%zz%"), "A%zz%");
    }
}
