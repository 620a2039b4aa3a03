//! UIO devices of TCMU: finding them, opening them, mapping their memory, ringing their bell.
//!
//! A TCMU device is a UIO device whose name is `tcm-user/<hba index>/<device name>/<dev_config>`, and whose dev_config is
//! `<subtype>/<config>`. What the device is for, its size and its serial number are in [`configfs`](super::configfs).

use super::{Doorbell, Error, Region, Result};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Where the kernel shows UIO devices.
#[derive(Clone, Debug)]
pub struct Paths {
    /// The class directory, `/sys/class/uio`.
    pub class: PathBuf,
    /// The device nodes' directory, `/dev`.
    pub dev: PathBuf,
}

impl Default for Paths {
    fn default() -> Self {
        Self { class: PathBuf::from("/sys/class/uio"), dev: PathBuf::from("/dev") }
    }
}

/// The parts of a TCMU device's UIO name, which is also what netlink events call it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DeviceName {
    /// Index of the HBA: its configfs directory is `core/user_<index>`.
    pub hba: u32,
    /// Name of the device: its configfs directory is below that of the HBA.
    pub device: String,
    /// First part of dev_config, which says whose device it is; empty if there is no dev_config.
    pub subtype: String,
    /// The rest of dev_config: the cfgstring.
    pub config: String,
}

impl DeviceName {
    /// Takes a UIO name apart; none if it is not one of TCMU. Only the first slashes separate: dev_config has its own.
    pub fn parse(name: &str) -> Option<Self> {
        let mut parts = name.trim_end_matches('\n').splitn(4, '/');
        if parts.next()? != "tcm-user" {
            return None;
        }
        let hba = parts.next()?.parse().ok()?;
        let device = parts.next().filter(|device| !device.is_empty())?.to_owned();
        let dev_config = parts.next().unwrap_or("");
        let (subtype, config) = dev_config.split_once('/').unwrap_or((dev_config, ""));
        Some(Self { hba, device, subtype: subtype.to_owned(), config: config.to_owned() })
    }

    /// `user_<hba>/<device>`: short, and unique at any time.
    pub fn short(&self) -> String {
        format!("user_{}/{}", self.hba, self.device)
    }
}

/// A TCMU device that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UioDevice {
    /// Number of the UIO device.
    pub minor: u32,
    /// Its name.
    pub name: DeviceName,
    /// Size of its memory in bytes.
    pub map_size: u64,
}

/// All TCMU devices of subtype `subtype`, by ascending number. Devices that vanish meanwhile are left out.
///
/// A kernel without the UIO class has none, which is not an error: its module may be loaded later.
pub fn scan(paths: &Paths, subtype: &str) -> Result<Vec<UioDevice>> {
    let listing = match fs::read_dir(&paths.class) {
        Ok(listing) => listing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(Error::Path { what: "list", path: paths.class.clone(), source }),
    };
    let mut devices = Vec::new();
    for entry in listing {
        let entry = entry.map_err(|source| Error::Path { what: "list", path: paths.class.clone(), source })?;
        let minor = entry.file_name().to_str().and_then(|name| name.strip_prefix("uio")?.parse().ok());
        let Some(minor) = minor else { continue };
        match lookup(paths, minor) {
            Ok(Some(device)) if device.name.subtype == subtype => devices.push(device),
            Ok(_) => {}
            Err(error) if error.io_kind() == Some(io::ErrorKind::NotFound) => {}
            Err(error) => return Err(error),
        }
    }
    devices.sort_by_key(|device| device.minor);
    Ok(devices)
}

/// The TCMU device with number `minor`; none if that UIO device is something else.
pub fn lookup(paths: &Paths, minor: u32) -> Result<Option<UioDevice>> {
    let directory = paths.class.join(format!("uio{minor}"));
    let Some(name) = DeviceName::parse(&read_text(&directory.join("name"))?) else { return Ok(None) };
    let path = directory.join("maps/map0/size");
    let text = read_text(&path)?;
    let digits = text.trim();
    let size = u64::from_str_radix(digits.strip_prefix("0x").unwrap_or(digits), 16);
    let map_size = size.map_err(|_| Error::Malformed { path, problem: format!("{digits:?} is not a size") })?;
    Ok(Some(UioDevice { minor, name, map_size }))
}

