//! Reads, writes, verifies, COMPARE AND WRITE, ORWRITE: what moves, what is refused, and residuals.

use crate::harness::*;
use formats::Kind;
use img_tcmu::scsi::{Config, Data, Status};
use std::io::IoSliceMut;
use std::sync::Arc;

const OUT_OF_RANGE: (u8, u8, u8) = (5, 0x21, 0);
const BAD_LENGTH: (u8, u8, u8) = (5, 0x0E, 3);
const MISCOMPARE: (u8, u8, u8) = (0xE, 0x1D, 0);

#[test]
fn every_length_of_cdb_reads_what_another_wrote() {
    let disk = Disk::new();
    let data = pattern(1024, 1);
    let writes: [&[u8]; 4] = [&[0x0A, 0, 0, 3, 2, 0], &cdb10(0x2A, 0, 3, 2), &cdb12(0xAA, 0, 3, 2), &cdb16(0x8A, 0, 3, 2)];
    let reads: [&[u8]; 4] = [&[0x08, 0, 0, 3, 2, 0], &cdb10(0x28, 0, 3, 2), &cdb12(0xA8, 0, 3, 2), &cdb16(0x88, 0, 3, 2)];
    for (seed, write) in writes.iter().enumerate() {
        let data: Vec<u8> = data.iter().map(|b| b ^ (seed as u8 * 16)).collect();
        disk.write(write, &data);
        assert_eq!(disk.memory.bytes()[3 * 512..5 * 512], data);
        for read in reads {
            assert_eq!(disk.read(read, 1024), data);
        }
    }
    assert!(disk.memory.bytes()[..3 * 512].iter().chain(&disk.memory.bytes()[5 * 512..]).all(|b| *b == 0));
}

#[test]
fn length_zero_is_256_blocks_for_six_bytes_and_none_for_the_rest() {
    let disk = Disk::new();
    let data = pattern(256 * 512, 9);
    disk.write(&[0x0A, 0, 0, 0, 0, 0], &data);
    assert_eq!(disk.read(&[0x08, 0, 0, 0, 0, 0], 256 * 512), data);
    assert_eq!(disk.read(&cdb10(0x28, 0, 0, 0), 512), b"");
    disk.ok(&cdb16(0x8A, 0, 0, 0));
    assert_eq!(disk.triple(&cdb10(0x28, 0, 2048, 0), &[]), OUT_OF_RANGE);
}

#[test]
fn beyond_the_end_is_refused_without_effect() {
    let disk = Disk::new();
    for (lba, blocks) in [(2047u64, 2u32), (2048, 1), (1 << 63, 1), (u64::MAX, 1), (u64::MAX, 0), (0, 2049)] {
        for opcode in [0x88, 0x8A, 0x8B, 0x8E, 0x8F, 0x90, 0x91, 0x93] {
            let triple = disk.triple(&cdb16(opcode, 0, lba, blocks), &[0xAA; 2050 * 512]);
            assert_eq!(triple, OUT_OF_RANGE, "opcode {opcode:02x} lba {lba} blocks {blocks}");
        }
    }
    assert_eq!(disk.triple(&compare_and_write(0, 2047, 2), &[0; 2048]), OUT_OF_RANGE);
    assert!(disk.memory.bytes().iter().all(|b| *b == 0));
}

#[test]
fn a_read_fills_what_it_is_given_and_zeroes_the_rest() {
    let disk = Disk::new();
    let data = pattern(1024, 3);
    disk.write(&cdb10(0x2A, 0, 0, 2), &data);
    assert_eq!(disk.read(&cdb10(0x28, 0, 0, 1), 10_000), data[..512], "residual underflow");
    assert_eq!(disk.read(&cdb10(0x28, 0, 0, 1), 200), data[..200], "residual overflow");
    assert_eq!(disk.read(&cdb10(0x28, 0, 0, 2), 512), data[..512]);
    assert_eq!(disk.read(&cdb10(0x28, 0, 0, 1), 0), b"");
}

