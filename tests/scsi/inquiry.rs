//! INQUIRY, vital product data, capacity, REQUEST SENSE and unit attentions, and what a LUN may be made of.

use crate::harness::*;
use formats::Limits;
use img_tcmu::scsi::{Config, ConfigError, Identity, Lun};
use std::sync::Arc;

fn vpd(disk: &Disk, page: u8) -> Vec<u8> {
    let reply = disk.read(&[0x12, 1, page, 0x04, 0, 0], 4096);
    assert_eq!((reply[0], reply[1]), (0, page));
    assert_eq!(usize::from(u16::from_be_bytes([reply[2], reply[3]])), reply.len() - 4);
    reply
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

#[test]
fn standard_data() {
    let disk = Disk::new();
    let reply = disk.read(&[0x12, 0, 0, 1, 4, 0], 260);
    assert_eq!(reply.len(), 96);
    assert_eq!(reply[..8], [0, 0, 6, 0x12, 91, 0x08, 0, 2]);
    assert_eq!(&reply[8..32], b"IMG-TCMUdisk image      ");
    assert_eq!(reply[58..64], [0x00, 0xA0, 0x04, 0x60, 0x04, 0xC0]);
    for len in 0..=255u8 {
        assert_eq!(disk.read(&[0x12, 0, 0, 0, len, 0], 255).len(), usize::from(len).min(96));
    }
    assert_eq!(disk.cdb_fault(&[0x12, 0, 1, 0, 255, 0], &[]), (2, None));
    assert_eq!(disk.cdb_fault(&[0x12, 2, 0, 0, 255, 0], &[]), (1, Some(1)));
    assert_eq!(disk.cdb_fault(&[0x12, 1, 0xC0, 0, 255, 0], &[]), (2, None));
}

#[test]
fn every_listed_page_can_be_read_and_the_list_is_sorted() {
    let disk = Disk::new();
    let pages = vpd(&disk, 0)[4..].to_vec();
    assert!(pages.is_sorted());
    for page in [0x00, 0x80, 0x83, 0x86, 0x8F, 0xB0, 0xB1, 0xB2] {
        assert!(pages.contains(&page), "{page:02x}");
    }
    for page in 0..=255u8 {
        match pages.contains(&page) {
            true => drop(vpd(&disk, page)),
            false => assert_eq!(disk.cdb_fault(&[0x12, 1, page, 0, 255, 0], &[]), (2, None)),
        }
    }
}

#[test]
fn identification_comes_from_the_serial_number() {
    let disk = Disk::new();
    let serial = b"01234567-89ab-cdef-0123-456789abcdef";
    assert_eq!(vpd(&disk, 0x80)[4..], *serial);
    let page = vpd(&disk, 0x83);
    assert_eq!(page[4..8], [2, 1, 0, 8 + 36]);
    assert_eq!(&page[8..16], b"IMG-TCMU");
    assert_eq!(page[16..52], *serial);
    assert_eq!(page[52..56], [1, 3, 0, 16]);
    let naa = [0x60, 0x01, 0x40, 0x50, 0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0, 0x12, 0x34, 0x56, 0x78];
    assert_eq!(page[56..], naa);
}

#[test]
fn without_a_serial_number_there_is_no_identification_yet() {
    let lun = Lun::new(Arc::new(Memory::new(4096)), Identity::with_serial_source(|| None), Config::default()).unwrap();
    let disk = Disk { memory: Arc::new(Memory::new(4096)), lun };
    assert_eq!(vpd(&disk, 0x83).len(), 4);
    assert_eq!(vpd(&disk, 0x80).len(), 4);
}

#[test]
fn limits_follow_the_image() {
    let limits = Limits { physical_sector: 4096, granularity: 65536, ..Memory::new(1 << 20).limits_now() };
    let config = Config { max_transfer_blocks: 128, optimal_transfer_blocks: 64, ..Config::default() };
    let disk = Disk::with(Memory::with_limits(limits), config);
    let b0 = vpd(&disk, 0xB0);
    assert_eq!(b0.len(), 64);
    assert_eq!(b0[4..8], [1, 255, 0, 8]);
    assert_eq!((be32(&b0, 8), be32(&b0, 12)), (128, 64));
    assert!(be32(&b0, 20) > 0 && be32(&b0, 24) > 0);
    assert_eq!((be32(&b0, 28), be32(&b0, 32)), (128, 0x8000_0000));
    assert_eq!(vpd(&disk, 0xB1)[4..9], [0, 1, 0, 0x40, 3]);
    assert_eq!(vpd(&disk, 0xB2)[5..7], [0xE4, 2]);
    let capacity = disk.read(&[0x9E, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], 32);
    assert_eq!(capacity[..16], [0, 0, 0, 0, 0, 0, 7, 255, 0, 0, 2, 0, 0, 3, 0xC0, 0]);
}

#[test]
fn lbprz_is_said_only_when_it_is_so() {
    let limits = Limits { discard_zeroes: false, ..Memory::new(1 << 20).limits_now() };
    let disk = Disk::with(Memory::with_limits(limits), Config::default());
    assert_eq!(vpd(&disk, 0xB2)[5], 0xE0);
    assert_eq!(disk.read(&[0x9E, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], 32)[14], 0x80);
}

#[test]
fn a_disk_that_cannot_discard_says_nothing_of_it() {
    let disk = Disk::with(Memory::new(1 << 20), Config { discard: false, ..Config::default() });
    let b0 = vpd(&disk, 0xB0);
    assert_eq!(b0[20..36], [0; 16]);
    assert_eq!(vpd(&disk, 0xB2)[4..], [0; 4]);
    assert_eq!(disk.read(&[0x9E, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], 32)[14], 0);
    assert_eq!(disk.triple(&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &[0; 24]), (5, 0x20, 0));
    assert_eq!(disk.cdb_fault(&cdb10(0x41, 0x08, 0, 1), &[0; 512]), (1, Some(3)));
    assert_eq!(disk.cdb_fault(&cdb16(0x93, 0x08, 0, 1), &[0; 512]), (1, Some(3)));
}

#[test]
fn capacity() {
    let disk = Disk::new();
    assert_eq!(disk.read(&cdb10(0x25, 0, 0, 0), 8), [0, 0, 7, 255, 0, 0, 2, 0]);
    let mut cdb = [0x9E, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for len in 0..=40 {
        cdb[13] = len;
        assert_eq!(disk.read(&cdb, 64).len(), usize::from(len).min(32));
    }
    let small = Disk::with(Memory::new(1 << 20), Config { size: Some(513), ..Config::default() });
    assert_eq!(small.read(&cdb10(0x25, 0, 0, 0), 8), [0, 0, 0, 0, 0, 0, 2, 0]);
}

#[test]
fn growing_is_told_once() {
    use formats::BlockDevice;
    let disk = Disk::new();
    assert!(disk.lun.capacity_changed(2 << 20).is_err(), "the image is not that large");
    disk.memory.grow(2 << 20).unwrap();
    disk.lun.capacity_changed(2 << 20).unwrap();
    disk.lun.capacity_changed(2 << 20).unwrap();
    disk.read(&[0x12, 0, 0, 0, 96, 0], 96);
    assert_eq!(disk.triple(&[0; 6], &[]), (6, 0x2A, 9));
    disk.ok(&[0; 6]);
    assert_eq!(disk.read(&cdb10(0x25, 0, 0, 0), 8)[..4], [0, 0, 15, 255]);
    disk.write(&cdb10(0x2A, 0, 4095, 1), &[1; 512]);
}

#[test]
fn request_sense_takes_a_unit_attention() {
    let disk = Disk::new();
    let quiet = [0x70, 0, 0, 0, 0, 0, 0, 0x0A, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(disk.read(&[3, 0, 0, 0, 252, 0], 252), quiet);
    disk.lun.threshold_reached();
    assert_eq!(disk.read(&[3, 1, 0, 0, 252, 0], 252), [0x72, 6, 0x38, 7, 0, 0, 0, 0]);
    assert_eq!(disk.read(&[3, 1, 0, 0, 252, 0], 252), [0x72, 0, 0, 0, 0, 0, 0, 0]);
    disk.ok(&[0; 6]);
}

#[test]
fn start_and_stop() {
    let disk = Disk::new();
    disk.ok(&[0x1B, 0, 0, 0, 1, 0]);
    disk.ok(&[0x1B, 1, 0, 0, 0, 0]);
    assert_eq!(disk.memory.flush_count(), 1);
    disk.ok(&[0x1B, 0, 0, 0, 4, 0]);
    assert_eq!(disk.memory.flush_count(), 1);
    assert_eq!(disk.cdb_fault(&[0x1B, 0, 0, 0, 2, 0], &[]), (4, Some(1)));
    assert_eq!(disk.cdb_fault(&[0x1B, 0, 0, 0, 0x30, 0], &[]), (4, Some(5)));
}

#[test]
fn what_a_lun_is_refused_for() {
    let make = |limits: Limits, config: Config| Lun::new(Arc::new(Memory::with_limits(limits)), Identity::with_serial("1"), config).err();
    let limits = Memory::new(1 << 20).limits_now();
    let config = Config::default();
    assert_eq!(make(limits, Config { block_size: 1024, ..config.clone() }), Some(ConfigError::BlockSize(1024)));
    let four_k = Limits { sector: 4096, ..limits };
    assert_eq!(make(four_k, config.clone()), Some(ConfigError::Sector { image: 4096, lun: 512 }));
    assert_eq!(make(four_k, Config { block_size: 4096, ..config.clone() }), None);
    let fixed = |block_size| Config { block_size, fixed_sector: true, ..config.clone() };
    assert_eq!(make(limits, fixed(512)), None);
    assert_eq!(make(limits, fixed(4096)), Some(ConfigError::Sector { image: 512, lun: 4096 }));
    let too_large = Config { size: Some(2 << 20), ..config.clone() };
    assert_eq!(make(limits, too_large), Some(ConfigError::TooLarge { image: 1 << 20, lun: 2 << 20 }));
    assert_eq!(make(limits, Config { size: Some(511), ..config }), Some(ConfigError::TooSmall(511)));
}

#[test]
fn another_image_takes_over() {
    let disk = Disk::new();
    assert!(disk.lun.replace(Arc::new(Memory::new(1 << 19))).is_err(), "smaller than the LUN");
    disk.write(&cdb10(0x2A, 0, 0, 1), &[1; 512]);
    let new = Arc::new(Memory::new(1 << 20));
    disk.lun.replace(new.clone()).unwrap();
    assert_eq!(disk.triple(&[0; 6], &[]), (6, 0x3F, 3));
    assert_eq!(disk.read(&cdb10(0x28, 0, 0, 1), 512), [0; 512]);
    disk.write(&cdb10(0x2A, 0, 0, 1), &[2; 512]);
    assert_eq!(new.bytes()[..512], [2; 512]);
    assert_eq!(disk.memory.bytes()[..512], [1; 512]);
}
