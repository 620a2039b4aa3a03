//! Partition tables: MBR with logical partitions, and GPT with its backup. Numbers are Linux's (`/dev/sdX1`, logical ones from 5).

use crate::device::BlockDevice;
use crate::error::{Error, Kind, Result};
use std::io::IoSliceMut;

/// A partition, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number.
    pub number: u32,
    /// First byte.
    pub start: u64,
    /// Length in bytes, not 0, inside the disk.
    pub len: u64,
}

/// More entries than this in a GPT are not read (128 is usual).
const MAX_GPT_ENTRIES: u32 = 4096;
/// As many logical partitions as Linux finds.
const MAX_LOGICAL: u32 = 100;

/// All partitions of a disk, in order of their numbers.
///
/// # Errors
/// `InvalidOption` when there is no partition table; `Corrupt` when both copies of a GPT are damaged; the device's own.
pub fn partitions(disk: &dyn BlockDevice) -> Result<Vec<Partition>> {
    let disk = Disk { disk, sector: u64::from(disk.limits().sector), size: disk.limits().size };
    let mbr = disk.sector(0)?;
    if mbr.get(510..512) != Some(&[0x55, 0xAA]) {
        return Err(Error::new(Kind::InvalidOption, "the disk has no partition table (leave out 'partition' to use it whole)"));
    }
    let entries = mbr_entries(&mbr);
    if entries.iter().any(|e| e.kind == 0xEE) {
        return gpt(&disk);
    }
    let mut found = Vec::new();
    let mut extended = None;
    for (number, entry) in (1..).zip(entries) {
        match entry.kind {
            0 => {}
            0x05 | 0x0F | 0x85 => extended = extended.or(Some(u64::from(entry.start))),
            _ => disk.add(&mut found, number, u64::from(entry.start), u64::from(entry.count)),
        }
    }
    if let Some(first) = extended {
        logical(&disk, first, &mut found)?;
    }
    Ok(found)
}

/// The partition of that number.
///
/// # Errors
/// As for [`partitions`], and `InvalidOption`, naming those that there are.
pub fn find(disk: &dyn BlockDevice, number: u32) -> Result<Partition> {
    let all = partitions(disk)?;
    all.iter().find(|p| p.number == number).copied().ok_or_else(|| {
        let numbers: Vec<String> = all.iter().map(|p| p.number.to_string()).collect();
        let there = if numbers.is_empty() { "none".into() } else { numbers.join(", ") };
        Error::new(Kind::InvalidOption, format!("the disk has no partition {number}; it has: {there}"))
    })
}

struct Disk<'a> {
    disk: &'a dyn BlockDevice,
    sector: u64,
    size: u64,
}

impl Disk<'_> {
    fn bytes(&self, at: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| Error::corrupt("a partition table that is too large"))?];
        self.disk.read(&mut [IoSliceMut::new(&mut bytes)], at)?;
        Ok(bytes)
    }

    fn sector(&self, number: u64) -> Result<Vec<u8>> {
        let at = number.checked_mul(self.sector).filter(|at| at.checked_add(self.sector).is_some_and(|end| end <= self.size));
        self.bytes(
            at.ok_or_else(|| Error::corrupt(format!("the partition table refers to sector {number}, which the disk does not have")))?,
            self.sector,
        )
    }

    /// Adds a partition if any of it is on the disk; one that reaches beyond the end is cut, as Linux does.
    fn add(&self, found: &mut Vec<Partition>, number: u32, start: u64, count: u64) {
        let (Some(start), Some(len)) = (start.checked_mul(self.sector), count.checked_mul(self.sector)) else { return };
        if let Some(left) = self.size.checked_sub(start)
            && len.min(left) > 0
            && start > 0
        {
            found.push(Partition { number, start, len: len.min(left) });
        }
    }
}

#[derive(Clone, Copy)]
struct MbrEntry {
    kind: u8,
    start: u32,
    count: u32,
}

