//! `img-tcmu attach`: an image becomes a local disk in one step.

use super::{Failure, ImageArgs};
use crate::daemon::lock;
use crate::image::{self, Purpose};
use crate::tcmu::configfs::{Backstore, Configfs, Parameters};
use cfgstring::{Config, MAX_LEN, SUBTYPE, Spec};
use clap::Args;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

/// What one command may transfer: large enough that the disk's own speed counts.
const MAX_TRANSFER: u32 = 4 << 20;

/// The kernel looks for a new disk at once, but it may be busy.
const DISK_TIMEOUT: Duration = Duration::from_secs(60);

/// Make a local disk (/dev/sdX) of an image
///
/// Creates a user:img backstore and a loopback LUN for it, and prints the disk's name. The daemon ('img-tcmu serve') has to run; this
/// needs root. 'img-tcmu detach NAME' removes both again.
#[derive(Debug, Args)]
pub struct Attach {
    #[command(flatten)]
    image: ImageArgs,
    /// The disk is write-protected
    #[arg(long)]
    read_only: bool,
    /// Name of the backstore [default: the file's name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Size of the disk, at most that of the image: bytes, or with K, M, G, T [default: the image's]
    #[arg(long, value_parser = cfgstring::parse_size)]
    size: Option<u64>,
    /// Block size of the disk: 512 or 4096 [default: the image's]
    #[arg(long, value_name = "BYTES")]
    block_size: Option<u32>,
    #[arg(long, hide = true, default_value = crate::daemon::RUN_DIRECTORY)]
    run_dir: PathBuf,
}

impl Attach {
    /// A disk of an image with nothing but defaults.
    pub fn plain(image: ImageArgs, read_only: bool, run_dir: PathBuf) -> Self {
        Self { image, read_only, name: None, size: None, block_size: None, run_dir }
    }

    /// Creates backstore and LUN and prints the disk.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let disk = self.create()?;
        writeln!(io::stdout(), "{}", disk.display()).map_err(Failure::output)?;
        Ok(ExitCode::SUCCESS)
    }

    /// Creates backstore and LUN, or leaves nothing behind: the disk.
    pub fn create(self) -> Result<PathBuf, Failure> {
        let configfs = Configfs::default();
        configfs.check().map_err(|error| Failure::new(error.to_string()))?;
        if !lock::is_held(&self.run_dir) {
            return Err(Failure::new(
                "no daemon runs that could serve the image: start it with 'systemctl start img-tcmu' or 'img-tcmu serve'",
            ));
        }
        let (config, spec) = self.config()?;
        let dev_config = format!("{SUBTYPE}/{config}");
        if dev_config.len() > MAX_LEN {
            return Err(Failure::new(format!(
                "the configuration string is {} bytes and the kernel keeps {MAX_LEN}: define a named export in the configuration file, and attach @NAME",
                dev_config.len()
            )));
        }
        let disk = self.image.environment()?.open(&spec, Purpose::Read)?;
        let limits = disk.device.limits();
        drop(disk);
        let size = self.size.unwrap_or(limits.size);
        if size > limits.size {
            return Err(Failure::new(format!("--size {size} is more than the image has: {} bytes", limits.size)));
        }
        let name = match self.name {
            Some(name) => name,
            None => free_name(&configfs, &spec)?,
        };
        let block_size = self.block_size.unwrap_or(limits.sector);
        let parameters = Parameters {
            dev_config,
            size,
            block_size: Some(block_size),
            max_sectors: Some(MAX_TRANSFER / block_size.max(512)),
            ..Parameters::default()
        };
        create(&configfs, &name, &parameters)
    }

    /// What the daemon will be told: absolute, since it has another working directory.
    fn config(&self) -> Result<(Config, Spec), Failure> {
        match self.image.given() {
            Config::Export(name) if self.read_only => {
                Err(Failure::new(format!("--read-only does not go with the export @{name}: say so in the configuration file")))
            }
            export @ Config::Export(_) => Ok((export.clone(), self.image.spec()?)),
            Config::Image(spec) => {
                let mut spec = spec.as_ref().clone();
                for path in [Some(&mut spec.file), spec.overlay.as_mut(), spec.parent.as_mut()].into_iter().flatten() {
                    *path = std::path::absolute(&*path)
                        .map_err(|error| Failure::caused(format!("cannot resolve '{}'", path.display()), error))?;
                }
                spec.read_only |= self.read_only;
                image::require_absolute(&spec)?;
                Ok((Config::Image(Box::new(spec.clone())), spec))
            }
        }
    }
}

