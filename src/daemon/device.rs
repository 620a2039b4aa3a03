//! One LUN: from its configuration string to an open image, a SCSI unit and a ring that is served; and its changes and end.

use super::control::protocol;
use super::errno::Refusal;
use super::rings::Rings;
use crate::image::{self, Disk, Environment, Purpose};
use crate::scsi::CopyPeers;
use crate::scsi::ports::TargetPorts;
use crate::scsi::{self, Identity, Lun};
use crate::serve::{Pool, Served};
use crate::tcmu::configfs::Backstore;
use crate::tcmu::uio::UioDevice;
use cfgstring::{Config, Discard, Spec};
use nix::errno::Errno;
use parking_lot::Mutex;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// `hw_max_sectors` when nobody asked for anything.
const KERNEL_MAX_SECTORS: u32 = 128;

/// What one command may transfer unless the backstore says otherwise: the kernel's own default of 64 KiB halves the throughput.
const MAX_TRANSFER_BYTES: u64 = 4 << 20;

/// How long a report waits for what somebody else holds.
const GLANCE: Duration = Duration::from_millis(100);

/// Formats whose images say which sectors their guest used.
const RECORDED_SECTORS: [&str; 1] = ["vhdx"];

/// The backing of a device: changes with its dev_config.
struct Backing {
    /// REST of the dev_config.
    config: String,
    spec: Spec,
    /// None if the image was lost in a change of the configuration.
    disk: Option<Disk>,
}

impl Backing {
    fn describe(&self) -> String {
        describe(&self.spec, self.disk.as_ref())
    }

    /// The file is the image's own.
    fn holds(&self, file: &Path) -> bool {
        let identity = |path: &Path| std::fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
        self.disk.as_ref().and_then(|disk| identity(disk.image.path())).is_some_and(|own| Some(own) == identity(file))
    }
}

fn describe(spec: &Spec, disk: Option<&Disk>) -> String {
    match disk {
        Some(disk) => {
            let read_only = if disk.device.limits().read_only { ", read-only" } else { "" };
            // What was named, below an overlay if there is one.
            let overlaid = spec.overlay.is_some() || spec.snapshot;
            let image = disk.image.parent().filter(|_| overlaid).unwrap_or(&disk.image);
            let writes = match &spec.overlay {
                Some(overlay) => format!(", writes go to {}", overlay.display()),
                None if spec.snapshot => ", writes are thrown away".to_owned(),
                None => String::new(),
            };
            format!("{} ({}{read_only}{writes})", spec.file.display(), image.format().name())
        }
        None => format!("{} (lost)", spec.file.display()),
    }
}

/// A LUN that is served.
pub struct Device {
    uio: UioDevice,
    lun: Arc<Lun>,
    backing: Mutex<Backing>,
    served: Mutex<Option<Served>>,
}

/// What the unit can reach besides its image.
pub struct Surroundings {
    /// The target ports that lead to it.
    pub ports: Arc<dyn TargetPorts>,
    /// The other units.
    pub peers: Arc<dyn CopyPeers>,
}

impl Device {
    /// Opens the image and takes the ring into service.
    ///
    /// # Errors
    /// Why not, with the errno that the kernel is to be told.
    pub fn start(
        uio: UioDevice,
        backstore: &Backstore,
        surroundings: Surroundings,
        environment: &Environment,
        rings: &dyn Rings,
        pool: &Pool,
    ) -> Result<Self, Refusal> {
        let backing = open(&uio.name.config, environment).map_err(OpenError::into_refusal)?;
        let lun = Arc::new(lun(backstore, &backing, surroundings)?);
        if let Err(error) = backstore.notify_of_task_management() {
            tracing::debug!("commands that are given up end no sooner: {error}");
        }
        let ring = rings.attach(&uio, backstore)?;
        let served =
            pool.serve(ring, Arc::clone(&lun)).map_err(|error| Refusal::new(Errno::EIO, format!("cannot serve the ring: {error}")))?;
        tracing::info!("serves {}, {} bytes", backing.describe(), lun.blocks() * u64::from(lun.block_size()));
        Ok(Self { uio, lun, backing: Mutex::new(backing), served: Mutex::new(Some(served)) })
    }

