//! The directory of persistent dirty bitmaps: who uses them is told that they are stale, before the first change.
//!
//! Bitmaps are not kept up to date here. Each is marked as in use, which is how a writer that died leaves them: they stay in the file, no tool trusts
//! them, and `qemu-img bitmap --remove` gets rid of them. Where that cannot be done, the autoclear bit goes, which says the same of all.
//!
//! Source: QEMU's docs/interop/qcow2.rst, "Bitmaps extension".

use super::header::{BitmapsAt, be32, be64};
use crate::error::{Error, Result};
use crate::writeback::WriteBack;

/// Bytes of a directory that are accepted, as in QEMU: 65535 entries of at most 1 KiB.
const MAX_DIRECTORY: u64 = 65535 * 1024;
/// The fixed part of an entry in bytes.
const FIXED: usize = 24;
const FLAGS: usize = 12;
const IN_USE: u32 = 1;
const AUTO: u32 = 2;

/// One bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bitmap {
    /// Offset of its entry in the directory, in bytes.
    entry: usize,
    pub table_at: u64,
    pub table_entries: u32,
    pub flags: u32,
    pub granularity_bits: u8,
    pub name: String,
}

impl Bitmap {
    /// Names of its flags, as QEMU has them.
    pub fn flag_names(&self) -> Vec<&'static str> {
        [(IN_USE, "in-use"), (AUTO, "auto")].into_iter().filter(|(bit, _)| self.flags & bit != 0).map(|(_, name)| name).collect()
    }
}

/// The directory as it is in the file, and its entries.
pub(super) fn read(writeback: &WriteBack, at: BitmapsAt, file_len: u64) -> Result<(Vec<u8>, Vec<Bitmap>)> {
    let bad = |why: &str| Error::corrupt(format!("the list of bitmaps {why}")).at_offset(at.at);
    if at.size > MAX_DIRECTORY {
        return Err(bad("is too long"));
    }
    if at.at.checked_add(at.size).is_none_or(|end| end > file_len) {
        return Err(bad("lies beyond the end of the file"));
    }
    let mut bytes = vec![0; usize::try_from(at.size).unwrap_or(0)];
    writeback.read(0, at.at, &mut bytes)?;
    let mut list = Vec::new();
    let mut entry = 0;
    for _ in 0..at.count {
        let fixed = bytes.get(entry..entry + FIXED).ok_or_else(|| bad("ends too early"))?;
        let (name_len, extra_len) = (usize::from(u16::from_be_bytes([fixed[18], fixed[19]])), be32(fixed, 20) as usize);
        let name_at = entry + FIXED + extra_len;
        let name = bytes.get(name_at..name_at + name_len).ok_or_else(|| bad("ends too early"))?;
        list.push(Bitmap {
            entry,
            table_at: be64(fixed, 0),
            table_entries: be32(fixed, 8),
            flags: be32(fixed, FLAGS),
            granularity_bits: fixed[17],
            name: String::from_utf8_lossy(name).into_owned(),
        });
        entry = (name_at + name_len).next_multiple_of(8);
    }
    Ok((bytes, list))
}

/// Marks all bitmaps as in use, durably.
pub(super) fn mark_in_use(writeback: &WriteBack, at: BitmapsAt, file_len: u64) -> Result<()> {
    let (mut bytes, list) = read(writeback, at, file_len)?;
    if list.iter().all(|b| b.flags & IN_USE != 0) {
        return Ok(());
    }
    for bitmap in &list {
        let flags = bitmap.entry + FLAGS;
        if let Some(into) = bytes.get_mut(flags..flags + 4) {
            into.copy_from_slice(&(bitmap.flags | IN_USE).to_be_bytes());
        }
    }
    writeback.write_through(0, at.at, &bytes)
}
