//! Local SCSI targets (`tcm_loop`): how a backstore becomes a `/dev/sdX` of this host.

use super::{Backstore, Configfs, list, make_dir, read, remove_dir, write};
use crate::tcmu::{Error, Result};
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A loopback target with one portal group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loopback {
    path: PathBuf,
    wwn: String,
    scsi_devices: PathBuf,
    dev: PathBuf,
}

/// A LUN of a loopback target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoopbackLun {
    /// The target.
    pub target: Loopback,
    /// Its number.
    pub lun: u64,
    /// The directory of the backstore behind it.
    pub backstore: PathBuf,
}

impl Configfs {
    /// The loopback target named `wwn`, whether it exists or not.
    pub fn loopback(&self, wwn: &str) -> Loopback {
        let path = self.target.join("loopback").join(wwn);
        Loopback { path, wwn: wwn.to_owned(), scsi_devices: self.scsi_devices.clone(), dev: self.dev.clone() }
    }

    /// Makes a loopback target with a name of its own.
    pub fn create_loopback(&self) -> Result<Loopback> {
        let fabric = self.target.join("loopback");
        if !fabric.exists() {
            // The kernel loads the module when its directory is made.
            fs::create_dir(&fabric).map_err(|_| Error::ModuleMissing { path: fabric.clone(), module: "tcm_loop" })?;
        }
        let target = self.loopback(&random_wwn());
        make_dir(&target.path)?;
        match make_dir(&target.group()).and_then(|()| write(&target.group().join("nexus"), &random_wwn())) {
            Ok(()) => Ok(target),
            Err(error) => {
                target.delete().unwrap_or_else(|error| tracing::warn!("{error}"));
                Err(error)
            }
        }
    }

    /// All LUNs of all loopback targets.
    pub fn loopback_luns(&self) -> Result<Vec<LoopbackLun>> {
        let mut found = Vec::new();
        for wwn in list(&self.target.join("loopback"))? {
            let target = self.loopback(&wwn);
            for lun in target.luns()? {
                if let Some(backstore) = linked(&target.lun(lun))? {
                    found.push(LoopbackLun { target: target.clone(), lun, backstore });
                }
            }
        }
        Ok(found)
    }
}

impl Loopback {
    /// Its name (`naa.…`).
    pub fn wwn(&self) -> &str {
        &self.wwn
    }

    fn group(&self) -> PathBuf {
        self.path.join("tpgt_1")
    }

    fn lun(&self, lun: u64) -> PathBuf {
        self.group().join("lun").join(format!("lun_{lun}"))
    }

    fn luns(&self) -> Result<Vec<u64>> {
        let names = list(&self.group().join("lun"))?;
        Ok(names.iter().filter_map(|name| name.strip_prefix("lun_")?.parse().ok()).collect())
    }

    /// Exports a backstore: the host gets a new disk.
    pub fn add_lun(&self, lun: u64, backstore: &Backstore) -> Result<()> {
        let directory = self.lun(lun);
        make_dir(&directory)?;
        let link = directory.join(backstore.name());
        symlink(backstore.path(), &link).map_err(|source| {
            remove_dir(&directory).unwrap_or_else(|error| tracing::warn!("{error}"));
            Error::Path { what: "link", path: link, source }
        })
    }

    /// Takes a LUN away: the host loses the disk.
    pub fn remove_lun(&self, lun: u64) -> Result<()> {
        let directory = self.lun(lun);
        if let Some((link, _)) = link_in(&directory)? {
            fs::remove_file(&link).map_err(|source| Error::Path { what: "remove", path: link, source })?;
        }
        remove_dir(&directory)
    }

    /// Removes the target and all its LUNs.
    pub fn delete(&self) -> Result<()> {
        for lun in self.luns()? {
            self.remove_lun(lun)?;
        }
        remove_dir(&self.group())?;
        remove_dir(&self.path)
    }

