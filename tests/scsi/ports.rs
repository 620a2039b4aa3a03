//! REPORT and SET TARGET PORT GROUPS over a target in memory.

use crate::harness::*;
use img_tcmu::scsi::ports::{EXPLICIT, IMPLICIT, PortGroup, TargetPorts};
use img_tcmu::scsi::{Config, Identity, Lun};
use std::sync::{Arc, Mutex};

struct Target {
    modes: u8,
    groups: Mutex<Vec<PortGroup>>,
}

impl TargetPorts for Target {
    fn modes(&self) -> u8 {
        self.modes
    }

    fn groups(&self) -> Vec<PortGroup> {
        self.groups.lock().unwrap().clone()
    }

    fn transition_seconds(&self) -> u8 {
        7
    }

    fn set(&self, group: u16, state: u8) -> Result<(), String> {
        let mut groups = self.groups.lock().unwrap();
        let group = groups.iter_mut().find(|g| g.id == group).ok_or("no such group")?;
        if state == 3 {
            return Err("the target does not want to".into());
        }
        (group.state, group.status) = (state, 1);
        Ok(())
    }
}

fn disk(modes: u8) -> Disk {
    let group = |id, state, ports: &[u16]| PortGroup { id, state, preferred: id == 1, supported: 0x8F, status: 0, ports: ports.to_vec() };
    let groups = Mutex::new(vec![group(1, 0, &[1, 2]), group(0x102, 2, &[]), group(3, 15, &[9])]);
    let memory = Arc::new(Memory::new(1 << 20));
    let ports: Arc<dyn TargetPorts> = Arc::new(Target { modes, groups });
    let identity = Identity::with_serial("1");
    let lun = Lun::with_surroundings(memory.clone(), identity, Config::default(), Some(ports), None).unwrap();
    Disk { memory, lun }
}

fn report(format: u8, len: u8) -> [u8; 12] {
    [0xA3, 0x0A | format << 5, 0, 0, 0, 0, 0, 0, 0, len, 0, 0]
}

fn set(len: u8) -> [u8; 12] {
    [0xA4, 0x0A, 0, 0, 0, 0, 0, 0, 0, len, 0, 0]
}

#[test]
fn reported() {
    let disk = disk(IMPLICIT);
    let groups = [
        &[0x80, 0x8F, 0, 1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 2][..],
        &[2, 0x8F, 1, 2, 0, 0, 0, 0],
        &[15, 0x8F, 0, 3, 0, 0, 0, 1, 0, 0, 0, 9],
    ]
    .concat();
    assert_eq!(disk.read(&report(0, 255), 255), [&[0, 0, 0, 36], &groups[..]].concat());
    assert_eq!(disk.read(&report(1, 255), 255), [&[0, 0, 0, 40, 0x10, 7, 0, 0], &groups[..]].concat());
    assert_eq!(disk.read(&report(0, 10), 255).len(), 10);
    assert_eq!(disk.cdb_fault(&report(2, 255), &[]), (1, Some(7)));
    assert_eq!(disk.read(&[0x12, 0, 0, 0, 96, 0], 96)[5], 0x18, "TPGS");
}

#[test]
fn set_by_the_initiator() {
    let disk = disk(IMPLICIT | EXPLICIT);
    assert_eq!(disk.read(&[0x12, 0, 0, 0, 96, 0], 96)[5], 0x38);
    disk.ok(&set(0));
    disk.write(&set(12), &[0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 2]);
    let reply = disk.read(&report(0, 255), 255);
    assert_eq!((reply[4], reply[9], reply[20], reply[25]), (0x81, 1, 0, 1));
    for (list, triple) in [
        (&[0, 0, 0, 0, 1, 0, 0, 9][..], (5, 0x26, 0)),
        (&[0, 0, 0, 0, 14, 0, 0, 1], (5, 0x26, 0)),
        (&[0, 0, 0, 0, 3, 0, 0, 1], (4, 0x67, 0x0A)),
        (&[0, 0, 0, 0, 1, 0], (5, 0x1A, 0)),
        (&[0, 0], (5, 0x1A, 0)),
    ] {
        assert_eq!(disk.triple(&set(list.len() as u8), list), triple);
    }
    assert_eq!(disk.triple(&set(8), &[0; 7]), (5, 0x0E, 3));
}

#[test]
fn identification_names_the_port_if_there_is_but_one() {
    let with = |groups: Vec<PortGroup>| {
        let ports: Arc<dyn TargetPorts> = Arc::new(Target { modes: IMPLICIT, groups: Mutex::new(groups) });
        let (memory, identity) = (Arc::new(Memory::new(1 << 20)), Identity::with_serial("1"));
        let lun = Lun::with_surroundings(memory.clone(), identity, Config::default(), Some(ports), None).unwrap();
        let page = Disk { memory, lun }.read(&[0x12, 1, 0x83, 0, 255, 0], 255);
        page[4 + 4 + 9 + 4 + 16..].to_vec()
    };
    let group = |id, ports: &[u16]| PortGroup { id, state: 0, preferred: false, supported: 1, status: 0, ports: ports.to_vec() };
    let port = [1, 0x14, 0, 4, 0, 0, 0, 7];
    let of_group = [1, 0x15, 0, 4, 0, 0, 1, 2];
    assert_eq!(with(vec![group(0, &[]), group(0x102, &[7])]), [port, of_group].concat());
    assert_eq!(with(vec![group(0x102, &[7, 8])]), of_group);
    assert_eq!(with(vec![group(0x102, &[7]), group(1, &[8])]), b"");
    assert_eq!(with(vec![]), b"");
}

#[test]
fn not_without_groups() {
    assert_eq!(Disk::new().cdb_fault(&report(0, 255), &[]), (1, Some(4)));
    assert_eq!(Disk::new().triple(&set(0), &[]), (5, 0x20, 0));
    let none = disk(0);
    assert_eq!(none.cdb_fault(&report(0, 255), &[]), (1, Some(4)));
    assert_eq!(none.read(&[0x12, 0, 0, 0, 96, 0], 96)[5], 0x08);
    assert_eq!(disk(IMPLICIT).triple(&set(0), &[]), (5, 0x20, 0));
}
