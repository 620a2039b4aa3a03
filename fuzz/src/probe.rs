//! Files of unknown format: any bytes, opened as a user would without saying what they are.
//!
//! A disk that was taken for raw stays raw, whatever its guest writes to it.

use super::input::Input;
use formats::{BlockDevice, Cache, OpenOptions};
use std::io::{IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

const MAX_FILE: usize = 1 << 20;
const SCRIPT: usize = 600;

/// A directory for this process's file, in memory if there is such a place.
fn place() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let root = if Path::new("/dev/shm").is_dir() { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
        let dir = root.join(format!("img-tcmu-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory for the image");
        dir
    })
}

pub fn raw_probe(data: &[u8]) {
    let mut input = Input::new(data);
    let writable = input.flag();
    let mut script = Input::new(input.take(SCRIPT));
    let bytes = input.rest();
    let path = place().join(format!("image-{:?}", std::thread::current().id()));
    std::fs::write(&path, &bytes[..bytes.len().min(MAX_FILE)]).expect("the file can be written");
    look(&path, writable, &mut script);
    let _ = std::fs::remove_file(&path);
}

fn open(path: &Path, writable: bool) -> formats::Result<Arc<formats::Image>> {
    let options = OpenOptions { cache: Some(Arc::new(Cache::new(4 << 20))), ..OpenOptions::new(path).format("auto").read_only(!writable) };
    formats::open(&options)
}

fn look(path: &Path, writable: bool, script: &mut Input<'_>) {
    let Ok(image) = open(path, writable) else { return };
    let size = image.limits().size;
    let raw = image.format().name() == "raw" && !image.limits().read_only;
    let mut buffer = vec![0; 5000];
    for at in [0, size / 2, size.saturating_sub(700)] {
        let len = (size - at).min(5000) as usize;
        let _ = image.read(&mut [IoSliceMut::new(&mut buffer[..len])], at);
        if len > 0 {
            let _ = image.map(at, len as u64);
        }
    }
    if !raw || size == 0 {
        let _ = image.check(false);
        return;
    }
    for _ in 0..4 {
        let at = match script.u8() % 4 {
            0 => 0,
            1 => u64::from(script.u16()),
            2 => size.saturating_sub(script.below(1100)),
            _ => script.below(size),
        };
        let len = usize::from(script.u8());
        let bytes = script.take(len.min((size - at.min(size)) as usize));
        let _ = match script.u8() % 5 {
            0 => image.zero(at, bytes.len() as u64, formats::ZeroMode::MayUnmap),
            1 => image.discard(at, bytes.len() as u64),
            2 => image.grow(size + u64::from(script.u8()) * 512),
            _ => image.write(&[IoSlice::new(bytes)], at),
        };
        if script.is_empty() {
            break;
        }
    }
    let size = image.limits().size;
    let before = image.close();
    drop(image);
    if before.is_err() {
        return;
    }
    let image = open(path, true).unwrap_or_else(|error| panic!("a guest made its raw disk unusable: {}", error.chain()));
    assert_eq!(image.format().name(), "raw", "a guest made its raw disk look like another format");
    assert!(!image.limits().read_only && image.limits().size == size, "a guest made its raw disk look like a stream");
}