fn mbr_entries(sector: &[u8]) -> [MbrEntry; 4] {
    [446, 462, 478, 494].map(|at| {
        let entry = sector.get(at..at + 16).unwrap_or(&[0; 16]);
        let word = |i: usize| entry.get(i..).and_then(|e| e.first_chunk::<4>()).map_or(0, |b| u32::from_le_bytes(*b));
        let count = word(12);
        // An entry without sectors is no entry, whatever its type.
        MbrEntry { kind: if count == 0 { 0 } else { entry.get(4).copied().unwrap_or(0) }, start: word(8), count }
    })
}

/// The chain of extended boot records from sector `first` on.
fn logical(disk: &Disk<'_>, first: u64, found: &mut Vec<Partition>) -> Result<()> {
    let mut here = first;
    for number in 5..5 + MAX_LOGICAL {
        let record = disk.sector(here)?;
        if record.get(510..512) != Some(&[0x55, 0xAA]) {
            return Ok(());
        }
        let entries = mbr_entries(&record);
        // The data partition counts from its own record, the link to the next one from the first record.
        let Some(data) = entries.iter().find(|e| e.kind != 0 && !matches!(e.kind, 0x05 | 0x0F | 0x85)) else { return Ok(()) };
        disk.add(found, number, here.saturating_add(u64::from(data.start)), u64::from(data.count));
        let Some(link) = entries.iter().find(|e| matches!(e.kind, 0x05 | 0x0F | 0x85)) else { return Ok(()) };
        let next = first.saturating_add(u64::from(link.start));
        // Only forwards: a circle would be read until the limit.
        if next <= here {
            return Ok(());
        }
        here = next;
    }
    Ok(())
}

fn gpt(disk: &Disk<'_>) -> Result<Vec<Partition>> {
    let last = (disk.size / disk.sector).saturating_sub(1);
    gpt_copy(disk, 1).or_else(|first| {
        gpt_copy(disk, last)
            .inspect(|_| tracing::warn!(error = %first, "the GPT is damaged; its backup at the end of the disk is used"))
            .map_err(|second| Error::corrupt(format!("both copies of the GPT are damaged: {first}; {second}")))
    })
}

fn gpt_copy(disk: &Disk<'_>, at: u64) -> Result<Vec<Partition>> {
    let mut header = disk.sector(at)?;
    let word = |h: &[u8], i: usize| h.get(i..).and_then(|e| e.first_chunk::<4>()).map_or(0, |b| u32::from_le_bytes(*b));
    let double = |h: &[u8], i: usize| h.get(i..).and_then(|e| e.first_chunk::<8>()).map_or(0, |b| u64::from_le_bytes(*b));
    if !header.starts_with(b"EFI PART") {
        return Err(Error::corrupt(format!("sector {at} has no GPT header")));
    }
    let (len, crc) = (word(&header, 12) as usize, word(&header, 16));
    if let Some(field) = header.get_mut(16..20) {
        field.fill(0);
    }
    let checked = header.get(..len).filter(|_| len >= 92).map(crc32fast::hash);
    if checked != Some(crc) || double(&header, 24) != at {
        return Err(Error::corrupt(format!("the GPT header in sector {at} has a wrong checksum or place")));
    }
    let (table, count, size, table_crc) = (double(&header, 72), word(&header, 80), word(&header, 84), word(&header, 88));
    if count > MAX_GPT_ENTRIES || !(128..=4096).contains(&size) {
        return Err(Error::corrupt(format!("the GPT in sector {at} has {count} entries of {size} bytes")));
    }
    let start = table.checked_mul(disk.sector).ok_or_else(|| Error::corrupt("the GPT's table lies beyond the disk"))?;
    let bytes = disk.bytes(start, u64::from(count) * u64::from(size))?;
    if crc32fast::hash(&bytes) != table_crc {
        return Err(Error::corrupt(format!("the table of the GPT in sector {at} has a wrong checksum")));
    }
    let mut found = Vec::new();
    for (number, entry) in (1..).zip(bytes.chunks_exact(size as usize)) {
        let (first, last) = (double(entry, 32), double(entry, 40));
        if entry.get(..16) != Some(&[0; 16]) && last >= first {
            disk.add(&mut found, number, first, (last - first).saturating_add(1));
        }
    }
    Ok(found)
}