    /// The kernel's device.
    pub fn uio(&self) -> &UioDevice {
        &self.uio
    }

    /// The SCSI unit.
    pub fn lun(&self) -> &Lun {
        &self.lun
    }

    /// What the image is called.
    pub fn describe(&self) -> String {
        self.backing.lock().describe()
    }

    /// How it is doing; none where it is being stopped. And whether it failed.
    pub fn report(&self) -> (Option<protocol::Served>, bool) {
        // Both are held for long where a file system hangs, and nobody is to wait for that here.
        let served = self.served.try_lock_for(GLANCE);
        let (counters, in_flight, failed) = match served.as_deref().and_then(Option::as_ref) {
            Some(served) => (served.statistics(), served.in_flight(), served.is_out_of_service()),
            None => return (None, false),
        };
        let mut chain = Vec::new();
        let mut read_only = false;
        if let Some(backing) = self.backing.try_lock_for(GLANCE) {
            let mut next = backing.disk.as_ref().map(|disk| &disk.image);
            while let Some(image) = next {
                chain.push(protocol::Link { path: image.path().to_path_buf(), format: image.format().name().into() });
                next = image.parent();
            }
            read_only = backing.disk.as_ref().is_none_or(|disk| disk.device.limits().read_only) || backing.spec.read_only;
        }
        let served = protocol::Served {
            chain,
            size: self.lun.blocks() * u64::from(self.lun.block_size()),
            block_size: self.lun.block_size(),
            read_only,
            write_cache: self.lun.write_cache(),
            in_flight,
            oldest_s: None,
            counters,
        };
        (Some(served), failed)
    }

    /// The file that may need more space on the host as the disk is written; none where nothing is written.
    pub fn growing_file(&self) -> Option<PathBuf> {
        let backing = self.backing.lock();
        let disk = backing.disk.as_ref().filter(|disk| !disk.device.limits().read_only)?;
        Some(disk.image.path().to_path_buf())
    }

    /// The configuration now in force, as the kernel has it, and what it means.
    pub fn config(&self) -> (String, Spec) {
        let backing = self.backing.lock();
        (backing.config.clone(), backing.spec.clone())
    }

    /// Puts another configuration in force. The same one is no change: tools that restore a saved configuration set it again.
    ///
    /// # Errors
    /// The new image does not open or does not fit. The old one is then served on.
    pub fn set_config(&self, dev_config: &str, environment: &Environment) -> Result<(), Refusal> {
        let rest = dev_config.strip_prefix(cfgstring::SUBTYPE).and_then(|rest| rest.strip_prefix('/'));
        let Some(rest) = rest else {
            return Err(Refusal::new(
                Errno::EINVAL,
                format!("'{dev_config}' is of another handler: remove the backstore and create a new one"),
            ));
        };
        let mut backing = self.backing.lock();
        let parsed = Config::parse(rest.as_bytes())?;
        if parsed == Config::parse(backing.config.as_bytes())? && environment.resolve(&parsed)? == backing.spec {
            rest.clone_into(&mut backing.config);
            return Ok(());
        }
        let new = match open(rest, environment) {
            Ok(new) => new,
            Err(OpenError::Locked(path, _)) if backing.holds(&path) => return self.exchange(rest, &mut backing, environment),
            Err(error) => return Err(error.into_refusal()),
        };
        let Some(disk) = &new.disk else { return Err(Refusal::new(Errno::EIO, "no image")) };
        let old = self.lun.replace(disk.device.clone()).map_err(|error| Refusal::new(Errno::EINVAL, error.to_string()))?;
        drop(old);
        tracing::info!("now serves {} instead of {}", new.describe(), backing.spec.file.display());
        let before = std::mem::replace(&mut *backing, new);
        close(before.disk.as_ref());
        Ok(())
    }

