//! EXTENDED COPY and RECEIVE COPY RESULTS, within a unit and between two.

use crate::harness::*;
use formats::Kind;
use img_tcmu::scsi::{Config, CopyPeers, Identity, Lun};
use std::slice::from_ref;
use std::sync::{Arc, Mutex};

/// All the units there are.
#[derive(Default)]
struct Shelf(Mutex<Vec<([u8; 16], Lun)>>);

impl CopyPeers for Shelf {
    fn find(&self, naa: &[u8; 16]) -> Option<Lun> {
        self.0.lock().unwrap().iter().find(|(name, _)| name == naa).map(|(_, lun)| lun.clone())
    }
}

fn unit(shelf: &Arc<Shelf>, serial: &str, config: Config) -> Disk {
    let memory = Arc::new(Memory::new(4 << 20));
    let peers: Arc<dyn CopyPeers> = shelf.clone();
    let lun = Lun::with_surroundings(memory.clone(), Identity::with_serial(serial), config, None, Some(peers)).unwrap();
    let disk = Disk { memory, lun };
    shelf.0.lock().unwrap().push((naa(&disk), disk.lun.clone()));
    disk
}

fn naa(disk: &Disk) -> [u8; 16] {
    let page = disk.read(&[0x12, 1, 0x83, 0, 255, 0], 255);
    page[page.len() - 16..].try_into().unwrap()
}

/// An identification descriptor.
fn target(naa: &[u8; 16], block: u16) -> Vec<u8> {
    let mut descriptor = vec![0xE4, 0, 0, 0, 1, 3, 0, 16];
    descriptor.extend(naa);
    descriptor.resize(30, 0);
    descriptor.extend(block.to_be_bytes());
    descriptor
}

/// A block to block segment descriptor.
fn blocks(source: u16, destination: u16, count: u16, from: u64, to: u64) -> Vec<u8> {
    let mut descriptor = vec![0x02, 0, 0, 24];
    for index in [source, destination, 0, count] {
        descriptor.extend(index.to_be_bytes());
    }
    descriptor.extend(from.to_be_bytes());
    descriptor.extend(to.to_be_bytes());
    descriptor
}

/// A block to block segment descriptor with byte offsets, within target 0.
fn bytes(count: u32, from: u64, to: u64, from_offset: u16, to_offset: u16) -> Vec<u8> {
    let mut descriptor = vec![0x0A, 0, 0, 28, 0, 0, 0, 0];
    descriptor.extend(count.to_be_bytes());
    descriptor.extend(from.to_be_bytes());
    descriptor.extend(to.to_be_bytes());
    descriptor.extend(from_offset.to_be_bytes());
    descriptor.extend(to_offset.to_be_bytes());
    descriptor
}

fn list(id: u8, targets: &[Vec<u8>], segments: &[Vec<u8>]) -> Vec<u8> {
    let (targets, segments) = (targets.concat(), segments.concat());
    let mut list = vec![id, 0];
    list.extend((targets.len() as u16).to_be_bytes());
    list.extend([0; 4]);
    list.extend((segments.len() as u32).to_be_bytes());
    list.extend([0; 4]);
    [list, targets, segments].concat()
}

fn copy(len: usize) -> [u8; 16] {
    cdb16(0x83, 0, 0, len as u32)
}

fn results(action: u8, id: u8) -> [u8; 16] {
    let mut cdb = cdb16(0x84, action, 0, 1000);
    cdb[2] = id;
    cdb
}

fn run(disk: &Disk, list: &[u8]) {
    disk.write(&copy(list.len()), list);
}

fn fails(disk: &Disk, list: &[u8]) -> (u8, u8, u8) {
    disk.triple(&copy(list.len()), list)
}

