//! `img-tcmu mount`: from an image to its files.
//!
//! The kernel mounts a block device. That is a disk of the SCSI target where the kernel and a daemon have it, else a loop device over a file that a
//! process of our own serves over FUSE. Every step can be taken back, and is when a later one fails or a signal comes: [`Steps`].

mod filesystem;
mod loop_device;
pub mod server;
pub mod state;

use super::attach::Attach;
use super::detach::Detach;
use super::{Failure, ImageArgs};
use crate::daemon::lock;
use crate::export::fuse::DISK;
use crate::image::{Disk, Purpose};
use crate::tcmu::configfs::Configfs;
use cfgstring::{Config, Spec};
use clap::{Args, ValueEnum};
use filesystem::Filesystem;
use formats::BlockDevice;
use formats::filter::partition::{self, Partition};
use formats::filter::window::Window;
use loop_device::LoopDevice;
use server::Server;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use state::{Process, Record, State, Way};
use std::fmt::Write;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// How the disk gets into this kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Via {
    /// The SCSI target if this kernel has TCMU and the daemon runs, else FUSE
    Auto,
    /// A disk of the SCSI target, served by the daemon
    Tcmu,
    /// A loop device over a file, served by a process for this mount alone
    Fuse,
}

/// Mount a filesystem that is in an image
///
/// Finds the partition (or the filesystem that has no partition table around it), and mounts it on DIR: read-only and without replaying journals unless
/// --read-write is given, so that the image is not changed in any way; always with 'nosuid,nodev', since an image may be anybody's. 'img-tcmu umount DIR'
/// undoes all of it. Needs root. An interruption (Ctrl-C) at any time leaves nothing behind.
#[derive(Debug, Args)]
pub struct Mount {
    #[command(flatten)]
    image: ImageArgs,
    /// An existing directory
    directory: PathBuf,
    /// Number of the partition, when there are several
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    partition: Option<u32>,
    /// Files can be written to
    #[arg(long, short = 'w')]
    read_write: bool,
    /// How the disk gets into this kernel
    #[arg(long, default_value = "auto")]
    via: Via,
    /// More options for mount(8)
    #[arg(long, short, value_name = "OPTIONS")]
    options: Option<String>,
    #[arg(long, hide = true, default_value = crate::daemon::RUN_DIRECTORY)]
    run_dir: PathBuf,
}

/// What is to be mounted.
struct Source {
    /// The image with the partition as its disk.
    image: ImageArgs,
    name: String,
    filesystem: Option<Filesystem>,
    sector: u32,
}