    /// As [`Self::set_config`] where the new configuration uses the image that is now open for writing, as a new overlay on it does:
    /// the old image is closed first, and opened again if the new one does not open. Initiators are told to wait meanwhile.
    fn exchange(&self, rest: &str, backing: &mut Backing, environment: &Environment) -> Result<(), Refusal> {
        let mut verdict = Ok(());
        self.lun.exchange(|| {
            let before = backing.disk.take();
            if let Some(disk) = &before
                && let Err(error) = disk.image.close()
            {
                verdict = Err(error.into());
                backing.disk = before;
                return backing.disk.as_ref().map(|disk| (disk.device.clone(), false));
            }
            drop(before);
            let fitting = |new: Backing| match &new.disk {
                Some(disk) => match self.lun.fits(&disk.device) {
                    Ok(()) => Ok(new),
                    Err(error) => Err(Refusal::new(Errno::EINVAL, error.to_string())),
                },
                None => Err(Refusal::new(Errno::EIO, "no image")),
            };
            match open(rest, environment).map_err(OpenError::into_refusal).and_then(fitting) {
                Ok(new) => {
                    tracing::info!("now serves {} instead of {}", new.describe(), backing.spec.file.display());
                    *backing = new;
                }
                Err(refusal) => {
                    verdict = Err(refusal);
                    match open(&backing.config, environment) {
                        Ok(again) => backing.disk = again.disk,
                        Err(error) => {
                            let error = error.into_refusal();
                            tracing::error!("the image that was served does not open again, so that the unit has none: {error}");
                        }
                    }
                }
            }
            backing.disk.as_ref().map(|disk| (disk.device.clone(), verdict.is_ok()))
        });
        verdict
    }

    /// Makes the LUN `size` bytes large, growing the image where it has to.
    ///
    /// # Errors
    /// The image cannot grow, or the LUN would shrink under its initiators.
    pub fn set_size(&self, size: u64) -> Result<(), Refusal> {
        let block = u64::from(self.lun.block_size());
        let now = self.lun.blocks() * block;
        if size == now {
            return Ok(());
        }
        if !size.is_multiple_of(block) {
            return Err(Refusal::new(Errno::EINVAL, format!("{size} bytes are no whole number of blocks of {block} bytes")));
        }
        if size < now {
            let text =
                format!("{size} bytes are less than the {now} it has, which initiators use: remove the backstore and create a smaller one");
            return Err(Refusal::new(Errno::EINVAL, text));
        }
        let device = self.lun.device();
        if size > device.limits().size {
            device.grow(size)?;
        }
        self.lun.capacity_changed(size).map_err(|error| Refusal::new(Errno::EINVAL, error.to_string()))?;
        tracing::info!("grew from {now} to {size} bytes");
        Ok(())
    }

    /// Switches the volatile write cache.
    ///
    /// # Errors
    /// What was written before could not be made safe.
    pub fn set_write_cache(&self, on: bool) -> Result<(), Refusal> {
        if self.lun.write_cache() != on {
            self.lun.set_write_cache(on)?;
            tracing::info!("write cache {}", if on { "on" } else { "off" });
        }
        Ok(())
    }

    /// Takes the ring out of service when all commands under way have ended, then flushes and closes the image. Memory and file of
    /// the UIO device are closed when this returns. Commands that hang hold it up: `progress` is called now and then.
    pub fn stop(&self, mut progress: impl FnMut(usize)) {
        if let Some(served) = self.served.lock().take() {
            let mut stopping = served.stop();
            while !stopping.wait(Duration::from_secs(5)) {
                progress(stopping.in_flight());
            }
        }
        close(self.backing.lock().disk.as_ref());
    }
}

