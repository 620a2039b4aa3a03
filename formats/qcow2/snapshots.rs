//! The list of internal snapshots: reading it. Each snapshot has an L1 table of its own and shares clusters by their refcounts.
//!
//! Source: QEMU's docs/interop/qcow2.rst, "Snapshots".

use super::header::{Header, be32, be64};
use crate::error::{Error, Result};
use crate::writeback::WriteBack;

/// The fixed part of an entry in bytes.
const FIXED: usize = 40;
/// Bytes of the table that are accepted, as in QEMU.
const MAX_TABLE: u64 = 64 << 20;
/// Bytes of extra data that are accepted, as in QEMU.
const MAX_EXTRA: u32 = 1024;

/// One internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Snapshot {
    pub l1_at: u64,
    pub l1_entries: u32,
    pub id: String,
    pub name: String,
    /// Seconds and nanoseconds since 1970.
    pub date: (u32, u32),
    /// Guest time in nanoseconds.
    pub vm_clock: u64,
    /// Bytes of VM state.
    pub vm_state: u64,
    /// Guest-visible size when it was taken, if the entry says so.
    pub disk_size: Option<u64>,
    /// Executed instructions, if the entry says so.
    pub icount: Option<u64>,
}

/// The snapshots and the length of their table in bytes.
pub(super) fn read(writeback: &WriteBack, header: &Header) -> Result<(Vec<Snapshot>, u64)> {
    let mut list = Vec::new();
    let mut at = header.snapshots_at;
    let mut buf = Vec::new();
    for index in 0..header.snapshots {
        let entry_at = at;
        let bad = |why: &str| Error::corrupt(format!("entry {index} of the snapshot table {why}")).at_offset(entry_at);
        let mut fixed = [0; FIXED];
        writeback.read(0, at, &mut fixed)?;
        let (id_len, name_len) = (usize::from(be16(&fixed, 12)), usize::from(be16(&fixed, 14)));
        let extra_len = be32(&fixed, 36);
        if extra_len > MAX_EXTRA {
            return Err(bad("has too much extra data"));
        }
        let extra_len = extra_len as usize;
        buf.clear();
        buf.resize(extra_len + id_len + name_len, 0);
        writeback.read(0, at + FIXED as u64, &mut buf)?;
        let (extra, rest) = buf.split_at(extra_len);
        let (id, name) = rest.split_at(id_len);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        list.push(Snapshot {
            l1_at: be64(&fixed, 0),
            l1_entries: be32(&fixed, 8),
            id: text(id),
            name: text(name),
            date: (be32(&fixed, 16), be32(&fixed, 20)),
            vm_clock: be64(&fixed, 24),
            vm_state: if extra_len >= 8 { be64(extra, 0) } else { u64::from(be32(&fixed, 32)) },
            disk_size: (extra_len >= 16).then(|| be64(extra, 8)),
            icount: (extra_len >= 24).then(|| be64(extra, 16)).filter(|i| *i != u64::MAX),
        });
        at += (FIXED + buf.len()).next_multiple_of(8) as u64;
        if at - header.snapshots_at > MAX_TABLE {
            return Err(bad("lies beyond the largest table allowed"));
        }
    }
    Ok((list, at - header.snapshots_at))
}

fn be16(buf: &[u8], at: usize) -> u16 {
    buf.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_be_bytes)
}
