//! Random CDBs for every opcode over random buffers: nothing panics, nothing but the named blocks changes, and nothing of a
//! buffer's former contents gets out.

use crate::harness::*;
use formats::Limits;
use img_tcmu::scsi::opcode::{self, Access, Direction, TABLE};
use img_tcmu::scsi::{Config, Data, Outcome, Status};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::io::IoSliceMut;

/// Rounds; `SCSI_HOSTILE_ROUNDS` asks for more.
fn rounds() -> u64 {
    std::env::var("SCSI_HOSTILE_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(60_000)
}

fn disks() -> Vec<Disk> {
    let size = 64 << 10;
    let base = Memory::new(size).limits_now();
    let config = Config::default();
    vec![
        Disk::with(Memory::new(size), config.clone()),
        Disk::with(Memory::new(size), Config { block_size: 4096, write_cache: false, ..config.clone() }),
        Disk::with(Memory::new(size), Config { read_only: true, ..config.clone() }),
        Disk::with(Memory::with_limits(Limits { size: size + 700, discard_zeroes: false, ..base }), config),
    ]
}

#[test]
fn random_commands() {
    let disks = disks();
    let mut ended_well = 0;
    for seed in 0..rounds() {
        let mut random = StdRng::seed_from_u64(seed);
        let disk = &disks[random.random_range(0..disks.len())];
        let entry = &TABLE[random.random_range(0..TABLE.len())];
        let mut cdb: Vec<u8> = (0..16).map(|_| random.random()).collect();
        cdb[0] = if random.random_ratio(1, 20) { random.random() } else { entry.opcode };
        if random.random_ratio(19, 20) {
            // Mostly plausible: reserved bits clear, small fields.
            for (byte, usage) in cdb.iter_mut().zip(entry.usage).skip(1) {
                *byte &= usage;
                if *usage == 0xFF && random.random_ratio(3, 4) {
                    *byte = 0;
                }
            }
            cdb[1] |= entry.action.unwrap_or(0);
        }
        if random.random_ratio(1, 20) {
            cdb.truncate(random.random_range(0..17));
        }
        let mut buffer = vec![POISON; random_len(&mut random)];
        let poison = buffer.clone();
        let before = disk.memory.bytes();

        let outcome = {
            let mut segments = cut(&mut buffer, &mut random);
            disk.lun.execute(&cdb, &mut Data::new(&mut segments))
        };

        settle(disk);
        let note = format!("seed {seed} cdb {cdb:02x?} buffer {} outcome {outcome:?}", buffer.len());
        let after = disk.memory.bytes();
        if outcome.status != Status::Good {
            assert!(outcome.sense.is_some() && outcome.data_in.is_none(), "{note}");
            continue;
        }
        ended_well += 1;
        let action = cdb[1] & 0x1F;
        let rows = opcode::rows(cdb[0]).unwrap();
        let row = rows.iter().find(|r| r.action.is_none_or(|a| a == action)).unwrap();
        match row.direction {
            Direction::Out => {
                assert_eq!(buffer, poison, "data-out was changed: {note}");
                assert_eq!(outcome.data_in, None, "{note}");
            }
            Direction::In => {
                let valid = outcome.data_in.expect(&note) as usize;
                assert!(valid <= buffer.len(), "{note}");
                assert!(buffer[valid..].iter().all(|b| *b == 0), "poison after the reply: {note}");
                // The media hold poison by now, so a read may return it.
                if !row.name.starts_with("READ (") {
                    assert!(!buffer.windows(4).any(|w| w == [POISON; 4]), "poison in the reply: {note}");
                }
                assert_eq!(before, after, "{note}");
            }
            Direction::None => {
                assert!(buffer.iter().all(|b| *b == 0), "poison after no data: {note}");
                assert!(before == after || row.access == Access::Write, "{note}");
            }
        }
    }
    assert!(ended_well > rounds() / 20, "only {ended_well} ended well: the CDBs are not plausible enough to mean anything");
}

/// Waits for an operation in the background.
fn settle(disk: &Disk) {
    let busy = |outcome: Outcome| outcome.sense.is_some_and(|s| s.as_bytes().windows(2).any(|w| w == [0x04, 0x1B] || w == [0x04, 0x04]));
    while busy(disk.run(&[0; 6], &mut [])) {
        std::thread::yield_now();
    }
}

/// None, around a few blocks, or anything.
fn random_len(random: &mut StdRng) -> usize {
    match random.random_range(0..4) {
        0 => 0,
        1 => random.random_range(0..64),
        2 => 512 * random.random_range(0..20),
        _ => random.random_range(0..20_000),
    }
}

fn cut<'a>(buffer: &'a mut [u8], random: &mut StdRng) -> Vec<IoSliceMut<'a>> {
    let mut segments = Vec::new();
    let mut rest = buffer;
    while !rest.is_empty() && segments.len() < 100 {
        let at = random.random_range(0..=rest.len().min(5000));
        let (head, tail) = rest.split_at_mut(at);
        segments.push(IoSliceMut::new(head));
        rest = tail;
    }
    segments.push(IoSliceMut::new(rest));
    segments
}
