//! REPORT SUPPORTED OPERATION CODES, encoded from the table (SPC-4 6.35).

use crate::scsi::cdb::Cdb;
use crate::scsi::data::Data;
use crate::scsi::lun::Command;
use crate::scsi::opcode::{self, Entry, Reply, TABLE};
use crate::scsi::sense::Fault;

/// CTDP in the flags of a command descriptor.
const CTDP: u8 = 0x02;
/// SERVACTV in the same.
const SERVACTV: u8 = 0x01;

pub fn report(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let timeouts = cdb.has(2, 0x80);
    let (opcode, action) = (cdb.byte(3), cdb.u16(4));
    let reply = match cdb.byte(2) & 0x07 {
        0 => all(command, timeouts),
        options @ 1..=3 => {
            let rows: Vec<&Entry> = opcode::rows(opcode).into_iter().flatten().filter(|e| command.has(e)).collect();
            let has_actions = rows.iter().any(|e| e.action.is_some());
            // Option 1 asks by opcode alone, option 2 by service action, option 3 by whichever applies.
            if !rows.is_empty() && (options == 1 && has_actions || options == 2 && !has_actions) {
                return Err(Fault::cdb(2, Some(2)));
            }
            one(command, rows.into_iter().find(|e| e.action.is_none_or(|a| u16::from(a) == action)), timeouts)
        }
        _ => return Err(Fault::cdb(2, Some(2))),
    };
    Ok(Reply::DataIn(data.reply(&reply, u64::from(cdb.u32(6)))))
}

/// The all_commands parameter data.
fn all(command: &Command<'_>, timeouts: bool) -> Vec<u8> {
    let mut reply = vec![0; 4];
    for entry in TABLE.iter().filter(|e| command.has(e)) {
        let [high, low] = u16::from(entry.action.unwrap_or(0)).to_be_bytes();
        let flags = if timeouts { CTDP } else { 0 } | if entry.action.is_some() { SERVACTV } else { 0 };
        reply.extend([entry.opcode, 0, high, low, 0, flags, 0, entry.usage.len() as u8]);
        if timeouts {
            reply.extend(timeouts_descriptor(entry));
        }
    }
    let len = u32::try_from(reply.len() - 4).unwrap_or(u32::MAX);
    reply[..4].copy_from_slice(&len.to_be_bytes());
    reply
}

/// The one_command parameter data.
fn one(command: &Command<'_>, entry: Option<&Entry>, timeouts: bool) -> Vec<u8> {
    let Some(entry) = entry else { return vec![0, 0x01, 0, 0] };
    let mut reply = vec![0, 0x03 | if timeouts { 0x80 } else { 0 }, 0, entry.usage.len() as u8];
    let mut usage = entry.usage.to_vec();
    if let Some((at, bits)) = command.unsupported_bits(entry) {
        usage[at] &= !bits;
    }
    if let Some(action) = entry.action {
        usage[1] |= action;
    }
    reply.extend(usage);
    if timeouts {
        reply.extend(timeouts_descriptor(entry));
    }
    reply
}

fn timeouts_descriptor(entry: &Entry) -> [u8; 12] {
    let mut descriptor = [0; 12];
    descriptor[1] = 0x0A;
    descriptor[4..8].copy_from_slice(&entry.timeout.0.to_be_bytes());
    descriptor[8..].copy_from_slice(&entry.timeout.1.to_be_bytes());
    descriptor
}
