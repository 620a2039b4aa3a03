//! From a file's name to an open image: the gate, the probe, the driver, the chain of parents.

use crate::cache::Cache;
use crate::compressed::{self, StreamKind};
use crate::device::BlockDevice;
use crate::drivers::{self, Opened, Request};
use crate::error::{Error, Kind, Result};
use crate::gate::{Chain, Gate};
use crate::image::{Image, Parts, RawGuard};
use crate::overlay::{self, Overlay};
use crate::probe::Head;
use crate::redo::{self, RedoLog};
use crate::split;
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
    /// The format of the image's parent: for those that do not say it, and instead of what the others say.
    pub parent_format: Option<String>,
    /// Show an internal snapshot, read-only.
    pub snapshot_name: Option<String>,
    /// Where writes go instead of to the image, which is then opened read-only. `read_only` is that of the overlay.
    pub overlay: Option<Overlay>,
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
    let opener = Opener { options, glance: false };
    let image = if options.overlay.is_some() { overlay::open(&opener)? } else { opener.open_top()? };
    image.ok_or_else(|| Error::unsupported("the image was not opened").at_path(&options.file))
}

/// Whether [`open()`] would do, found out in little time: no stream is indexed or decoded, so that an image inside one is not looked into, and nothing is
/// created or written. The size in bytes if it is known without that.
///
/// # Errors
/// As for [`open()`], as far as they show.
pub fn check(options: &OpenOptions) -> Result<Option<u64>> {
    let options = OpenOptions { read_only: true, redo: None, ..options.clone() };
    let opener = Opener { options: &options, glance: true };
    let image = if options.overlay.is_some() { overlay::open(&opener)? } else { opener.open_top()? };
    Ok(image.map(|image| image.size()))
}

/// One opening.
pub(crate) struct Opener<'a> {
    pub(crate) options: &'a OpenOptions,
    /// Do not look into compressed streams: an image that lies in one, or has a parent that does, is `None`.
    pub(crate) glance: bool,
}

/// One file of a chain, opened.
struct Layer<'a> {
    file: Arc<FileStore>,
    path: &'a Path,
    /// Its format, if somebody has said so.
    format: Option<&'a str>,
    writable: bool,
    /// It is what the user named.
    top: bool,
}

