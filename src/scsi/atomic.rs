//! COMPARE AND WRITE, ORWRITE (16) and WRITE ATOMIC (16): commands during which nobody else is in the range (SBC-3 5.3, 5.11,
//! SBC-4 5.48).

use crate::scsi::cdb::{Cdb, Extent};
use crate::scsi::data::Data;
use crate::scsi::lun::Command;
use crate::scsi::opcode::Reply;
use crate::scsi::sense::{Fault, Triple};
use crate::scsi::verify::{CHUNK, compare};
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;

/// MAXIMUM ATOMIC TRANSFER LENGTH (VPD B0). A single block is as much as can be promised to be whole after a power cut: a
/// longer write passes through the host's page cache, which may have written any part of it.
pub const MAX_ATOMIC_BLOCKS: u32 = 1;

/// FUA in byte 1.
const FUA: u8 = 0x08;

/// The buffer holds the blocks to compare with and then those to write. Its length has to be just that: from a shorter or
/// longer one nobody could tell where the halves meet.
pub fn compare_and_write(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let range = command.range(cdb.u64(2), u64::from(cdb.byte(13)))?;
    let len = range.end - range.start;
    if len == 0 {
        // With data, it is the number of blocks that did not fit its field.
        return if data.is_empty() { Ok(Reply::Done) } else { Err(Fault::cdb(13, None)) };
    }
    if data.len() != 2 * len {
        return Err(Triple::INVALID_FIELD_IN_COMMAND_IU.into());
    }
    {
        let _exclusive = command.lun.ranges.exclusive(range.clone());
        match compare(command, range.clone(), 0, data) {
            // The process that died may have written some of it, and nobody was told: each block is then the old or the new one.
            Err(_) if command.again && is_either_half(command, range.clone(), data)? => {}
            result => result?,
        }
        command.device.write(&data.slices(len, len), range.start).map_err(|e| command.write_error(&e))?;
    }
    command.settle(cdb.has(1, FUA))?;
    Ok(Reply::Done)
}

/// Every block of the range is that of the first or that of the second half of the data.
fn is_either_half(command: &Command<'_>, range: Range<u64>, data: &Data<'_, '_>) -> Result<bool, Fault> {
    let len = range.end - range.start;
    let mut block = vec![0; usize::try_from(command.block_size()).unwrap_or(0)];
    let mut at = 0;
    while at < len {
        command.device.read(&mut [IoSliceMut::new(&mut block)], range.start + at).map_err(|e| command.read_error(&e))?;
        if data.first_difference(at, &block).is_some() && data.first_difference(len + at, &block).is_some() {
            return Ok(false);
        }
        at += command.block_size();
    }
    Ok(true)
}

pub fn or_write(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let extent: Extent = cdb.extent_16();
    let range = command.transfer_range(&extent)?;
    let len = range.end - range.start;
    if data.len() < len {
        return Err(Triple::INVALID_FIELD_IN_COMMAND_IU.into());
    }
    if len > 0 {
        let _exclusive = command.lun.ranges.exclusive(range.clone());
        let mut buffer = vec![0; usize::try_from(CHUNK.min(len)).unwrap_or(0)];
        let mut done = 0;
        while done < len {
            let take = usize::try_from(len - done).map_or(buffer.len(), |left| left.min(buffer.len()));
            let chunk = &mut buffer[..take];
            let at = range.start + done;
            command.device.read(&mut [IoSliceMut::new(chunk)], at).map_err(|e| command.read_error(&e))?;
            let mut bytes = chunk.iter_mut();
            for slice in &data.slices(done, take as u64) {
                slice.iter().zip(bytes.by_ref()).for_each(|(from, to)| *to |= from);
            }
            command.device.write(&[IoSlice::new(chunk)], at).map_err(|e| command.write_error(&e))?;
            done += take as u64;
        }
    }
    command.settle(cdb.has(1, FUA))?;
    Ok(Reply::Done)
}

pub fn write_atomic(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let (boundary, blocks) = (cdb.u16(10), u32::from(cdb.u16(12)));
    let range = command.range(cdb.u64(2), u64::from(blocks))?;
    let len = range.end - range.start;
    if boundary != 0 {
        return Err(Fault::cdb(10, None));
    }
    if blocks > MAX_ATOMIC_BLOCKS {
        return Err(Fault::cdb(12, None));
    }
    if data.len() < len {
        return Err(Triple::INVALID_FIELD_IN_COMMAND_IU.into());
    }
    if len > 0 {
        let at = range.start;
        let _exclusive = command.lun.ranges.exclusive(range);
        command.device.write(&data.slices(0, len), at).map_err(|e| command.write_error(&e))?;
    }
    command.settle(cdb.has(1, FUA))?;
    Ok(Reply::Done)
}