impl Mount {
    /// Mounts, or leaves nothing behind.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, interrupted.clone()).map_err(|error| Failure::caused("cannot handle signals", error))?;
        }
        if !nix::unistd::geteuid().is_root() {
            return Err(Failure::new(
                "mounting needs root; without it, 'img-tcmu fuse' shows the disk as a file, and 'img-tcmu cat' its bytes",
            ));
        }
        let name = self.directory.display();
        let directory = self.directory.canonicalize().map_err(|error| Failure::caused(format!("cannot mount on {name}"), error))?;
        if !directory.is_dir() {
            return Err(Failure::new(format!("{name} is not a directory")));
        }
        sweep(&self.run_dir);
        if State::all(&self.run_dir).iter().any(|state| state.record.directory == directory) {
            return Err(Failure::new(format!("{name} is in use by an earlier 'img-tcmu mount': 'img-tcmu umount {name}' ends it")));
        }
        let source = self.source()?;
        let via_tcmu = match self.via {
            Via::Fuse => false,
            Via::Tcmu => true,
            Via::Auto => Configfs::default().check().is_ok() && lock::is_held(&self.run_dir),
        };
        let record = Record {
            directory: directory.clone(),
            image: source.name.clone(),
            way: if via_tcmu { Way::Tcmu } else { Way::Fuse { server: None } },
            device: None,
            mounter: Process::of(std::process::id()),
        };
        let state = State::new(&self.run_dir, record)
            .map_err(|error| Failure::caused(format!("cannot keep state in {}", self.run_dir.display()), error))?;
        let mut steps = Steps { state: Some(state), server: None, device: None, disk: None, mounted: None };
        let device = if via_tcmu {
            steps.attach(&source, !self.read_write, &self.run_dir)?
        } else {
            steps.serve(&source, !self.read_write, &interrupted)?
        };
        check(&interrupted)?;
        steps.mount(&device, &directory, &self.mount_options(&source))?;
        check(&interrupted)?;
        steps.finish()?;
        Ok(ExitCode::SUCCESS)
    }

    /// Looks into the image for what there is to be mounted.
    fn source(&self) -> Result<Source, Failure> {
        let mut spec = self.image.spec()?;
        let Disk { device, .. } = self.image.open(Purpose::Read)?;
        if self.read_write && (spec.read_only || spec.snapshot_name.is_some()) {
            return Err(Failure::new("the description of the image says that it is read-only"));
        }
        let mut part = device.clone();
        let mut resolved = false;
        if self.partition.is_some() && (spec.partition.is_some() || spec.offset != 0 || spec.size.is_some()) {
            return Err(Failure::new("--partition does not go with a description that names a part of the image already"));
        }
        if let Some(found) = self.choose(&*device)? {
            part = Arc::new(Window::new(device, found.start, Some(found.len))?);
            if spec.offset != 0 || spec.size.is_some() {
                // The partition of a part of the image: by its place.
                (spec.offset, spec.size) = (spec.offset + found.start, Some(found.len));
            } else {
                spec.partition = Some(found.number);
            }
            resolved = true;
        }
        let filesystem = filesystem::find(&*part)?;
        let sector = part.limits().sector;
        let name = spec.file.display().to_string();
        let given = self.image.given();
        let config = match given {
            Config::Export(_) if !resolved => given.clone(),
            _ => Config::Image(Box::new(absolute(spec)?)),
        };
        Ok(Source { image: self.image.with(config), name, filesystem, sector })
    }

    /// The partition to mount; `None`: the whole.
    fn choose(&self, disk: &dyn BlockDevice) -> Result<Option<Partition>, Failure> {
        if let Some(number) = self.partition {
            return Ok(Some(partition::find(disk, number)?));
        }
        if filesystem::is_boot_sector(filesystem::find(disk)?) {
            return Ok(None);
        }
        let all = match partition::partitions(disk) {
            Ok(all) => all,
            Err(error) if error.kind() == formats::Kind::InvalidOption => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        match all.as_slice() {
            [] => Ok(None),
            [one] => Ok(Some(*one)),
            several => Err(Failure::new(format!("the disk has several partitions: choose one with --partition: {}", list(disk, several)))),
        }
    }

    fn mount_options(&self, source: &Source) -> String {
        let mut options = if self.read_write { "rw" } else { "ro" }.to_owned();
        options.push_str(",nosuid,nodev");
        if let Some(found) = source.filesystem.filter(|_| !self.read_write) {
            if let Some(option) = found.no_replay {
                options.push(',');
                options.push_str(option);
            }
            if found.dirty {
                eprintln!(
                    "img-tcmu: the {} filesystem was not unmounted cleanly: it is shown without what its journal holds (--read-write would replay it)",
                    found.name
                );
            }
        }
        if let Some(more) = &self.options {
            options.push(',');
            options.push_str(more);
        }
        options
    }
}

/// Files by their whole names: the server, or the daemon, may have another working directory.
fn absolute(mut spec: Spec) -> Result<Spec, Failure> {
    for path in [Some(&mut spec.file), spec.overlay.as_mut(), spec.parent.as_mut()].into_iter().flatten() {
        *path = std::path::absolute(&*path).map_err(|error| Failure::caused(format!("cannot resolve '{}'", path.display()), error))?;
    }
    Ok(spec)
}

/// "1 (512 MiB, vfat), 2 (9 GiB, ext4)".
fn list(disk: &dyn BlockDevice, partitions: &[Partition]) -> String {
    let mut text = String::new();
    for found in partitions {
        let what = part(disk, found).map_or("unknown", |filesystem| filesystem.name);
        let separator = if text.is_empty() { "" } else { ", " };
        // Writing to a string does not fail.
        let _ = write!(text, "{separator}{} ({}, {what})", found.number, size(found.len));
    }
    text
}

/// What is in a partition. Errors are those of looking at it for a list: whoever chooses it will be told.
fn part(disk: &dyn BlockDevice, found: &Partition) -> Option<Filesystem> {
    let mut bytes = vec![0; filesystem::LOOKED_AT.min(usize::try_from(found.len).unwrap_or(usize::MAX))];
    disk.read(&mut [std::io::IoSliceMut::new(&mut bytes)], found.start).ok()?;
    filesystem::recognise(&bytes)
}

fn size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    units
        .iter()
        .find(|(shift, _)| bytes >> shift > 0)
        .map_or(format!("{bytes} bytes"), |(shift, unit)| format!("{} {unit}", bytes >> shift))
}

fn check(interrupted: &AtomicBool) -> Result<(), Failure> {
    if interrupted.load(Ordering::SeqCst) { Err(Failure::interrupted()) } else { Ok(()) }
}

/// What was done. Dropping it undoes it, the last first.
struct Steps {
    mounted: Option<PathBuf>,
    device: Option<LoopDevice>,
    server: Option<Server>,
    disk: Option<PathBuf>,
    state: Option<State>,
}