/// The file's name without its extension, in characters that every tool takes, with a number if it is taken.
fn free_name(configfs: &Configfs, spec: &Spec) -> Result<String, Failure> {
    let stem = spec.id.clone().unwrap_or_else(|| spec.file.file_stem().unwrap_or_default().to_string_lossy().into_owned());
    let clean: String =
        stem.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '_' }).take(64).collect();
    let clean = if clean.trim_matches('.').is_empty() { "disk".to_owned() } else { clean.trim_start_matches('.').to_owned() };
    let taken = configfs.backstores(SUBTYPE).map_err(|error| Failure::new(error.to_string()))?;
    let free = |name: &str| taken.iter().all(|backstore| backstore.name() != name);
    if free(&clean) {
        return Ok(clean);
    }
    (2..10_000u32)
        .map(|number| format!("{clean}-{number}"))
        .find(|name| free(name))
        .ok_or_else(|| Failure::new("too many backstores of this name: give one with --name"))
}

fn create(configfs: &Configfs, name: &str, parameters: &Parameters) -> Result<PathBuf, Failure> {
    let taken = configfs.backstores(SUBTYPE).map_err(|error| Failure::new(error.to_string()))?;
    if taken.iter().any(|backstore| backstore.name() == name) {
        return Err(Failure::new(format!("a backstore named '{name}' exists already: give another --name")));
    }
    let backstore = configfs.create_backstore(name, parameters).map_err(|error| Failure::caused("cannot create the backstore", error))?;
    let disk = enable(&backstore).and_then(|()| export(configfs, &backstore));
    if disk.is_err()
        && let Err(error) = backstore.delete()
    {
        // The first failure is the one to tell; this one would be the next command's.
        tracing::warn!("{error}");
    }
    disk
}

fn enable(backstore: &Backstore) -> Result<(), Failure> {
    backstore.enable().map_err(|error| {
        Failure::caused("the daemon or the kernel refused the backstore; the daemon's log has the reason (journalctl -u img-tcmu)", error)
    })?;
    let serial = uuid::Uuid::new_v4().to_string();
    backstore.set_unit_serial(&serial).map_err(|error| Failure::caused("cannot set the serial number", error))
}

fn export(configfs: &Configfs, backstore: &Backstore) -> Result<PathBuf, Failure> {
    load_loopback(configfs);
    let target = configfs.create_loopback().map_err(|error| Failure::caused("cannot create a loopback target", error))?;
    let disk = target.add_lun(0, backstore).and_then(|()| target.wait_for_block_device(0, DISK_TIMEOUT));
    disk.map_err(|error| {
        if let Err(error) = target.delete() {
            tracing::warn!("{error}");
        }
        Failure::caused("the backstore could not become a local disk", error)
    })
}

/// The module of the loopback fabric is loaded by whoever uses it first.
fn load_loopback(configfs: &Configfs) {
    if !configfs.modules.join("tcm_loop").exists() {
        load_module("tcm_loop");
    }
}

/// Asks modprobe; that a module is still missing is noticed, and said, by who needs it.
pub fn load_module(name: &str) {
    let modprobe = ["/usr/sbin/modprobe", "/sbin/modprobe", "/bin/modprobe"].into_iter().find(|path| Path::new(path).exists());
    if let Some(modprobe) = modprobe {
        let result = Command::new(modprobe).args(["-q", name]).stdin(Stdio::null()).status();
        tracing::debug!("{modprobe} -q {name}: {result:?}");
    }
}
