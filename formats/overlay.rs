//! Copy-on-write overlays: any image or stream, opened read-only, becomes writable by a qcow2 image on top that takes the writes.
//!
//! The overlay is of the whole image; windows (`offset`, `size`, partitions) lie above it. So it is an ordinary qcow2 image with a backing file, which QEMU
//! understands wherever it can read the base.
//!
//! # What a kept overlay says of its base
//! The name is relative to the overlay's directory when the two have more in common than the root directory; QEMU resolves it likewise. The format is QEMU's
//! name for it, but for images that QEMU would read wrongly: there it is a name that QEMU does not know, so that it refuses the overlay instead of showing other bytes.
//!
//! | base | format stated | QEMU |
//! |---|---|---|
//! | raw, qcow2, VHDX, fixed or dynamic VHD | `raw`, `qcow2`, `vhdx`, `vpc` | reads it |
//! | differencing VHDX | `vhdx` | refuses it for itself |
//! | differencing VHD | `vhd` | does not know the name |
//! | compressed stream of format F | `gzip+F`, `xz+F`, … | does not know the name |

use crate::cache::Cache;
use crate::compressed::{self, StreamKind, scratch};
use crate::drivers::{self, Opened, Request};
use crate::error::{Error, Kind, Result};
use crate::gate::{self, Chain};
use crate::image::{Image, Parts};
use crate::open::Opener;
use crate::qcow2;
use crate::qcow2::create::{Backing, NewImage};
use crate::redo::{self, RedoLog};
use crate::store::{FileStore, Store, ThrowAwayStore};
use std::ffi::OsStr;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Where the writes go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Overlay {
    /// To a file without a name, which is gone when the image is closed or the process ends. It may grow as far as 5 % of its file system stay free.
    ThrowAway {
        /// Where it lies. `None`: where scratch files of compressed streams do (see [`compressed::Options::scratch_dir`]).
        dir: Option<PathBuf>,
    },
    /// To this file, a qcow2 image whose backing file is the image.
    Kept {
        /// The file.
        path: PathBuf,
        /// It is made when it is missing and the image is opened for writing. Otherwise the image is shown without it.
        create: bool,
    },
}

/// The image below the overlay.
struct Base {
    file: Arc<FileStore>,
    /// `None` at a glance, when it lies in a stream.
    image: Option<Arc<Image>>,
}

/// Opens an image with its overlay; see [`crate::open()`].
pub(crate) fn open(opener: &Opener<'_>) -> Result<Option<Arc<Image>>> {
    let options = opener.options;
    let (file, mut chain) = options.gate.open_named(&options.file, false)?;
    let image = opener.open_user_file(file.clone(), false, &mut chain)?;
    let base = Base { file, image };
    match &options.overlay {
        None => Ok(base.image),
        Some(Overlay::ThrowAway { dir }) => throw_away(opener, base, dir.as_deref()),
        Some(Overlay::Kept { path, create }) => kept(opener, base, path, *create, &mut chain),
    }
}

fn throw_away(opener: &Opener<'_>, base: Base, dir: Option<&Path>) -> Result<Option<Arc<Image>>> {
    if opener.glance {
        // The default directory is made when it is needed.
        dir.map(scratch::room).transpose()?;
    }
    let Some(image) = base.image else { return Ok(None) };
    if opener.glance || opener.options.read_only {
        return Ok(Some(image));
    }
    let dir = dir.map_or_else(|| compressed::Options::default().scratch_dir(), Path::to_path_buf);
    let fail = |e| Error::io("cannot make a throw-away overlay", e).at_path(&dir);
    let room = scratch::room(&dir)?;
    let file = scratch::nameless_file(&dir).map_err(fail)?;
    let store: Arc<dyn Store> = Arc::new(ThrowAwayStore::new(file, &dir, room).map_err(fail)?);
    // Nobody resolves the name; but that there is a backing file makes zeros differ from what was never written.
    let name = image.path().file_name().unwrap_or(OsStr::new("image")).into();
    let new = NewImage { backing: Some(Backing { name, format: stated_format(&image) }), ..NewImage::new(overlay_size(&image)) };
    new.write(&*store).map_err(|e| e.at_path(&dir))?;
    let opened = open_qcow2(store, &dir, true, false, Box::new(redo::None))?;
    assemble(opener, opened, image, &dir).map(Some)
}

