//! Writes VMDK extents that no program on Linux makes: those of ESX (COWD), and space-efficient ones. Knows nothing of the code under test; QEMU and
//! dissect.hypervisor read what it writes.

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

const SECTOR: usize = 512;

/// What an extent says of a grain.
pub enum Grain<'a> {
    Absent,
    Zero,
    Data(&'a [u8]),
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// The order in which grains lie in the file.
fn shuffled(count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.shuffle(&mut StdRng::seed_from_u64(count as u64));
    order
}

/// An ESX sparse extent of `sectors` sectors in grains of `grain` sectors.
pub fn cowd(sectors: usize, grain: usize, grains: &[Grain<'_>]) -> Vec<u8> {
    let tables = sectors.div_ceil(grain * 4096);
    let directory_sectors = (tables * 4).div_ceil(SECTOR);
    let mut file = vec![0; (4 + directory_sectors) * SECTOR];
    for (at, field) in [1, 3, sectors, grain, 4, tables].into_iter().enumerate() {
        put(&mut file, 4 + at * 4, &(field as u32).to_le_bytes());
    }
    put(&mut file, 0, b"COWD");
    for number in 0..tables {
        let place = grains.len().min((number + 1) * 4096);
        if grains[number * 4096..place].iter().all(|g| matches!(g, Grain::Absent)) {
            continue;
        }
        let at = file.len();
        put(&mut file, 4 * SECTOR + number * 4, &((at / SECTOR) as u32).to_le_bytes());
        file.resize(at + 4096 * 4, 0);
    }
    for index in shuffled(grains.len()) {
        let data = match &grains[index] {
            Grain::Absent => continue,
            Grain::Zero => &vec![0; grain * SECTOR][..],
            Grain::Data(data) => data,
        };
        let at = file.len();
        let table = u32::from_le_bytes(file[4 * SECTOR + index / 4096 * 4..][..4].try_into().unwrap()) as usize * SECTOR;
        put(&mut file, table + index % 4096 * 4, &((at / SECTOR) as u32).to_le_bytes());
        file.extend_from_slice(data);
        file.resize(at + grain * SECTOR, 0);
    }
    file
}

/// A space-efficient extent of `sectors` sectors; its grains have 4 KiB.
pub fn sesparse(sectors: usize, grains: &[Grain<'_>]) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(sectors as u64);
    let tables = grains.len().div_ceil(4096);
    let directory_sectors = (tables * 8).div_ceil(SECTOR);
    let (directory, tables_at) = (16, 64);
    // One table that belongs to nobody comes first.
    let grains_at = tables_at + (tables + 1) * 64;
    let mut file = vec![0; grains_at * SECTOR];
    let fields: [(usize, u64); 11] = [
        (0, 0xCAFE_BABE),
        (8, 0x2_0000_0001),
        (16, sectors as u64),
        (24, 8),
        (32, 64),
        (80, 1),
        (88, 1),
        (128, directory),
        (136, directory_sectors as u64),
        (144, tables_at as u64),
        (152, (tables as u64 + 1) * 64),
    ];
    for (at, field) in fields {
        put(&mut file, at, &field.to_le_bytes());
    }
    put(&mut file, 192, &(grains_at as u64).to_le_bytes());
    put(&mut file, SECTOR, &0xCAFE_CAFE_u64.to_le_bytes());
    for number in 0..tables {
        if grains[number * 4096..grains.len().min((number + 1) * 4096)].iter().any(|g| !matches!(g, Grain::Absent)) {
            put(&mut file, directory as usize * SECTOR + number * 8, &(0x1000_0000_0000_0000 | (number as u64 + 1)).to_le_bytes());
        }
    }
    for index in shuffled(grains.len()) {
        let entry = match &grains[index] {
            Grain::Absent => continue,
            // Zeroed, or unmapped by the guest.
            Grain::Zero => 2_u64 << 60,
            Grain::Data(data) => {
                let number = ((file.len() - grains_at * SECTOR) / 4096) as u64;
                let at = file.len();
                file.extend_from_slice(data);
                file.resize(at + 4096, 0);
                // Some places stay unused.
                if rng.random_ratio(1, 9) {
                    file.resize(at + 8192, 0xEE);
                }
                3 << 60 | (number & 0xFFF) << 48 | number >> 12
            }
        };
        put(&mut file, (tables_at + (index / 4096 + 1) * 64) * SECTOR + index % 4096 * 8, &entry.to_le_bytes());
    }
    file
}
