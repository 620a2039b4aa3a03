//! From a file's name to an open image: the gate, the probe, the driver, the chain of parents.

use crate::cache::Cache;
use crate::compressed;
use crate::device::BlockDevice;
use crate::drivers::{self, Opened, Request};
use crate::error::{Error, Kind, Result};
use crate::gate::{Chain, Gate};
use crate::image::{Image, Parts, RawGuard};
use crate::probe::Head;
use crate::redo::{self, RedoLog};
use crate::store::{FileStore, Store};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How to open an image.
#[derive(Clone, Default)]
pub struct OpenOptions {
    /// The file.
    pub file: PathBuf,
    /// Name of its format; `None`: by its signature, raw if it has none.
    pub format: Option<String>,
    /// Open read-only.
    pub read_only: bool,
    /// It is opened to be mended: an image that is marked as damaged can be opened for writing, which fails until a check with repair has succeeded.
    pub repair: bool,
    /// Do not pass discards to the format.
    pub ignore_discard: bool,
    /// Another parent than the one that the image names (moved, or named by an absolute path of another machine).
    pub parent: Option<PathBuf>,
    /// Show an internal snapshot, read-only.
    pub snapshot_name: Option<String>,
    /// What names inside images may lead to.
    pub gate: Gate,
    /// Where decoded units are kept; `None`: the cache that all images of the process share.
    pub cache: Option<Arc<Cache>>,
    /// Where pending metadata are mirrored; `None`: nowhere, and the death of the process may lose unflushed writes.
    pub redo: Option<Arc<dyn RedoLogs>>,
}

/// Supplies the redo log of an image that is opened for writing.
pub trait RedoLogs: Send + Sync {
    /// Finishes what a predecessor's log holds for this file (before anything in it is read), and starts a new one.
    fn begin(&self, file: &FileStore, stores: &[Arc<dyn Store>]) -> Result<Box<dyn RedoLog>>;
}

impl OpenOptions {
    /// For a file in a format to be found out.
    pub fn new(file: impl Into<PathBuf>) -> Self {
        Self { file: file.into(), ..Self::default() }
    }

    /// Names the format.
    #[must_use]
    pub fn format(mut self, name: impl Into<String>) -> Self {
        self.format = Some(name.into());
        self
    }

    /// Read-only, or not.
    #[must_use]
    pub fn read_only(mut self, yes: bool) -> Self {
        self.read_only = yes;
        self
    }
}

/// Opens an image with its chain of parents.
///
/// # Errors
/// Each with the path and what to do: the file cannot be opened or is locked, it is of another format, it uses what is not supported, it is damaged, or
/// it names files that the gate does not allow.
pub fn open(options: &OpenOptions) -> Result<Arc<Image>> {
    let writable = !options.read_only && options.snapshot_name.is_none();
    let (file, mut chain) = options.gate.open_named(&options.file, writable)?;
    open_file(options, file, &options.file, options.format.as_deref(), writable, true, &mut chain)
}

/// Opens one file of a chain and what is below it.
fn open_file(
    options: &OpenOptions,
    file: Arc<FileStore>,
    path: &Path,
    format: Option<&str>,
    writable: bool,
    top: bool,
    chain: &mut Chain,
) -> Result<Arc<Image>> {
    // "auto" is the user's word; in an image it is no format.
    let named = format.filter(|f| !top || *f != "auto");
    let cache = options.cache.clone().unwrap_or_else(Cache::shared);
    let (store, stream) = match named {
        // Said to be raw: its bytes are the guest's, whatever they look like.
        Some("raw") => (file.clone() as Arc<dyn Store>, false),
        _ => match compressed::open(file.clone(), &compressed::Options::default(), &cache).map_err(|e| e.at_path(path))? {
            Some(decoded) => (decoded, true),
            None => (file.clone() as Arc<dyn Store>, false),
        },
    };
    if stream && writable {
        tracing::warn!(
            image = %path.display(),
            "a compressed stream cannot be written to: served read-only (qemu-img create -b puts a writable image on it)"
        );
    }
    let writable = writable && !stream;
    // A predecessor's unfinished writes come first: they may concern the very header that the probe looks at.
    let redo: Box<dyn RedoLog> = match &options.redo {
        Some(logs) if writable => logs.begin(&file, std::slice::from_ref(&store))?,
        _ => Box::new(redo::None),
    };
    let driver = match named {
        Some(name) => drivers::by_name(name)?,
        None => drivers::by_name(Head::read(&*store).map_err(|e| e.at_path(path))?.recognise().unwrap_or("raw"))?,
    };
    let guessed_raw = named.is_none() && driver.name == "raw";
    if guessed_raw && writable {
        tracing::warn!(
            image = %path.display(),
            "no format was given and the file bears no signature: taken for raw; writes that would make it look like another format are refused (format=raw lifts that)"
        );
    }
    let mut open_extent = |name: &Path, writable: bool| -> Result<Arc<dyn Store>> {
        let (store, _) = options.gate.open_implicit(chain, path, name, writable)?;
        Ok(store)
    };
    let request = Request {
        store,
        path,
        writable,
        repair: options.repair && top,
        redo,
        open_file: &mut open_extent,
        snapshot_name: if top { options.snapshot_name.as_deref() } else { None },
    };
    let Opened { format, writeback, parent } = (driver.open)(request).map_err(|e| e.at_path(path))?;
    let parent = match parent {
        None => None,
        Some(mut parent) => {
            let other = options.parent.as_deref().filter(|_| top);
            let (file, parent_path) = match other {
                Some(other) => {
                    // The user's own word: any place, still not in a circle.
                    let gate = Gate { allowed: vec![PathBuf::from("/")], ..options.gate.clone() };
                    let absolute = std::path::absolute(other).map_err(|e| Error::io("cannot resolve the path", e).at_path(other))?;
                    gate.open_implicit(chain, path, &absolute, false)?
                }
                None => open_first(options, chain, path, &parent.names)?,
            };
            let Some(name) = parent.format.take() else {
                return Err(Error::new(
                    Kind::Denied,
                    format!(
                        "the image does not say which format its backing file {} has, and guessing it could be abused by a guest that wrote to it (qemu-img rebase -u -b FILE -F FORMAT writes it down)",
                        parent_path.display()
                    ),
                )
                .at_path(path));
            };
            let below = open_file(options, file, &parent_path, Some(&name), false, false, chain)?;
            if let Some(verify) = parent.verify {
                verify(below.format()).map_err(|e| e.at_path(path))?;
            }
            if below.limits().sector > format.limits().sector {
                return Err(
                    Error::unsupported(format!("the parent {} has larger sectors than its child", parent_path.display())).at_path(path)
                );
            }
            Some(below)
        }
    };
    let image = Image::new(Parts {
        format,
        writeback,
        parent,
        cache,
        path: path.to_path_buf(),
        discard: !options.ignore_discard,
        guard: (guessed_raw && writable).then(RawGuard::default),
    })?;
    Ok(Arc::new(image))
}

/// Opens the first of a parent's names that exists.
fn open_first(options: &OpenOptions, chain: &mut Chain, by: &Path, names: &[PathBuf]) -> Result<(Arc<FileStore>, PathBuf)> {
    let mut first_error = None;
    for name in names {
        match options.gate.open_implicit(chain, by, name, false) {
            Ok(found) => return Ok(found),
            Err(error) => {
                first_error.get_or_insert(error);
            }
        }
    }
    Err(first_error.unwrap_or_else(|| Error::corrupt("the image has a parent but names none").at_path(by)))
}
