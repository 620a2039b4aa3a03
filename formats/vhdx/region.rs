//! The two copies of the region table: where the BAT and the metadata lie.

use super::header::{Header, MIB, checksum};
use crate::error::{Error, Result};
use crate::field::{array, put};
use crate::store::Store;
use uuid::{Uuid, uuid};

/// Size of a copy, in bytes; the checksum covers all of it.
pub(super) const LEN: usize = 64 << 10;
/// Byte offsets of the two copies.
pub(super) const COPIES: [u64; 2] = [192 << 10, 256 << 10];
const MAX_ENTRIES: u32 = 2047;
const BAT: Uuid = uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08");
const METADATA: Uuid = uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e");

/// A run of bytes of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) at: u64,
    pub(super) len: u64,
}

impl Region {
    pub(super) fn end(self) -> u64 {
        self.at.saturating_add(self.len)
    }

    pub(super) fn overlaps(self, at: u64, len: u64) -> bool {
        at < self.end() && self.at < at.saturating_add(len)
    }
}

/// What the region table says.
#[derive(Clone, Debug)]
pub(super) struct Regions {
    pub(super) bat: Region,
    pub(super) metadata: Region,
    /// All of the file that is not payload or sector bitmap: header section, log and every region.
    pub(super) fixed: Vec<Region>,
    /// What is wrong with a copy, if anything; `table` is what it should be.
    pub(super) damage: Option<String>,
    /// Byte offset of the damaged copy.
    pub(super) damaged_at: Option<u64>,
    table: Vec<u8>,
}

impl Regions {
    /// Reads the first valid copy ([MS-VHDX] 2.2.3) and checks it against the header.
    pub(super) fn read(store: &dyn Store, header: &Header) -> Result<Self> {
        let mut tables = Vec::with_capacity(2);
        for at in COPIES {
            let mut table = vec![0; LEN];
            store.read_zero_filled(&mut table, at).map_err(|e| Error::io("cannot read the region table", e).at_offset(at))?;
            tables.push(table);
        }
        let (second, first) = (tables.pop().unwrap_or_default(), tables.pop().unwrap_or_default());
        let (table, damage, damaged_at) = match (valid(&first), valid(&second)) {
            (true, true) if first == second => (first, None, None),
            (true, true) => (first, Some("the copies of the region table differ".to_owned()), Some(COPIES[1])),
            (true, false) => (first, Some("the second copy of the region table is damaged".to_owned()), Some(COPIES[1])),
            (false, true) => (second, Some("the first copy of the region table is damaged".to_owned()), Some(COPIES[0])),
            (false, false) => return Err(Error::corrupt("both copies of the region table are damaged").at_offset(COPIES[0])),
        };
        Self::parse(table, damage, damaged_at, header)
    }

    fn parse(table: Vec<u8>, damage: Option<String>, damaged_at: Option<u64>, header: &Header) -> Result<Self> {
        let count = u32::from_le_bytes(array(&table, 8)?);
        if count > MAX_ENTRIES {
            return Err(Error::corrupt(format!("the region table has {count} entries; {MAX_ENTRIES} are allowed")).at_offset(COPIES[0]));
        }
        let (mut bat, mut metadata) = (None, None);
        let mut fixed = vec![Region { at: 0, len: MIB }];
        if header.log_len > 0 {
            fixed.push(Region { at: header.log_at, len: u64::from(header.log_len) });
        }
        for entry in table.get(16..).unwrap_or_default().chunks_exact(32).take(count as usize) {
            let guid = Uuid::from_bytes_le(array(entry, 0)?);
            let region = Region { at: u64::from_le_bytes(array(entry, 16)?), len: u64::from(u32::from_le_bytes(array(entry, 24)?)) };
            let required = u32::from_le_bytes(array(entry, 28)?) & 1 == 1;
            let aligned = region.at.is_multiple_of(MIB) && region.len.is_multiple_of(MIB) && region.len > 0;
            if !aligned || region.at < MIB || region.at.checked_add(region.len).is_none_or(|e| e > i64::MAX as u64) {
                return Err(Error::corrupt(format!("region {guid} lies at {:#x} and is {} bytes long", region.at, region.len)));
            }
            let slot = match guid {
                BAT => Some(&mut bat),
                METADATA => Some(&mut metadata),
                _ if required => {
                    return Err(Error::unsupported(format!("the image has a region {guid} that must be understood, and is not")));
                }
                _ => None,
            };
            if let Some(slot) = slot
                && slot.replace(region).is_some()
            {
                return Err(Error::corrupt(format!("region {guid} is listed twice")));
            }
            fixed.push(region);
        }
        fixed.sort_by_key(|r| r.at);
        if let Some(pair) = fixed.windows(2).find(|w| matches!(w, [a, b] if a.end() > b.at)) {
            let at = pair.last().map_or(0, |r| r.at);
            return Err(Error::corrupt("two structures of the file overlap (header section, log, or regions)").at_offset(at));
        }
        let missing = |what: &str| Error::corrupt(format!("the region table has no entry for the {what}"));
        Ok(Self {
            bat: bat.ok_or_else(|| missing("block allocation table"))?,
            metadata: metadata.ok_or_else(|| missing("metadata"))?,
            fixed,
            damage,
            damaged_at,
            table,
        })
    }

    /// The bytes of a sound copy that a damaged one needs: up to the last entry, and with them the rest.
    pub(super) fn table(&self) -> &[u8] {
        &self.table
    }

    /// A table in which the BAT lies elsewhere.
    pub(super) fn with_bat(&self, to: Region, header: &Header) -> Result<Self> {
        let mut table = self.table.clone();
        let count = u32::from_le_bytes(array(&table, 8)?);
        for entry in table.get_mut(16..).unwrap_or_default().chunks_exact_mut(32).take(count as usize) {
            if Uuid::from_bytes_le(array(entry, 0)?) == BAT {
                let len = u32::try_from(to.len).map_err(|_| Error::unsupported("the block allocation table would be too long"))?;
                put(entry, 16, &to.at.to_le_bytes());
                put(entry, 24, &len.to_le_bytes());
            }
        }
        let sum = checksum(&table, 4);
        put(&mut table, 4, &sum.to_le_bytes());
        Self::parse(table, None, None, header)
    }

    /// Whether a run of bytes touches what no payload block may touch.
    pub(super) fn touches_fixed(&self, at: u64, len: u64) -> bool {
        // Sorted and disjoint: only the last one that begins before the end can.
        let before = self.fixed.partition_point(|r| r.at < at.saturating_add(len));
        before.checked_sub(1).and_then(|i| self.fixed.get(i)).is_some_and(|r| r.overlaps(at, len))
    }
}

fn valid(table: &[u8]) -> bool {
    table.starts_with(b"regi") && array(table, 4).is_ok_and(|sum| u32::from_le_bytes(sum) == checksum(table, 4))
}