impl Opener<'_> {
    fn open_top(&self) -> Result<Option<Arc<Image>>> {
        let options = self.options;
        let writable = !options.read_only && options.snapshot_name.is_none() && !self.is_stream()?;
        let (file, mut chain) = options.gate.open_named(&options.file, writable)?;
        self.open_user_file(file, writable, &mut chain)
    }

    /// Whether the user's file is a compressed stream, which nobody writes to: it needs no permission for that, and no lock against other readers.
    fn is_stream(&self) -> Result<bool> {
        let options = self.options;
        if options.read_only {
            return Ok(false);
        }
        let looking = Gate { locking: false, ..options.gate.clone() };
        let (file, _) = looking.open_named(&options.file, false)?;
        let named = Named::parse(options.format.as_deref().filter(|f| *f != "auto"))?;
        let stream = named.stream_of(&file).map_err(|e| e.at_path(&options.file))?;
        if stream.is_some() {
            tracing::warn!(
                image = %options.file.display(),
                "a compressed stream cannot be written to: served read-only (overlay=FILE keeps writes in a file of their own, snapshot=on for a while)"
            );
        }
        Ok(stream.is_some())
    }

    /// Opens the image in the file that the user named, and what is below it.
    pub(crate) fn open_user_file(&self, file: Arc<FileStore>, writable: bool, chain: &mut Chain) -> Result<Option<Arc<Image>>> {
        let options = self.options;
        let layer = Layer { file, path: &options.file, format: options.format.as_deref(), writable, top: true };
        self.open_layer(layer, chain)
    }

    /// Opens one file of a chain and what is below it.
    fn open_layer(&self, layer: Layer<'_>, chain: &mut Chain) -> Result<Option<Arc<Image>>> {
        let options = self.options;
        let Layer { file, path, format, writable, top } = layer;
        // "auto" is the user's word; in an image it is no format.
        let named = Named::parse(format.filter(|f| !top || *f != "auto")).map_err(|e| e.at_path(path))?;
        let cache = options.cache.clone().unwrap_or_else(Cache::shared);
        let stream = named.stream_of(&file).map_err(|e| e.at_path(path))?;
        if stream.is_some() && self.glance {
            return Ok(None);
        }
        let store = match stream {
            Some(_) => compressed::open(file.clone(), &compressed::Options::default(), &cache)
                .and_then(|store| store.ok_or_else(|| Error::invalid_format("the stream has changed while it was opened")))
                .map_err(|e| e.at_path(path))?,
            None => file.clone() as Arc<dyn Store>,
        };
        let writable = writable && stream.is_none();
        let named = named.format;
        // A predecessor's unfinished writes come first: they may concern the very header that the probe looks at.
        let begin = |file: &FileStore, store: &Arc<dyn Store>, writable: bool| -> Result<Box<dyn RedoLog>> {
            Ok(match &options.redo {
                Some(logs) if writable => logs.begin(file, std::slice::from_ref(store))?,
                _ => Box::new(redo::None),
            })
        };
        let redo = redo::PerFile::new(begin(&file, &store, writable)?);
        let driver = match named {
            Some(name) => drivers::by_name(name)?,
            None => match Head::read(&*store).map_err(|e| e.at_path(path))?.recognise() {
                Some(name) => drivers::by_name(name)?,
                None if stream.is_none() && split::is_first_of_many(path) => &split::DRIVER,
                None => drivers::by_name("raw")?,
            },
        };
        let guessed_raw = named.is_none() && matches!(driver.name, "raw" | split::NAME);
        if guessed_raw && writable {
            tracing::warn!(
                image = %path.display(),
                "no format was given and the file bears no signature: taken for raw; writes that would make it look like another format are refused (format=raw lifts that)"
            );
        }
        let mut open_extent = |name: &Path, writable: bool| -> Result<Arc<dyn Store>> {
            let (file, _) = options.gate.open_extent(chain, path, name, writable)?;
            let store: Arc<dyn Store> = file.clone();
            redo.add(begin(&file, &store, writable)?);
            Ok(store)
        };
        let request = Request {
            store,
            path,
            writable,
            repair: options.repair && top && writable,
            redo: Box::new(redo.clone()),
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
                        // The user's own word: any place where he may name images, still not in a circle.
                        let anywhere = || vec![PathBuf::from("/")];
                        let allowed =
                            options.gate.images.as_ref().map_or_else(anywhere, |dirs| [&dirs[..], &options.gate.allowed].concat());
                        let gate = Gate { allowed, ..options.gate.clone() };
                        let absolute = std::path::absolute(other).map_err(|e| Error::io("cannot resolve the path", e).at_path(other))?;
                        gate.open_implicit(chain, path, &absolute, false)?
                    }
                    None => self.open_first(chain, path, &parent.names)?,
                };
                let said = options.parent_format.clone().filter(|_| top);
                let Some(name) = said.or(parent.format.take()) else {
                    return Err(Error::new(
                        Kind::Denied,
                        format!(
                            "the image does not say which format its backing file {} has, and guessing it could be abused by a guest that wrote to it (parent-format=FORMAT says it; for a qcow2, qemu-img rebase -u -b FILE -F FORMAT writes it down)",
                            parent_path.display()
                        ),
                    )
                    .at_path(path));
                };
                let below = Layer { file, path: &parent_path, format: Some(&name), writable: false, top: false };
                let Some(below) = self.open_layer(below, chain)? else { return Ok(None) };
                if let Some(verify) = parent.verify {
                    verify(below.format()).map_err(|e| e.at_path(path))?;
                }
                // qcow2 has no sector size of its own: it takes over its backing file's.
                if below.limits().sector > format.limits().sector && format.name() != "qcow2" {
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
        Ok(Some(Arc::new(image.in_stream(stream))))
    }

    /// Opens the first of a parent's names that exists.
    fn open_first(&self, chain: &mut Chain, by: &Path, names: &[PathBuf]) -> Result<(Arc<FileStore>, PathBuf)> {
        let mut first_error = None;
        for name in names {
            match self.options.gate.open_implicit(chain, by, name, false) {
                Ok(found) => return Ok(found),
                Err(error) => {
                    first_error.get_or_insert(error);
                }
            }
        }
        Err(first_error.unwrap_or_else(|| Error::corrupt("the image has a parent but names none").at_path(by)))
    }
}

/// A format as somebody has said it: `qcow2`, or `xz+qcow2` for one inside a compressed stream.
struct Named<'a> {
    stream: Option<StreamKind>,
    format: Option<&'a str>,
}

impl<'a> Named<'a> {
    fn parse(name: Option<&'a str>) -> Result<Self> {
        let Some((stream, format)) = name.and_then(|name| name.split_once('+')) else { return Ok(Self { stream: None, format: name }) };
        let kind = StreamKind::by_name(stream)
            .ok_or_else(|| Error::new(Kind::InvalidOption, format!("there is no kind of compressed stream \"{stream}\"")))?;
        Ok(Self { stream: Some(kind), format: Some(format) })
    }

    /// The stream that the file is, as far as what was said allows it to be one.
    fn stream_of(&self, file: &Arc<FileStore>) -> Result<Option<StreamKind>> {
        // Said to be raw: its bytes are the guest's, whatever they look like.
        if self.stream.is_none() && self.format == Some("raw") {
            return Ok(None);
        }
        // A DMG image may begin with a compressed chunk, which looks like a whole stream; but that has no such end.
        let found = match compressed::kind(file.clone())? {
            Some(_) if self.stream.is_none() && crate::dmg::has_trailer(&Head::read(&**file)?) => None,
            found => found,
        };
        match self.stream {
            Some(wanted) if found != Some(wanted) => Err(Error::invalid_format(format!("this is not a {} stream", wanted.name()))),
            _ => Ok(found),
        }
    }
}
