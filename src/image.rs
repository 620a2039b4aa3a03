//! From a configuration string to an open image: the one place where its keys meet the engine's options.

use cfgstring::{Config, Discard, Spec, ZeroDetection};
use formats::filter::partition;
use formats::filter::window::Window;
use formats::filter::zeroes::ZeroDetector;
use formats::gate::Gate;
use formats::open::RedoLogs;
use formats::overlay::Overlay;
use formats::{BlockDevice, Cache, Error, Image, Kind, OpenOptions, Result};
use std::path::PathBuf;
use std::sync::Arc;

/// What does not come from the configuration string.
#[derive(Clone, Default)]
pub struct Environment {
    /// Directories, besides an image's own, in which files that it names (parents, extents) may lie.
    pub allowed: Vec<PathBuf>,
    /// Directories in which images have to lie; `None`: anywhere.
    pub images: Option<Vec<PathBuf>>,
    /// Images may not be block devices.
    pub files_only: bool,
    /// Named exports (`@NAME`).
    pub exports: Exports,
    /// What keeps acknowledged writes when this process dies; only a server needs it.
    pub redo: Option<Arc<dyn RedoLogs>>,
}

/// The exports of the configuration file.
pub type Exports = std::collections::BTreeMap<String, Spec>;

/// An open image, and the part of it that is shown.
#[derive(Clone)]
pub struct Disk {
    /// The whole.
    pub image: Arc<Image>,
    /// What is shown: the whole, a window, a partition.
    pub device: Arc<dyn BlockDevice>,
}

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To serve it: for writing, unless it says `read-only`.
    Serve,
    /// To read its contents.
    Read,
    /// To see whether it opens.
    Check,
    /// To look at it, also while others write to it: no locks.
    Inspect,
    /// To mend it: for writing whatever it says.
    Repair,
}

impl Environment {
    /// The description behind a configuration: itself, or that of a named export.
    ///
    /// # Errors
    /// `NotFound`: there is no such export.
    pub fn resolve(&self, config: &Config) -> Result<Spec> {
        match config {
            Config::Image(spec) => Ok(spec.as_ref().clone()),
            Config::Export(name) => self.exports.get(name).cloned().ok_or_else(|| {
                Error::new(Kind::NotFound, format!("no export is named '{name}': define it in the configuration file as [exports.{name}]"))
            }),
        }
    }

    /// Opens what `spec` describes.
    ///
    /// # Errors
    /// A key that is not supported yet, by name; those of [`formats::open()`]; a window or partition that is not there.
    pub fn open(&self, spec: &Spec, purpose: Purpose) -> Result<Disk> {
        let image = formats::open(&self.options(spec, purpose)?)?;
        let device = filtered(spec, &image).map_err(|error| error.at_path(&spec.file))?;
        Ok(Disk { image, device })
    }

    /// Whether what `spec` describes would open to be served, as far as that can be told in little time and without changing anything: compressed
    /// streams are recognised, not decoded.
    ///
    /// # Errors
    /// As for [`Self::open`], as far as they show.
    pub fn check(&self, spec: &Spec) -> Result<()> {
        let options = self.options(spec, Purpose::Check)?;
        let empty = || Error::new(Kind::InvalidOption, "the disk inside has no bytes: it cannot be served").at_path(&spec.file);
        match formats::open::check(&options)? {
            Some(0) => return Err(empty()),
            // The window needs the image's contents, which can be had.
            Some(_) if spec.partition.is_some() || spec.offset != 0 || spec.size.is_some() => {
                self.open(spec, Purpose::Check)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// What the keys mean to the engine.
    ///
    /// # Errors
    /// A key that is not supported yet, by name.
    pub fn options(&self, spec: &Spec, purpose: Purpose) -> Result<OpenOptions> {
        refuse_unsupported(spec)?;
        let mut options = OpenOptions::new(&spec.file);
        options.format.clone_from(&spec.format);
        options.read_only = match purpose {
            Purpose::Serve => spec.read_only,
            Purpose::Read | Purpose::Check | Purpose::Inspect => true,
            Purpose::Repair => false,
        };
        options.repair = purpose == Purpose::Repair;
        options.ignore_discard = spec.discard == Discard::Ignore;
        options.parent.clone_from(&spec.parent);
        options.parent_format.clone_from(&spec.parent_format);
        options.snapshot_name.clone_from(&spec.snapshot_name);
        options.overlay = overlay(spec, purpose)?;
        options.gate = Gate {
            allowed: self.allowed.clone(),
            images: self.images.clone(),
            block_devices: !self.files_only,
            locking: purpose != Purpose::Inspect,
            ..Gate::default()
        };
        if purpose == Purpose::Serve {
            options.redo.clone_from(&self.redo);
        }
        if let Some(bytes) = spec.cache_size {
            options.cache = Some(Arc::new(Cache::new(usize::try_from(bytes).unwrap_or(usize::MAX))));
        }
        Ok(options)
    }
}

/// The part of the image that is asked for.
fn filtered(spec: &Spec, image: &Arc<Image>) -> Result<Arc<dyn BlockDevice>> {
    let (start, len) = match spec.partition {
        Some(number) => {
            let partition = partition::find(image.as_ref(), number)?;
            (partition.start, Some(partition.len))
        }
        None => (spec.offset, spec.size),
    };
    let mut device: Arc<dyn BlockDevice> = image.clone();
    if start != 0 || len.is_some() {
        device = Arc::new(Window::new(device, start, len)?);
    }
    if spec.detect_zeroes != ZeroDetection::Off {
        device = Arc::new(ZeroDetector::new(device, spec.detect_zeroes == ZeroDetection::Unmap));
    }
    Ok(device)
}

/// Where the writes go, if not to the image.
fn overlay(spec: &Spec, purpose: Purpose) -> Result<Option<Overlay>> {
    if let Some(path) = &spec.overlay {
        if purpose == Purpose::Repair && !path.exists() {
            return Err(Error::new(Kind::NotFound, "the overlay does not exist yet: there is nothing to repair").at_path(path));
        }
        return Ok(Some(Overlay::Kept { path: path.clone(), create: purpose == Purpose::Serve }));
    }
    let throw_away = Overlay::ThrowAway { dir: None };
    match purpose {
        Purpose::Serve | Purpose::Check if spec.snapshot && !spec.read_only => Ok(Some(throw_away)),
        Purpose::Repair if spec.snapshot => Err(Error::new(
            Kind::InvalidOption,
            "with 'snapshot' nothing is written to the image, so it cannot be repaired: leave the key out",
        )),
        _ => Ok(None),
    }
}

fn refuse_unsupported(spec: &Spec) -> Result<()> {
    if spec.direct {
        return Err(Error::unsupported("the key 'direct' is not supported yet: leave it out"));
    }
    Ok(())
}

/// A daemon has no working directory that a user could mean.
///
/// # Errors
/// `InvalidOption`: a path of `spec` is relative.
pub fn require_absolute(spec: &Spec) -> Result<()> {
    let paths = [("file", Some(&spec.file)), ("overlay", spec.overlay.as_ref()), ("parent", spec.parent.as_ref())];
    for (key, path) in paths {
        if let Some(path) = path
            && !path.is_absolute()
        {
            return Err(Error::new(Kind::InvalidOption, format!("'{key}' should be an absolute path, not '{}'", path.display())));
        }
    }
    Ok(())
}
