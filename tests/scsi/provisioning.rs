//! UNMAP, WRITE SAME and GET LBA STATUS.

use crate::harness::*;
use formats::Limits;
use img_tcmu::scsi::Config;

fn unmap(ranges: &[(u64, u32)]) -> (Vec<u8>, [u8; 10]) {
    let len = 16 * ranges.len();
    let mut list = vec![0; 8];
    list[..2].copy_from_slice(&(len as u16 + 6).to_be_bytes());
    list[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    for (lba, blocks) in ranges {
        list.extend(lba.to_be_bytes());
        list.extend(blocks.to_be_bytes());
        list.extend([0; 4]);
    }
    let cdb = cdb10(0x42, 0, 0, list.len() as u16);
    (list, cdb)
}

/// LBA, blocks and status of each descriptor.
fn status(disk: &Disk, lba: u64, len: usize) -> Vec<(u64, u32, u8)> {
    let mut cdb = cdb16(0x9E, 0x12, lba, 0);
    cdb[10..14].copy_from_slice(&(len as u32).to_be_bytes());
    let reply = disk.read(&cdb, len);
    let run = |d: &[u8]| (u64::from_be_bytes(d[..8].try_into().unwrap()), u32::from_be_bytes(d[8..12].try_into().unwrap()), d[12]);
    reply[8..].chunks_exact(16).map(run).collect()
}

#[test]
fn unmap_gives_back_whole_units_and_zeroes_the_edges() {
    let disk = Disk::new();
    disk.write(&cdb10(0x2A, 0, 0, 64), &[0xAA; 64 * 512]);
    // Blocks 1 to 29: the rest of unit 0, units 1 and 2, and six blocks of unit 3.
    let (list, cdb) = unmap(&[(1, 29)]);
    disk.write(&cdb, &list);
    let bytes = disk.memory.bytes();
    assert_eq!(bytes[..512], [0xAA; 512]);
    assert!(bytes[512..30 * 512].iter().all(|b| *b == 0));
    assert_eq!(bytes[30 * 512..64 * 512], [0xAA; 34 * 512]);
    assert_eq!(status(&disk, 0, 256), [(0, 8, 0), (8, 16, 1), (24, 40, 0), (64, 1984, 1)]);
    assert_eq!(status(&disk, 9, 24), [(9, 15, 1)]);
    // Over what is unmapped already nothing is written.
    let (list, cdb) = unmap(&[(65, 2), (2047, 1)]);
    disk.write(&cdb, &list);
    assert_eq!(status(&disk, 64, 24), [(64, 1984, 1)]);
}

#[test]
fn without_lbprz_the_edges_stay() {
    let limits = Limits { discard_zeroes: false, ..Memory::new(1 << 20).limits_now() };
    let disk = Disk::with(Memory::with_limits(limits), Config::default());
    disk.write(&cdb10(0x2A, 0, 0, 64), &[0xAA; 64 * 512]);
    let (list, cdb) = unmap(&[(1, 29)]);
    disk.write(&cdb, &list);
    assert_eq!(disk.memory.bytes()[..8 * 512], [0xAA; 8 * 512]);
    assert_eq!(status(&disk, 0, 56), [(0, 8, 0), (8, 16, 1), (24, 40, 0)]);
}

#[test]
fn unmap_checks_everything_first() {
    let disk = Disk::new();
    disk.write(&cdb10(0x2A, 0, 0, 64), &[0xAA; 64 * 512]);
    let (list, cdb) = unmap(&[(0, 8), (2047, 2)]);
    assert_eq!(disk.triple(&cdb, &list), (5, 0x21, 0));
    assert_eq!(disk.triple(&cdb, &list[..20]), (5, 0x0E, 3), "the buffer is shorter than the list");
    assert_eq!(disk.triple(&cdb10(0x42, 0, 0, 7), &list), (5, 0x1A, 0));
    assert_eq!(disk.triple(&cdb10(0x42, 0, 0, 39), &list), (5, 0x1A, 0), "the list ends within its descriptors");
    assert_eq!(disk.cdb_fault(&cdb10(0x42, 1, 0, 40), &list), (1, Some(0)), "ANCHOR");
    let (list, cdb) = unmap(&[(0, 8); 257]);
    assert_eq!(disk.triple(&cdb, &list), (5, 0x26, 0));
    assert_eq!(disk.memory.bytes()[..64 * 512], [0xAA; 64 * 512]);
    // Nothing to do is no error, wherever it is.
    let (list, cdb) = unmap(&[(2048, 0), (u64::MAX, 0)]);
    disk.write(&cdb, &list);
    let (list, cdb) = unmap(&[]);
    disk.write(&cdb, &list);
    disk.ok(&cdb10(0x42, 0, 0, 0));
    let (list, cdb) = unmap(&[(0, 8); 256]);
    disk.write(&cdb, &list);
    assert_eq!(disk.memory.bytes()[..8 * 512], [0; 8 * 512]);
}

#[test]
fn lba_status_counts_in_blocks_and_stops_where_told() {
    let disk = Disk::new();
    for unit in (0..200).step_by(2) {
        disk.write(&cdb10(0x2A, 0, unit * 8, 1), &[1; 512]);
    }
    assert_eq!(status(&disk, 0, 8 + 16 * 3), [(0, 8, 0), (8, 8, 1), (16, 8, 0)]);
    assert_eq!(status(&disk, 0, 8 + 16 * 300).len(), 200);
    assert_eq!(status(&disk, 2047, 24), [(2047, 1, 1)]);
    // At least one descriptor is counted, whatever fits.
    let reply = disk.read(&cdb16(0x9E, 0x12, 0, 4), 100);
    assert_eq!(reply, [0, 0, 0, 20]);
    assert_eq!(disk.triple(&cdb16(0x9E, 0x12, 2048, 24), &[]), (5, 0x21, 0));
    let thick = Disk::with(Memory::new(1 << 20), Config { discard: false, ..Config::default() });
    assert_eq!(status(&thick, 8, 24), [(8, 2040, 0)]);
}

#[test]
fn write_same_in_all_flag_combinations() {
    let disk = Disk::new();
    let block = pattern(512, 5);
    let all = |from: usize, blocks: usize| disk.memory.bytes()[from * 512..(from + blocks) * 512].to_vec();
    for cdb in [&cdb10(0x41, 0, 3, 700)[..], &cdb16(0x93, 0, 3, 700)] {
        disk.write(&cdb16(0x93, 0x01, 0, 2048), &[]);
        disk.write(cdb, &block);
        assert_eq!(all(3, 700), block.repeat(700));
        assert_eq!(all(0, 3), [0; 3 * 512]);
        assert_eq!(all(703, 1), [0; 512]);
    }
    // UNMAP with data that unmapped blocks could not read back as: written.
    disk.write(&cdb10(0x41, 0x08, 0, 16), &block);
    assert_eq!(all(0, 16), block.repeat(16));
    assert_eq!(status(&disk, 0, 24)[0].2, 0);
    // UNMAP with zeros, with and without a block of them.
    disk.write(&cdb10(0x41, 0x08, 0, 16), &[0; 512]);
    assert_eq!(status(&disk, 0, 24), [(0, 16, 1)]);
    disk.write(&cdb16(0x93, 0x09, 16, 16), &[]);
    assert_eq!(status(&disk, 0, 24), [(0, 32, 1)]);
    // Zeros without UNMAP stay mapped.
    disk.write(&cdb10(0x41, 0, 0, 16), &[0; 512]);
    assert_eq!(status(&disk, 0, 24)[0], (0, 16, 0));
    // No block, of the wrong length, no range, ANCHOR, LBDATA, PBDATA, protection.
    for len in [0, 256, 511, 513, 1024] {
        assert_eq!(disk.triple(&cdb10(0x41, 0x08, 0, 1), &vec![0; len]), (5, 0x0E, 3));
    }
    // WSNZ.
    assert_eq!(disk.read(&[0x12, 1, 0xB0, 0, 64, 0], 64)[4] & 1, 1);
    assert_eq!(disk.cdb_fault(&cdb10(0x41, 0, 2040, 0), &block), (7, None));
    assert_eq!(disk.cdb_fault(&cdb16(0x93, 0x08, 2040, 0), &[0; 512]), (10, None));
    for (flags, bit) in [(0x10, 4), (0x18, 4), (0x04, 2), (0x02, 1), (0x20, 5)] {
        assert_eq!(disk.cdb_fault(&cdb16(0x93, flags, 0, 1), &block), (1, Some(bit)));
    }
    assert_eq!(disk.cdb_fault(&cdb10(0x41, 0x01, 0, 1), &block), (1, Some(0)), "NDOB is for 16 bytes");
}
