//! Thin provisioning: UNMAP and GET LBA STATUS (SBC-3 5.28, 5.6).

use crate::scsi::cdb::Cdb;
use crate::scsi::data::Data;
use crate::scsi::lun::Command;
use crate::scsi::opcode::Reply;
use crate::scsi::sense::{Fault, Triple};
use formats::ZeroMode;
use std::ops::Range;

/// Most blocks that one UNMAP may name (VPD B0).
pub const MAX_UNMAP_BLOCKS: u32 = 1 << 20;
/// Most descriptors of one UNMAP (VPD B0).
pub const MAX_UNMAP_DESCRIPTORS: u32 = 256;
/// Most descriptors of one GET LBA STATUS reply.
const MAX_STATUS_DESCRIPTORS: usize = 1024;
/// What a guest unmaps beside whole units of the format cannot be given back. So much of it is overwritten with zeros, so
/// that it reads as the blocks beside it do; a longer rest stays as it is, since writing it would cost more than it is worth.
const MAX_EDGE: u64 = 1 << 20;

/// All descriptors are checked before the first is acted upon.
pub fn unmap(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let list_len = usize::from(cdb.u16(7));
    if list_len == 0 {
        return Ok(Reply::Done);
    }
    if data.len() < list_len as u64 {
        return Err(Triple::INVALID_FIELD_IN_COMMAND_IU.into());
    }
    let mut list = vec![0; list_len];
    data.copy_out(0, &mut list);
    let descriptors = match list.split_at_checked(8) {
        Some((header, rest)) => {
            let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
            rest.get(..len).ok_or(Triple::PARAMETER_LIST_LENGTH_ERROR)?
        }
        None => return Err(Triple::PARAMETER_LIST_LENGTH_ERROR.into()),
    };
    // An incomplete last descriptor is ignored.
    let (descriptors, _) = descriptors.as_chunks::<16>();
    if descriptors.len() > MAX_UNMAP_DESCRIPTORS as usize {
        return Err(Fault::parameter(2, None));
    }
    let mut ranges = Vec::with_capacity(descriptors.len());
    let mut total = 0;
    for (index, descriptor) in descriptors.iter().enumerate() {
        let descriptor = Cdb::new(descriptor);
        let (lba, blocks) = (descriptor.u64(0), u64::from(descriptor.u32(8)));
        if blocks == 0 {
            continue;
        }
        total += blocks;
        if total > u64::from(MAX_UNMAP_BLOCKS) {
            return Err(Fault::parameter(8 + 16 * index + 8, None));
        }
        ranges.push(command.range(lba, blocks)?);
    }
    for range in ranges {
        unmap_range(command, range)?;
    }
    command.settle(false)?;
    Ok(Reply::Done)
}

fn unmap_range(command: &Command<'_>, range: Range<u64>) -> Result<(), Fault> {
    let _shared = command.lun.ranges.shared(range.clone());
    let granularity = command.limits.granularity.max(1);
    let start = range.start.next_multiple_of(granularity).min(range.end);
    // The unit at the end of the disk may be cut short by it, and is whole all the same.
    let at_end = range.end == command.limits.size;
    let end = if at_end { range.end } else { (range.end / granularity * granularity).max(start) };
    let edges = if command.limits.discard_zeroes { [range.start..start, end..range.end] } else { [0..0, 0..0] };
    if start < end {
        command.device.discard(start, end - start).map_err(|e| command.write_error(&e))?;
    }
    for edge in edges {
        let len = edge.end - edge.start;
        if (1..=MAX_EDGE).contains(&len) && !is_zero(command, &edge) {
            command.device.zero(edge.start, len, ZeroMode::MayUnmap).map_err(|e| command.write_error(&e))?;
        }
    }
    Ok(())
}

/// The image knows without reading that the whole range is zeros.
fn is_zero(command: &Command<'_>, range: &Range<u64>) -> bool {
    let mut at = range.start;
    while at < range.end {
        match command.device.map(at, range.end - at) {
            Ok(extent) if extent.zero && extent.len > 0 => at += extent.len,
            _ => return false,
        }
    }
    true
}

/// Runs of blocks that have space in the image and runs that have none, from the LBA on, as many as the allocation length
/// takes (but at least one).
pub fn get_lba_status(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let range = command.range(cdb.u64(2), 0)?;
    let allocation_len = u64::from(cdb.u32(10));
    let room = allocation_len.min(data.len()).saturating_sub(8) / 16;
    let most = usize::try_from(room).map_or(MAX_STATUS_DESCRIPTORS, |room| room.clamp(1, MAX_STATUS_DESCRIPTORS));
    let mut runs: Vec<(u64, u32, u8)> = Vec::new();
    let (mut lba, end) = (range.start / command.block_size(), command.lun.blocks());
    while lba < end {
        let (blocks, status) = status_of(command, lba, end - lba)?;
        match runs.last_mut() {
            // Stays within the field's 32 bits, or begins a new run.
            Some((_, len, last)) if *last == status && u64::from(*len) + u64::from(blocks) <= u64::from(u32::MAX) => {
                *len += blocks;
            }
            _ => {
                if runs.len() == most {
                    break;
                }
                runs.push((lba, blocks, status));
            }
        }
        lba += u64::from(blocks);
    }
    let mut reply = vec![0; 8 + 16 * runs.len()];
    let len = u32::try_from(reply.len() - 4).unwrap_or(u32::MAX);
    reply[..4].copy_from_slice(&len.to_be_bytes());
    for (at, (lba, blocks, status)) in runs.into_iter().enumerate() {
        let descriptor = &mut reply[8 + 16 * at..24 + 16 * at];
        descriptor[..8].copy_from_slice(&lba.to_be_bytes());
        descriptor[8..12].copy_from_slice(&blocks.to_be_bytes());
        descriptor[12] = status;
    }
    Ok(Reply::DataIn(data.reply(&reply, allocation_len)))
}

/// Provisioning status of a run of blocks at `lba`: mapped (0) or deallocated (1). A block that is only partly allocated is
/// mapped, and so is everything where blocks cannot be unmapped.
fn status_of(command: &Command<'_>, lba: u64, most: u64) -> Result<(u32, u8), Fault> {
    let most = most.min(u64::from(u32::MAX));
    if !command.can_unmap() {
        return Ok((most as u32, 0));
    }
    let block = command.block_size();
    let extent = command.device.map(lba * block, most * block).map_err(|e| command.read_error(&e))?;
    match u32::try_from(extent.len / block) {
        Ok(0) => Ok((1, 0)),
        Ok(blocks) => Ok((blocks, u8::from(!extent.allocated))),
        Err(_) => Ok((u32::MAX, u8::from(!extent.allocated))),
    }
}
