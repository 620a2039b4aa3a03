//! The metadata region: block size, disk size, sector sizes, the disk's identifier and the parent locator's bytes.

use super::region::Region;
use crate::error::{Error, Result};
use crate::field::array;
use crate::store::Store;
use uuid::{Uuid, uuid};

/// Size of the table at the start of the region, in bytes; items lie behind it.
const TABLE: usize = 64 << 10;
const MAX_ENTRIES: usize = 2047;
/// The longest item, in bytes.
const MAX_ITEM: u32 = 1 << 20;
const MAX_SIZE: u64 = 64 << 40;
const USER: u32 = 1;
const REQUIRED: u32 = 4;

const FILE_PARAMETERS: Uuid = uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b");
const DISK_SIZE: Uuid = uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8");
const DISK_ID: Uuid = uuid!("beca12ab-b2e6-4523-93ef-c309e000c746");
const LOGICAL_SECTOR: Uuid = uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f");
const PHYSICAL_SECTOR: Uuid = uuid!("cda348c7-445d-4471-9cc9-e9885251c556");
const PARENT_LOCATOR: Uuid = uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c");

/// The known items ([MS-VHDX] 2.6.2).
#[derive(Clone, Debug)]
pub(super) struct Metadata {
    /// Bytes; a power of two from 1 MiB to 256 MiB.
    pub(super) block: u64,
    /// Blocks stay allocated: a fixed image.
    pub(super) fixed: bool,
    pub(super) has_parent: bool,
    /// Bytes.
    pub(super) size: u64,
    /// Where in the file the size stands, as a byte offset.
    pub(super) size_at: u64,
    /// Identifier of the disk (SCSI VPD page 83h).
    pub(super) disk_id: Uuid,
    pub(super) sector: u32,
    pub(super) physical_sector: u32,
    /// The parent locator as it is in the file.
    pub(super) locator: Option<Vec<u8>>,
}

impl Metadata {
    /// The largest disk, in bytes.
    pub(super) const MAX_SIZE: u64 = MAX_SIZE;

    pub(super) fn read(store: &dyn Store, region: Region) -> Result<Self> {
        let fail = |e| Error::io("cannot read the metadata", e).at_offset(region.at);
        let mut table = vec![0; TABLE];
        store.read_zero_filled(&mut table, region.at).map_err(fail)?;
        if !table.starts_with(b"metadata") {
            return Err(Error::corrupt("the metadata table has no signature").at_offset(region.at));
        }
        let count = usize::from(u16::from_le_bytes(array(&table, 10)?));
        if count > MAX_ENTRIES {
            return Err(Error::corrupt(format!("the metadata table has {count} entries; {MAX_ENTRIES} are allowed")).at_offset(region.at));
        }
        let mut items = Items { store, region, known: Vec::new() };
        for entry in table.get(32..).unwrap_or_default().chunks_exact(32).take(count) {
            let guid = Uuid::from_bytes_le(array(entry, 0)?);
            let item = Item { guid, at: u32::from_le_bytes(array(entry, 16)?), len: u32::from_le_bytes(array(entry, 20)?) };
            let flags = u32::from_le_bytes(array(entry, 24)?);
            let system = flags & USER == 0;
            let known = system && [FILE_PARAMETERS, DISK_SIZE, DISK_ID, LOGICAL_SECTOR, PHYSICAL_SECTOR, PARENT_LOCATOR].contains(&guid);
            if !known {
                if flags & REQUIRED != 0 {
                    return Err(Error::unsupported(format!("the image has metadata {guid} that must be understood, and are not")));
                }
                continue;
            }
            if items.known.iter().any(|i| i.guid == guid) {
                return Err(Error::corrupt(format!("the metadata item {guid} is listed twice")).at_offset(region.at));
            }
            let inside = u64::from(item.at).checked_add(u64::from(item.len)).is_some_and(|end| end <= region.len);
            if item.len > MAX_ITEM || (item.at as usize) < TABLE || !inside {
                return Err(Error::corrupt(format!("the metadata item {guid} lies outside its region")).at_offset(region.at));
            }
            // A change of one must not change another.
            let over = |other: &Item| item.at < other.at.saturating_add(other.len) && other.at < item.at.saturating_add(item.len);
            if items.known.iter().any(over) {
                return Err(Error::corrupt(format!("the metadata item {guid} lies over another")).at_offset(region.at));
            }
            items.known.push(item);
        }
        items.interpret()
    }
}

