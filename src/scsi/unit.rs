//! TEST UNIT READY, REQUEST SENSE and START STOP UNIT.

use crate::scsi::cdb::Cdb;
use crate::scsi::data::Data;
use crate::scsi::lun::Command;
use crate::scsi::opcode::Reply;
use crate::scsi::sense::{Fault, Sense, Triple};

pub fn test_unit_ready(_: &Command<'_>, _: &Cdb<'_>, _: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    Ok(Reply::Done)
}

/// A pending unit attention as parameter data, or nothing to report; DESC chooses the format (SPC-4 6.39).
pub fn request_sense(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let fault = Fault::from(command.lun.attention.take().unwrap_or(Triple::NO_SENSE));
    let sense = Sense::encode(&fault, cdb.has(1, 0x01));
    Ok(Reply::DataIn(data.reply(sense.as_bytes(), u64::from(cdb.byte(4)))))
}

/// The medium cannot be ejected and there are no power conditions to enter. A stop is accepted and makes the cache safe, but
/// the unit stays ready: other initiators use it too (SBC-3 5.25).
pub fn start_stop(command: &Command<'_>, cdb: &Cdb<'_>, _: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let (start, load_eject, no_flush) = (cdb.has(4, 0x01), cdb.has(4, 0x02), cdb.has(4, 0x04));
    if load_eject {
        return Err(Fault::cdb(4, Some(1)));
    }
    if !start && !no_flush {
        command.flush()?;
    }
    Ok(Reply::Done)
}