fn kept(opener: &Opener<'_>, base: Base, path: &Path, create: bool, chain: &mut Chain) -> Result<Option<Arc<Image>>> {
    let options = opener.options;
    if options.snapshot_name.is_some() {
        return Err(Error::new(
            Kind::InvalidOption,
            "an overlay file cannot say that it lies on an internal snapshot: leave out the snapshot's name, or use a throw-away overlay (snapshot=on)",
        )
        .at_path(path));
    }
    let writable = !options.read_only;
    let file = match options.gate.open_overlay(chain, path, writable) {
        Err(error) if error.kind() == Kind::NotFound => {
            if opener.glance {
                check_directory(path)?;
                options.gate.may_create(path)?;
            }
            if !(create && writable) {
                return Ok(base.image);
            }
            if let Some(image) = &base.image {
                options.gate.may_create(path)?;
                let new = NewImage { backing: Some(base.describe(image, path)?), ..NewImage::new(overlay_size(image)) };
                // Somebody else may have been faster: then it is his, and verified like any other.
                if new.create(path, mode_like(&base.file))? {
                    tracing::info!(overlay = %path.display(), image = %image.path().display(), "created an overlay");
                }
            }
            options.gate.open_overlay(chain, path, writable)?
        }
        other => other?,
    };
    let redo: Box<dyn RedoLog> = match &options.redo {
        Some(logs) if writable => logs.begin(&file, &[file.clone() as Arc<dyn Store>])?,
        _ => Box::new(redo::None),
    };
    let opened = open_qcow2(file, path, writable, options.repair && writable, redo)?;
    base.verify(&opened, path)?;
    match base.image {
        Some(image) => assemble(opener, opened, image, path).map(Some),
        None => Ok(None),
    }
}

impl Base {
    /// What an overlay at `path` says of it.
    fn describe(&self, image: &Image, path: &Path) -> Result<Backing> {
        let meta = self.file.file().metadata().map_err(|e| Error::io("cannot look at the file", e).at_path(image.path()))?;
        let name = if meta.file_type().is_block_device() {
            // By the name that the user chose: those that it stands for change from boot to boot.
            std::path::absolute(image.path()).map_err(|e| Error::io("cannot resolve the path", e).at_path(image.path()))?
        } else {
            let real = gate::real_path(self.file.file(), image.path())?;
            let dir = parent_dir(path).canonicalize().map_err(|e| Error::io("cannot create the overlay", e).at_path(path))?;
            relative(&dir, &real).unwrap_or(real)
        };
        Ok(Backing { name, format: stated_format(image) })
    }

    /// Whether an overlay that was found is one of this image.
    fn verify(&self, overlay: &Opened, path: &Path) -> Result<()> {
        let refuse = |why: String| {
            Err(Error::new(
                Kind::InvalidOption,
                format!("this is not an overlay of {}: {why}. Name another file, which will be created", shown(&self.file)),
            )
            .at_path(path))
        };
        let Some(parent) = &overlay.parent else {
            return refuse("it is an image of its own, without a backing file".into());
        };
        let Some(name) = parent.names.first() else {
            return refuse("it does not name its backing file".into());
        };
        if gate::looks_like_protocol(name) || !self.is_at(&parent_dir(path).join(name)) {
            return refuse(format!("its backing file is \"{}\"", name.display()));
        }
        let Some(stated) = parent.format.as_deref() else {
            return refuse(
                "it does not say which format its backing file has (qemu-img rebase -u -b FILE -F FORMAT writes it down)".into(),
            );
        };
        let fits = match &self.image {
            Some(image) => same_format(stated, &stated_format(image)),
            // Not looked into: it, or an image below it, is a stream.
            None => {
                let said = stated.split_once('+').and_then(|(name, _)| StreamKind::by_name(name));
                let stream = compressed::kind(self.file.clone()).map_err(|e| e.at_path(shown(&self.file)))?;
                stream.is_none() || stream == said
            }
        };
        if !fits {
            let is = self.image.as_ref().map_or_else(|| "a compressed stream".to_owned(), |image| stated_format(image));
            return refuse(format!("it takes the image for {stated}, which is {is} here"));
        }
        Ok(())
    }

    /// Whether the file at `path` is this one.
    fn is_at(&self, path: &Path) -> bool {
        let (Ok(there), Ok(here)) = (std::fs::metadata(path), self.file.file().metadata()) else { return false };
        if there.file_type().is_block_device() && here.file_type().is_block_device() {
            return there.rdev() == here.rdev();
        }
        (there.dev(), there.ino()) == (here.dev(), here.ino())
    }
}

