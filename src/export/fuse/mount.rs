//! The life of a mount: mount(2), threads, signals, unmounting, the end.

use super::filesystem::Disk;
use super::{Options, Share};
use formats::BlockDevice;
use fuser::{Config, MountOption, Session, SessionACL, SessionUnmounter};
use nix::mount::{MntFlags, umount2};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A mounted disk.
pub struct Mounted {
    session: Session<Disk>,
    signals: Signals,
    mountpoint: PathBuf,
    device: Arc<dyn BlockDevice>,
}

impl Mounted {
    /// Mounts it: when this returns the file is there. Signals that would end the process are kept for [`Self::run`] from here on.
    ///
    /// # Errors
    /// The kernel's, or fusermount3's for whoever is not root: the directory is not there, /dev/fuse may not be used.
    pub fn new(share: Share, mountpoint: &Path, options: Options) -> io::Result<Self> {
        let device = share.device.clone();
        let read_only = device.limits().read_only;
        let signals = Signals::new([SIGINT, SIGTERM])?;
        // The mount table's fields end at commas and blanks.
        let name = share.image.to_string_lossy().replace([',', ' ', '\n', '\t', '\\'], "_");
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName(name),
            MountOption::Subtype("img-tcmu".to_owned()),
            MountOption::DefaultPermissions,
            MountOption::NoDev,
            MountOption::NoSuid,
            MountOption::NoExec,
            MountOption::NoAtime,
            if read_only { MountOption::RO } else { MountOption::RW },
        ];
        config.acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
        config.n_threads = Some(options.threads);
        config.clone_fd = true;
        if !read_only && let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
            // Needs CAP_SYS_RESOURCE. Without it, memory that runs out while a loop device over our file is written to can make both wait for each
            // other.
            tracing::debug!(%error, "cannot become an I/O flusher");
        }
        let disk = Disk::new(share, options).map_err(|error| io::Error::other(error.chain()))?;
        let session = Session::new(disk, mountpoint, &config)?;
        // Absolute: it may be unmounted from another thread, by its name.
        let mountpoint = mountpoint.canonicalize()?;
        Ok(Self { session, signals, mountpoint, device })
    }

    /// Serves it until it is unmounted: by umount(8), or by us when the process is told to end. Then flushes.
    ///
    /// # Errors
    /// The device's (/dev/fuse), or that of the last flush.
    pub fn run(mut self) -> io::Result<()> {
        let unmounter = self.session.unmount_callable();
        let (signals, mountpoint, device) = (self.signals, self.mountpoint, self.device.clone());
        std::thread::Builder::new().name("fuse-signals".into()).spawn(move || obey(signals, unmounter, &mountpoint, &*device))?;
        let result = self.session.run();
        self.device.flush().map_err(|error| io::Error::other(error.chain()))?;
        match result {
            // One of the ways in which the kernel tells a thread that the mount is gone, besides ENODEV.
            Err(error) if error.raw_os_error() == Some(nix::libc::ECONNABORTED) => Ok(()),
            other => other,
        }
    }
}

/// The first signal unmounts, the second ends.
fn obey(mut signals: Signals, mut unmounter: SessionUnmounter, mountpoint: &Path, device: &dyn BlockDevice) {
    let mut told = false;
    for _ in signals.forever() {
        if told {
            tracing::warn!("told to end a second time: whoever uses the file sees errors");
            if let Err(error) = device.flush() {
                tracing::error!(error = %error.chain(), "the last flush failed");
            }
            std::process::exit(1);
        }
        told = true;
        let Err(error) = unmounter.unmount() else { continue };
        tracing::warn!(
            %error,
            "{} is in use: it is out of sight now, and ends when its users do; a second signal ends it at once",
            mountpoint.display()
        );
        // Nobody else can have mounted over it: that fails for a directory in use as ours is.
        if let Err(error) = umount2(mountpoint, MntFlags::MNT_DETACH) {
            tracing::error!(%error, "cannot unmount {}", mountpoint.display());
        }
    }
}
