//! `img-tcmu fuse`: an image as a file.

use super::{Failure, ImageArgs};
use crate::daemon::log;
use crate::export::fuse::{DISK, Mounted, Options, PARTITIONS, Share};
use crate::export::manager;
use crate::image::{Disk, Purpose};
use clap::{Args, ValueEnum};
use formats::BlockDevice;
use formats::filter::partition;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// When the kernel reads and writes a raw image by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Passthrough {
    /// Not at all
    Never,
    /// If the disk is read-only
    Auto,
    /// Also for writing: a write behind the end then makes the image longer, where it would fail otherwise
    Always,
}

/// Show an image as a file in MOUNTPOINT, in the foreground, until it is unmounted
///
/// MOUNTPOINT/disk is the disk as its guest sees it, for loop devices and for every program that reads files. It can be written to unless the image, or
/// --read-only, says otherwise; its size is fixed. Holes are seen (SEEK_HOLE) and made (fallocate). fsync and close make writes safe.
///
/// 'umount MOUNTPOINT', SIGINT and SIGTERM unmount, flush and end. If the file is still in use then, it goes out of sight and is served until its users
/// are done; a second signal ends at once. After a 'kill -9' the directory says "Transport endpoint is not connected": 'umount MOUNTPOINT' clears it, and
/// what was not flushed may be lost, as after a power cut.
#[derive(Debug, Args)]
pub struct Fuse {
    #[command(flatten)]
    image: ImageArgs,
    /// An existing directory
    mountpoint: PathBuf,
    /// Read-only
    #[arg(short, long)]
    read_only: bool,
    /// Show each partition as well, as MOUNTPOINT/partitions/NUMBER
    #[arg(long)]
    partition_dir: bool,
    /// Other users may use the files, as far as the permissions of the image let them
    #[arg(long)]
    allow_other: bool,
    /// The kernel caches nothing, and lets writes run side by side
    #[arg(long)]
    direct_io: bool,
    /// Let the kernel read, and write, a raw image by itself
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    passthrough: Passthrough,
    /// Threads that do requests [default: two a CPU, at least 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
    /// End when standard input does, unless a byte was read from it before: for 'img-tcmu mount', which may be killed
    #[arg(long, hide = true)]
    leash: bool,
}

impl Fuse {
    /// Mounts, serves, and ends well.
    pub fn run(self) -> Result<ExitCode, Failure> {
        log::init("warn").map_err(Failure::new)?;
        check_mountpoint(&self.mountpoint)?;
        let Disk { image, device } = self.image.open(if self.read_only { Purpose::Read } else { Purpose::Serve })?;
        let partitions = if self.partition_dir { partition::partitions(&*device)? } else { Vec::new() };
        let read_only = device.limits().read_only;
        let whole = self.image.spec().is_ok_and(|spec| spec.partition.is_none() && spec.offset == 0 && spec.size.is_none());
        let wanted = match self.passthrough {
            Passthrough::Never => false,
            Passthrough::Auto => read_only,
            Passthrough::Always => true,
        };
        // A partition's pages and the disk's would not agree: see the filesystem's choice of direct I/O.
        let backing = (wanted && whole && image.format().name() == "raw" && (read_only || partitions.is_empty()))
            .then(|| backing(image.path(), &*device))
            .flatten();
        let mut options = Options { allow_other: self.allow_other, direct_io: self.direct_io, ..Options::default() };
        if let Some(threads) = self.threads {
            options.threads = threads.into();
        }
        let share = Share { device, image: image.path().to_owned(), partitions, backing };
        let mounted = Mounted::new(share, &self.mountpoint, options)
            .map_err(|error| Failure::caused(format!("cannot mount on {}", self.mountpoint.display()), error))?;
        if self.leash {
            follow_leash()?;
        }
        let what = format!("{} is {}", image.path().display(), self.mountpoint.join(DISK).display());
        if self.partition_dir {
            eprintln!("img-tcmu: {what}, its partitions are in {}", self.mountpoint.join(PARTITIONS).display());
        } else {
            eprintln!("img-tcmu: {what}");
        }
        manager::ready(&what);
        mounted.run().map_err(|error| Failure::caused("the mount ended", error))?;
        image.close()?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Whoever holds the other end of standard input and dies has us end, as by a signal.
fn follow_leash() -> Result<(), Failure> {
    let follow = || {
        let mut byte = [0];
        if !matches!(std::io::stdin().lock().read(&mut byte), Ok(1)) {
            // Our own process is there, and may be signalled.
            let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGTERM);
        }
    };
    let spawned = std::thread::Builder::new().name("leash".into()).spawn(follow);
    spawned.map(drop).map_err(|error| Failure::caused("cannot start a thread", error))
}

fn check_mountpoint(mountpoint: &Path) -> Result<(), Failure> {
    let name = mountpoint.display();
    // Attributes of a dead mount may still be in the kernel's memory; its names are not.
    match std::fs::read_dir(mountpoint).map(drop) {
        Ok(()) => Ok(()),
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOTCONN) => {
            Err(Failure::new(format!("{name} is the mount of a process that was killed: 'umount {name}' clears it")))
        }
        Err(error) => Err(Failure::caused(format!("cannot use {name}"), error)),
    }
}

/// The image's file once more, if the disk is exactly what is in it and the kernel can take it (passthrough needs root).
fn backing(path: &Path, device: &dyn BlockDevice) -> Option<File> {
    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    let limits = device.limits();
    let file = File::options().read(true).write(!limits.read_only).open(path).ok()?;
    let metadata = file.metadata().ok()?;
    (metadata.is_file() && metadata.size() == limits.size).then_some(file)
}
