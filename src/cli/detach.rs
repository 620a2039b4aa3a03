//! `img-tcmu detach`: a local disk and its backstore go.

use super::Failure;
use crate::tcmu::configfs::{Configfs, LoopbackLun};
use cfgstring::SUBTYPE;
use clap::Args;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;

/// Remove a disk that 'attach' made, with its backstore
///
/// Refuses while the disk is mounted or otherwise in use, and while the backstore is exported by another fabric (iSCSI).
#[derive(Debug, Args)]
pub struct Detach {
    /// Name of the backstore, or the disk (/dev/sdX), as 'list' shows them
    name: String,
    /// Also when the disk is in use: whoever uses it will see errors
    #[arg(long)]
    force: bool,
}

impl Detach {
    /// Removal of a disk, by its path, that nobody uses.
    pub fn disk(path: &Path) -> Self {
        Self { name: path.to_string_lossy().into_owned(), force: false }
    }

    /// Removes the LUN, its target if that is empty then, and the backstore.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let configfs = Configfs::default();
        configfs.check().map_err(|error| Failure::new(error.to_string()))?;
        let luns = configfs.loopback_luns().map_err(|error| Failure::new(error.to_string()))?;
        let backstores = configfs.backstores(SUBTYPE).map_err(|error| Failure::new(error.to_string()))?;
        let found: Vec<_> = backstores
            .iter()
            .filter(|backstore| {
                backstore.name() == self.name
                    || disks_of(&luns, backstore.path()).any(|lun| node(lun).is_some_and(|disk| disk == Path::new(&self.name)))
            })
            .collect();
        let backstore = match found.as_slice() {
            [one] => *one,
            [] => return Err(Failure::new(format!("there is no backstore or disk '{}' of ours: 'img-tcmu list' shows all", self.name))),
            _ => return Err(Failure::new(format!("several backstores are named '{}': name one by its disk", self.name))),
        };
        let own: Vec<&LoopbackLun> = disks_of(&luns, backstore.path()).collect();
        if !self.force {
            for lun in &own {
                refuse_in_use(lun)?;
            }
        }
        for lun in own {
            let alone = luns.iter().filter(|other| other.target == lun.target).count() == 1;
            let removed = if alone { lun.target.delete() } else { lun.target.remove_lun(lun.lun) };
            removed.map_err(|error| Failure::caused("cannot remove the disk", error))?;
        }
        backstore.delete().map_err(|error| {
            Failure::caused("cannot remove the backstore; if another fabric (iSCSI) exports it, remove its LUN there first", error)
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

fn disks_of<'a>(luns: &'a [LoopbackLun], backstore: &'a Path) -> impl Iterator<Item = &'a LoopbackLun> {
    let real = backstore.canonicalize().unwrap_or_else(|_| backstore.to_path_buf());
    luns.iter().filter(move |lun| lun.backstore == real)
}

fn node(lun: &LoopbackLun) -> Option<std::path::PathBuf> {
    lun.target.block_device(lun.lun).ok().flatten()
}

/// An exclusive open of a block device fails while it, or a partition of it, is mounted or held (open(2), O_EXCL).
fn refuse_in_use(lun: &LoopbackLun) -> Result<(), Failure> {
    let Some(disk) = node(lun) else { return Ok(()) };
    match OpenOptions::new().read(true).custom_flags(nix::libc::O_EXCL | nix::libc::O_NONBLOCK).open(&disk) {
        Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => {
            Err(Failure::new(format!("{} is in use: unmount it first (lsblk {0} shows what uses it), or use --force", disk.display())))
        }
        // Other errors say nothing about use: the disk may be dead already.
        _ => Ok(()),
    }
}
