//! Decoding of compressed clusters: raw deflate, or one zstd frame.
//!
//! The length in an L2 entry is rounded up to sectors, so whatever follows the stream's end is ignored.

use super::header::Compression;
use crate::error::{Error, Result};
use std::cell::RefCell;

thread_local! {
    static INFLATE: RefCell<libdeflater::Decompressor> = RefCell::new(libdeflater::Decompressor::new());
    static INPUT: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Calls `with` with a buffer of `len` bytes that is kept for the thread's next call.
pub(crate) fn with_input<R>(len: usize, with: impl FnOnce(&mut [u8]) -> R) -> R {
    INPUT.with_borrow_mut(|buf| {
        buf.resize(len, 0);
        with(buf)
    })
}

/// Fills `out` with the cluster in `input`.
pub(super) fn decode(kind: Compression, input: &[u8], out: &mut [u8]) -> Result<()> {
    let done = match kind {
        Compression::Zlib => inflate(input, out),
        Compression::Zstd => zstd(input, out),
    };
    let shorter = |n: usize| Error::corrupt(format!("a compressed cluster holds {n} bytes instead of {}", out.len()));
    match done {
        Some(n) if n == out.len() => Ok(()),
        Some(n) => Err(shorter(n)),
        None => Err(Error::corrupt("a compressed cluster cannot be decoded")),
    }
}

/// Fills `out` with the raw deflate stream at the start of `input`, if there is as much in it: also for what qcow's version 1 compresses.
pub(crate) fn fill_from_deflate(input: &[u8], out: &mut [u8]) -> bool {
    inflate(input, out) == Some(out.len())
}

fn inflate(input: &[u8], out: &mut [u8]) -> Option<usize> {
    let whole = INFLATE.with_borrow_mut(|d| d.deflate_decompress(input, out));
    whole.ok().or_else(|| inflate_part(input, out))
}

/// For streams that go on beyond the cluster or lack their end: what matters is that the cluster is full.
fn inflate_part(input: &[u8], out: &mut [u8]) -> Option<usize> {
    let mut stream = flate2::Decompress::new(false);
    // At an error the output so far is not to be trusted to be the cluster; a stream that was cut short is no error.
    stream.decompress(input, out, flate2::FlushDecompress::Finish).ok()?;
    usize::try_from(stream.total_out()).ok()
}

fn zstd(input: &[u8], out: &mut [u8]) -> Option<usize> {
    let len = zstd::zstd_safe::find_frame_compressed_size(input).ok()?;
    // Into a buffer of the right size at once: no window is allocated, whatever the frame asks for.
    zstd::zstd_safe::decompress(out, input.get(..len)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        (0..65536u32).map(|i| (i / 7 % 251) as u8 ^ (i >> 11) as u8).collect()
    }

    #[test]
    fn deflate_with_garbage_behind_it() {
        let data = sample();
        let mut deflated = vec![0; 70000];
        let n = libdeflater::Compressor::new(libdeflater::CompressionLvl::default()).deflate_compress(&data, &mut deflated).unwrap();
        deflated.truncate(n);
        deflated.extend([0xA5; 511]);
        let mut out = vec![0; data.len()];
        decode(Compression::Zlib, &deflated, &mut out).unwrap();
        assert_eq!(out, data);
        // A shorter cluster than the stream is full all the same, as in QEMU.
        let mut part = vec![0; 512];
        decode(Compression::Zlib, &deflated, &mut part).unwrap();
        assert_eq!(part, data[..512]);
        let mut longer = vec![0; data.len() + 1];
        assert!(decode(Compression::Zlib, &deflated, &mut longer).is_err());
        assert!(decode(Compression::Zlib, &[0xff; 512], &mut out).is_err());
    }

    #[test]
    fn zstd_with_garbage_behind_it() {
        let data = sample();
        let mut frame = zstd::bulk::compress(&data, 3).unwrap();
        frame.extend([0x5A; 300]);
        let mut out = vec![0; data.len()];
        decode(Compression::Zstd, &frame, &mut out).unwrap();
        assert_eq!(out, data);
        assert!(decode(Compression::Zstd, &frame[..100], &mut out).is_err());
        assert!(decode(Compression::Zstd, &[0; 512], &mut out).is_err());
    }
}
