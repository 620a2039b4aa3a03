//! What a unit knows of the world around it: the target ports that lead to it, as configfs has them.

use crate::scsi::ports::{EXPLICIT, IMPLICIT, PortGroup, TargetPorts};
use crate::tcmu::configfs::Backstore;

/// The target port groups of a backstore, read whenever somebody asks: administrators change them without a word to us.
pub struct Ports(pub Backstore);

impl Ports {
    fn read(&self) -> Vec<crate::tcmu::configfs::PortGroup> {
        self.0.port_groups().unwrap_or_else(|error| {
            tracing::warn!("cannot read the target port groups: {error}");
            Vec::new()
        })
    }
}

impl TargetPorts for Ports {
    fn modes(&self) -> u8 {
        let used = self.read().into_iter().filter(|group| !group.ports.is_empty());
        used.fold(0, |modes, group| modes | if group.implicit { IMPLICIT } else { 0 } | if group.explicit { EXPLICIT } else { 0 })
    }

    fn groups(&self) -> Vec<PortGroup> {
        let group = |group: crate::tcmu::configfs::PortGroup| PortGroup {
            id: group.id,
            state: group.state,
            preferred: group.preferred,
            supported: group.supported,
            status: group.status,
            ports: group.ports,
        };
        self.read().into_iter().map(group).collect()
    }

    fn set(&self, group: u16, state: u8) -> Result<(), String> {
        let result = self.0.set_port_group_state(group, state);
        match &result {
            Ok(()) => tracing::info!("target port group {group} is put into access state {state} by an initiator"),
            Err(error) => tracing::warn!("an initiator cannot put target port group {group} into access state {state}: {error}"),
        }
        result.map_err(|error| error.to_string())
    }
}