    /// The node of the disk behind a LUN, if the host has found it yet.
    pub fn block_device(&self, lun: u64) -> Result<Option<PathBuf>> {
        let path = self.group().join("address");
        let address = read(&path)?;
        let parts = address.trim().split(':').count();
        if parts != 3 {
            return Err(Error::Malformed { path, problem: format!("{address:?} is not host:channel:target") });
        }
        let block = self.scsi_devices.join(format!("{}:{lun}", address.trim())).join("block");
        let node = list(&block)?.first().map(|name| self.dev.join(name));
        Ok(node.filter(|node| node.exists()))
    }

    /// Waits until the host has found the disk behind a LUN and made its node.
    pub fn wait_for_block_device(&self, lun: u64, timeout: Duration) -> Result<PathBuf> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(node) = self.block_device(lun)? {
                return Ok(node);
            }
            if Instant::now() >= deadline {
                let text = "no disk has appeared; `dmesg` may say why, and the module sd_mod is needed";
                return Err(Error::Malformed { path: self.lun(lun), problem: text.into() });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The backstore that a LUN's directory links to.
fn linked(directory: &Path) -> Result<Option<PathBuf>> {
    Ok(link_in(directory)?.map(|(_, target)| target))
}

fn link_in(directory: &Path) -> Result<Option<(PathBuf, PathBuf)>> {
    for name in list(directory)? {
        let link = directory.join(name);
        match fs::symlink_metadata(&link) {
            Ok(metadata) if metadata.is_symlink() => {
                let target = fs::canonicalize(&link).map_err(|source| Error::Path { what: "follow", path: link.clone(), source })?;
                return Ok(Some((link, target)));
            }
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(Error::Path { what: "look at", path: link, source }),
            _ => {}
        }
    }
    Ok(None)
}

/// A new name in the range that the target code uses: NAA 5, company 001405h, 36 random bits.
fn random_wwn() -> String {
    let random = uuid::Uuid::new_v4().as_u128() >> 92;
    format!("naa.5001405{:09x}", random & 0xf_ffff_ffff)
}

#[cfg(test)]
mod tests {
    use super::super::tests::tree;
    use super::*;
    use crate::tcmu::uio::DeviceName;

    #[test]
    fn names_have_sixteen_digits_and_differ() {
        let (one, other) = (random_wwn(), random_wwn());
        assert!(one.len() == 20 && one.starts_with("naa.5001405") && one != other, "{one} {other}");
    }

    #[test]
    fn luns_lead_to_backstores_and_disks() {
        let (root, configfs) = tree();
        let backstore = configfs.backstore(&DeviceName::parse("tcm-user/0/d/img/x").unwrap());
        fs::create_dir_all(backstore.path()).unwrap();
        let target = configfs.loopback("naa.5001405000000001");
        fs::create_dir_all(target.group().join("lun")).unwrap();
        // The fabric's directory holds files too.
        fs::write(configfs.target.join("loopback/version"), "").unwrap();
        target.add_lun(4, &backstore).unwrap();
        let luns = configfs.loopback_luns().unwrap();
        assert_eq!(luns.len(), 1);
        assert_eq!((luns[0].lun, &luns[0].target), (4, &target));
        assert_eq!(luns[0].backstore, fs::canonicalize(backstore.path()).unwrap());

        fs::write(target.group().join("address"), "2:0:1\n").unwrap();
        assert_eq!(target.block_device(4).unwrap(), None);
        fs::create_dir_all(root.path().join("scsi/2:0:1:4/block/sdq")).unwrap();
        fs::create_dir_all(root.path().join("dev")).unwrap();
        assert_eq!(target.block_device(4).unwrap(), None);
        fs::write(root.path().join("dev/sdq"), "").unwrap();
        assert_eq!(target.wait_for_block_device(4, Duration::ZERO).unwrap(), root.path().join("dev/sdq"));
        let missing = target.wait_for_block_device(5, Duration::ZERO).unwrap_err().to_string();
        assert!(missing.contains("no disk"), "{missing}");

        target.remove_lun(4).unwrap();
        assert_eq!(configfs.loopback_luns().unwrap(), []);
    }
}
