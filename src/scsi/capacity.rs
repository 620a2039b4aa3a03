//! READ CAPACITY (10) and (16) (SBC-3 5.15, 5.16).

use crate::scsi::cdb::Cdb;
use crate::scsi::data::Data;
use crate::scsi::lun::Command;
use crate::scsi::opcode::Reply;
use crate::scsi::sense::Fault;

/// LBPME in byte 14.
const LBPME: u8 = 0x80;
/// LBPRZ in byte 14.
const LBPRZ: u8 = 0x40;

pub fn read_capacity_10(command: &Command<'_>, _: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let last = u32::try_from(command.lun.blocks() - 1).unwrap_or(u32::MAX);
    let mut reply = [0; 8];
    reply[..4].copy_from_slice(&last.to_be_bytes());
    reply[4..].copy_from_slice(&command.lun.block_size().to_be_bytes());
    Ok(Reply::DataIn(data.reply(&reply, 8)))
}

pub fn read_capacity_16(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let mut reply = [0; 32];
    reply[..8].copy_from_slice(&(command.lun.blocks() - 1).to_be_bytes());
    reply[8..12].copy_from_slice(&command.lun.block_size().to_be_bytes());
    reply[13] = command.physical_exponent();
    if command.can_unmap() {
        reply[14] = LBPME | if command.limits.discard_zeroes { LBPRZ } else { 0 };
    }
    Ok(Reply::DataIn(data.reply(&reply, u64::from(cdb.u32(10)))))
}

impl Command<'_> {
    /// Logical blocks per physical block, as an exponent of 2.
    pub(super) fn physical_exponent(&self) -> u8 {
        let ratio = self.limits.physical_sector / self.lun.block_size();
        if ratio.is_power_of_two() { ratio.trailing_zeros() as u8 & 0x0F } else { 0 }
    }
}
