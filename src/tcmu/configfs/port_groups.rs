//! Target port groups of a backstore: `alua/<group>` in its directory, and the ports that their members are.

use super::{Backstore, list, read, write};
use crate::tcmu::{Error, Result};
use std::path::{Path, PathBuf};

/// A target port group as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortGroup {
    /// Its identifier.
    pub id: u16,
    /// Asymmetric access state (SPC-4 table 310).
    pub state: u8,
    /// The PREF bit.
    pub preferred: bool,
    /// Supported states, as byte 1 of its descriptor in REPORT TARGET PORT GROUPS.
    pub supported: u8,
    /// Why the state is what it is: 0 nothing known, 1 by SET TARGET PORT GROUPS, 2 by the administrator.
    pub status: u8,
    /// States change without being told to (implicit ALUA).
    pub implicit: bool,
    /// SET TARGET PORT GROUPS may change them (explicit ALUA).
    pub explicit: bool,
    /// Relative identifiers of its target ports, in order.
    pub ports: Vec<u16>,
}

/// The files that say whether a state is supported, and its bit.
const SUPPORTED: [(&str, u8); 7] = [
    ("alua_support_transitioning", 0x80),
    ("alua_support_offline", 0x40),
    ("alua_support_lba_dependent", 0x10),
    ("alua_support_unavailable", 0x08),
    ("alua_support_standby", 0x04),
    ("alua_support_active_nonoptimized", 0x02),
    ("alua_support_active_optimized", 0x01),
];

impl Backstore {
    /// Its target port groups that have an identifier, in order of their names. None where the kernel keeps no groups.
    pub fn port_groups(&self) -> Result<Vec<PortGroup>> {
        let alua = self.path().join("alua");
        list(&alua)?.iter().filter_map(|name| self.port_group(&alua.join(name)).transpose()).collect()
    }

    fn port_group(&self, path: &Path) -> Result<Option<PortGroup>> {
        // The kernel shows nothing while a group has no identifier.
        let Ok(id) = read(&path.join("tg_pt_gp_id"))?.trim().parse() else { return Ok(None) };
        let number = |name: &str| -> Result<u8> {
            let text = read(&path.join(name))?;
            text.trim().parse().map_err(|_| Error::Malformed { path: path.join(name), problem: format!("{text:?} is not a number") })
        };
        let kind = read(&path.join("alua_access_type"))?;
        let status = match read(&path.join("alua_access_status"))?.as_str() {
            "Altered by Explicit STPG" => 1,
            "Altered by Implicit ALUA" => 2,
            _ => 0,
        };
        let supported = SUPPORTED.iter().map(|(name, bit)| Ok(if number(name)? != 0 { *bit } else { 0 }));
        let mut ports: Vec<u16> = read(&path.join("members"))?.lines().filter_map(|line| self.port_of(line)).collect();
        ports.sort_unstable();
        ports.dedup();
        Ok(Some(PortGroup {
            id,
            state: number("alua_access_state")?,
            preferred: number("preferred")? != 0,
            supported: supported.sum::<Result<u8>>()?,
            status,
            implicit: kind.contains("Implicit"),
            explicit: kind.contains("Explicit"),
            ports,
        }))
    }

    /// The relative identifier of the port that a member is: `<fabric>/<target>/tpgt_<n>/lun_<n>`. None while it comes or goes.
    fn port_of(&self, member: &str) -> Option<u16> {
        let [fabric, target, group, lun] = member.trim().split('/').collect::<Vec<_>>().try_into().ok()?;
        // The fabrics' names are those of their directories but for the case.
        let tree = self.path().ancestors().nth(3)?;
        let group: PathBuf = tree.join(fabric.to_lowercase()).join(target).join(group);
        // Where the port belongs to the group of LUNs (since Linux 6.4), and where it belongs to the LUN.
        let text = read(&group.join("rtpi")).or_else(|_| read(&group.join("lun").join(lun).join("statistics/scsi_port/indx"))).ok()?;
        text.trim().parse().ok()
    }

    /// Puts a group into an access state, as SET TARGET PORT GROUPS does.
    pub fn set_port_group_state(&self, id: u16, state: u8) -> Result<()> {
        let alua = self.path().join("alua");
        for name in list(&alua)? {
            let path = alua.join(&name);
            if read(&path.join("tg_pt_gp_id"))?.trim() == id.to_string() {
                write(&path.join("alua_access_state"), &state.to_string())?;
                // What the kernel has put down is a change by the administrator.
                return write(&path.join("alua_access_status"), "1");
            }
        }
        Err(Error::Invalid(format!("{} has no target port group {id}", self.path().display())))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::tree;
    use super::*;
    use crate::tcmu::uio::DeviceName;
    use std::fs;

    #[test]
    fn groups_are_read_with_their_ports_and_set() {
        let (_root, configfs) = tree();
        let backstore = configfs.backstore(&DeviceName::parse("tcm-user/0/d/img/x").unwrap());
        assert_eq!(backstore.port_groups().unwrap(), []);
        let group = backstore.path().join("alua/default_tg_pt_gp");
        fs::create_dir_all(&group).unwrap();
        fs::create_dir_all(backstore.path().join("alua/without_id")).unwrap();
        fs::write(backstore.path().join("alua/without_id/tg_pt_gp_id"), "").unwrap();
        for (name, _) in SUPPORTED {
            fs::write(group.join(name), if name.ends_with("offline") { "0\n" } else { "1\n" }).unwrap();
        }
        let members = "iSCSI/iqn.x:a/tpgt_1/lun_0\nloopback/naa.1/tpgt_1/lun_3\nloopback/naa.gone/tpgt_1/lun_0\n";
        for (name, text) in [
            ("tg_pt_gp_id", "0\n"),
            ("alua_access_state", "0\n"),
            ("alua_access_status", "Altered by Implicit ALUA\n"),
            ("alua_access_type", "Implicit and Explicit\n"),
            ("preferred", "1\n"),
            ("members", members),
        ] {
            fs::write(group.join(name), text).unwrap();
        }
        let iscsi = configfs.target.join("iscsi/iqn.x:a/tpgt_1");
        fs::create_dir_all(&iscsi).unwrap();
        fs::write(iscsi.join("rtpi"), "7\n").unwrap();
        let older = configfs.target.join("loopback/naa.1/tpgt_1/lun/lun_3/statistics/scsi_port");
        fs::create_dir_all(&older).unwrap();
        fs::write(older.join("indx"), "2\n").unwrap();
        let found =
            PortGroup { id: 0, state: 0, preferred: true, supported: 0x9F, status: 2, implicit: true, explicit: true, ports: vec![2, 7] };
        assert_eq!(backstore.port_groups().unwrap(), [found]);
        backstore.set_port_group_state(0, 2).unwrap();
        // A plain file keeps what lies behind what was written.
        assert!(fs::read_to_string(group.join("alua_access_state")).unwrap().starts_with('2'));
        assert!(fs::read_to_string(group.join("alua_access_status")).unwrap().starts_with('1'));
        assert!(backstore.set_port_group_state(9, 2).unwrap_err().to_string().contains("group 9"));
    }
}
