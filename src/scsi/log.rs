//! LOG SENSE: the supported pages and the error counters for reading and writing (SPC-4 6.8, 7.3).

use crate::scsi::cdb::Cdb;
use crate::scsi::data::Data;
use crate::scsi::lun::Command;
use crate::scsi::opcode::Reply;
use crate::scsi::sense::{Fault, Triple};
use std::sync::atomic::{AtomicU64, Ordering};

/// Medium errors since the unit was set up.
#[derive(Default)]
pub struct Counters {
    read_errors: AtomicU64,
    write_errors: AtomicU64,
}

impl Counters {
    /// Counts a command that ended with a medium error.
    pub fn count(&self, fault: &Fault) {
        match fault.triple {
            Triple::READ_ERROR => &self.read_errors,
            Triple::WRITE_ERROR => &self.write_errors,
            _ => return,
        }
        .fetch_add(1, Ordering::Relaxed);
    }
}

/// The pages; the counters' are read and write error counters.
const PAGES: [u8; 3] = [0x00, 0x02, 0x03];
/// Parameter code of the total of uncorrected errors.
const TOTAL_UNCORRECTED: u16 = 0x0006;

pub fn log_sense(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let (control, page, subpage) = (cdb.byte(2) >> 6, cdb.byte(2) & 0x3F, cdb.byte(3));
    // Cumulative values are all there are.
    if control != 1 && page != 0 {
        return Err(Fault::cdb(2, Some(7)));
    }
    let counters = &command.lun.counters;
    let mut payload = Vec::new();
    match (page, subpage) {
        (0x00, 0x00) => payload.extend(PAGES),
        (0x00, 0xFF) => PAGES.iter().for_each(|page| payload.extend([*page, 0x00])),
        (0x02, 0x00) => counter(&mut payload, cdb, &counters.write_errors),
        (0x03, 0x00) => counter(&mut payload, cdb, &counters.read_errors),
        (0x00 | 0x02 | 0x03, _) => return Err(Fault::cdb(3, None)),
        _ => return Err(Fault::cdb(2, Some(5))),
    }
    let [high, low] = u16::try_from(payload.len()).unwrap_or(u16::MAX).to_be_bytes();
    let mut reply = vec![page | if subpage == 0 { 0 } else { 0x40 }, subpage, high, low];
    reply.extend(payload);
    Ok(Reply::DataIn(data.reply(&reply, u64::from(cdb.u16(7)))))
}

/// The parameter, unless the parameter pointer is beyond it.
fn counter(payload: &mut Vec<u8>, cdb: &Cdb<'_>, value: &AtomicU64) {
    if cdb.u16(5) <= TOTAL_UNCORRECTED {
        payload.extend(TOTAL_UNCORRECTED.to_be_bytes());
        payload.extend([0x00, 8]);
        payload.extend(value.load(Ordering::Relaxed).to_be_bytes());
    }
}
