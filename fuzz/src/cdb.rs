//! SCSI commands over a small image, with buffers cut anyhow.
//!
//! Nothing of a buffer's former contents gets out, nothing that the initiator sent is changed, replies are as long as they say, and a read gives what was
//! written.

use super::disk;
use super::input::Input;
use super::sparse::Sparse;
use super::{qcow2, vhd};
use formats::BlockDevice;
use img_tcmu::scsi::opcode::{self, Access, Direction, TABLE};
use img_tcmu::scsi::{Config, Data, Identity, Lun, Outcome, Status};
use std::io::IoSliceMut;
use std::sync::Arc;

/// What a buffer holds before a command: bytes of somebody else. No image holds them, and no initiator sends them.
const POISON: [u8; 2] = [0xE7, 0x18];
const MAX_COMMANDS: usize = 12;

fn unit(input: &mut Input<'_>) -> Option<(Lun, u64)> {
    let flags = input.u8();
    let image = match flags % 4 {
        0 => disk::open(Arc::new(Sparse::new(&[0x21; 40_000])), "raw", true),
        1 => disk::open(qcow2::valid(input), "qcow2", true),
        2 => disk::open(vhd::valid(input), "vpc", true),
        _ => disk::open(qcow2::valid(input), "qcow2", false),
    };
    let image = image.unwrap_or_else(|error| panic!("a valid image does not open: {}", error.chain()));
    let config = Config {
        block_size: if flags & 4 == 0 { 512 } else { 4096 },
        read_only: flags & 24 == 24,
        write_cache: flags & 32 == 0,
        discard: flags & 64 == 0,
        ..Config::default()
    };
    let size = image.limits().size;
    Lun::new(image, Identity::with_serial("01234567-89ab-cdef-0123-456789abcdef"), config).ok().map(|lun| (lun, size))
}

fn run(lun: &Lun, cdb: &[u8], buffer: &mut [u8], cuts: &[u8]) -> Outcome {
    let mut segments = Vec::new();
    let mut rest = buffer;
    for cut in cuts {
        let (head, tail) = rest.split_at_mut((usize::from(*cut) * 37).min(rest.len()));
        segments.push(IoSliceMut::new(head));
        rest = tail;
    }
    segments.push(IoSliceMut::new(rest));
    let mut data = Data::new(&mut segments);
    if cuts.first().is_some_and(|c| c & 1 == 1)
        && let Some(outcome) = lun.try_execute(cdb, &mut data)
    {
        return outcome;
    }
    lun.execute(cdb, &mut data)
}

pub fn cdb(data: &[u8]) {
    let mut input = Input::new(data);
    let Some((lun, size)) = unit(&mut input) else { return };
    for _ in 0..MAX_COMMANDS {
        if input.is_empty() {
            break;
        }
        command(&lun, size, &mut input);
        settle(&lun);
    }
}

