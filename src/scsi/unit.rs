//! TEST UNIT READY, REQUEST SENSE, START STOP UNIT, SEND DIAGNOSTIC, REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS: commands
//! about the unit as a whole.

use crate::scsi::cdb::Cdb;
use crate::scsi::data::Data;
use crate::scsi::lun::Command;
use crate::scsi::opcode::Reply;
use crate::scsi::sense::{Fault, Sense, Triple};

pub fn test_unit_ready(_: &Command<'_>, _: &Cdb<'_>, _: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    Ok(Reply::Done)
}

/// A pending unit attention as parameter data, or how far a long operation is, or nothing to report; DESC chooses the format (SPC-4 6.39).
pub fn request_sense(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let pending = command.lun.attention.take().map(Fault::from);
    let fault = pending.or_else(|| command.lun.operation.state()).unwrap_or(Triple::NO_SENSE.into());
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

/// The default self-test, which has nothing to test that a command would not find (SPC-4 6.42).
pub fn send_diagnostic(_: &Command<'_>, _: &Cdb<'_>, _: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    Ok(Reply::Done)
}

/// Those that the kernel's target core does: ABORT TASK and LOGICAL UNIT RESET (SPC-4 6.36).
pub fn task_management_functions(_: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    Ok(Reply::DataIn(data.reply(&[0x88, 0, 0, 0], u64::from(cdb.u32(6)))))
}

/// A command that the kernel answers should not arrive here; if it does, the kernel does not answer it.
pub fn kernels_own(_: &Command<'_>, _: &Cdb<'_>, _: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    Err(Triple::INVALID_OPCODE.into())
}
