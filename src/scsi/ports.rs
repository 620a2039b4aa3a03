//! REPORT and SET TARGET PORT GROUPS (SPC-4 6.37, 6.45): the access states belong to the target, which is asked for them.

use crate::scsi::cdb::Cdb;
use crate::scsi::data::Data;
use crate::scsi::lun::Command;
use crate::scsi::opcode::Reply;
use crate::scsi::sense::{Fault, Triple};

/// States change by themselves (TPGS 01b).
pub const IMPLICIT: u8 = 0x1;
/// SET TARGET PORT GROUPS changes states (TPGS 10b).
pub const EXPLICIT: u8 = 0x2;

/// Most bytes of a SET TARGET PORT GROUPS list that are looked at.
const MAX_LIST: u32 = 4 + 4 * 256;

/// A target port group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortGroup {
    /// Its identifier.
    pub id: u16,
    /// Asymmetric access state: 0 active/optimized, 1 active/non-optimized, 2 standby, 3 unavailable, 14 offline, 15
    /// transitioning.
    pub state: u8,
    /// It is preferred to others in the same state.
    pub preferred: bool,
    /// Supported states: byte 1 of its descriptor.
    pub supported: u8,
    /// Why the state is what it is: 0 nothing known, 1 by SET TARGET PORT GROUPS, 2 by itself.
    pub status: u8,
    /// Relative identifiers of its target ports.
    pub ports: Vec<u16>,
}

/// The target's port groups, as far as they lead to this logical unit.
pub trait TargetPorts: Send + Sync {
    /// How states change: [`IMPLICIT`], [`EXPLICIT`], or both; 0 if there are no groups.
    fn modes(&self) -> u8;

    /// The groups, always in the same order.
    fn groups(&self) -> Vec<PortGroup>;

    /// Time that a change of state may take in seconds; 0 says nothing.
    fn transition_seconds(&self) -> u8 {
        0
    }

    /// Puts a group into a state. The text is for the log.
    fn set(&self, group: u16, state: u8) -> Result<(), String>;
}

/// REPORT TARGET PORT GROUPS, with or without the extended header.
pub(super) fn report(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let ports = command.lun.ports.as_ref().ok_or(Triple::INVALID_OPCODE)?;
    let mut reply = vec![0; 4];
    match cdb.byte(1) >> 5 {
        0 => {}
        1 => reply.extend([0x10, ports.transition_seconds(), 0, 0]),
        _ => return Err(Fault::cdb(1, Some(7))),
    }
    for group in ports.groups() {
        let [high, low] = group.id.to_be_bytes();
        let count = u8::try_from(group.ports.len()).unwrap_or(u8::MAX);
        let state = group.state & 0x0F | if group.preferred { 0x80 } else { 0 };
        reply.extend([state, group.supported, high, low, 0, group.status, 0, count]);
        for port in group.ports.iter().take(usize::from(count)) {
            let [high, low] = port.to_be_bytes();
            reply.extend([0, 0, high, low]);
        }
    }
    let len = u32::try_from(reply.len() - 4).unwrap_or(u32::MAX);
    reply[..4].copy_from_slice(&len.to_be_bytes());
    Ok(Reply::DataIn(data.reply(&reply, u64::from(cdb.u32(6)))))
}

/// The relative identifier of the only target port that leads to the unit, and the only group that has ports, if there is
/// just one: a command does not say through which it came.
pub(super) fn only(ports: &dyn TargetPorts) -> (Option<u16>, Option<u16>) {
    let groups = ports.groups();
    let mut used = groups.iter().filter(|group| !group.ports.is_empty());
    match (used.next(), used.next()) {
        (Some(group), None) => (group.ports.first().copied().filter(|_| group.ports.len() == 1), Some(group.id)),
        _ => (None, None),
    }
}

/// Every group and state is checked before the first is changed.
pub(super) fn set(command: &Command<'_>, cdb: &Cdb<'_>, data: &mut Data<'_, '_>) -> Result<Reply, Fault> {
    let ports = command.lun.ports.as_ref().ok_or(Triple::INVALID_OPCODE)?;
    let list_len = cdb.u32(6);
    if list_len == 0 {
        return Ok(Reply::Done);
    }
    if !(4..=MAX_LIST).contains(&list_len) || !list_len.is_multiple_of(4) {
        return Err(Triple::PARAMETER_LIST_LENGTH_ERROR.into());
    }
    let mut list = vec![0; usize::try_from(list_len).unwrap_or(0)];
    if data.copy_out(0, &mut list) < list.len() {
        return Err(Triple::INVALID_FIELD_IN_COMMAND_IU.into());
    }
    let groups = ports.groups();
    let mut changes = Vec::new();
    for (index, descriptor) in list[4..].as_chunks::<4>().0.iter().enumerate() {
        let at = 4 + 4 * index;
        let (state, id) = (descriptor[0] & 0x0F, u16::from_be_bytes([descriptor[2], descriptor[3]]));
        let group = groups.iter().find(|group| group.id == id).ok_or(Fault::parameter(at + 2, None))?;
        // Bit n of the supported states is for state n; only offline and transitioning have other places.
        let settable = state < 4 && group.supported & 1 << state != 0;
        if !settable {
            return Err(Fault::parameter(at, Some(3)));
        }
        changes.push((id, state));
    }
    for (id, state) in changes {
        ports.set(id, state).map_err(|_| Triple::SET_TARGET_PORT_GROUPS_FAILED)?;
    }
    Ok(Reply::Done)
}