#[test]
fn a_write_takes_its_blocks_from_a_longer_buffer_and_refuses_a_shorter_one() {
    let disk = Disk::new();
    disk.write(&cdb10(0x2A, 0, 0, 1), &[0xBB; 1024]);
    assert!(disk.memory.bytes()[512..].iter().all(|b| *b == 0), "only the blocks of the CDB");
    for opcode in [0x2A, 0x2E] {
        assert_eq!(disk.triple(&cdb10(opcode, 0, 4, 2), &[0xBB; 1023]), BAD_LENGTH);
        assert_eq!(disk.triple(&cdb10(opcode, 0, 4, 2), &[]), BAD_LENGTH);
    }
    assert_eq!(disk.triple(&cdb16(0x8B, 0, 4, 2), &[0xBB; 200]), BAD_LENGTH);
    assert!(disk.memory.bytes()[2048..].iter().all(|b| *b == 0), "nothing was written");
}

#[test]
fn flags() {
    let disk = Disk::new();
    let data = [0x11; 512];
    // DPO, FUA, and the obsolete FUA_NV.
    for flags in [0x10, 0x08, 0x18, 0x02, 0x1A] {
        disk.write(&cdb10(0x2A, flags, 0, 1), &data);
        assert_eq!(disk.read(&cdb10(0x28, flags, 0, 1), 512), data);
    }
    // Protection, RARC.
    for (flags, bit) in [(0x20, 5), (0x40, 6), (0xE0, 7), (0x04, 2)] {
        assert_eq!(disk.cdb_fault(&cdb10(0x28, flags, 0, 1), &[]), (1, Some(bit)));
        assert_eq!(disk.cdb_fault(&cdb16(0x8A, flags, 0, 1), &data), (1, Some(bit)));
    }
    let mut naca = cdb10(0x28, 0, 0, 1);
    naca[9] = 0x04;
    assert_eq!(disk.cdb_fault(&naca, &[]), (9, Some(2)));
}

#[test]
fn force_unit_access_and_write_through_flush() {
    let disk = Disk::new();
    let flushes = || disk.memory.flush_count();
    disk.write(&cdb10(0x2A, 0, 0, 1), &[1; 512]);
    assert_eq!(flushes(), 0);
    disk.write(&cdb10(0x2A, 0x08, 0, 1), &[1; 512]);
    assert_eq!(flushes(), 1);
    disk.ok(&cdb10(0x35, 0, 0, 0));
    disk.ok(&cdb16(0x91, 0x02, 0, 0));
    assert_eq!(flushes(), 3);

    let disk = Disk::with(Memory::new(1 << 20), Config { write_cache: false, ..Config::default() });
    disk.write(&cdb10(0x2A, 0, 0, 1), &[1; 512]);
    disk.write(&compare_and_write(0, 0, 1), &[1; 1024]);
    disk.write(&cdb10(0x41, 0, 0, 1), &[1; 512]);
    disk.write(&cdb10(0x41, 0, 0, 1), &[0; 512]);
    disk.write(&cdb16(0x8B, 0, 0, 1), &[1; 512]);
    assert_eq!(disk.memory.flush_count(), 5, "without a write cache every write is safe when it ends");
}

#[test]
fn longer_than_the_limits_is_refused() {
    let disk = Disk::with(Memory::new(64 << 20), Config { max_transfer_blocks: 8, ..Config::default() });
    // What is published is advice up to 65536 blocks.
    disk.write(&cdb10(0x2A, 0, 0, 9), &[1; 9 * 512]);
    assert_eq!(disk.cdb_fault(&cdb12(0xA8, 0, 0, 65537), &[]), (6, None));
    assert_eq!(disk.cdb_fault(&cdb16(0x8F, 0, 0, 65537), &[]), (10, None));
    disk.ok(&cdb16(0x8F, 0, 0, 65536));
}

