//! READ, WRITE, PRE-FETCH and SYNCHRONIZE CACHE: the lent buffers go straight to the image (SBC-3 5.13 to 5.48).

use crate::scsi::cdb::{Cdb, Extent};
use crate::scsi::data::Data;
use crate::scsi::lun::Command;
use crate::scsi::opcode::Reply;
use crate::scsi::sense::{Fault, Triple};

/// FUA in byte 1.
const FUA: u8 = 0x08;

pub fn read_6(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    read(command, &cdb.extent_6(), false, data)
}

pub fn read_10(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    read(command, &cdb.extent_10(), cdb.has(1, FUA), data)
}

pub fn read_12(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    read(command, &cdb.extent_12(), cdb.has(1, FUA), data)
}

pub fn read_16(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    read(command, &cdb.extent_16(), cdb.has(1, FUA), data)
}

pub fn write_6(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    write(command, &cdb.extent_6(), false, data)
}

pub fn write_10(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    write(command, &cdb.extent_10(), cdb.has(1, FUA), data)
}

pub fn write_12(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    write(command, &cdb.extent_12(), cdb.has(1, FUA), data)
}

pub fn write_16(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    write(command, &cdb.extent_16(), cdb.has(1, FUA), data)
}

pub fn prefetch_10(command: &Command<'_>, cdb: &Cdb<'_>, _: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    prefetch(command, &cdb.extent_10())
}

pub fn prefetch_16(command: &Command<'_>, cdb: &Cdb<'_>, _: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    prefetch(command, &cdb.extent_16())
}

pub fn synchronize_cache_10(command: &Command<'_>, cdb: &Cdb<'_>, _: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    synchronize_cache(command, &cdb.extent_10())
}

pub fn synchronize_cache_16(command: &Command<'_>, cdb: &Cdb<'_>, _: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    synchronize_cache(command, &cdb.extent_16())
}

/// Reads what fits into the buffer. An initiator that expects less than the CDB says gets that much of it; one that expects
/// more gets the residual.
fn read(command: &Command<'_>, extent: &Extent, fua: bool, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let range = command.transfer_range(extent)?;
    let valid = (range.end - range.start).min(data.len());
    if fua && !command.is_read_only() && command.lun.parameters.write_cache() {
        // From the medium: what the cache has newer goes there first (SBC-3 4.15).
        if command.no_wait {
            return Ok(Reply::WouldBlock);
        }
        command.flush()?;
    }
    if valid > 0 {
        let bytes = range.start..range.start + valid;
        let mut slices = data.slices_mut(valid);
        if command.no_wait {
            let Some(_shared) = command.lun.ranges.try_shared() else { return Ok(Reply::WouldBlock) };
            // An error is found again, and reported, by the read that may wait.
            if !command.device.try_read(&mut slices, bytes.start).unwrap_or(false) {
                return Ok(Reply::WouldBlock);
            }
        } else {
            let at = bytes.start;
            let _shared = command.lun.ranges.shared(bytes);
            command.device.read(&mut slices, at).map_err(|e| command.read_error(&e))?;
        }
    }
    data.zero_from(valid);
    Ok(Reply::DataIn(u32::try_from(valid).unwrap_or(u32::MAX)))
}

/// Writes all blocks or refuses: a buffer shorter than the CDB says would leave the rest undefined. What the buffer has
/// beyond is not looked at.
fn write(command: &Command<'_>, extent: &Extent, fua: bool, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    write_blocks(command, extent, data)?;
    command.settle(fua)?;
    Ok(Reply::Done)
}

/// The write itself, without making it safe.
pub fn write_blocks(command: &Command<'_>, extent: &Extent, data: &Data<'_, '_>) -> Result<(), Fault> {
    let range = command.transfer_range(extent)?;
    let len = range.end - range.start;
    if data.len() < len {
        return Err(Triple::INVALID_FIELD_IN_COMMAND_IU.into());
    }
    if len > 0 {
        let at = range.start;
        let _shared = command.lun.ranges.shared(range);
        command.device.write(&data.slices(0, len), at).map_err(|e| command.write_error(&e))?;
    }
    Ok(())
}

/// A hint, checked and otherwise not acted upon: what would be read ahead is the host's page cache, which does so itself.
/// Nothing is promised to be in a cache, so the status is GOOD and not CONDITION MET (SBC-3 5.12).
fn prefetch(command: &Command<'_>, extent: &Extent) -> Result<Reply, Fault> {
    command.range(extent.lba, u64::from(extent.blocks))?;
    Ok(Reply::Done)
}

/// Makes all completed writes safe, whatever the range; IMMED gets the same.
fn synchronize_cache(command: &Command<'_>, extent: &Extent) -> Result<Reply, Fault> {
    command.range(extent.lba, u64::from(extent.blocks))?;
    command.flush()?;
    Ok(Reply::Done)
}
