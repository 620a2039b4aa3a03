//! One TCMU device in configfs: `core/user_<hba>/<name>`.

use super::{Configfs, check_name, list, make_dir, read, remove_dir, write, write_tolerant};
use crate::tcmu::uio::DeviceName;
use crate::tcmu::{Error, Result};
use nix::libc::{EINVAL, ENOENT};
use std::path::{Path, PathBuf};

/// A backstore of TCMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backstore {
    path: PathBuf,
    hba: u32,
    name: String,
}

/// What a new backstore is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// `<subtype>/<config>`.
    pub dev_config: String,
    /// Size in bytes.
    pub size: u64,
    /// Logical block size in bytes; 512 if not given.
    pub block_size: Option<u32>,
    /// Largest transfer in blocks; 128 if not given.
    pub max_sectors: Option<u32>,
    /// Size of the data area in MiB; 1024 if not given.
    pub max_data_area_mib: Option<u32>,
    /// Seconds until the kernel gives up a command; 30 if not given, 0 is never.
    pub command_timeout: Option<u32>,
}

/// What commands in a ring that is reset end with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetStatus {
    /// BUSY: the initiator tries again.
    Busy,
    /// CHECK CONDITION: the initiator sees an error.
    Error,
}

impl Configfs {
    /// The backstore that a UIO name or an event is about, whether it exists or not.
    pub fn backstore(&self, name: &DeviceName) -> Backstore {
        self.backstore_at(name.hba, &name.device)
    }

    fn backstore_at(&self, hba: u32, name: &str) -> Backstore {
        Backstore { path: self.hba(hba).join(name), hba, name: name.to_owned() }
    }

    fn hba(&self, hba: u32) -> PathBuf {
        self.target.join("core").join(format!("user_{hba}"))
    }

    /// All backstores whose dev_config is of `subtype`.
    pub fn backstores(&self, subtype: &str) -> Result<Vec<Backstore>> {
        let mut found = Vec::new();
        for hba_name in list(&self.target.join("core"))? {
            let Some(hba) = hba_name.strip_prefix("user_").and_then(|hba| hba.parse().ok()) else { continue };
            for name in list(&self.hba(hba))? {
                let backstore = self.backstore_at(hba, &name);
                let config = backstore.dev_config().unwrap_or_default();
                if config.split('/').next() == Some(subtype) && config.contains('/') {
                    found.push(backstore);
                }
            }
        }
        Ok(found)
    }

    /// Makes a backstore on an HBA of its own, without enabling it.
    pub fn create_backstore(&self, name: &str, parameters: &Parameters) -> Result<Backstore> {
        check_name(name)?;
        check_dev_config(&parameters.dev_config)?;
        self.check()?;
        let mut hba = 0;
        loop {
            match make_dir(&self.hba(hba)) {
                Ok(()) => break,
                Err(Error::Path { source, .. }) if source.kind() == std::io::ErrorKind::AlreadyExists => hba += 1,
                Err(error) => return Err(error),
            }
        }
        let backstore = self.backstore_at(hba, name);
        match make_dir(&backstore.path).and_then(|()| backstore.configure(parameters)) {
            Ok(()) => Ok(backstore),
            Err(error) => {
                // The first error is the one to tell.
                backstore.delete().unwrap_or_else(|error| tracing::warn!("{error}"));
                Err(error)
            }
        }
    }
}

impl Backstore {
    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Index of its HBA.
    pub fn hba(&self) -> u32 {
        self.hba
    }

    /// Whether it exists.
    pub fn exists(&self) -> bool {
        self.path.is_dir()
    }

    fn configure(&self, parameters: &Parameters) -> Result<()> {
        let control = |key: &str, value: &dyn std::fmt::Display| write(&self.path.join("control"), &format!("{key}={value}"));
        control("dev_config", &parameters.dev_config)?;
        control("dev_size", &parameters.size)?;
        let optional = [
            ("hw_block_size", parameters.block_size),
            ("hw_max_sectors", parameters.max_sectors),
            ("max_data_area_mb", parameters.max_data_area_mib),
        ];
        for (key, value) in optional {
            if let Some(value) = value {
                control(key, &value)?;
            }
        }
        match parameters.command_timeout {
            Some(seconds) => self.set_attribute("cmd_time_out", &seconds.to_string()),
            None => Ok(()),
        }
    }

