//! MODE SENSE and MODE SELECT.

use crate::harness::*;
use img_tcmu::scsi::Config;

fn sense(disk: &Disk, page: u8) -> Vec<u8> {
    disk.read(&[0x1A, 8, page, 0, 255, 0], 255)
}

fn select(page: &[u8]) -> (Vec<u8>, [u8; 6]) {
    let list = [&[0, 0, 0, 0], page].concat();
    let cdb = [0x15, 0x10, 0, 0, list.len() as u8, 0];
    (list, cdb)
}

#[test]
fn all_pages() {
    let disk = Disk::new();
    let reply = disk.read(&[0x1A, 0, 0x3F, 0, 255, 0], 255);
    assert_eq!(reply.len(), 4 + 8 + 12 + 20 + 12);
    assert_eq!(reply[..12], [55, 0, 0x10, 8, 0, 0, 8, 0, 0, 0, 2, 0]);
    assert_eq!(reply[12..14], [0x01, 0x0A]);
    assert_eq!(reply[24..27], [0x08, 0x12, 0x04]);
    assert_eq!(reply[44..47], [0x0A, 0x0A, 0x02]);
    assert_eq!(disk.read(&[0x1A, 0, 0x3F, 0xFF, 255, 0], 255), reply);
    assert_eq!(disk.read(&[0x1A, 0, 0x3F, 0, 4, 0], 4), reply[..4]);
    let ten = disk.read(&[0x5A, 0x10, 0x3F, 0, 0, 0, 0, 1, 0, 0], 256);
    assert_eq!(ten[..8], [0, 6 + 16 + 44, 0, 0x10, 1, 0, 0, 16]);
    assert_eq!(ten[8..24], [0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    assert_eq!(ten[24..], reply[12..]);
}

#[test]
fn refused() {
    let disk = Disk::new();
    assert_eq!(disk.cdb_fault(&[0x1A, 0, 0x02, 0, 255, 0], &[]), (2, Some(5)));
    assert_eq!(disk.cdb_fault(&[0x1A, 0, 0x0A, 1, 255, 0], &[]), (3, None));
    assert_eq!(disk.triple(&[0x1A, 0, 0xC8, 0, 255, 0], &[]), (5, 0x39, 0));
    let (list, mut cdb) = select(&sense(&disk, 8)[4..]);
    cdb[1] = 0;
    assert_eq!(disk.cdb_fault(&cdb, &list), (1, Some(4)));
    cdb[1] = 0x11;
    assert_eq!(disk.cdb_fault(&cdb, &list), (1, Some(0)));
    cdb[1] = 0x10;
    assert_eq!(disk.triple(&cdb, &list[..10]), (5, 0x1A, 0), "the buffer is shorter than the list");
    cdb[4] -= 1;
    assert_eq!(disk.triple(&cdb, &list), (5, 0x1A, 0), "the page is cut");
    cdb[4] = 3;
    assert_eq!(disk.triple(&cdb, &list), (5, 0x1A, 0), "not even a header");
    cdb[4] = 0;
    disk.write(&cdb, &list);
    // A bit that cannot be changed, with its place.
    let mut page = sense(&disk, 0x0A)[4..].to_vec();
    page[3] ^= 0x02;
    let (list, cdb) = select(&page);
    let fault = disk.fault(&cdb, &list);
    assert_eq!((fault[2], fault[12], fault[15], fault[17]), (5, 0x26, 0x89, 7));
    // A block size that is not so.
    let list = [&[0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 4, 0], &sense(&disk, 8)[4..]].concat();
    let cdb = [0x15, 0x10, 0, 0, list.len() as u8, 0];
    assert_eq!(disk.triple(&cdb, &list), (5, 0x26, 0));
}

#[test]
fn changeable_bits_are_those_that_change() {
    let disk = Disk::new();
    assert_eq!(sense(&disk, 0x48)[4..7], [0x08, 0x12, 0x04]);
    assert!(sense(&disk, 0x48)[7..].iter().all(|b| *b == 0));
    assert_eq!(sense(&disk, 0x4A)[4..], [0x0A, 0x0A, 0x04, 0, 0x08, 0, 0, 0, 0, 0, 0, 0]);
    assert!(sense(&disk, 0x41)[6..].iter().all(|b| *b == 0));
}

#[test]
fn write_cache() {
    let disk = Disk::new();
    let mut page = sense(&disk, 8)[4..].to_vec();
    page[2] = 0;
    let (list, cdb) = select(&page);
    disk.write(&cdb, &list);
    assert_eq!(disk.memory.flush_count(), 1, "turning the cache off empties it");
    assert_eq!(sense(&disk, 8)[6], 0);
    assert_eq!(sense(&disk, 0x88)[6], 4, "the default stays");
    disk.write(&cdb10(0x2A, 0, 0, 1), &[1; 512]);
    assert_eq!(disk.memory.flush_count(), 2);
    disk.lun.set_write_cache(true).unwrap();
    assert_eq!(sense(&disk, 8)[6], 4);
    let off = Disk::with(Memory::new(4096), Config { write_cache: false, ..Config::default() });
    assert_eq!(sense(&off, 8)[6], 0);
    assert_eq!(sense(&off, 0x88)[6], 0);
}

#[test]
fn descriptor_sense_and_write_protect() {
    let disk = Disk::new();
    let mut page = sense(&disk, 0x0A)[4..].to_vec();
    page[2] |= 0x04;
    page[4] |= 0x08;
    // By the 10-byte command this time.
    let list = [&[0; 8], &page[..]].concat();
    disk.write(&[0x55, 0x10, 0, 0, 0, 0, 0, 0, list.len() as u8, 0], &list);
    assert_eq!(sense(&disk, 0x0A)[4..], page);
    assert_eq!(sense(&disk, 0x0A)[2], 0x90, "WP");
    assert_eq!(disk.fault(&cdb10(0x2A, 0, 0, 1), &[0; 512]), [0x72, 7, 0x27, 2, 0, 0, 0, 0]);
    assert_eq!(disk.fault(&cdb10(0x28, 0, u32::MAX, 1), &[]), [0x72, 5, 0x21, 0, 0, 0, 0, 0]);
    disk.read(&cdb10(0x28, 0, 0, 1), 512);
    page[2] &= !0x04;
    page[4] = 0;
    let (list, cdb) = select(&page);
    disk.write(&cdb, &list);
    disk.write(&cdb10(0x2A, 0, 0, 1), &[0; 512]);
    assert_eq!(disk.triple(&cdb10(0x28, 0, u32::MAX, 1), &[]), (5, 0x21, 0));
}