fn shown(file: &FileStore) -> String {
    file.path().map_or_else(String::new, |path| path.display().to_string())
}

/// The format under which an overlay names `image` (see the module's text).
fn stated_format(image: &Image) -> String {
    let name = image.format().name();
    match image.stream() {
        Some(stream) => format!("{}+{name}", stream.name()),
        None if name == "vpc" && image.parent().is_some() => "vhd".into(),
        None => name.into(),
    }
}

fn same_format(a: &str, b: &str) -> bool {
    let known = |name: &str| {
        let (stream, format) = name.split_once('+').map_or((None, name), |(stream, format)| (Some(stream.to_owned()), format));
        (stream, drivers::by_name(format).map_or_else(|_| format.to_owned(), |driver| driver.name.to_owned()))
    };
    known(a) == known(b)
}

/// Opens the overlay's own file.
fn open_qcow2(store: Arc<dyn Store>, path: &Path, writable: bool, repair: bool, redo: Box<dyn RedoLog>) -> Result<Opened> {
    let mut no_files = |name: &Path, _: bool| -> Result<Arc<dyn Store>> {
        Err(Error::unsupported(format!("an overlay with a further file \"{}\"", name.display())))
    };
    let request = Request { store, path, writable, repair, redo, open_file: &mut no_files, snapshot_name: None };
    qcow2::open(request).map_err(|e| match e.kind() {
        Kind::InvalidFormat => e.context("the overlay is not a qcow2 image: name another file, which will be created").at_path(path),
        _ => e.at_path(path),
    })
}

/// Puts the overlay on the image.
fn assemble(opener: &Opener<'_>, overlay: Opened, base: Arc<Image>, path: &Path) -> Result<Arc<Image>> {
    let Opened { format, writeback, .. } = overlay;
    let image = Image::new(Parts {
        format,
        writeback,
        parent: Some(base),
        cache: opener.options.cache.clone().unwrap_or_else(Cache::shared),
        path: path.to_path_buf(),
        discard: !opener.options.ignore_discard,
        guard: None,
    })?;
    Ok(Arc::new(image))
}

/// The size of an overlay on `base`: whole sectors.
fn overlay_size(base: &Image) -> u64 {
    base.size().next_multiple_of(512)
}

/// Whoever may read the image may read its overlay; its owner may write it.
fn mode_like(base: &FileStore) -> u32 {
    let mode = base.file().metadata().map_or(0, |meta| if meta.is_file() { meta.mode() } else { 0 });
    0o600 | mode & 0o044
}

/// Whether an overlay could be made at `path`.
fn check_directory(path: &Path) -> Result<()> {
    let dir = parent_dir(path);
    rustix::fs::access(dir, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK)
        .map_err(|e| Error::io("the overlay cannot be created in this directory", e.into()).at_path(dir))
}

fn parent_dir(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// The way from the directory `from` to `to`, both absolute and without links, if they have more than the root in common. Never one that looks like the name of
/// a protocol.
fn relative(from: &Path, to: &Path) -> Option<PathBuf> {
    let (from, to): (Vec<Component<'_>>, Vec<Component<'_>>) = (from.components().collect(), to.components().collect());
    let common = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
    if common < 2 {
        return None;
    }
    let up = from.get(common..)?.iter().map(|_| OsStr::new(".."));
    let way: PathBuf = up.chain(to.get(common..)?.iter().map(|c| c.as_os_str())).collect();
    Some(if gate::looks_like_protocol(&way) { Path::new(".").join(way) } else { way })
}

#[cfg(test)]
mod tests {
    use super::relative;
    use std::path::{Path, PathBuf};

    #[test]
    fn relative_ways() {
        let way = |from: &str, to: &str| relative(Path::new(from), Path::new(to));
        assert_eq!(way("/a/b", "/a/b/c"), Some(PathBuf::from("c")));
        assert_eq!(way("/a/b/d", "/a/b/c"), Some(PathBuf::from("../c")));
        assert_eq!(way("/a/b", "/a/c/d"), Some(PathBuf::from("../c/d")));
        assert_eq!(way("/a/b", "/c/d"), None);
        assert_eq!(way("/", "/c"), None);
        assert_eq!(way("/a", "/a/nbd:x").as_deref(), Some(Path::new("./nbd:x")));
    }
}