#[test]
fn within_a_unit() {
    let disk = Disk::new();
    let own = [target(&naa(&disk), 512)];
    let data = pattern(300 * 512, 1);
    disk.write(&cdb10(0x2A, 0, 10, 300), &data);
    run(&disk, &list(1, &own, &[blocks(0, 0, 300, 10, 1000), blocks(0, 0, 10, 10, 2038)]));
    assert_eq!(disk.memory.bytes()[1000 * 512..1300 * 512], data);
    assert_eq!(disk.memory.bytes()[2038 * 512..], data[..5120]);
    // Overlapping, both ways.
    run(&disk, &list(1, &own, &[blocks(0, 0, 300, 10, 15)]));
    assert_eq!(disk.memory.bytes()[15 * 512..315 * 512], data);
    run(&disk, &list(1, &own, &[blocks(0, 0, 300, 15, 9)]));
    assert_eq!(disk.memory.bytes()[9 * 512..309 * 512], data);
    // By bytes: the source may be anywhere, the destination is whole blocks.
    run(&disk, &list(1, &own, &[bytes(1024, 9, 500, 100, 512)]));
    assert_eq!(disk.memory.bytes()[501 * 512..503 * 512], data[100..1124]);
    assert_eq!(fails(&disk, &list(1, &own, &[bytes(1024, 9, 500, 0, 1)])), (0xA, 0, 0));
    assert_eq!(fails(&disk, &list(1, &own, &[bytes(1023, 9, 500, 0, 0)])), (0xA, 0, 0));
    run(&disk, &list(1, &own, &[blocks(0, 0, 0, 0, 0)]));
    disk.ok(&copy(0));
}

#[test]
fn zeros_stay_unallocated() {
    let disk = Disk::new();
    disk.write(&cdb10(0x2A, 0, 1024, 512), &[1; 512 * 512]);
    run(&disk, &list(1, &[target(&naa(&disk), 512)], &[blocks(0, 0, 512, 0, 1024)]));
    let mut status = cdb16(0x9E, 0x12, 1024, 0);
    status[13] = 24;
    assert_eq!(disk.read(&status, 24)[16..21], [0, 0, 4, 0, 1], "1024 blocks are deallocated");
    assert!(all_blocks_are(&disk.memory, &[0; 512]));
}

#[test]
fn between_units() {
    let shelf = Arc::new(Shelf::default());
    let a = unit(&shelf, "aaaa", Config::default());
    let b = unit(&shelf, "bbbb", Config { block_size: 4096, ..Config::default() });
    let targets = [target(&naa(&a), 512), target(&naa(&b), 4096)];
    let data = pattern(2048 * 512, 4);
    a.write(&cdb10(0x2A, 0, 0, 2048), &data);
    // Either of them can be asked; 2048 blocks of one are 256 of the other.
    run(&b, &list(7, &targets, &[blocks(0, 1, 2048, 0, 3)]));
    assert_eq!(b.memory.bytes()[3 * 4096..][..2048 * 512], data);
    run(&a, &list(7, &targets, &[blocks(1, 0, 256, 3, 2048)]));
    assert_eq!(a.memory.bytes()[2048 * 512..][..2048 * 512], data);
    // DC: counted in the destination's blocks.
    let mut counted = blocks(0, 1, 2, 0, 500);
    counted[1] = 0x02;
    run(&a, &list(7, &targets, &[counted]));
    assert_eq!(b.memory.bytes()[500 * 4096..502 * 4096], data[..8192]);
    assert_eq!(fails(&a, &list(7, &targets, &[blocks(0, 1, 3, 0, 0)])), (0xA, 0, 0), "part of a block");
    // What the other unit does not allow.
    let protected = unit(&shelf, "cccc", Config { read_only: true, ..Config::default() });
    let targets = [target(&naa(&a), 512), target(&naa(&protected), 512)];
    assert_eq!(fails(&a, &list(7, &targets, &[blocks(0, 1, 1, 0, 0)])), (7, 0x27, 0));
    protected.memory.fail(Some(Kind::Io));
    assert_eq!(fails(&a, &list(7, &targets, &[blocks(1, 0, 1, 0, 0)])), (3, 0x11, 0));
}

