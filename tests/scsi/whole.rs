//! SANITIZE and FORMAT UNIT, and the small commands about the unit: defects, logs, diagnostics.

use crate::harness::*;
use formats::Kind;
use img_tcmu::scsi::{Config, Data};
use std::io::IoSliceMut;
use std::sync::Arc;
use std::time::{Duration, Instant};

fn sanitize(action: u8, list_len: u16) -> [u8; 10] {
    let [high, low] = list_len.to_be_bytes();
    [0x48, action, 0, 0, 0, 0, 0, high, low, 0]
}

fn overwrite(passes: u8, pattern: &[u8]) -> Vec<u8> {
    let mut list = vec![passes, 0];
    list.extend((pattern.len() as u16).to_be_bytes());
    list.extend(pattern);
    list
}

#[test]
fn overwriting() {
    let disk = Disk::new();
    for len in [1, 4, 256, 511, 512] {
        let list = overwrite(1, &pattern(len, 3));
        disk.write(&sanitize(1, list.len() as u16), &list);
        let block: Vec<u8> = list[4..].iter().copied().cycle().take(512).collect();
        assert!(all_blocks_are(&disk.memory, &block), "pattern of {len} bytes");
    }
    // Two passes, the second inverted; three, ending as they began.
    for (passes, last) in [(0x82, 0x5A), (0x83, 0xA5)] {
        disk.write(&sanitize(1, 5), &overwrite(passes, &[0xA5]));
        assert!(all_blocks_are(&disk.memory, &[last; 512]));
    }
    assert!(disk.memory.flush_count() >= 10, "every pass reaches the medium");
}

#[test]
fn overwrite_parameters() {
    let disk = Disk::new();
    for len in [0, 1, 2, 3, 4, 517] {
        assert_eq!(disk.cdb_fault(&sanitize(1, len), &[1; 600]), (7, None));
    }
    let good = overwrite(1, &[0xAA; 512]);
    let cdb = sanitize(1, 516);
    for (at, value) in [(0, 0x00), (0, 0x21), (1, 1), (2, 0), (3, 1)] {
        let mut list = good.clone();
        list[at] = value;
        assert_eq!(disk.triple(&cdb, &list), (5, 0x26, 0), "byte {at}");
    }
    assert_eq!(disk.triple(&cdb, &good[..515]), (5, 0x0E, 3));
    for (byte, value, bit) in [(1, 0x41, 6), (2, 2, 1), (3, 4, 2), (6, 6, 2)] {
        let mut bad = cdb;
        bad[byte] = value;
        assert_eq!(disk.cdb_fault(&bad, &good), (byte as u16, Some(bit)));
    }
    for action in (0..0x1F).filter(|a| !(1..=2).contains(a)) {
        assert_eq!(disk.cdb_fault(&sanitize(action, 0), &[]), (1, Some(4)));
    }
    assert!(all_blocks_are(&disk.memory, &[0; 512]), "nothing was written");
}

#[test]
fn block_erase() {
    let disk = Disk::new();
    disk.write(&cdb10(0x2A, 0, 5, 256), &[1; 256 * 512]);
    assert_eq!(disk.cdb_fault(&sanitize(2, 8), &[0; 8]), (7, None));
    disk.ok(&sanitize(2, 0));
    assert!(all_blocks_are(&disk.memory, &[0; 512]));
    let mut status = cdb16(0x9E, 0x12, 0, 0);
    status[13] = 255;
    assert_eq!(disk.read(&status, 256), [&[0, 0, 0, 20, 0, 0, 0, 0][..], &[0; 10], &[8, 0, 1, 0, 0, 0]].concat());
    let thick = Disk::with(Memory::new(1 << 20), Config { discard: false, ..Config::default() });
    assert_eq!(thick.cdb_fault(&sanitize(2, 0), &[]), (1, Some(4)));
}

