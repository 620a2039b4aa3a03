//! The one place where files are opened: those the user named, and those that an image names.
//!
//! An image may come from anybody, and the names inside it (backing file, parent, extent) are its author's wish, not the user's. They are followed
//! only to regular files below the directory of the image that the user named, or below directories that the user allowed; never to device nodes, FIFOs,
//! or through symbolic links to elsewhere; at most [`MAX_DEPTH`] deep and never in a circle.

use crate::error::{Error, Kind, Result};
use crate::locks::{self, Use};
use crate::store::FileStore;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The longest chain of images.
pub const MAX_DEPTH: usize = 200;
/// The most files of a chain, with the extents of its images.
pub const MAX_FILES: usize = 8192;

/// How often a lock that somebody else holds is asked for again.
const LOCK_RETRIES: u32 = 10;
/// Time between.
const LOCK_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// What may be opened, and how.
#[derive(Clone, Debug)]
pub struct Gate {
    /// Directories, besides the image's own tree, in which files named by images may lie.
    pub allowed: Vec<PathBuf>,
    /// Directories in which the images (and overlays) that the user names have to lie, wherever symbolic links lead. `None`: anywhere.
    pub images: Option<Vec<PathBuf>>,
    /// The user may name block devices, which lie in no image directory.
    pub block_devices: bool,
    /// Take QEMU's locks. Off only where the file system has none.
    pub locking: bool,
    /// Follow names at all. Off for looking at an image without touching others (`info` of a stranger's file).
    pub follow: bool,
}

impl Default for Gate {
    fn default() -> Self {
        Self { allowed: Vec::new(), images: None, block_devices: true, locking: true, follow: true }
    }
}

/// The chain of files opened so far, from the one that the user named on.
#[derive(Debug)]
pub struct Chain {
    /// Real directory of the user's image.
    root: PathBuf,
    /// Device and inode of every file.
    seen: Vec<(u64, u64)>,
    /// Images: files that are no extents of one.
    images: usize,
}

