//! Promises of the engine that no format can keep or break: what a flush, a close and a zero mean, what a guest cannot do to a raw image.

mod table;

use formats::redo;
use formats::store::failing::{FailingStore, Faults};
use formats::store::{MemoryStore, Store};
use formats::{BlockDevice, Cache, Kind as ErrorKind, OpenOptions, ZeroMode};
use std::io::{self, IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use table::{open, qemu, rows, scratch};

/// A raw image over `store`.
fn raw_over(store: Arc<dyn Store>) -> Arc<formats::Image> {
    open::over(&rows::raw(), Path::new("/nowhere/image.raw"), store, true, Box::new(redo::None)).unwrap()
}

/// Zeros of any length on a host that can neither punch holes nor zero ranges; counts what it is asked for.
#[derive(Default)]
struct Plain {
    len: u64,
    writes: AtomicU64,
    deallocations: AtomicU64,
}

impl Store for Plain {
    fn read_at(&self, bufs: &mut [IoSliceMut<'_>], _: u64) -> io::Result<usize> {
        bufs.iter_mut().for_each(|b| b.fill(1));
        Ok(bufs.iter().map(|b| b.len()).sum())
    }
    fn write_at(&self, _: &[IoSlice<'_>], _: u64) -> io::Result<()> {
        self.writes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.len)
    }
    fn set_len(&self, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn punch(&self, _: u64, _: u64) -> io::Result<bool> {
        self.deallocations.fetch_add(1, Ordering::SeqCst);
        Ok(false)
    }
    fn zero(&self, _: u64, _: u64) -> io::Result<bool> {
        self.deallocations.fetch_add(1, Ordering::SeqCst);
        Ok(false)
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_discard_where_the_host_cannot_ends_soon() {
    let store = Arc::new(Plain { len: 1 << 50, ..Plain::default() });
    let image = raw_over(store.clone());
    let started = Instant::now();
    image.discard(0, 1 << 50).unwrap();
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    assert!(store.deallocations.load(Ordering::SeqCst) < 1000);
}

#[test]
fn a_zero_that_is_not_cheap_does_nothing() {
    let store = Arc::new(Plain { len: 1 << 20, ..Plain::default() });
    let image = raw_over(store.clone());
    let error = image.zero(100, 100_000, ZeroMode::OnlyIfCheap).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!(store.writes.load(Ordering::SeqCst), 0, "it failed as if nothing was done, and wrote");
}

#[test]
fn a_failed_sync_stops_changes_flushes_and_close() {
    let failing = Arc::new(FailingStore::new(Arc::new(MemoryStore::new(vec![0; 1 << 20])), 1));
    let image = raw_over(failing.clone());
    open::write(&*image, 0, b"data").unwrap();
    failing.set(Faults { sync: true, ..Faults::default() });
    image.flush().unwrap_err();
    image.flush().unwrap_err();
    let error = open::write(&*image, 4096, b"more").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io, "{}", error.chain());
    image.zero(0, 4096, ZeroMode::MayUnmap).unwrap_err();
    image.discard(0, 4096).unwrap_err();
    image.close().unwrap_err();
    image.close().unwrap_err();
    image.flush().unwrap_err();
    assert_eq!(open::read(&*image, 0, 4).unwrap(), b"data", "reads go on");
}

#[test]
fn a_close_that_failed_can_be_tried_again() {
    let dir = scratch();
    let kind = rows::raw();
    let made = kind.make(dir.path());
    let inner: Arc<dyn Store> = Arc::new(MemoryStore::new(open::bytes(&made)));
    let failing = Arc::new(FailingStore::new(inner, 1));
    let image = raw_over(failing.clone());
    open::write(&*image, 0, b"data").unwrap();
    failing.set(Faults { sync: true, ..Faults::default() });
    image.close().unwrap_err();
    assert!(image.flush().is_err(), "what was never made durable was called so");
}

fn open_guessed(path: &Path) -> Arc<formats::Image> {
    formats::open(&OpenOptions::new(path)).unwrap()
}

/// A compressed stream may hold an image of any format, also behind a skippable frame.
#[test]
fn a_guest_cannot_make_a_raw_image_a_stream() {
    let dir = scratch();
    let path = dir.path().join("disk");
    let streams: [&[u8]; 5] = [
        b"\x1f\x8b\x08\0\0\0\0\0\0\x03",
        b"\x28\xb5\x2f\xfd\x24\x05",
        b"\xfd7zXZ\0\0\x04",
        b"\x50\x2a\x4d\x18\x04\0\0\0",
        b"\x5f\x2a\x4d\x18\x04\0\0\0",
    ];
    for stream in streams {
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let image = open_guessed(&path);
        let error = open::write(&*image, 0, stream).unwrap_err();
        assert_eq!(error.kind(), formats::Kind::Denied, "{stream:02x?}");
        image.close().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), vec![1; 1 << 20], "nothing was written");
    }
}

#[test]
fn a_guest_cannot_give_a_raw_image_a_signature() {
    let dir = scratch();
    let path = dir.path().join("disk");
    // Whole sectors, and a file that ends inside its last sector: the guest's disk is longer than the file.
    for len in [1 << 20, (1 << 20) - 100, 700, 100] {
        let device_len = (len as u64).next_multiple_of(512);
        let signatures: [(&[u8], u64); 6] = [
            (b"QFI\xfb\0\0\0\x03", 0),
            (b"KDMV", 0),
            (b"version=1\n", 0),
            (b"conectix", len as u64 - 512.min(len as u64)),
            (b"conectix", device_len - 512),
            (b"koly\0\0\0\x04", len as u64 - 600.min(len as u64)),
        ];
        for (signature, at) in signatures {
            std::fs::write(&path, vec![1; len]).unwrap();
            let image = open_guessed(&path);
            // In two steps, too: first half, then whole.
            let _ = open::write(&*image, at, &signature[..3]);
            let _ = open::write(&*image, at, signature);
            let _ = open::write(&*image, at, &signature[..3]);
            let _ = open::write(&*image, at + 3, &signature[3..]);
            image.flush().unwrap();
            drop(image);
            let again = open_guessed(&path);
            assert_eq!(again.format().name(), "raw", "{signature:?} at {at} of {len}");
        }
    }
}

#[test]
fn growth_does_not_move_a_guests_bytes_under_a_signature() {
    let dir = scratch();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![1; 64 << 10]).unwrap();
    let image = open_guessed(&path);
    // Not where the trailer of a DMG is looked for, but it will be when the file is a sector longer.
    open::write(&*image, (64 << 10) - 300, b"koly\0\0\0\x04").unwrap();
    let _ = image.grow((64 << 10) + 512);
    drop(image);
    assert_eq!(formats::open(&OpenOptions::new(&path)).unwrap().format().name(), "raw");
}

#[test]
fn a_backing_format_of_auto_is_no_format() {
    let dir = scratch();
    let (base, child) = (dir.path().join("base"), dir.path().join("child.qcow2"));
    std::fs::write(&base, vec![0; 1 << 20]).unwrap();
    qemu::must("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", child.to_str().unwrap()]);
    let mut bytes = std::fs::read(&child).unwrap();
    let at = bytes.windows(11).position(|w| w == b"\xe2\x79\x2a\xca\0\0\0\x03raw").unwrap();
    bytes[at + 7] = 4;
    bytes[at + 8..at + 12].copy_from_slice(b"auto");
    std::fs::write(&child, &bytes).unwrap();
    let Err(error) = formats::open(&OpenOptions::new(&child).read_only(true)) else {
        panic!("an image made us guess the format of its backing file");
    };
    assert!(error.to_string().contains("auto"), "{}", error.chain());
}

#[test]
fn images_and_other_owners_of_the_cache_do_not_meet() {
    let dir = scratch();
    let (source, path) = (dir.path().join("source"), dir.path().join("image.qcow2"));
    let content = table::guest::initial(1 << 20);
    std::fs::write(&source, &content).unwrap();
    qemu::must("qemu-img", &["convert", "-c", "-O", "qcow2", source.to_str().unwrap(), path.to_str().unwrap()]);
    let cache = Arc::new(Cache::new(64 << 20));
    // Somebody else keeps units under every number that this image's could have.
    for _ in 0..4 {
        let owner = Cache::new_owner();
        for unit in 0..40_000 {
            for key in [unit * 8, 0x50000 + unit] {
                let foreign = |out: &mut Vec<u8>| {
                    out.push(0xBD);
                    Ok(())
                };
                cache.get((owner, key), 1, foreign).unwrap();
            }
        }
    }
    let options = OpenOptions { cache: Some(cache), ..OpenOptions::new(&path).read_only(true) };
    let image = formats::open(&options).unwrap();
    assert!(open::read_all(&*image).unwrap() == content);
}