#[test]
fn failures_of_the_image_become_sense() {
    let disk = Disk::new();
    let expected = |kind| match kind {
        Kind::Io | Kind::Corrupt | Kind::InvalidFormat | Kind::NotFound | Kind::Denied | Kind::Locked => ((3, 0x11, 0), (3, 0x0C, 0)),
        Kind::NoSpace => ((7, 0x27, 7), (7, 0x27, 7)),
        Kind::ReadOnly => ((7, 0x27, 0), (7, 0x27, 0)),
        Kind::OutOfBounds => ((5, 0x21, 0), (5, 0x21, 0)),
        Kind::Unsupported | Kind::InvalidOption => ((4, 0x44, 0), (4, 0x44, 0)),
    };
    for kind in [
        Kind::Io,
        Kind::Corrupt,
        Kind::InvalidFormat,
        Kind::NotFound,
        Kind::Denied,
        Kind::Locked,
        Kind::NoSpace,
        Kind::ReadOnly,
        Kind::OutOfBounds,
        Kind::Unsupported,
        Kind::InvalidOption,
    ] {
        disk.memory.fail(Some(kind));
        let (read, write) = expected(kind);
        assert_eq!(disk.triple(&cdb10(0x28, 0, 0, 1), &[0; 512]), read);
        assert_eq!(disk.triple(&cdb10(0x2A, 0, 0, 1), &[0; 512]), write);
        assert_eq!(disk.triple(&cdb10(0x35, 0, 0, 0), &[]), write);
    }
    disk.memory.fail(None);
    disk.write(&cdb10(0x2A, 0, 0, 1), &[0; 512]);
}

#[test]
fn read_only_and_write_protect() {
    let disk = Disk::with(Memory::new(1 << 20), Config { read_only: true, ..Config::default() });
    let refused: [&[u8]; 11] = [
        &cdb10(0x42, 0, 0, 24),
        &cdb10(0x41, 0x08, 0, 1),
        &cdb10(0x48, 0x02, 0, 0),
        &cdb10(0x2A, 0, 0, 1),
        &cdb10(0x41, 0, 0, 1),
        &cdb10(0x2E, 0, 0, 1),
        &cdb12(0xAA, 0, 0, 1),
        &cdb16(0x8A, 0, 0, 1),
        &cdb16(0x8B, 0, 0, 1),
        &cdb16(0x93, 0, 0, 1),
        &compare_and_write(0, 0, 1),
    ];
    for cdb in refused {
        assert_eq!(disk.triple(cdb, &[0; 512]), (7, 0x27, 0), "{cdb:02x?}");
    }
    disk.read(&cdb10(0x28, 0, 0, 1), 512);
    disk.ok(&cdb10(0x35, 0, 0, 0));
}

#[test]
fn verify() {
    let disk = Disk::new();
    let data = pattern(3 * 512, 7);
    disk.write(&cdb10(0x2A, 0, 10, 3), &data);
    for cdb in [&cdb10(0x2F, 0x02, 10, 3)[..], &cdb12(0xAF, 0x12, 10, 3), &cdb16(0x8F, 0x02, 10, 3)] {
        disk.write(cdb, &data);
        let mut other = data.clone();
        other[1000] ^= 1;
        let sense = disk.fault(cdb, &other);
        assert_eq!((sense[0], sense[2], sense[12], sense[13]), (0xF0, 0xE, 0x1D, 0));
        assert_eq!(sense[3..7], 1000u32.to_be_bytes());
        assert_eq!(disk.triple(cdb, &data[..1000]), BAD_LENGTH);
    }
    // Without BYTCHK the data do not matter.
    disk.ok(&cdb10(0x2F, 0, 10, 3));
    disk.write(&cdb10(0x2F, 0, 10, 3), &[0xFF; 512]);
    disk.memory.fail(Some(Kind::Io));
    assert_eq!(disk.triple(&cdb10(0x2F, 0, 10, 3), &[]), (3, 0x11, 0), "the medium is really read");
    disk.memory.fail(None);
    // One block against many.
    disk.write(&cdb10(0x41, 0, 20, 100), &data[..512]);
    disk.write(&cdb10(0x2F, 0x06, 20, 100), &data[..512]);
    assert_eq!(disk.triple(&cdb10(0x2F, 0x06, 20, 101), &data[..512]), MISCOMPARE);
    assert_eq!(disk.cdb_fault(&cdb10(0x2F, 0x04, 20, 100), &data[..512]), (1, Some(2)));
    disk.ok(&cdb10(0x2F, 0x06, 20, 0));
}

