//! A writer of VHD files that no tool on Linux makes: differencing ones, and dynamic ones whose bitmaps are not all ones. It knows the specification, and nothing
//! of the code under test; what it writes is confirmed by an independent reader.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use uuid::Uuid;

/// Runs of whole sectors of a block, by their first sector; all others are the parent's, or zeros.
pub type Runs = Vec<(u64, Vec<u8>)>;

/// Names of a parent by locator code.
pub type Names = Vec<(&'static [u8; 4], String)>;

#[derive(Clone, Debug)]
pub struct Vhd {
    pub size: u64,
    pub block: u64,
    pub uuid: Uuid,
    /// The parent's UUID, and its names.
    pub parent: Option<(Uuid, Names)>,
    pub blocks: Vec<(u64, Runs)>,
}

/// The UUID in the footer at the end of a file.
pub fn uuid(path: &Path) -> Uuid {
    let file = File::open(path).unwrap();
    let mut bytes = [0; 16];
    file.read_exact_at(&mut bytes, file.metadata().unwrap().len() - 512 + 68).unwrap();
    Uuid::from_bytes(bytes)
}

fn seal(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let sum = !bytes.iter().map(|b| u32::from(*b)).sum::<u32>();
    bytes[at..at + 4].copy_from_slice(&sum.to_be_bytes());
}

/// Recomputes the checksum of the footer at `at`.
pub fn reseal(file: &File, at: u64) {
    let mut bytes = [0; 512];
    file.read_exact_at(&mut bytes, at).unwrap();
    seal(&mut bytes, 64);
    file.write_all_at(&bytes, at).unwrap();
}

/// What a chain of images (the top first) shows, read as the specification says and as simply as can be.
pub fn flatten(dir: &Path, chain: &[&str]) -> Vec<u8> {
    let Some((name, parents)) = chain.split_first() else { return Vec::new() };
    let file = std::fs::read(dir.join(name)).unwrap();
    let be = |at: usize, len: usize| file[at..at + len].iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
    let size = be(file.len() - 512 + 48, 8) as usize;
    if be(file.len() - 512 + 60, 4) == 2 {
        return file[..size].to_vec();
    }
    let mut disk = if parents.is_empty() { vec![0; size] } else { flatten(dir, parents) };
    let (table, block) = (be(512 + 16, 8) as usize, be(512 + 32, 4) as usize);
    let bitmap_len = (block / 512 / 8).next_multiple_of(512);
    for sector in 0..size / 512 {
        let (index, inside) = (sector * 512 / block, sector % (block / 512));
        let at = be(table + index * 4, 4) as usize * 512;
        if at != 0xFFFF_FFFF * 512 && (parents.is_empty() || file[at + inside / 8] & (0x80 >> (inside % 8)) != 0) {
            disk[sector * 512..][..512].copy_from_slice(&file[at + bitmap_len + inside * 512..][..512]);
        }
    }
    disk
}

impl Vhd {
    fn footer(&self) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        bytes[..8].copy_from_slice(b"conectix");
        bytes[11] = 2;
        bytes[13] = 1;
        bytes[16..24].copy_from_slice(&512u64.to_be_bytes());
        bytes[24..28].copy_from_slice(&700_000_000u32.to_be_bytes());
        bytes[28..32].copy_from_slice(b"win ");
        bytes[36..40].copy_from_slice(b"Wi2k");
        bytes[40..48].copy_from_slice(&self.size.to_be_bytes());
        bytes[48..56].copy_from_slice(&self.size.to_be_bytes());
        bytes[56..60].copy_from_slice(&[0, 100, 4, 17]);
        bytes[63] = if self.parent.is_some() { 4 } else { 3 };
        bytes[68..84].copy_from_slice(self.uuid.as_bytes());
        seal(&mut bytes, 64);
        bytes
    }

    pub fn write(&self, path: &Path) {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
        let put = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at).unwrap();
        put(0, &self.footer());
        let entries = self.size.div_ceil(self.block);
        let table_at = 1536u64;
        let mut end = table_at + (entries * 4).next_multiple_of(512);
        let mut header = vec![0; 1024];
        header[..8].copy_from_slice(b"cxsparse");
        header[8..16].fill(0xFF);
        header[16..24].copy_from_slice(&table_at.to_be_bytes());
        header[25] = 1;
        header[28..32].copy_from_slice(&(entries as u32).to_be_bytes());
        header[32..36].copy_from_slice(&(self.block as u32).to_be_bytes());
        if let Some((uuid, names)) = &self.parent {
            header[40..56].copy_from_slice(uuid.as_bytes());
            header[56..60].copy_from_slice(&700_000_000u32.to_be_bytes());
            let last = names.iter().map(|(_, n)| n.rsplit(['\\', '/']).next().unwrap()).next_back().unwrap();
            for (index, unit) in last.encode_utf16().enumerate() {
                header[64 + index * 2..66 + index * 2].copy_from_slice(&unit.to_be_bytes());
            }
            for (index, (code, name)) in names.iter().enumerate() {
                let text: Vec<u8> =
                    if *code == b"MacX" { name.as_bytes().to_vec() } else { name.encode_utf16().flat_map(u16::to_le_bytes).collect() };
                let entry = &mut header[576 + index * 24..600 + index * 24];
                entry[..4].copy_from_slice(*code);
                entry[4..8].copy_from_slice(&512u32.to_be_bytes());
                entry[8..12].copy_from_slice(&(text.len() as u32).to_be_bytes());
                entry[16..24].copy_from_slice(&end.to_be_bytes());
                put(end, &text);
                end += 512;
            }
        }
        seal(&mut header, 36);
        put(512, &header);
        put(table_at, &vec![0xFF; (entries * 4) as usize]);
        let bitmap_len = (self.block / 512 / 8).next_multiple_of(512);
        for (index, runs) in &self.blocks {
            put(table_at + index * 4, &((end / 512) as u32).to_be_bytes());
            let mut bits = vec![0u8; bitmap_len as usize];
            for (first, bytes) in runs {
                put(end + bitmap_len + first * 512, bytes);
                for sector in *first..first + bytes.len() as u64 / 512 {
                    bits[sector as usize / 8] |= 0x80 >> (sector % 8);
                }
            }
            put(end, &bits);
            end += bitmap_len + self.block;
        }
        put(end, &self.footer());
    }
}
