//! A writer of VHDX files that no tool on Linux makes: differencing ones, and ones with 4096-byte sectors. It knows the specification, and nothing of the
//! code under test; what it writes is confirmed by independent readers.

use super::MIB;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use uuid::Uuid;

/// What is in a payload block. A block that is not listed is not present.
#[derive(Clone, Debug)]
pub enum Block {
    Zero,
    Unmapped,
    Full(Vec<u8>),
    /// Runs of whole sectors, by their first sector in the block.
    Partial(Vec<(u64, Vec<u8>)>),
}

/// Keys and values of the parent locator.
pub type Locator = Vec<(&'static str, String)>;

#[derive(Clone, Debug)]
pub struct Vhdx {
    pub size: u64,
    pub block: u64,
    pub sector: u64,
    pub data_write: Uuid,
    pub parent: Option<Locator>,
    pub blocks: Vec<(u64, Block)>,
}

/// The DataWriteGuid of a file whose first header is the current one or the only one that matters.
pub fn data_write_guid(path: &Path) -> Uuid {
    let file = File::open(path).unwrap();
    let header = |at: u64| {
        let mut bytes = [0; 48];
        file.read_exact_at(&mut bytes, at).unwrap();
        (u64::from_le_bytes(bytes[8..16].try_into().unwrap()), Uuid::from_bytes_le(bytes[32..48].try_into().unwrap()))
    };
    header(64 << 10).max(header(128 << 10)).1
}

fn guid(text: &str) -> [u8; 16] {
    Uuid::parse_str(text).unwrap().to_bytes_le()
}

fn seal(bytes: &mut [u8]) {
    bytes[4..8].fill(0);
    let sum = crc32c::crc32c(bytes);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
}

impl Vhdx {
    pub fn write(&self, path: &Path) {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
        let put = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at).unwrap();
        put(0, b"vhdxfile");
        for (copy, at) in [64u64 << 10, 128 << 10].into_iter().enumerate() {
            let mut header = vec![0; 4096];
            header[..4].copy_from_slice(b"head");
            header[8..16].copy_from_slice(&(copy as u64 + 5).to_le_bytes());
            header[16..32].copy_from_slice(&Uuid::new_v4().to_bytes_le());
            header[32..48].copy_from_slice(&self.data_write.to_bytes_le());
            header[66] = 1;
            header[68..72].copy_from_slice(&(MIB as u32).to_le_bytes());
            header[72..80].copy_from_slice(&MIB.to_le_bytes());
            seal(&mut header);
            put(at, &header);
        }
        let chunk = (1u64 << 23) * self.sector / self.block;
        let blocks = self.size.div_ceil(self.block);
        let entries = if self.parent.is_some() { blocks.div_ceil(chunk) * (chunk + 1) } else { blocks + (blocks - 1) / chunk };
        let (metadata_at, bat_at) = (2 * MIB, 3 * MIB);
        let bat_len = (entries * 8).next_multiple_of(MIB);
        let mut regions = vec![0; 64 << 10];
        regions[..4].copy_from_slice(b"regi");
        regions[8] = 2;
        for (index, (id, at, len)) in
            [("8b7ca206-4790-4b9a-b8fe-575f050f886e", metadata_at, MIB), ("2dc27766-f623-4200-9d64-115e9bfd4a08", bat_at, bat_len)]
                .into_iter()
                .enumerate()
        {
            let entry = &mut regions[16 + index * 32..48 + index * 32];
            entry[..16].copy_from_slice(&guid(id));
            entry[16..24].copy_from_slice(&at.to_le_bytes());
            entry[24..28].copy_from_slice(&(len as u32).to_le_bytes());
            entry[28] = 1;
        }
        seal(&mut regions);
        put(192 << 10, &regions);
        put(256 << 10, &regions);
        put(metadata_at, &self.metadata());
        self.write_blocks(&file, bat_at, bat_len, chunk);
    }

    fn metadata(&self) -> Vec<u8> {
        let parameters = [(self.block as u32).to_le_bytes(), (u32::from(self.parent.is_some()) << 1).to_le_bytes()].concat();
        let mut items = vec![
            ("caa16737-fa36-4d43-b3b6-33f0aa44e76b", 4, parameters),
            ("2fa54224-cd1b-4876-b211-5dbed83bf4b8", 6, self.size.to_le_bytes().to_vec()),
            ("beca12ab-b2e6-4523-93ef-c309e000c746", 6, Uuid::new_v4().to_bytes_le().to_vec()),
            ("8141bf1d-a96f-4709-ba47-f233a8faab5f", 6, (self.sector as u32).to_le_bytes().to_vec()),
            ("cda348c7-445d-4471-9cc9-e9885251c556", 6, 4096u32.to_le_bytes().to_vec()),
        ];
        if let Some(locator) = &self.parent {
            items.push(("a8d35f2d-b30b-454d-abf7-d3d84834ab0c", 4, encode_locator(locator)));
        }
        let mut bytes = vec![0; MIB as usize];
        bytes[..8].copy_from_slice(b"metadata");
        bytes[10] = items.len() as u8;
        let mut at = 64 << 10;
        for (index, (id, flags, value)) in items.into_iter().enumerate() {
            let entry = &mut bytes[32 + index * 32..64 + index * 32];
            entry[..16].copy_from_slice(&guid(id));
            entry[16..20].copy_from_slice(&(at as u32).to_le_bytes());
            entry[20..24].copy_from_slice(&(value.len() as u32).to_le_bytes());
            entry[24] = flags;
            bytes[at..at + value.len()].copy_from_slice(&value);
            at += value.len().next_multiple_of(8);
        }
        bytes
    }

    fn write_blocks(&self, file: &File, bat_at: u64, bat_len: u64, chunk: u64) {
        let mut end = bat_at + bat_len;
        file.set_len(end).unwrap();
        let mut bitmaps: std::collections::BTreeMap<u64, u64> = std::collections::BTreeMap::new();
        for (block, contents) in &self.blocks {
            let index = block + block / chunk;
            let mut entry = |state: u64| {
                file.write_all_at(&(end | state).to_le_bytes(), bat_at + index * 8).unwrap();
                let at = end;
                end += self.block;
                file.set_len(end).unwrap();
                at
            };
            match contents {
                Block::Zero => file.write_all_at(&2u64.to_le_bytes(), bat_at + index * 8).unwrap(),
                Block::Unmapped => file.write_all_at(&3u64.to_le_bytes(), bat_at + index * 8).unwrap(),
                Block::Full(bytes) => file.write_all_at(bytes, entry(6)).unwrap(),
                Block::Partial(runs) => {
                    let at = entry(7);
                    let bitmap = *bitmaps.entry(block / chunk).or_insert_with(|| {
                        let index = (block / chunk + 1) * chunk + block / chunk;
                        file.write_all_at(&(end | 6).to_le_bytes(), bat_at + index * 8).unwrap();
                        end += MIB;
                        file.set_len(end).unwrap();
                        end - MIB
                    });
                    let bits_at = bitmap + block % chunk * (self.block / self.sector / 8);
                    let mut bits = vec![0u8; (self.block / self.sector / 8) as usize];
                    for (first, bytes) in runs {
                        file.write_all_at(bytes, at + first * self.sector).unwrap();
                        for sector in *first..first + bytes.len() as u64 / self.sector {
                            bits[sector as usize / 8] |= 1 << (sector % 8);
                        }
                    }
                    file.write_all_at(&bits, bits_at).unwrap();
                }
            }
        }
    }
}

fn encode_locator(entries: &Locator) -> Vec<u8> {
    let mut bytes = guid("b04aefb7-d19e-4a81-b789-25b8e9445913").to_vec();
    bytes.extend([0, 0]);
    bytes.extend((entries.len() as u16).to_le_bytes());
    let mut texts: Vec<u8> = Vec::new();
    let base = 20 + entries.len() * 12;
    for (key, value) in entries {
        let mut place = |text: &str| {
            let units: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
            let at = (base + texts.len()) as u32;
            texts.extend(&units);
            (at, units.len() as u16)
        };
        let (key_at, key_len) = place(key);
        let (value_at, value_len) = place(value);
        bytes.extend(key_at.to_le_bytes());
        bytes.extend(value_at.to_le_bytes());
        bytes.extend(key_len.to_le_bytes());
        bytes.extend(value_len.to_le_bytes());
    }
    bytes.extend(texts);
    bytes
}