    /// Brings the device into being. Waits for its daemon's answer, if there is a daemon that answers (or was one since boot).
    pub fn enable(&self) -> Result<()> {
        write(&self.path.join("enable"), "1")
    }

    /// Removes the backstore and its HBA, if that is then empty. It must not be exported.
    pub fn delete(&self) -> Result<()> {
        remove_dir(&self.path)?;
        match self.path.parent() {
            Some(hba) => remove_dir(hba).or_else(|error| match error.io_kind() {
                Some(std::io::ErrorKind::DirectoryNotEmpty | std::io::ErrorKind::ResourceBusy) => Ok(()),
                _ => Err(error),
            }),
            None => Ok(()),
        }
    }

    /// The value of `attrib/<name>`.
    pub fn attribute(&self, name: &str) -> Result<String> {
        read(&self.path.join("attrib").join(name))
    }

    /// Sets `attrib/<name>`. Some attributes ask the daemon first.
    pub fn set_attribute(&self, name: &str, value: &str) -> Result<()> {
        write(&self.path.join("attrib").join(name), value)
    }

    /// Has the kernel put a notice into the ring when commands are given up (`tmr_notification`, Linux 5.9). It takes that only
    /// while the device is not exported; then it stays so until the device is removed.
    pub fn notify_of_task_management(&self) -> Result<()> {
        match self.attribute("tmr_notification")?.trim() {
            "1" => Ok(()),
            _ => self.set_attribute("tmr_notification", "1"),
        }
    }

    /// A number in `attrib/<name>`.
    fn number(&self, name: &str) -> Result<u64> {
        let text = self.attribute(name)?;
        let problem = || Error::Malformed { path: self.path.join("attrib").join(name), problem: format!("{text:?} is not a number") };
        text.trim().parse().map_err(|_| problem())
    }

    /// `<subtype>/<config>`.
    pub fn dev_config(&self) -> Result<String> {
        // The attribute is newer than the line in `info`, which is cut at a space by nobody but people.
        match self.attribute("dev_config") {
            Err(error) if error.io_kind() == Some(std::io::ErrorKind::NotFound) => {
                let info = read(&self.path.join("info"))?;
                let (_, rest) = info.split_once("Config: ").unwrap_or_default();
                Ok(rest.split_once(" Size: ").map_or(rest, |(config, _)| config).to_owned())
            }
            other => other,
        }
    }

    /// Size in bytes, as it was said when the device was made.
    pub fn size(&self) -> Result<u64> {
        self.number("dev_size")
    }

    /// Logical block size in bytes.
    pub fn block_size(&self) -> Result<u32> {
        Ok(u32::try_from(self.number("hw_block_size")?).unwrap_or(u32::MAX))
    }

    /// Largest transfer in blocks that the backstore advises.
    pub fn max_sectors(&self) -> Result<u32> {
        Ok(u32::try_from(self.number("hw_max_sectors")?).unwrap_or(u32::MAX))
    }

    /// Seconds after which the kernel gives up a command; 0 is never.
    pub fn command_timeout(&self) -> Result<u64> {
        self.number("cmd_time_out")
    }

    /// The unit serial number; none if it is not set (yet: tools set it after enabling the device).
    pub fn unit_serial(&self) -> Result<Option<String>> {
        let text = read(&self.path.join("wwn/vpd_unit_serial"))?;
        let serial = text.rsplit_once(": ").map_or(text.as_str(), |(_, serial)| serial).trim();
        let serial = serial.strip_prefix("T10 VPD Unit Serial Number:").unwrap_or(serial);
        Ok((!serial.is_empty()).then(|| serial.to_owned()))
    }

    /// Sets the unit serial number. Must be done before the device is exported.
    pub fn set_unit_serial(&self, serial: &str) -> Result<()> {
        write(&self.path.join("wwn/vpd_unit_serial"), serial)
    }

    /// Blocks the device: new commands end with BUSY until it is unblocked. Does nothing where the kernel cannot, or where the
    /// device is not enabled.
    pub fn block(&self, block: bool) -> Result<()> {
        self.action("block_dev", if block { "1" } else { "0" })
    }

    /// Empties the ring; commands in it end with `status`. To be done while the device is [blocked](Backstore::block) and nobody
    /// serves the ring.
    pub fn reset_ring(&self, status: ResetStatus) -> Result<()> {
        let value = match status {
            ResetStatus::Busy => "1",
            ResetStatus::Error => "2",
        };
        self.action("reset_ring", value)
    }

