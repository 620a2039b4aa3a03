//! WRITE SAME (10) and (16), with UNMAP and NDOB (SBC-3 5.45, 5.46).

use crate::scsi::cdb::{Cdb, Extent};
use crate::scsi::data::Data;
use crate::scsi::lun::Command;
use crate::scsi::opcode::Reply;
use crate::scsi::sense::{Fault, Triple};
use formats::ZeroMode;
use std::io::IoSlice;

/// UNMAP in byte 1.
const UNMAP: u8 = 0x08;
/// NDOB in byte 1 of WRITE SAME (16).
const NDOB: u8 = 0x01;

/// Bytes of the repeated pattern that are written at a time.
const CHUNK: u64 = 1 << 20;
/// Longest range of one command in bytes. Bounds the time that it takes where zeros have to be written.
const MAX_LEN: u64 = 1 << 30;

/// MAXIMUM WRITE SAME LENGTH of VPD B0.
pub fn max_write_same_blocks(command: &Command<'_>) -> u32 {
    u32::try_from(MAX_LEN / command.block_size()).unwrap_or(u32::MAX)
}

pub fn write_same_10(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    write_same(command, &cdb.extent_10(), cdb.has(1, UNMAP), false, data)
}

pub fn write_same_16(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    write_same(command, &cdb.extent_16(), cdb.has(1, UNMAP), cdb.has(1, NDOB), data)
}

/// Zeros with UNMAP may give their space back; zeros without it are zeroed in place; anything else is written out, also
/// with UNMAP, since unmapped blocks could not read back as it (SBC-3 4.7.3.4.4).
fn write_same(command: &Command<'_>, extent: &Extent, unmap: bool, no_data: bool, data: &Data<'_, '_>) -> Result<Reply, Fault> {
    let range = command.range(extent.lba, u64::from(extent.blocks))?;
    // WSNZ in VPD B0: no count means no range, not the rest of the medium.
    if extent.blocks == 0 {
        return Err(Fault::cdb(extent.blocks_field, None));
    }
    if range.end - range.start > MAX_LEN {
        return Err(Fault::cdb(extent.blocks_field, None));
    }
    let len = range.end - range.start;
    let mut block = vec![0; usize::try_from(command.block_size()).unwrap_or(0)];
    if !no_data {
        if data.len() != command.block_size() {
            return Err(Triple::INVALID_FIELD_IN_COMMAND_IU.into());
        }
        data.copy_out(0, &mut block);
    }
    if block.iter().all(|byte| *byte == 0) {
        let mode = if unmap { ZeroMode::MayUnmap } else { ZeroMode::KeepAllocated };
        let at = range.start;
        let _shared = command.lun.ranges.shared(range);
        command.device.zero(at, len, mode).map_err(|e| command.write_error(&e))?;
    } else {
        let pattern = block.repeat(usize::try_from(CHUNK.min(len) / command.block_size()).unwrap_or(1));
        let mut at = range.start;
        let end = range.end;
        let _exclusive = command.lun.ranges.exclusive(range);
        while at < end {
            let take = usize::try_from(end - at).map_or(pattern.len(), |left| left.min(pattern.len()));
            command.device.write(&[IoSlice::new(&pattern[..take])], at).map_err(|e| command.write_error(&e))?;
            at += take as u64;
        }
    }
    command.settle(false)?;
    Ok(Reply::Done)
}