#[test]
fn write_and_verify() {
    let disk = Disk::new();
    let data = pattern(2 * 512, 8);
    for (at, cdb) in [&cdb10(0x2E, 0x02, 0, 2)[..], &cdb12(0xAE, 0, 2, 2), &cdb16(0x8E, 0x12, 4, 2)].iter().enumerate() {
        disk.write(cdb, &data);
        assert_eq!(disk.memory.bytes()[at * 1024..][..1024], data);
    }
    assert_eq!(disk.memory.flush_count(), 3);
    assert_eq!(disk.cdb_fault(&cdb10(0x2E, 0x04, 0, 2), &data), (1, Some(2)));
}

#[test]
fn compare_and_write_swaps_or_tells_where_not() {
    let disk = Disk::new();
    let old = pattern(255 * 512, 1);
    let new = pattern(255 * 512, 2);
    disk.write(&cdb10(0x2A, 0, 5, 255), &old);
    let both = [old.clone(), new.clone()].concat();
    disk.write(&compare_and_write(0, 5, 255), &both);
    assert_eq!(disk.memory.bytes()[5 * 512..260 * 512], new);
    let mut wrong = [new.clone(), old].concat();
    wrong[255 * 512 - 27] ^= 4;
    let sense = disk.fault(&compare_and_write(0, 5, 255), &wrong);
    assert_eq!((sense[0], sense[2], sense[12]), (0xF0, 0xE, 0x1D));
    assert_eq!(sense[3..7], (255u32 * 512 - 27).to_be_bytes());
    assert_eq!(disk.memory.bytes()[5 * 512..260 * 512], new, "nothing written");
    for len in [0, 512, 1023, 1025, 2048] {
        assert_eq!(disk.triple(&compare_and_write(0, 5, 1), &vec![0; len]), BAD_LENGTH);
    }
    disk.ok(&compare_and_write(0, 5, 0));
    assert_eq!(disk.cdb_fault(&compare_and_write(0, 5, 0), &[0; 2 * 256 * 512]), (13, None), "256 blocks do not fit");
}

/// A process that was killed has written all, some or nothing of it. What was neither is still a miscompare.
#[test]
fn compare_and_write_is_taken_over_from_a_dead_process() {
    let (old, new) = (pattern(8 * 512, 1), pattern(8 * 512, 2));
    let both = [old.clone(), new.clone()].concat();
    for written in 0..=8 {
        let disk = Disk::new();
        disk.write(&cdb10(0x2A, 0, 5, 8), &[&new[..written * 512], &old[written * 512..]].concat());
        if written > 0 {
            assert_eq!(disk.triple(&compare_and_write(0, 5, 8), &both), MISCOMPARE);
        }
        let mut data = both.clone();
        let outcome = disk.lun.execute_again(1, &compare_and_write(0, 5, 8), &mut Data::new(&mut [IoSliceMut::new(&mut data)]));
        assert_eq!(outcome, good(), "{written} blocks written");
        assert_eq!(disk.memory.bytes()[5 * 512..13 * 512], new);
        let mut other = [new.clone(), old.clone()].concat();
        other[3 * 512] ^= 1;
        other[11 * 512] ^= 1;
        let outcome = disk.lun.execute_again(1, &compare_and_write(0, 5, 8), &mut Data::new(&mut [IoSliceMut::new(&mut other)]));
        assert_eq!(outcome.status, Status::CheckCondition);
        assert_eq!(disk.memory.bytes()[5 * 512..13 * 512], new);
    }
}