#[test]
fn in_the_background() {
    let disk = Disk::new();
    let list = overwrite(31, &[0x77]);
    disk.write(&sanitize(0x81, 5), &list);
    // Other commands wait for it by asking again; INQUIRY does not.
    let mut waited = false;
    loop {
        disk.read(&[0x12, 0, 0, 0, 96, 0], 96);
        let outcome = disk.run(&cdb10(0x28, 0, 0, 1), &mut [0; 512]);
        let Some(sense) = outcome.sense else { break };
        let sense = sense.as_bytes();
        assert_eq!((sense[2], sense[12], sense[13], sense[15] & 0x80), (2, 0x04, 0x1B, 0x80));
        waited = true;
    }
    assert!(waited || disk.memory.flush_count() >= 31);
    assert!(all_blocks_are(&disk.memory, &[0x77; 512]));
}

/// Of a field in error and an operation under way, the operation is what is told.
fn is_in_progress(disk: &Disk, cdb: &[u8]) -> bool {
    disk.run(cdb, &mut [0; 512]).sense.is_some_and(|sense| sense.as_bytes()[2..][..1] == [2] && sense.as_bytes()[12..14] == [0x04, 0x1B])
}

#[test]
fn a_command_that_is_given_up_ends_and_the_work_goes_on() {
    let disk = Disk::new();
    let list = overwrite(1, &[0x77]);
    let held = disk.memory.hold();
    std::thread::scope(|scope| {
        let lun = disk.lun.clone();
        let command = scope.spawn(move || {
            let mut list = list;
            lun.execute_tagged(7, &sanitize(1, 5), &mut Data::new(&mut [IoSliceMut::new(&mut list)]))
        });
        while !is_in_progress(&disk, &[0; 6]) {
            std::thread::yield_now();
        }
        assert!(is_in_progress(&disk, &[0x1B, 1, 0, 0, 0x12, 0]), "not INVALID FIELD IN CDB");
        // The command may not have come to wait yet, in which case the notice is early, and comes to nothing.
        let patience = Instant::now();
        disk.lun.given_up(&[6, 8]);
        std::thread::sleep(Duration::from_millis(20));
        assert!(!command.is_finished(), "others were given up");
        while !command.is_finished() {
            assert!(patience.elapsed() < Duration::from_secs(10), "the command waits on");
            disk.lun.given_up(&[6, 7]);
            std::thread::yield_now();
        }
        let sense = command.join().unwrap().sense.unwrap();
        assert_eq!((sense.as_bytes()[12], sense.as_bytes()[13]), (0x04, 0x1B));
        assert!(is_in_progress(&disk, &cdb10(0x28, 0, 0, 1)));
        // The image is not taken from under it.
        let memory = Arc::new(Memory::new(1 << 20));
        let lun = disk.lun.clone();
        let replacing = scope.spawn(move || lun.replace(memory).map(drop));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!replacing.is_finished());
        drop(held);
        replacing.join().unwrap().unwrap();
    });
    assert!(all_blocks_are(&disk.memory, &[0x77; 512]));
}

#[test]
fn failure_keeps_the_medium_out_of_reach() {
    let disk = Disk::new();
    let list = overwrite(1, &[0x77]);
    let failed = (3, 0x31, 3);
    disk.memory.fail(Some(Kind::Io));
    assert_eq!(disk.triple(&sanitize(1, 5), &list), (3, 0x0C, 0));
    disk.memory.fail(None);
    for cdb in [&[0; 6][..], &cdb10(0x28, 0, 0, 1), &cdb10(0x2A, 0, 0, 1), &cdb10(0x25, 0, 0, 0)] {
        assert_eq!(disk.triple(cdb, &[0; 512]), failed);
    }
    assert_eq!(disk.read(&[3, 0, 0, 0, 18, 0], 18)[2], 3);
    assert_eq!(disk.cdb_fault(&sanitize(0x1F, 0), &[]), (1, Some(4)), "the command did not allow it");
    disk.write(&sanitize(1, 5), &list);
    disk.ok(&[0; 6]);

    disk.memory.fail(Some(Kind::Io));
    assert_eq!(disk.triple(&sanitize(0x21, 5), &list), (3, 0x0C, 0));
    disk.memory.fail(None);
    assert_eq!(disk.triple(&[0; 6], &[]), failed);
    assert_eq!(disk.cdb_fault(&sanitize(0x1F, 8), &[0; 8]), (7, None));
    disk.ok(&sanitize(0x1F, 0));
    disk.ok(&[0; 6]);
    disk.ok(&sanitize(0x1F, 0));
}