struct Item {
    guid: Uuid,
    /// From the region's start.
    at: u32,
    len: u32,
}

struct Items<'a> {
    store: &'a dyn Store,
    region: Region,
    known: Vec<Item>,
}

impl Items<'_> {
    fn find(&self, guid: Uuid) -> Option<&Item> {
        self.known.iter().find(|i| i.guid == guid)
    }

    fn at(&self, item: &Item) -> u64 {
        self.region.at.saturating_add(u64::from(item.at))
    }

    /// The bytes of an item that there must be.
    fn required<const N: usize>(&self, guid: Uuid, what: &str) -> Result<[u8; N]> {
        let item = self.find(guid).ok_or_else(|| Error::corrupt(format!("the metadata lack the {what}")).at_offset(self.region.at))?;
        if (item.len as usize) < N {
            return Err(Error::corrupt(format!("the {what} is {} bytes long instead of {N}", item.len)).at_offset(self.at(item)));
        }
        let mut bytes = [0; N];
        self.store.read_zero_filled(&mut bytes, self.at(item)).map_err(|e| Error::io(format!("cannot read the {what}"), e))?;
        Ok(bytes)
    }

    fn interpret(&self) -> Result<Metadata> {
        let corrupt = |message: String| Error::corrupt(message).at_offset(self.region.at);
        let parameters: [u8; 8] = self.required(FILE_PARAMETERS, "file parameters")?;
        let block = u64::from(u32::from_le_bytes(array(&parameters, 0)?));
        let flags = u32::from_le_bytes(array(&parameters, 4)?);
        if !block.is_power_of_two() || !((1 << 20)..=(256 << 20)).contains(&block) {
            return Err(corrupt(format!("a block size of {block} bytes; allowed are powers of two from 1 MiB to 256 MiB")));
        }
        let sector = u32::from_le_bytes(self.required(LOGICAL_SECTOR, "logical sector size")?);
        if !matches!(sector, 512 | 4096) {
            return Err(corrupt(format!("a logical sector size of {sector} bytes; allowed are 512 and 4096")));
        }
        // Some writers leave it out; it is advice.
        let physical_sector = match self.find(PHYSICAL_SECTOR) {
            Some(_) => u32::from_le_bytes(self.required(PHYSICAL_SECTOR, "physical sector size")?),
            None => 4096,
        };
        if !matches!(physical_sector, 512 | 4096) {
            return Err(corrupt(format!("a physical sector size of {physical_sector} bytes; allowed are 512 and 4096")));
        }
        let size = u64::from_le_bytes(self.required(DISK_SIZE, "size of the disk")?);
        if size > MAX_SIZE || !size.is_multiple_of(u64::from(sector)) {
            return Err(corrupt(format!("a disk of {size} bytes; allowed are multiples of {sector} up to 64 TiB")));
        }
        let disk_id = match self.find(DISK_ID) {
            Some(_) => Uuid::from_bytes_le(self.required(DISK_ID, "identifier of the disk")?),
            None => Uuid::nil(),
        };
        let has_parent = flags & 2 != 0;
        let locator = match self.find(PARENT_LOCATOR) {
            Some(item) if has_parent => {
                let mut bytes = vec![0; item.len as usize];
                self.store.read_zero_filled(&mut bytes, self.at(item)).map_err(|e| Error::io("cannot read the parent locator", e))?;
                Some(bytes)
            }
            None if has_parent => return Err(corrupt("the image has a parent, and no parent locator".to_owned())),
            _ => None,
        };
        Ok(Metadata {
            block,
            // Means nothing in a differencing image ([MS-VHDX] 2.6.2.1).
            fixed: flags & 1 != 0 && !has_parent,
            has_parent,
            size,
            size_at: self.find(DISK_SIZE).map_or(0, |i| self.at(i)),
            disk_id,
            sector,
            physical_sector: physical_sector.max(sector),
            locator,
        })
    }
}