    fn action(&self, name: &str, value: &str) -> Result<()> {
        write_tolerant(&self.path.join("action").join(name), value, &[ENOENT, EINVAL])
    }
}

/// The control file takes `key=value` separated by commas or line ends, and cuts a value after 255 bytes without a word.
fn check_dev_config(config: &str) -> Result<()> {
    let problem = if !config.contains('/') {
        "has no slash between subtype and cfgstring"
    } else if config.contains([',', '\n', '\0']) {
        "has a comma or a line end, where the kernel would cut it"
    } else if config.len() > 255 {
        "is longer than the 255 bytes that the kernel keeps"
    } else {
        return Ok(());
    };
    Err(Error::Invalid(format!("dev_config {config:?} {problem}")))
}

#[cfg(test)]
mod tests {
    use super::super::tests::tree;
    use super::*;
    use std::fs;

    fn make(configfs: &Configfs, hba: u32, name: &str, config: &str) -> Backstore {
        let backstore = configfs.backstore_at(hba, name);
        for directory in ["attrib", "wwn", "action"] {
            fs::create_dir_all(backstore.path.join(directory)).unwrap();
        }
        for (file, content) in [("control", ""), ("enable", "0"), ("attrib/dev_config", config), ("attrib/dev_size", "1048576\n")] {
            fs::write(backstore.path.join(file), content).unwrap();
        }
        backstore
    }

    #[test]
    fn backstores_are_found_by_subtype() {
        let (_root, configfs) = tree();
        make(&configfs, 0, "a", "img/@file=/a\n");
        make(&configfs, 3, "b", "image/@file=/b\n");
        make(&configfs, 12, "c", "img//c\n");
        fs::create_dir_all(configfs.target.join("core/fileio_0/img")).unwrap();
        fs::create_dir_all(configfs.target.join("core/alua")).unwrap();
        let found: Vec<_> = configfs.backstores("img").unwrap().iter().map(|store| (store.hba(), store.name().to_owned())).collect();
        assert_eq!(found, [(0, "a".to_owned()), (12, "c".to_owned())]);
    }

    #[test]
    fn attributes_serial_and_actions() {
        let (_root, configfs) = tree();
        let store = make(&configfs, 0, "a", "img/@file=/a");
        assert_eq!(store.size().unwrap(), 1 << 20);
        // Kernels without the actions, or devices without them yet.
        store.block(true).unwrap();
        store.reset_ring(ResetStatus::Busy).unwrap();
        fs::write(store.path.join("action/block_dev"), "").unwrap();
        store.block(true).unwrap();
        assert_eq!(fs::read_to_string(store.path.join("action/block_dev")).unwrap(), "1");
        let serial = store.path.join("wwn/vpd_unit_serial");
        for (text, wanted) in [
            ("T10 VPD Unit Serial Number: 0e3a-1\n", Some("0e3a-1")),
            ("T10 VPD Unit Serial Number: \n", None),
            ("T10 VPD Unit Serial Number:\n", None),
        ] {
            fs::write(&serial, text).unwrap();
            assert_eq!(store.unit_serial().unwrap().as_deref(), wanted, "{text}");
        }
        fs::write(store.path.join("attrib/hw_block_size"), "lots").unwrap();
        assert!(store.block_size().unwrap_err().to_string().contains("\"lots\" is not a number"));
    }

    #[test]
    fn what_the_kernel_would_cut_is_refused() {
        check_dev_config("img/@id=x@file=/a").unwrap();
        for bad in ["img", "img/a,b", "img/a\nb", &format!("img/{}", "x".repeat(252))] {
            assert!(check_dev_config(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_failed_creation_leaves_nothing() {
        let (_root, configfs) = tree();
        fs::create_dir_all(configfs.target.join("core/user_0")).unwrap();
        // There is no control file in a plain directory: writing it fails.
        let parameters = Parameters { dev_config: "img/x".into(), size: 512, ..Parameters::default() };
        let error = configfs.create_backstore("d", &parameters).unwrap_err().to_string();
        assert!(error.contains("user_1/d/control"), "{error}");
        assert_eq!(list(&configfs.target.join("core")).unwrap(), ["user_0"]);
    }
}