#[test]
fn format_unit() {
    let disk = Disk::new();
    disk.write(&cdb10(0x2A, 0, 5, 256), &[1; 256 * 512]);
    for (cdb, list) in [
        ([4, 0x90, 0, 0, 0, 0], &[0; 4][..]),
        ([4, 0x10, 0, 0, 0, 0], &[0, 0x08, 0, 0]),
        ([4, 0x10, 0, 0, 0, 0], &[0, 0, 0, 8]),
        ([4, 0x10, 0, 0, 0, 0], &[0, 0]),
        ([4, 0x30, 0, 0, 0, 0], &[0, 0, 0, 0, 0, 0, 0, 4]),
        ([4, 0x20, 0, 0, 0, 0], &[]),
        ([4, 0x08, 0, 0, 0, 0], &[]),
    ] {
        assert_eq!(disk.fault(&cdb, list)[2], 5, "{cdb:02x?} {list:02x?}");
    }
    assert_eq!(disk.memory.bytes()[5 * 512], 1);
    disk.ok(&[4, 0, 0, 0, 0, 0]);
    assert!(all_blocks_are(&disk.memory, &[0; 512]));
    disk.write(&[4, 0x18, 0, 0, 0, 0], &[0, 0x82, 0, 0]);
    disk.memory.fail(Some(Kind::NoSpace));
    while disk.triple(&[4, 0x30, 0, 0, 0, 0], &[0; 8]) == (2, 4, 4) {}
    disk.memory.fail(None);
    assert_eq!(disk.triple(&[0; 6], &[]), (3, 0x31, 1));
    disk.ok(&[4, 0, 0, 0, 0, 0]);
    disk.ok(&[0; 6]);
}

#[test]
fn defect_lists_are_empty() {
    let disk = Disk::new();
    assert_eq!(disk.read(&[0x37, 0, 0x1C, 0, 0, 0, 0, 0, 32, 0], 32), [0, 0x1C, 0, 0]);
    assert_eq!(disk.read(&[0xB7, 0x0D, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], 32), [0, 0x0D, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn logs() {
    let disk = Disk::new();
    let sense = |page: u8, subpage: u8, pointer: u8| disk.read(&[0x4D, 0, page, subpage, 0, 0, pointer, 1, 0, 0], 256);
    assert_eq!(sense(0x40, 0, 0), [0, 0, 0, 3, 0, 2, 3]);
    assert_eq!(sense(0x40, 0xFF, 0), [0x40, 0xFF, 0, 6, 0, 0, 2, 0, 3, 0]);
    let errors = |page: u8| u64::from_be_bytes(sense(page, 0, 0)[8..].try_into().unwrap());
    assert_eq!((errors(0x42), errors(0x43)), (0, 0));
    disk.memory.fail(Some(Kind::Io));
    for _ in 0..3 {
        disk.triple(&cdb10(0x28, 0, 0, 1), &[0; 512]);
    }
    disk.triple(&cdb10(0x2A, 0, 0, 1), &[0; 512]);
    assert_eq!((errors(0x42), errors(0x43)), (1, 3));
    assert_eq!(sense(0x42, 0, 7), [2, 0, 0, 0], "the parameter pointer is beyond the last");
    assert_eq!(disk.cdb_fault(&[0x4D, 0, 0x4D, 0, 0, 0, 0, 1, 0, 0], &[]), (2, Some(5)));
    assert_eq!(disk.cdb_fault(&[0x4D, 0, 0x42, 1, 0, 0, 0, 1, 0, 0], &[]), (3, None));
    assert_eq!(disk.cdb_fault(&[0x4D, 0, 0x02, 0, 0, 0, 0, 1, 0, 0], &[]), (2, Some(7)));
    assert_eq!(disk.cdb_fault(&[0x4D, 1, 0x42, 0, 0, 0, 0, 1, 0, 0], &[]), (1, Some(0)), "SP");
}

#[test]
fn diagnostics_and_task_management() {
    let disk = Disk::new();
    disk.ok(&[0x1D, 4, 0, 0, 0, 0]);
    assert_eq!(disk.cdb_fault(&[0x1D, 0x20, 0, 0, 0, 0], &[]), (1, Some(5)));
    assert_eq!(disk.read(&[0xA3, 0x0D, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0], 16), [0x88, 0, 0, 0]);
}