impl Steps {
    fn state(&mut self) -> Result<&mut State, Failure> {
        self.state.as_mut().ok_or_else(|| Failure::new("internal error: the state is gone"))
    }

    fn save(&mut self, device: &Path) -> Result<(), Failure> {
        let state = self.state()?;
        state.record.device = Some(device.to_owned());
        state.save().map_err(|error| Failure::caused("cannot keep state", error))
    }

    /// A disk of the SCSI target.
    fn attach(&mut self, source: &Source, read_only: bool, run_directory: &Path) -> Result<PathBuf, Failure> {
        let given = source.image.given().clone();
        let image = source.image.with(match given {
            Config::Image(mut spec) => {
                spec.read_only |= read_only;
                Config::Image(spec)
            }
            export @ Config::Export(_) => export,
        });
        let read_only = read_only && matches!(image.given(), Config::Image(_));
        let disk = Attach::plain(image, read_only, run_directory.to_owned()).create()?;
        self.disk = Some(disk.clone());
        self.save(&disk)?;
        Ok(disk)
    }

    /// A loop device over our server's file.
    fn serve(&mut self, source: &Source, read_only: bool, interrupted: &AtomicBool) -> Result<PathBuf, Failure> {
        let state = self.state()?;
        let server = Server::start(state, &source.image, read_only, interrupted)?;
        let path = state.fuse_directory().join(DISK);
        self.server = Some(server);
        let file = File::options()
            .read(true)
            .write(!read_only)
            .open(&path)
            .map_err(|error| Failure::caused(format!("cannot open {}", path.display()), error))?;
        let device = LoopDevice::new(&file, Path::new(&source.name), read_only, source.sector)
            .map_err(|error| Failure::caused("cannot make a loop device", error))?;
        let path = device.path().to_owned();
        self.device = Some(device);
        self.save(&path)?;
        Ok(path)
    }

    /// Has mount(8) do it, which finds out what filesystem it is.
    fn mount(&mut self, device: &Path, directory: &Path, options: &str) -> Result<(), Failure> {
        let out = Command::new("mount")
            .args(["-o", options, "--"])
            .args([device, directory])
            .stdin(Stdio::null())
            .process_group(0)
            .output()
            .map_err(|error| Failure::caused("cannot run mount(8)", error))?;
        if !out.status.success() {
            let said = String::from_utf8_lossy(&out.stderr);
            return Err(Failure::new(said.trim().to_owned()));
        }
        self.mounted = Some(directory.to_owned());
        Ok(())
    }

    /// All is done: from here on `umount` undoes it.
    fn finish(mut self) -> Result<(), Failure> {
        if let Some(server) = self.server.take() {
            server.leave()?;
        }
        let state = self.state()?;
        state.record.mounter = None;
        state.save().map_err(|error| Failure::caused("cannot keep state", error))?;
        (self.mounted, self.disk, self.state) = (None, None, None);
        Ok(())
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        let mut clean = true;
        let mut warn = |what: &str, failure: Failure| {
            clean = false;
            eprint!("img-tcmu: {what}: {failure}");
        };
        if let Some(directory) = self.mounted.take()
            && let Err(error) = nix::mount::umount(&directory)
        {
            warn("cannot undo the mount", Failure::new(format!("{}: {error}", directory.display())));
        }
        self.device = None;
        self.server = None;
        if let Some(disk) = self.disk.take()
            && let Err(error) = Detach::disk(&disk).run()
        {
            warn("cannot undo the disk", error);
        }
        if let Some(state) = self.state.take().filter(|_| clean)
            && let Err(error) = state.remove()
        {
            eprint!("img-tcmu: cannot forget the mount: {error}");
        }
    }
}

/// Clears up after those that were killed, and after mounts that were undone by umount(8) alone. Best effort: what stays is the next one's.
pub fn sweep(run_directory: &Path) {
    for state in State::all(run_directory) {
        let Record { directory, way, device, mounter, .. } = &state.record;
        if mounter.is_some_and(Process::is_alive) || (device.is_some() && state::mounted_on(directory).ok().flatten() == *device) {
            continue;
        }
        match way {
            Way::Fuse { server } => {
                // It is there only if `mount` was killed before it could hide it.
                let _ = nix::mount::umount2(&state.fuse_directory(), nix::mount::MntFlags::MNT_DETACH);
                if let Some(server) = server.filter(|server| server.is_alive()) {
                    if mounter.is_none() {
                        // Somebody has its file open still.
                        continue;
                    }
                    server::end(server);
                }
            }
            Way::Tcmu => {
                let (Some(_), Some(device)) = (mounter, device) else { continue };
                if let Err(error) = Detach::disk(device).run() {
                    tracing::debug!("{error}");
                }
            }
        }
        if let Err(error) = state.remove() {
            tracing::debug!("{error}");
        }
    }
}