fn read_text(path: &Path) -> Result<String> {
    let bytes = fs::read(path).map_err(|source| Error::Path { what: "read", path: path.to_owned(), source })?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// An open UIO device. One process at a time can have it open; the kernel requires that it be closed (with its mapping) before
/// the removal of the device is acknowledged.
#[derive(Debug)]
pub struct Uio {
    file: File,
    map_size: usize,
}

impl Uio {
    /// Opens the node of `device`.
    pub fn open(paths: &Paths, device: &UioDevice) -> Result<Self> {
        let path = paths.dev.join(format!("uio{}", device.minor));
        let open = OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_NONBLOCK | nix::libc::O_CLOEXEC).open(&path);
        let file = match open {
            Ok(file) => file,
            Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => return Err(Error::Busy { path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Error::ModuleMissing { path, module: "uio" }),
            Err(source) => return Err(Error::Path { what: "open", path, source }),
        };
        let too_large = || Error::Malformed { path: path.clone(), problem: format!("{} bytes cannot be mapped", device.map_size) };
        let map_size = usize::try_from(device.map_size).map_err(|_| too_large())?;
        Ok(Self { file, map_size })
    }

    /// Maps the device's memory.
    pub fn map(&self) -> Result<Region> {
        Region::map(&self.file, self.map_size).map_err(|source| Error::Path { what: "map", path: PathBuf::from("UIO device"), source })
    }

    /// The event counter: how often the kernel has rung. None if it has not since the last call.
    pub fn events(&self) -> io::Result<Option<u32>> {
        let mut counter = [0; 4];
        match (&self.file).read(&mut counter) {
            Ok(4) => Ok(Some(u32::from_ne_bytes(counter))),
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Doorbell for Uio {
    fn kick(&self) -> io::Result<()> {
        loop {
            match (&self.file).write(&0u32.to_ne_bytes()) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_split_at_the_first_three_slashes_only() {
        let name = DeviceName::parse("tcm-user/7/disk0/img/@id=x@file=/a/b//c\n").unwrap();
        assert_eq!((name.hba, name.device.as_str(), name.subtype.as_str()), (7, "disk0", "img"));
        assert_eq!(name.config, "@id=x@file=/a/b//c");
        assert_eq!(name.short(), "user_7/disk0");
        let plain = DeviceName::parse("tcm-user/0/d/img//path/to").unwrap();
        assert_eq!(plain.config, "/path/to");
        let bare = DeviceName::parse("tcm-user/0/d").unwrap();
        assert_eq!((bare.subtype.as_str(), bare.config.as_str()), ("", ""));
        assert_eq!(DeviceName::parse("tcm-user/0/d/file").unwrap().subtype, "file");
        for other in ["", "tcm-user", "tcm-user/x/d", "tcm-user/0", "tcm-user/0/", "tcm-users/0/d/img/x", "igb_uio"] {
            assert_eq!(DeviceName::parse(other), None, "{other}");
        }
    }

    fn make(class: &Path, minor: u32, name: &str, size: &str) {
        let directory = class.join(format!("uio{minor}"));
        fs::create_dir_all(directory.join("maps/map0")).unwrap();
        fs::write(directory.join("name"), name).unwrap();
        fs::write(directory.join("maps/map0/size"), size).unwrap();
    }

    #[test]
    fn scan_finds_the_devices_of_the_subtype() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths { class: root.path().join("class"), dev: root.path().join("dev") };
        assert_eq!(scan(&paths, "img").unwrap(), []);
        make(&paths.class, 10, "tcm-user/1/ten/img/@id=t@file=/t\n", "0x0000000040800000\n");
        make(&paths.class, 1, "tcm-user/0/one/img//f\n", "0x1110000\n");
        make(&paths.class, 2, "tcm-user/2/two/image//f\n", "0x1110000\n");
        make(&paths.class, 3, "pci-thing\n", "0x1000\n");
        fs::create_dir_all(paths.class.join("uio4")).unwrap();
        let found = scan(&paths, "img").unwrap();
        assert_eq!(found.iter().map(|device| device.minor).collect::<Vec<_>>(), [1, 10]);
        assert_eq!(found[1].map_size, 0x4080_0000);
        make(&paths.class, 5, "tcm-user/5/five/img//f\n", "large\n");
        assert!(scan(&paths, "img").unwrap_err().to_string().contains("\"large\" is not a size"));
    }

    #[test]
    fn a_missing_node_says_what_to_do() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths { class: root.path().into(), dev: root.path().into() };
        let device = UioDevice { minor: 3, name: DeviceName::parse("tcm-user/0/d/img/x").unwrap(), map_size: 4096 };
        let message = Uio::open(&paths, &device).unwrap_err().to_string();
        assert!(message.contains("uio3") && message.contains("modprobe uio"), "{message}");
    }
}