#[test]
fn lists_that_are_refused() {
    let disk = Disk::new();
    disk.write(&cdb10(0x2A, 0, 0, 100), &[1; 51200]);
    let before = disk.memory.bytes();
    let own = target(&naa(&disk), 512);
    let seg = blocks(0, 0, 10, 0, 500);
    let good = list(1, from_ref(&own), from_ref(&seg));
    let length_error = (5, 0x1A, 0);
    for len in [1, 15, 16 + 31, good.len() - 1] {
        assert_eq!(disk.triple(&copy(len), &good), length_error);
    }
    assert_eq!(disk.triple(&copy(good.len()), &good[..20]), (5, 0x0E, 3));
    assert_eq!(fails(&disk, &list(1, &vec![own.clone(); 9], from_ref(&seg))), (5, 0x26, 6));
    assert_eq!(fails(&disk, &list(1, from_ref(&own), &vec![seg.clone(); 17])), (5, 0x26, 8));
    assert_eq!(fails(&disk, &list(1, &vec![own.clone(); 9], &vec![seg.clone(); 18])), length_error);
    let changed = |at: usize, value: u8| {
        let mut list = good.clone();
        list[at] = value;
        fails(&disk, &list)
    };
    assert_eq!(changed(16, 0xE0), (5, 0x26, 7), "Fibre Channel target");
    assert_eq!(changed(48, 0x03), (5, 0x26, 9), "stream to stream");
    assert_eq!(changed(15, 1), (5, 0x26, 0x0B), "inline data");
    assert_eq!(changed(17, 0x01), (0xA, 0x0D, 3), "a tape");
    assert_eq!(changed(30, 0x99), (0xA, 0x0D, 2), "an unknown unit");
    assert_eq!(changed(46, 0x10), (5, 0x26, 0), "another block length");
    assert_eq!(changed(51, 23), (5, 0x26, 0), "a descriptor of another length");
    assert_eq!(changed(55, 1), (0xA, 0x0D, 2), "a target that is not listed");
    for segment in [blocks(0, 0, 2, 0, 2047), blocks(0, 0, 2, u64::MAX, 0), blocks(0, 0, 2, 1 << 60, 0)] {
        assert_eq!(fails(&disk, &list(1, from_ref(&own), &[seg.clone(), segment])), (0xA, 0, 0));
    }
    assert_eq!(disk.memory.bytes(), before, "nothing was copied");
    // Obsolete bits beside the device type.
    let mut reserved = good.clone();
    reserved[17] = 0xE0;
    run(&disk, &reserved);
}

#[test]
fn results_are_kept_until_they_are_asked_for() {
    let disk = Disk::new();
    let own = [target(&naa(&disk), 512)];
    let status = |id| disk.read(&results(0, id), 100);
    assert_eq!(disk.cdb_fault(&results(0, 1), &[]), (2, None));
    run(&disk, &list(1, &own, &[blocks(0, 0, 10, 0, 500), blocks(0, 0, 10, 0, 500)]));
    assert_eq!(status(1), [0, 0, 0, 8, 1, 0, 2, 0, 0, 0, 0x28, 0]);
    assert_eq!(disk.cdb_fault(&results(0, 1), &[]), (2, None), "told once");
    disk.memory.fail(Some(Kind::Io));
    assert_eq!(fails(&disk, &list(2, &own, &[blocks(0, 0, 10, 0, 500)])), (3, 0x11, 0));
    disk.memory.fail(None);
    assert_eq!(status(2)[4..7], [2, 0, 0]);
    // A list that is refused leaves nothing, and what it replaced is gone.
    run(&disk, &list(3, &own, &[blocks(0, 0, 10, 0, 500)]));
    assert_eq!(fails(&disk, &list(3, &own, &[blocks(0, 1, 10, 0, 500)])), (0xA, 0x0D, 2));
    assert_eq!(disk.cdb_fault(&results(0, 3), &[]), (2, None));
    // No tracking; and only so many are kept.
    let mut untracked = list(4, &own, &[blocks(0, 0, 1, 0, 1)]);
    untracked[1] = 0x18;
    run(&disk, &untracked);
    assert_eq!(disk.cdb_fault(&results(0, 4), &[]), (2, None));
    for id in 10..=40 {
        run(&disk, &list(id, &own, &[blocks(0, 0, 1, 0, 1)]));
    }
    assert_eq!(disk.cdb_fault(&results(0, 24), &[]), (2, None));
    status(25);
}

#[test]
fn operating_parameters() {
    let disk = Disk::new();
    let reply = disk.read(&results(3, 0), 1000);
    assert_eq!(reply.len(), 47);
    assert_eq!(reply[..16], [0, 0, 0, 43, 1, 0, 0, 0, 0, 8, 0, 16, 0, 0, 3, 0]);
    assert_eq!(reply[43..], [3, 0x02, 0x0A, 0xE4]);
    let page = disk.read(&[0x12, 1, 0x8F, 4, 0, 0], 1024);
    assert_eq!(page[4..16], [0, 1, 0, 8, 7, 0x83, 1, 0, 0x84, 2, 0, 3]);
}