impl Gate {
    /// Opens the file that the user named.
    ///
    /// # Errors
    /// `NotFound`, `Denied`, `Locked`; `InvalidOption` for a directory or FIFO.
    pub fn open_named(&self, path: &Path, writable: bool) -> Result<(Arc<FileStore>, Chain)> {
        let file = self.open_within(path, writable, true)?;
        let meta = file.metadata().map_err(|e| Error::io("cannot look at the file", e).at_path(path))?;
        let kind = meta.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let what = if kind.is_dir() { "a directory" } else { "neither a file nor a block device" };
            return Err(Error::new(Kind::InvalidOption, format!("this is {what}, not a disk image")).at_path(path));
        }
        self.lock(&file, path, if writable { Use::Write } else { Use::Read })?;
        let root = real_path(&file, path)?.parent().map(Path::to_path_buf).unwrap_or_default();
        let chain = Chain { root, seen: vec![(meta.dev(), meta.ino())], images: 1 };
        let store = FileStore::new(file, path).map_err(|e| Error::io("cannot look at the file", e).at_path(path))?;
        Ok((Arc::new(store), chain))
    }

    /// Opens an overlay that the user named, to be put on the image of `chain`: a regular file that is not part of the chain.
    ///
    /// # Errors
    /// As for [`Self::open_named`].
    pub fn open_overlay(&self, chain: &mut Chain, path: &Path, writable: bool) -> Result<Arc<FileStore>> {
        let file = self.open_within(path, writable, false)?;
        let meta = file.metadata().map_err(|e| Error::io("cannot look at the file", e).at_path(path))?;
        if !meta.is_file() {
            return Err(Error::new(Kind::InvalidOption, "an overlay is a regular file, which this is not").at_path(path));
        }
        let id = (meta.dev(), meta.ino());
        if chain.seen.contains(&id) {
            return Err(Error::new(
                Kind::InvalidOption,
                "this is the image itself, or one of those below it, and cannot be its own overlay",
            )
            .at_path(path));
        }
        self.lock(&file, path, if writable { Use::Write } else { Use::Read })?;
        chain.seen.push(id);
        Ok(Arc::new(FileStore::new(file, path).map_err(|e| Error::io("cannot look at the file", e).at_path(path))?))
    }

    /// Opens an image that the one at `by` names, read-only unless `writable`. Relative names count from `by`'s directory.
    ///
    /// # Errors
    /// As for [`Self::open_named`]; `Denied` when the policy does not allow the name, with what to do about it.
    pub fn open_implicit(&self, chain: &mut Chain, by: &Path, name: &Path, writable: bool) -> Result<(Arc<FileStore>, PathBuf)> {
        if self.follow && chain.images >= MAX_DEPTH {
            let why = format!("which would be file {} of its chain; {MAX_DEPTH} are allowed", MAX_DEPTH + 1);
            return Err(refusal(by, name, &why));
        }
        let opened = self.open_extent(chain, by, name, writable)?;
        chain.images += 1;
        Ok(opened)
    }

    /// Opens a part of the image at `by` (an extent, a data file), which does not count as one more image of the chain.
    ///
    /// # Errors
    /// As for [`Self::open_implicit`].
    pub fn open_extent(&self, chain: &mut Chain, by: &Path, name: &Path, writable: bool) -> Result<(Arc<FileStore>, PathBuf)> {
        let shown = name.display();
        let refuse = |why: &str| refusal(by, name, why);
        if !self.follow {
            return Err(refuse("which is not to be followed"));
        }
        if chain.seen.len() >= MAX_FILES {
            return Err(refuse(&format!("which would be one more than the {MAX_FILES} files that are allowed")));
        }
        if looks_like_protocol(name) {
            return Err(refuse("which is the name of a protocol or an option list, not of a file; such names are not followed"));
        }
        let path = by.parent().unwrap_or(Path::new("")).join(name);
        // Looked at before it is opened (opening a device can have effects) and again after (it may have been exchanged).
        let meta = std::fs::metadata(&path)
            .map_err(|e| Error::io(format!("cannot open the file \"{shown}\" that the image names"), e).at_path(by))?;
        if !meta.is_file() {
            return Err(refuse("which is not a regular file"));
        }
        let file = open(&path, writable)?;
        let meta = file.metadata().map_err(|e| Error::io("cannot look at the file", e).at_path(&path))?;
        if !meta.is_file() {
            return Err(refuse("which is not a regular file"));
        }
        let real = real_path(&file, &path)?;
        let allowed = real.starts_with(&chain.root) || self.allowed.iter().any(|d| d.canonicalize().is_ok_and(|d| real.starts_with(d)));
        if !allowed {
            return Err(refuse(&format!(
                "which lies outside {} (allow its directory, if the image is to be trusted: --allow {})",
                chain.root.display(),
                real.parent().unwrap_or(Path::new("/")).display()
            )));
        }
        let id = (meta.dev(), meta.ino());
        if chain.seen.contains(&id) {
            return Err(refuse("which is part of its own chain already: the images refer to each other in a circle"));
        }
        self.lock(&file, &path, if writable { Use::Write } else { Use::Read })?;
        chain.seen.push(id);
        let store = FileStore::new(file, &path).map_err(|e| Error::io("cannot look at the file", e).at_path(&path))?;
        Ok((Arc::new(store), path))
    }

    /// Whether the user may name a new file at `path`: its directory has to lie in an image directory.
    ///
    /// # Errors
    /// `Denied`; `NotFound` when the directory is not there.
    pub fn may_create(&self, path: &Path) -> Result<()> {
        if self.images.is_none() {
            return Ok(());
        }
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let real = parent.canonicalize().map_err(|e| Error::io("cannot look at the directory of the new file", e).at_path(path))?;
        self.within(&real, path)
    }

    /// Opens a file that the user named: regular, or a block device where `devices` and the policy say so. With a policy nothing
    /// else is even touched, and nothing outside the image directories: the name is looked up once, and what it led to is opened, whatever becomes of the name.
    fn open_within(&self, path: &Path, writable: bool, devices: bool) -> Result<File> {
        if self.images.is_none() && self.block_devices {
            return open(path, writable);
        }
        let found = OpenOptions::new().read(true).custom_flags(nix::libc::O_PATH | nix::libc::O_CLOEXEC).open(path);
        let found = found.map_err(|e| Error::io(how(writable), e).at_path(path))?;
        let kind = found.metadata().map_err(|e| Error::io("cannot look at the file", e).at_path(path))?.file_type();
        if kind.is_block_device() && devices {
            if !self.block_devices {
                let why = "this is a block device, and the configuration allows images in files only ('block-devices = true' allows it)";
                return Err(Error::new(Kind::Denied, why).at_path(path));
            }
        } else {
            self.within(&real_path(&found, path)?, path)?;
            if !kind.is_file() {
                return Err(Error::new(Kind::InvalidOption, "this is not a regular file, and so no disk image").at_path(path));
            }
        }
        // The very file that was looked at. Without /proc there is no way to it, and no other is taken.
        open(Path::new(&format!("/proc/self/fd/{}", found.as_raw_fd())), writable).map_err(|error| error.at_path(path))
    }

    fn within(&self, real: &Path, path: &Path) -> Result<()> {
        let Some(directories) = &self.images else { return Ok(()) };
        if directories.iter().any(|dir| dir.canonicalize().is_ok_and(|dir| real.starts_with(dir))) {
            return Ok(());
        }
        let why = "this does not lie in one of the image directories of the configuration ('image-directories'), or a symbolic link leads out of them";
        Err(Error::new(Kind::Denied, why).at_path(path))
    }

    fn lock(&self, file: &File, path: &Path, how: Use) -> Result<()> {
        if !self.locking {
            return Ok(());
        }
        // Who only looks (`qemu-img info`, a check of a configuration) holds its locks for a moment.
        for _ in 0..LOCK_RETRIES {
            match locks::lock(file, path, how) {
                Err(error) if error.kind() == Kind::Locked => std::thread::sleep(LOCK_PAUSE),
                result => return result,
            }
        }
        locks::lock(file, path, how)
    }
}

