//! The target's configfs tree and the parameters of its modules: what an administrator would do with `mkdir` and `echo`.
//!
//! [`Configfs`] finds and makes things; [`Backstore`] is one TCMU device, [`Loopback`] one local SCSI target.

mod backstore;
mod loopback;
mod port_groups;

pub use backstore::{Backstore, Parameters, ResetStatus};
pub use loopback::{Loopback, LoopbackLun};
pub use port_groups::PortGroup;

use super::{Error, Result};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Where the kernel's trees are.
#[derive(Clone, Debug)]
pub struct Configfs {
    /// The target's tree, `/sys/kernel/config/target`.
    pub target: PathBuf,
    /// Loaded modules, `/sys/module`.
    pub modules: PathBuf,
    /// SCSI devices, `/sys/bus/scsi/devices`.
    pub scsi_devices: PathBuf,
    /// Device nodes, `/dev`.
    pub dev: PathBuf,
}

impl Default for Configfs {
    fn default() -> Self {
        Self {
            target: PathBuf::from("/sys/kernel/config/target"),
            modules: PathBuf::from("/sys/module"),
            scsi_devices: PathBuf::from("/sys/bus/scsi/devices"),
            dev: PathBuf::from("/dev"),
        }
    }
}

impl Configfs {
    /// Says what is missing, if TCMU cannot be used on this host now.
    pub fn check(&self) -> Result<()> {
        let module = self.modules.join("target_core_user");
        if !module.exists() {
            return Err(Error::ModuleMissing { path: module, module: "target_core_user" });
        }
        let core = self.target.join("core");
        if !core.exists() {
            return Err(Error::Invalid(format!(
                "{} is missing: is configfs mounted? Try `mount -t configfs none /sys/kernel/config`",
                core.display()
            )));
        }
        Ok(())
    }

    /// Stops (or lets go on) all netlink events of TCMU. Kernels that cannot are left alone. While events are stopped, devices that are removed go without a word: keep it short.
    pub fn block_netlink(&self, block: bool) -> Result<()> {
        let path = self.parameter("block_netlink");
        write_tolerant(&path, if block { "1" } else { "0" }, &[nix::libc::ENOENT])
    }

    /// Makes every operation that waits for an answer fail with EINTR. Needs events to be stopped.
    pub fn reset_netlink(&self) -> Result<()> {
        write_tolerant(&self.parameter("reset_netlink"), "1", &[nix::libc::ENOENT])
    }

    fn parameter(&self, name: &str) -> PathBuf {
        self.modules.join("target_core_user/parameters").join(name)
    }
}

/// The names in a directory, sorted; none if there is no such directory (configfs has files among them).
fn list(path: &Path) -> Result<Vec<String>> {
    let listing = match fs::read_dir(path) {
        Ok(listing) => listing,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(Vec::new()),
        Err(source) => return Err(Error::Path { what: "list", path: path.to_owned(), source }),
    };
    let mut names = Vec::new();
    for entry in listing {
        let entry = entry.map_err(|source| Error::Path { what: "list", path: path.to_owned(), source })?;
        names.extend(entry.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

fn make_dir(path: &Path) -> Result<()> {
    fs::create_dir(path).map_err(|source| Error::Path { what: "create", path: path.to_owned(), source })
}

/// Removes a directory, if it is there.
fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Path { what: "remove", path: path.to_owned(), source }),
        _ => Ok(()),
    }
}

fn read(path: &Path) -> Result<String> {
    let text = fs::read_to_string(path).map_err(|source| Error::Path { what: "read", path: path.to_owned(), source })?;
    Ok(text.trim_end_matches(['\n', '\0']).to_owned())
}

/// Writes a file that exists, in one call, as configfs and sysfs want it.
fn write(path: &Path, value: &str) -> Result<()> {
    let write = || OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes());
    write().map_err(|source| Error::Path { what: "write", path: path.to_owned(), source })
}

/// Like [`write()`], but some errors mean that this kernel, or this state, has no use for it.
fn write_tolerant(path: &Path, value: &str, tolerated: &[i32]) -> Result<()> {
    match write(path, value) {
        Err(Error::Path { source, .. }) if source.raw_os_error().is_some_and(|errno| tolerated.contains(&errno)) => {
            tracing::debug!(path = %path.display(), value, "not possible here: {source}");
            Ok(())
        }
        other => other,
    }
}

/// A name that becomes a directory.
fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '\0', '\n', ',']) || name.len() > 200 {
        return Err(Error::Invalid(format!("{name:?} cannot be the name of a device: no slash, comma or line end, at most 200 bytes")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree of plain files. Attributes that configfs would make must be made by the test.
    pub(super) fn tree() -> (tempfile::TempDir, Configfs) {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let configfs = Configfs { target: at("target"), modules: at("module"), scsi_devices: at("scsi"), dev: at("dev") };
        fs::create_dir_all(configfs.target.join("core")).unwrap();
        fs::create_dir_all(configfs.modules.join("target_core_user/parameters")).unwrap();
        (root, configfs)
    }

    #[test]
    fn what_is_missing_is_named() {
        let (root, configfs) = tree();
        configfs.check().unwrap();
        fs::remove_dir_all(root.path().join("target")).unwrap();
        assert!(configfs.check().unwrap_err().to_string().contains("mount -t configfs"));
        fs::remove_dir_all(root.path().join("module")).unwrap();
        assert!(configfs.check().unwrap_err().to_string().contains("modprobe target_core_user"));
    }

    #[test]
    fn old_kernels_have_no_netlink_parameters() {
        let (root, configfs) = tree();
        configfs.block_netlink(true).unwrap();
        configfs.reset_netlink().unwrap();
        let parameter = root.path().join("module/target_core_user/parameters/block_netlink");
        fs::write(&parameter, "0").unwrap();
        configfs.block_netlink(true).unwrap();
        assert_eq!(fs::read_to_string(parameter).unwrap(), "1");
    }

    #[test]
    fn names_are_checked() {
        check_name("disk0").unwrap();
        for bad in ["", "a/b", "..", "a,b", "a\nb", &"x".repeat(201)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