fn command(lun: &Lun, size: u64, input: &mut Input<'_>) {
    let entry = &TABLE[input.below(TABLE.len() as u64) as usize];
    let how = input.u8();
    let mut cdb = [0; 32];
    let given = input.take(16);
    cdb[..given.len()].copy_from_slice(given);
    let mut cdb = cdb[..16].to_vec();
    if how & 7 != 0 {
        cdb[0] = entry.opcode;
        for (byte, usage) in cdb.iter_mut().zip(entry.usage).skip(1) {
            *byte &= usage;
        }
        cdb[1] |= entry.action.unwrap_or(0);
        // The high bytes of an address in a small disk are zeros.
        if how & 8 != 0 && cdb[0] >= 0x20 {
            cdb[2..4].fill(0);
        }
        if how & 16 != 0 && (0x80..0xA0).contains(&cdb[0]) {
            cdb[2..8].fill(0);
        }
    }
    if how & 0xE0 == 0xE0 {
        cdb.truncate(input.below(17) as usize);
    }
    let row = cdb.first().and_then(|code| opcode::rows(*code)).and_then(|rows| {
        let action = cdb.get(1).map_or(0, |b| b & 0x1F);
        rows.iter().find(|r| r.action.is_none_or(|a| a == action))
    });
    let len = match input.u8() % 4 {
        0 => 0,
        1 => usize::from(input.u8()),
        2 => 512 * usize::from(input.u8() % 24),
        _ => input.below(20_000) as usize,
    };
    let pieces = usize::from(input.u8() % 6);
    let cuts = input.take(pieces);
    let out = row.is_some_and(|r| r.direction == Direction::Out);
    let mut buffer: Vec<u8> = if out {
        let given = input.take(len.min(512));
        (0..len)
            .map(|i| given.get(i % given.len().max(1)).map_or(i as u8, |b| *b))
            .map(|b| if POISON.contains(&b) { b ^ 1 } else { b })
            .collect()
    } else {
        (0..len).map(|i| POISON[i % 2]).collect()
    };
    let sent = buffer.clone();
    let outcome = run(lun, &cdb, &mut buffer, cuts);
    let note = || format!("cdb {cdb:02x?}, buffer of {len}, outcome {outcome:?}");
    if out {
        assert!(buffer == sent, "the initiator's data were changed: {}", note());
    }
    if outcome.status != Status::Good {
        assert!(outcome.data_in.is_none(), "{}", note());
        assert_eq!(outcome.sense.is_some(), outcome.status == Status::CheckCondition, "{}", note());
        return;
    }
    assert!(outcome.sense.is_none(), "{}", note());
    let Some(row) = row else { panic!("an unknown command ended well: {}", note()) };
    match row.direction {
        Direction::Out => assert_eq!(outcome.data_in, None, "{}", note()),
        Direction::In => {
            let valid = outcome.data_in.unwrap_or_else(|| panic!("no length: {}", note())) as usize;
            assert!(valid <= len, "{}", note());
            assert!(buffer[valid..].iter().all(|b| *b == 0), "bytes after the reply: {}", note());
            assert!(!buffer.windows(4).any(|w| w[..2] == POISON && w[2..] == POISON), "somebody's bytes in the reply: {}", note());
        }
        Direction::None => assert!(buffer.iter().all(|b| *b == 0), "bytes after no data: {}", note()),
    }
    if out && row.access == Access::Write && row.name.starts_with("WRITE (") {
        read_back(lun, size, &cdb, &sent);
    }
}

/// Reads the blocks of a WRITE that ended well.
fn read_back(lun: &Lun, size: u64, cdb: &[u8], sent: &[u8]) {
    let block = u64::from(lun.block_size());
    let number = |from: usize, len: usize| cdb[from..from + len].iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
    let (lba, blocks) = match cdb[0] {
        0x0A => (number(1, 3) & 0x1F_FFFF, if cdb[4] == 0 { 256 } else { number(4, 1) }),
        0x2A => (number(2, 4), number(7, 2)),
        0xAA => (number(2, 4), number(6, 4)),
        0x8A => (number(2, 8), number(10, 4)),
        _ => return,
    };
    assert!((lba + blocks) * block <= size, "a write beyond the end ended well: {cdb:02x?}");
    // What did not come is not written.
    let len = (blocks * block).min(sent.len() as u64 / block * block) as usize;
    let mut buffer = vec![0; len];
    let mut bytes = vec![IoSliceMut::new(&mut buffer)];
    lun.device().read(&mut bytes, lba * block).unwrap_or_else(|e| panic!("{}", e.chain()));
    assert!(buffer == sent[..len], "{cdb:02x?} is not read back");
}

/// Waits for an operation in the background.
fn settle(lun: &Lun) {
    let busy = |outcome: Outcome| outcome.sense.is_some_and(|s| s.as_bytes().windows(2).any(|w| w == [0x04, 0x1B] || w == [0x04, 0x04]));
    while busy(run(lun, &[0; 6], &mut [], &[])) {
        std::thread::yield_now();
    }
}