#[test]
fn compare_and_write_is_atomic() {
    let disk = Arc::new(Disk::new());
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let disk = disk.clone();
            std::thread::spawn(move || {
                let mut done = 0;
                while done < 50 {
                    let old = disk.read(&cdb10(0x28, 0, 0, 2), 1024);
                    let count = u32::from_le_bytes(old[..4].try_into().unwrap());
                    assert!(old.chunks_exact(4).all(|c| c == &old[..4]), "a half-done write was seen");
                    let new: Vec<u8> = (0..256).flat_map(|_| (count + 1).to_le_bytes()).collect();
                    let outcome = disk.run(&compare_and_write(0, 0, 2), &mut [old, new].concat());
                    done += u32::from(outcome.status == Status::Good);
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    assert_eq!(disk.memory.bytes()[..4], 200u32.to_le_bytes());
}

#[test]
fn or_write() {
    let disk = Disk::new();
    disk.write(&cdb10(0x2A, 0, 0, 600), &pattern(600 * 512, 0x0F));
    disk.write(&cdb16(0x8B, 0x18, 0, 600), &[0xA0; 600 * 512]);
    let expected: Vec<u8> = pattern(600 * 512, 0x0F).iter().map(|b| b | 0xA0).collect();
    assert_eq!(disk.memory.bytes()[..600 * 512], expected);
}

#[test]
fn write_atomic() {
    let disk = Disk::new();
    let cdb = |lba, boundary: u32, blocks: u32| cdb16(0x9C, 0x08, lba, boundary << 16 | blocks);
    disk.write(&cdb(3, 0, 1), &[7; 512]);
    assert_eq!(disk.memory.bytes()[3 * 512..4 * 512], [7; 512]);
    assert_eq!(disk.memory.flush_count(), 1);
    disk.ok(&cdb(3, 0, 0));
    assert_eq!(disk.triple(&cdb(2047, 0, 2), &[7; 1024]), OUT_OF_RANGE);
    assert_eq!(disk.cdb_fault(&cdb(3, 0, 2), &[7; 1024]), (12, None), "more than one block is not promised");
    assert_eq!(disk.cdb_fault(&cdb(3, 1, 1), &[7; 512]), (10, None));
    assert_eq!(disk.triple(&cdb(3, 0, 1), &[7; 511]), BAD_LENGTH);
    let b0 = |disk: &Disk| disk.read(&[0x12, 1, 0xB0, 0, 64, 0], 64)[44..].to_vec();
    assert_eq!(b0(&disk)[..4], [0, 0, 0, 1]);
    let four_k = Disk::with(Memory::new(1 << 20), Config { block_size: 4096, ..Config::default() });
    assert_eq!(four_k.triple(&cdb(3, 0, 1), &[7; 4096]), (5, 0x20, 0), "the image's sectors have 512 bytes");
    assert_eq!(b0(&four_k), [0; 20]);
}

#[test]
fn without_waiting() {
    let disk = Disk::new();
    let mut buffer = [POISON; 1024];
    let mut lend = |cdb: &[u8]| disk.lun.try_execute(cdb, &mut Data::new(&mut [IoSliceMut::new(&mut buffer)]));
    assert_eq!(lend(&[0; 6]).unwrap().status, Status::Good);
    assert_eq!(lend(&cdb10(0x28, 0, 0, 1)).unwrap().data_in, Some(512));
    assert_eq!(lend(&cdb10(0x28, 0, 2000, 1)), None, "not in memory");
    assert_eq!(lend(&cdb10(0x2A, 0, 0, 1)), None);
    assert_eq!(lend(&cdb10(0x28, 0, 2048, 1)).unwrap().status, Status::CheckCondition);
    disk.lun.threshold_reached();
    assert_eq!(lend(&cdb10(0x2A, 0, 0, 1)), None, "a unit attention is not lost");
    assert_eq!(lend(&cdb10(0x28, 0, 2000, 1)).unwrap().status, Status::CheckCondition);
    assert_eq!(disk.memory.bytes()[..512], [0; 512]);
}

#[test]
fn blocks_of_4096_bytes() {
    let disk = Disk::with(Memory::new(1 << 20), Config { block_size: 4096, ..Config::default() });
    let data = pattern(8192, 1);
    disk.write(&cdb10(0x2A, 0, 254, 2), &data);
    assert_eq!(disk.memory.bytes()[254 * 4096..], data);
    assert_eq!(disk.triple(&cdb10(0x28, 0, 255, 2), &[]), OUT_OF_RANGE);
    assert_eq!(disk.triple(&cdb10(0x2A, 0, 0, 1), &data[..512]), BAD_LENGTH);
}