/// The most files beside an image that are looked into for its parent.
const MAX_BESIDE: usize = 10_000;

/// For images that know their parent by its contents alone: the name (as one that the image at `by` could have, for [`Gate::open_implicit`] to allow or not) of
/// the first file in `directory`, counted from that of `by`, of which `wanted` says so by its first `len` bytes. Only regular files are looked into, no links.
pub(crate) fn find_beside(by: &Path, directory: &Path, len: usize, wanted: impl Fn(&[u8]) -> bool) -> Option<PathBuf> {
    let place = by.parent().unwrap_or(Path::new("")).join(directory);
    let place = if place.as_os_str().is_empty() { PathBuf::from(".") } else { place };
    let mut names: Vec<_> = std::fs::read_dir(place).ok()?.take(MAX_BESIDE).flatten().collect();
    names.sort_by_key(std::fs::DirEntry::file_name);
    names.into_iter().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file())).find_map(|entry| {
        let flags = nix::libc::O_NONBLOCK | nix::libc::O_NOFOLLOW | nix::libc::O_CLOEXEC;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(entry.path()).ok()?;
        let mut head = vec![0; len];
        file.read_exact_at(&mut head, 0).ok()?;
        wanted(&head).then(|| directory.join(entry.file_name()))
    })
}

fn refusal(by: &Path, name: &Path, why: &str) -> Error {
    Error::new(Kind::Denied, format!("the image names the file \"{}\", {why}", name.display())).at_path(by)
}

fn open(path: &Path, writable: bool) -> Result<File> {
    // NONBLOCK: a FIFO must not make us wait. It means nothing for files and block devices.
    let flags = nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY | nix::libc::O_CLOEXEC;
    OpenOptions::new().read(true).write(writable).custom_flags(flags).open(path).map_err(|e| Error::io(how(writable), e).at_path(path))
}

fn how(writable: bool) -> &'static str {
    if writable { "cannot open the image for writing" } else { "cannot open the image" }
}

/// Where an open file really is.
pub(crate) fn real_path(file: &File, path: &Path) -> Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .or_else(|_| path.canonicalize())
        .map_err(|e| Error::io("cannot find out where the file really is", e).at_path(path))
}

/// "nbd:…", "json:{…}", "https://…": a colon before any slash.
pub(crate) fn looks_like_protocol(name: &Path) -> bool {
    let bytes = name.as_os_str().as_encoded_bytes();
    bytes.iter().position(|b| *b == b':').is_some_and(|colon| !bytes[..colon].contains(&b'/'))
}
