//! VERIFY and WRITE AND VERIFY, (10), (12) and (16) (SBC-3 5.29 to 5.37, 5.42 to 5.44).

use crate::scsi::cdb::{Cdb, Extent};
use crate::scsi::data::Data;
use crate::scsi::io::write_blocks;
use crate::scsi::lun::Command;
use crate::scsi::opcode::Reply;
use crate::scsi::sense::{Fault, Triple};
use std::io::IoSliceMut;
use std::ops::Range;

/// Bytes read at a time to be compared.
pub(super) const CHUNK: u64 = 256 << 10;

/// BYTCHK in byte 1.
fn byte_check(cdb: &Cdb<'_>) -> u8 {
    (cdb.byte(1) >> 1) & 3
}

pub fn verify_10(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    verify(command, &cdb.extent_10(), byte_check(cdb), data)
}

pub fn verify_12(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    verify(command, &cdb.extent_12(), byte_check(cdb), data)
}

pub fn verify_16(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    verify(command, &cdb.extent_16(), byte_check(cdb), data)
}

pub fn write_and_verify_10(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    write_and_verify(command, &cdb.extent_10(), byte_check(cdb), data)
}

pub fn write_and_verify_12(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    write_and_verify(command, &cdb.extent_12(), byte_check(cdb), data)
}

pub fn write_and_verify_16(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    write_and_verify(command, &cdb.extent_16(), byte_check(cdb), data)
}

fn verify(command: &Command<'_>, extent: &Extent, byte_check: u8, data: &Data<'_, '_>) -> Result<Reply, Fault> {
    let range = command.transfer_range(extent)?;
    let len = range.end - range.start;
    let block = command.block_size();
    let needed = match byte_check {
        0 => 0,
        1 => len,
        3 if len > 0 => block,
        3 => 0,
        _ => return Err(Fault::cdb(1, Some(2))),
    };
    if data.len() < needed {
        return Err(Triple::INVALID_FIELD_IN_COMMAND_IU.into());
    }
    let _shared = command.lun.ranges.shared(range.clone());
    match byte_check {
        0 => read_back(command, range)?,
        1 => compare(command, range, 0, data)?,
        _ => {
            let mut pattern = vec![0; usize::try_from(block).unwrap_or(0)];
            data.copy_out(0, &mut pattern);
            let start = range.start;
            for_chunks(command, range, |at, bytes| {
                // A difference is reported by its offset in the data-out buffer, which is one block.
                let differs = bytes.iter().zip(pattern.iter().cycle()).position(|(a, b)| a != b);
                debug_assert_eq!((at - start) % block, 0);
                differs.map_or(Ok(()), |offset| Err(Fault::miscompare(offset as u64 % block)))
            })?;
        }
    }
    Ok(Reply::Done)
}

/// The write goes to the medium before it is verified. BYTCHK 10b and 11b are reserved here.
fn write_and_verify(command: &Command<'_>, extent: &Extent, byte_check: u8, data: &Data<'_, '_>) -> Result<Reply, Fault> {
    if byte_check > 1 {
        return Err(Fault::cdb(1, Some(2)));
    }
    let range = command.transfer_range(extent)?;
    write_blocks(command, extent, data)?;
    command.flush()?;
    let _shared = command.lun.ranges.shared(range.clone());
    match byte_check {
        0 => read_back(command, range)?,
        _ => compare(command, range, 0, data)?,
    }
    Ok(Reply::Done)
}

/// Reads the medium to see that it can be read.
fn read_back(command: &Command<'_>, range: Range<u64>) -> Result<(), Fault> {
    for_chunks(command, range, |_, _| Ok(()))
}

/// Compares the medium with the buffer from `data_at` on.
pub(super) fn compare(command: &Command<'_>, range: Range<u64>, data_at: u64, data: &Data<'_, '_>) -> Result<(), Fault> {
    let start = range.start;
    for_chunks(command, range, |at, bytes| {
        let offset = at - start;
        let differs = data.first_difference(data_at + offset, bytes);
        differs.map_or(Ok(()), |difference| Err(Fault::miscompare(offset + difference as u64)))
    })
}

/// Reads the range piece by piece. The caller holds the range.
fn for_chunks(command: &Command<'_>, range: Range<u64>, mut each: impl FnMut(u64, &[u8]) -> Result<(), Fault>) -> Result<(), Fault> {
    let mut at = range.start;
    let mut buffer = vec![0; usize::try_from(CHUNK.min(range.end - range.start)).unwrap_or(0)];
    while at < range.end {
        let take = usize::try_from(range.end - at).map_or(buffer.len(), |left| left.min(buffer.len()));
        let chunk = &mut buffer[..take];
        command.device.read(&mut [IoSliceMut::new(chunk)], at).map_err(|e| command.read_error(&e))?;
        each(at, chunk)?;
        at += take as u64;
    }
    Ok(())
}
