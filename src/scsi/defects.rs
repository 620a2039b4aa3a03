//! READ DEFECT DATA (10) and (12): both lists are empty (SBC-3 5.17, 5.18).

use crate::scsi::cdb::Cdb;
use crate::scsi::data::Data;
use crate::scsi::lun::Command;
use crate::scsi::opcode::Reply;
use crate::scsi::sense::Fault;

pub fn read_defect_data_10(_: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let reply = [0, cdb.byte(2) & 0x1F, 0, 0];
    Ok(Reply::DataIn(data.reply(&reply, u64::from(cdb.u16(7)))))
}

pub fn read_defect_data_12(_: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let reply = [0, cdb.byte(1) & 0x1F, 0, 0, 0, 0, 0, 0];
    Ok(Reply::DataIn(data.reply(&reply, u64::from(cdb.u32(6)))))
}
