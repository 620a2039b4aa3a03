//! INQUIRY: the standard data (SPC-4 6.6); the vital product data pages are in [`super::vpd`].

use crate::scsi::cdb::Cdb;
use crate::scsi::data::Data;
use crate::scsi::lun::Command;
use crate::scsi::opcode::Reply;
use crate::scsi::sense::Fault;
use crate::scsi::vpd;

/// Standards that the unit conforms to, each without a claim to one revision: SAM-5, SPC-4, SBC-3.
const VERSION_DESCRIPTORS: [u16; 3] = [0x00A0, 0x0460, 0x04C0];

pub fn inquiry(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let allocation_len = u64::from(cdb.u16(3));
    let page = cdb.byte(2);
    if cdb.has(1, 0x01) {
        let reply = vpd::page(command, page).ok_or(Fault::cdb(2, None))?;
        return Ok(Reply::DataIn(data.reply(&reply, allocation_len)));
    }
    if page != 0 {
        return Err(Fault::cdb(2, None));
    }
    Ok(Reply::DataIn(data.reply(&standard(command), allocation_len)))
}

/// The standard data of a disk.
fn standard(command: &Command<'_>) -> [u8; 96] {
    let identity = &command.lun.identity;
    let port_groups = command.lun.ports.as_ref().map_or(0, |ports| ports.modes() & 3);
    let mut reply = [0; 96];
    reply[2] = 0x06; // SPC-4
    reply[3] = 0x12; // HISUP, response data format 2
    reply[4] = 96 - 5;
    reply[5] = port_groups << 4 | 0x08; // TPGS, 3PC
    reply[7] = 0x02; // CMDQUE
    reply[8..16].copy_from_slice(&ascii::<8>(&identity.vendor));
    reply[16..32].copy_from_slice(&ascii::<16>(&identity.product));
    reply[32..36].copy_from_slice(&ascii::<4>(&identity.revision));
    for (at, descriptor) in VERSION_DESCRIPTORS.iter().enumerate() {
        reply[58 + 2 * at..60 + 2 * at].copy_from_slice(&descriptor.to_be_bytes());
    }
    reply
}

/// Left-aligned ASCII, padded with spaces; what is not printable becomes `?`.
pub(super) fn ascii<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [b' '; N];
    for (to, from) in field.iter_mut().zip(text.bytes()) {
        *to = if (0x20..0x7F).contains(&from) { from } else { b'?' };
    }
    field
}
