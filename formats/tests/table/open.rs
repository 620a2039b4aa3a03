//! Opening images of a kind: as files, through the gate, and over stores of the test's own.

use super::{Kind, Made};
use formats::drivers::{self, Opened, Request};
use formats::image::Parts;
use formats::redo::RedoLog;
use formats::store::{FileStore, Store};
use formats::{BlockDevice, Cache, Image, OpenOptions, Result, compressed};
use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::Arc;

/// Opens the file.
pub fn file(kind: &Kind, path: &Path, read_only: bool) -> Arc<Image> {
    let mut options = OpenOptions::new(path).read_only(read_only);
    // What is said to be raw is no stream.
    options.format = (!kind.stream || kind.format != "raw").then(|| kind.format.to_string());
    options.parent_format = kind.parent_format.map(str::to_owned);
    formats::open(&options).unwrap_or_else(|e| panic!("{}: {}", kind.name, e.chain()))
}

/// Opens an image that lies in `store` as if in the file of `made`; its extents and parents are files in the same directory.
pub fn over(kind: &Kind, path: &Path, store: Arc<dyn Store>, writable: bool, redo: Box<dyn RedoLog>) -> Result<Arc<Image>> {
    over_files(kind, path, store, None, writable, redo)
}

/// Likewise, with the only further file that the image names in a store, too, if there is one.
pub fn over_files(
    kind: &Kind,
    path: &Path,
    store: Arc<dyn Store>,
    second: Option<Arc<dyn Store>>,
    writable: bool,
    redo: Box<dyn RedoLog>,
) -> Result<Arc<Image>> {
    let mut open_file = |name: &Path, writable: bool| -> Result<Arc<dyn Store>> {
        if let Some(second) = &second {
            return Ok(second.clone());
        }
        let there = path.parent().unwrap().join(name);
        if there.parent() != path.parent() || !there.is_file() {
            return Err(formats::Error::new(formats::Kind::NotFound, format!("the test has no file {}", name.display())));
        }
        let file = std::fs::File::options().read(true).write(writable).open(&there).unwrap();
        Ok(Arc::new(FileStore::new(file, there).unwrap()))
    };
    let store = if kind.stream { decoded(store)? } else { store };
    let request = Request { store, path, writable, repair: false, redo, open_file: &mut open_file, snapshot_name: None };
    let Opened { format, writeback, parent } = (drivers::by_name(kind.format)?.open)(request)?;
    let parent = match parent {
        None => None,
        Some(parent) => {
            let file = path.parent().unwrap().join(parent.names.first().ok_or_else(|| formats::Error::corrupt("no parent's name"))?);
            let name = kind
                .parent_format
                .map(str::to_owned)
                .or(parent.format)
                .ok_or_else(|| formats::Error::corrupt("the image does not say its parent's format"))?;
            let below = formats::open(&OpenOptions::new(file).format(name).read_only(true))?;
            if let Some(verify) = parent.verify {
                verify(below.format())?;
            }
            Some(below)
        }
    };
    let parts =
        Parts { format, writeback, parent, cache: Arc::new(Cache::new(8 << 20)), path: path.to_path_buf(), discard: true, guard: None };
    Ok(Arc::new(Image::new(parts)?))
}

/// The bytes in a compressed stream, with little memory.
fn decoded(stream: Arc<dyn Store>) -> Result<Arc<dyn Store>> {
    let options = compressed::Options {
        keep_index: false,
        scratch_limit: Some(64 << 20),
        in_memory: 4 << 20,
        memory_limit: 32 << 20,
        progress: None,
        ..compressed::Options::default()
    };
    compressed::open(stream, &options, &Arc::new(Cache::new(8 << 20)))?.ok_or_else(|| formats::Error::corrupt("no stream"))
}

/// The bytes of the image file.
pub fn bytes(made: &Made) -> Vec<u8> {
    std::fs::read(&made.file).unwrap()
}

/// All bytes of a device.
pub fn read_all(image: &dyn BlockDevice) -> Result<Vec<u8>> {
    let mut bytes = vec![0xEE; usize::try_from(image.limits().size).unwrap()];
    for (index, part) in bytes.chunks_mut(1 << 20).enumerate() {
        image.read(&mut [IoSliceMut::new(part)], (index << 20) as u64)?;
    }
    Ok(bytes)
}

/// `len` bytes at `at`.
pub fn read(image: &dyn BlockDevice, at: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0xEE; len];
    image.read(&mut [IoSliceMut::new(&mut bytes)], at)?;
    Ok(bytes)
}

/// Writes one buffer.
pub fn write(image: &dyn BlockDevice, at: u64, bytes: &[u8]) -> Result<()> {
    image.write(&[IoSlice::new(bytes)], at)
}
