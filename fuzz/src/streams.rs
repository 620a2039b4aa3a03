//! Compressed streams: any bytes, or a valid stream that libFuzzer has damaged.
//!
//! A stream that opens reads the same whatever the order and size of the reads. What an independent decoder makes of the same bytes, if it accepts all of
//! them, is what the stream reads as.

use formats::Cache;
use formats::compressed::{self, Options, StreamKind};
use formats::store::{MemoryStore, Store};
use std::io::{IoSliceMut, Read};
use std::sync::Arc;

/// Bytes that are read, of streams that decode to more.
const MOST: u64 = 1 << 20;

fn options() -> Options {
    Options {
        keep_index: false,
        scratch_dir: Some(std::env::temp_dir()),
        scratch_limit: Some(16 << 20),
        memory_limit: 32 << 20,
        in_memory: 4 << 20,
        progress: None,
        ..Options::default()
    }
}

fn read(stream: &dyn Store, at: u64, len: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0xA5; len];
    let (a, b) = bytes.split_at_mut(len / 3);
    let got = stream.read_at(&mut [IoSliceMut::new(a), IoSliceMut::new(b)], at).ok()?;
    bytes.truncate(got);
    Some(bytes)
}

/// Opens the stream and reads it; `reference` decodes it some other way.
fn decode(kind: StreamKind, data: &[u8], reference: fn(&[u8]) -> Option<Vec<u8>>) {
    let first = data.get(..16).unwrap_or(data);
    // Other kinds have a target of their own; skippable frames may come first.
    if compressed::recognise(first).is_some_and(|found| found != kind) {
        return;
    }
    let store = Arc::new(MemoryStore::new(data.to_vec()));
    let Ok(Some(stream)) = compressed::open(store, &options(), &Arc::new(Cache::new(1 << 20))) else { return };
    let len = stream.len().expect("the length of an open stream is known");
    let end = len.min(MOST);
    // Forwards in odd pieces, then backwards in others.
    let mut whole: Vec<Option<u8>> = Vec::new();
    let mut at = 0;
    while at < end {
        let want = 4099.min(end - at) as usize;
        match read(&*stream, at, want) {
            Some(bytes) => {
                assert_eq!(bytes.len(), want, "a read at {at} of {len} is short");
                whole.extend(bytes.into_iter().map(Some));
            }
            None => whole.resize(whole.len() + want, None),
        }
        at += want as u64;
    }
    for at in (0..end).step_by(10_007).collect::<Vec<_>>().into_iter().rev() {
        let Some(bytes) = read(&*stream, at, 700.min(end - at) as usize) else { continue };
        for (index, byte) in bytes.into_iter().enumerate() {
            let before = whole[at as usize + index];
            assert!(before.is_none_or(|b| b == byte), "byte {} reads as {byte:#x} and as {before:x?}", at as usize + index);
        }
    }
    assert_eq!(read(&*stream, len, 10).map_or(0, |b| b.len()), 0, "there is something behind the end");
    if let Some(expected) = reference(data).filter(|_| len <= MOST) {
        assert_eq!(len, expected.len() as u64, "the length differs from another decoder's");
        for (at, (ours, theirs)) in whole.iter().zip(&expected).enumerate() {
            assert!(ours.is_none_or(|b| b == *theirs), "byte {at} differs from another decoder's");
        }
    }
}

/// All of a reader, unless it fails or is long.
fn all(reader: impl Read) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(MOST + 1).read_to_end(&mut bytes).ok()?;
    (bytes.len() as u64 <= MOST).then_some(bytes)
}

/// gzip and bgzf.
pub fn gzip(data: &[u8]) {
    decode(StreamKind::Gzip, data, |data| all(flate2::read::MultiGzDecoder::new(data)));
}

pub fn xz(data: &[u8]) {
    decode(StreamKind::Xz, data, |_| None);
}

pub fn zstd(data: &[u8]) {
    decode(StreamKind::Zstd, data, |data| all(zstd::stream::read::Decoder::new(data).ok()?));
}

pub fn bzip2(data: &[u8]) {
    decode(StreamKind::Bzip2, data, |_| None);
}

pub fn lz4(data: &[u8]) {
    decode(StreamKind::Lz4, data, |_| None);
}

pub fn lzip(data: &[u8]) {
    decode(StreamKind::Lzip, data, |_| None);
}