/// Why an image does not open.
enum OpenError {
    /// Somebody has this file open for writing.
    Locked(PathBuf, Refusal),
    Other(Refusal),
}

impl<E: Into<Refusal>> From<E> for OpenError {
    fn from(error: E) -> Self {
        Self::Other(error.into())
    }
}

impl OpenError {
    fn into_refusal(self) -> Refusal {
        match self {
            Self::Locked(_, refusal) | Self::Other(refusal) => refusal,
        }
    }
}

/// Opens what REST of a dev_config describes.
fn open(rest: &str, environment: &Environment) -> Result<Backing, OpenError> {
    let config = Config::parse(rest.as_bytes())?;
    let spec = environment.resolve(&config)?;
    image::require_absolute(&spec)?;
    let disk = environment.open(&spec, Purpose::Serve).map_err(|error| match error.path() {
        Some(path) if error.kind() == formats::Kind::Locked => OpenError::Locked(path.to_owned(), error.into()),
        _ => error.into(),
    })?;
    if disk.device.limits().read_only && !spec.read_only && spec.snapshot_name.is_none() {
        tracing::warn!("{} images can only be read: the disk is write-protected", disk.image.format().name());
    }
    Ok(Backing { config: rest.to_owned(), spec, disk: Some(disk) })
}

/// Flushes and closes; there is nobody left to tell but the log.
fn close(disk: Option<&Disk>) {
    let Some(Disk { image, .. }) = disk else { return };
    if let Err(error) = image.close() {
        tracing::error!("cannot close {} cleanly: {}", image.path().display(), error.chain());
    }
}

/// The SCSI unit over an image, as the backstore says.
fn lun(backstore: &Backstore, backing: &Backing, surroundings: Surroundings) -> Result<Lun, Refusal> {
    let Backing { spec, disk: Some(disk), .. } = backing else { return Err(Refusal::new(Errno::EIO, "no image")) };
    let limits = disk.device.limits();
    let size = backstore.size()?;
    let block_size = backstore.block_size().unwrap_or(512);
    if size > limits.size {
        return Err(Refusal::new(
            Errno::EINVAL,
            format!("the backstore is {size} bytes, which is more than {} has: create it with size {}", spec.file.display(), limits.size),
        ));
    }
    if size < limits.size {
        tracing::warn!("the backstore is {size} bytes and {} has {}: the rest is not served", spec.file.display(), limits.size);
    }
    let serial_of = backstore.clone();
    // The serial number is set after the device is enabled, but always before somebody may ask.
    let identity = Identity::with_serial_source(move || serial_of.unit_serial().ok().flatten());
    let config = scsi::Config {
        block_size,
        size: Some(size),
        read_only: spec.read_only,
        write_cache: true,
        discard: spec.discard == Discard::Unmap,
        fixed_sector: RECORDED_SECTORS.contains(&disk.image.format().name()),
        max_transfer_blocks: max_transfer_blocks(backstore, block_size),
        ..scsi::Config::default()
    };
    let Surroundings { ports, peers } = surroundings;
    Lun::with_surroundings(disk.device.clone(), identity, config, Some(ports), Some(peers))
        .map_err(|error| Refusal::new(Errno::EINVAL, error.to_string()))
}

/// What the backstore asks for; more than the kernel's small default where it asks for nothing, as far as the data area goes.
fn max_transfer_blocks(backstore: &Backstore, block_size: u32) -> u32 {
    let asked = backstore.max_sectors().unwrap_or(KERNEL_MAX_SECTORS);
    if asked != KERNEL_MAX_SECTORS {
        return asked;
    }
    let area = backstore.attribute("max_data_area_mb").ok().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(1024) << 20;
    // Several of the largest commands must fit, or they would wait for each other.
    let bytes = MAX_TRANSFER_BYTES.min(area / 8).max(64 << 10);
    u32::try_from(bytes / u64::from(block_size.max(512))).unwrap_or(KERNEL_MAX_SECTORS)
}
