//! Stored indexes: what took a pass over a whole stream to learn is kept in the cache directory.
//!
//! An index belongs to a file of a certain length, time of change and contents (a hash of its first and last bytes and of samples between): for any other file it is not
//! found. It ends with a checksum of all of it; one that is damaged or cut short is not used, and is replaced. It is trusted no further than that: every bound in it is
//! checked, and codecs check what they decode by it.

use super::codec::Codec;
use super::gzip::Windows;
use super::options::Options;
use super::source::Source;
use super::units::Units;
use crate::error::Result;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"ITCMUIX1";
/// magic, codec name (16), file length, seconds, nanoseconds, hash, length of the body, length of the windows.
const HEADER: usize = 8 + 16 + 6 * 8;
/// An index is never larger than this without its windows.
const MAX_BODY: u64 = 512 << 20;
/// The directory holds at most so many bytes of indexes; the oldest go first.
const MAX_KEPT: u64 = 1 << 30;
const SUFFIX: &str = "index";

/// What identifies a compressed file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    len: u64,
    seconds: u64,
    nanoseconds: u64,
    hash: u64,
}

/// Where the index of one file is, or would be.
pub(super) struct Sidecar {
    path: PathBuf,
    identity: Identity,
}

/// The windows of a stored index: `len` bytes at `at` of `file`.
pub(super) struct Stored {
    pub(super) file: File,
    pub(super) at: u64,
    pub(super) len: u64,
}

impl Sidecar {
    /// The place for the index of `source`; `None` if the file is not one of the file system, or there is no directory for indexes.
    pub(super) fn locate(source: &Source, options: &Options) -> Result<Option<Self>> {
        if !options.keep_index {
            return Ok(None);
        }
        let (Some(path), Some(dir)) = (source.store().path(), options.index_dir()) else { return Ok(None) };
        let Ok(metadata) = std::fs::metadata(path) else { return Ok(None) };
        if metadata.len() != source.len() || !metadata.is_file() {
            return Ok(None);
        }
        let hash = sample_hash(source)?;
        let identity = Identity { len: source.len(), seconds: metadata.mtime() as u64, nanoseconds: metadata.mtime_nsec() as u64, hash };
        Ok(Some(Self { path: dir.join(format!("{hash:016x}-{:x}.{SUFFIX}", identity.len)), identity }))
    }

    /// The stored index for `codec`, if there is a sound one for exactly this file: its units, its body from where the codec's part begins, and its windows.
    pub(super) fn load(&self, codec: &str) -> Option<(Units, Vec<u8>, Stored)> {
        match self.try_load(codec) {
            Ok(found) => Some(found),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::info!("{}: this index is not used: {error}", self.path.display());
                }
                None
            }
        }
    }

    fn try_load(&self, codec: &str) -> io::Result<(Units, Vec<u8>, Stored)> {
        let file = File::open(&self.path)?;
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        let (fixed, numbers) = header.split_at(HEADER - 16);
        if fixed != self.header(codec).as_slice() {
            return Err(io::Error::other("it was made for another version of the file"));
        }
        let number =
            |at: usize| numbers.get(at..at + 8).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let (body_len, windows_len) = (number(0), number(8));
        let at = HEADER as u64 + body_len;
        let end = at.checked_add(windows_len);
        if body_len > MAX_BODY || end.and_then(|end| end.checked_add(4)) != Some(file.metadata()?.len()) {
            return Err(io::Error::other("it is cut short"));
        }
        check_sum(&file)?;
        let mut body = vec![0; body_len as usize];
        file.read_exact_at(&mut body, HEADER as u64)?;
        let mut decoder = Decoder(&body);
        let units = decoder.units(self.identity.len).ok_or_else(|| io::Error::other("it contradicts itself"))?;
        let rest = decoder.0.to_vec();
        Ok((units, rest, Stored { file, at, len: windows_len }))
    }

    fn header(&self, codec: &str) -> Vec<u8> {
        let mut header = MAGIC.to_vec();
        let mut name = [0; 16];
        name.iter_mut().zip(codec.bytes()).for_each(|(to, from)| *to = from);
        header.extend_from_slice(&name);
        let Identity { len, seconds, nanoseconds, hash } = self.identity;
        [len, seconds, nanoseconds, hash].iter().for_each(|number| header.extend_from_slice(&number.to_le_bytes()));
        header
    }

    /// Stores an index. Whatever fails is only logged: the next time it is made again.
    pub(super) fn save(&self, units: &Units, codec: &dyn Codec) {
        let mut body = Encoder::default();
        body.units(units);
        if !codec.save(&mut body) || body.0.len() as u64 > MAX_BODY {
            return;
        }
        if let Err(error) = self.try_save(codec.name(), &body.0, codec.windows()) {
            tracing::warn!("{}: cannot keep the index: {error}", self.path.display());
        }
    }

    fn try_save(&self, codec: &str, body: &[u8], windows: Option<&Windows>) -> io::Result<()> {
        let dir = self.path.parent().unwrap_or(Path::new("."));
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        prune(dir, MAX_KEPT);
        let windows_len = windows.map_or(0, Windows::len);
        // A name of its own, so that two processes that index the same file do not write into one.
        let temporary = self.path.with_extension(format!("{}.tmp", std::process::id()));
        let written = (|| {
            let mut out = Summed { to: BufWriter::new(File::create(&temporary)?), sum: crc32fast::Hasher::new() };
            out.write_all(&self.header(codec))?;
            out.write_all(&(body.len() as u64).to_le_bytes())?;
            out.write_all(&windows_len.to_le_bytes())?;
            out.write_all(body)?;
            let mut buffer = vec![0; 1 << 20];
            let mut at = 0;
            while let (Some(windows), true) = (windows, at < windows_len) {
                let part = buffer.len().min((windows_len - at) as usize);
                let buffer = buffer.get_mut(..part).unwrap_or_default();
                windows.read_kept(at, buffer)?;
                out.write_all(buffer)?;
                at += part as u64;
            }
            let sum = out.sum.finalize();
            out.to.write_all(&sum.to_le_bytes())?;
            out.to.flush()?;
            std::fs::rename(&temporary, &self.path)
        })();
        if written.is_err() {
            // It may never have been made.
            let _ = std::fs::remove_file(&temporary);
        }
        written
    }
}

struct Summed<W> {
    to: W,
    sum: crc32fast::Hasher,
}

impl<W: Write> Write for Summed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.sum.update(bytes.get(..written).unwrap_or_default());
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Checks the CRC-32 at the end of an index.
fn check_sum(file: &File) -> io::Result<()> {
    let end = file.metadata()?.len().saturating_sub(4);
    let mut sum = crc32fast::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < end {
        let part = buffer.len().min((end - at) as usize);
        let buffer = buffer.get_mut(..part).unwrap_or_default();
        file.read_exact_at(buffer, at)?;
        sum.update(buffer);
        at += part as u64;
    }
    let mut stored = [0; 4];
    file.read_exact_at(&mut stored, end)?;
    if u32::from_le_bytes(stored) == sum.finalize() { Ok(()) } else { Err(io::Error::other("its checksum is wrong")) }
}

/// Removes the oldest indexes until those left have at most `keep` bytes.
fn prune(dir: &Path, keep: u64) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    let mut indexes: Vec<_> = entries
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|suffix| suffix == SUFFIX))
        .filter_map(|entry| entry.metadata().ok().map(|data| (data.mtime(), data.len(), entry.path())))
        .collect();
    indexes.sort();
    let mut total: u64 = indexes.iter().map(|(_, len, _)| len).sum();
    for (_, len, path) in indexes {
        if total <= keep {
            return;
        }
        // Another process may have been faster.
        let _ = std::fs::remove_file(path);
        total -= len;
    }
}

/// A hash of the file's first and last 64 KiB and of 32 samples between.
fn sample_hash(source: &Source) -> Result<u64> {
    const ENDS: usize = 64 << 10;
    const SAMPLE: usize = 4 << 10;
    let (mut ieee, mut castagnoli) = (crc32fast::Hasher::new(), 0);
    let mut buffer = vec![0; ENDS];
    let mut add = |at: u64, len: usize| -> Result<()> {
        let buffer = buffer.get_mut(..len).unwrap_or_default();
        let got = source.read_some(buffer, at)?;
        let bytes = buffer.get(..got).unwrap_or_default();
        ieee.update(bytes);
        castagnoli = crc32c::crc32c_append(castagnoli, bytes);
        Ok(())
    };
    add(0, ENDS)?;
    if source.len() > ENDS as u64 {
        for sample in 1..32 {
            add((u128::from(source.len()) * sample / 32) as u64, SAMPLE)?;
        }
        add(source.len() - ENDS as u64, ENDS)?;
    }
    Ok(u64::from(ieee.finalize()) << 32 | u64::from(castagnoli))
}

/// Appends numbers to an index: seven bits a byte, lowest first, the high bit set but for the last.
#[derive(Default)]
pub(super) struct Encoder(Vec<u8>);

impl Encoder {
    pub(super) fn put(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    fn units(&mut self, units: &Units) {
        self.put(units.spans().len() as u64);
        let mut last = 0_u64;
        for span in units.spans() {
            self.put(span.len);
            self.put(span.coded_len);
            if !span.is_zero() {
                self.put(span.coded_at.wrapping_sub(last));
                last = span.coded_at.wrapping_add(span.coded_len);
            }
        }
    }
}

/// Takes the numbers again.
pub(super) struct Decoder<'a>(&'a [u8]);

impl<'a> Decoder<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn get(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first()?;
            self.0 = rest;
            number |= u64::from(byte & 0x7f).checked_shl(shift)?;
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }

    fn units(&mut self, file_len: u64) -> Option<Units> {
        let count = self.get()?;
        let mut units = Units::default();
        let mut last = 0_u64;
        for _ in 0..count {
            let (len, coded_len) = (self.get()?, self.get()?);
            let mut coded_at = 0;
            if coded_len > 0 {
                coded_at = last.wrapping_add(self.get()?);
                last = coded_at.checked_add(coded_len).filter(|end| *end <= file_len)?;
            }
            units.push(len, coded_at, coded_len).ok().filter(|added| *added)?;
        }
        Some(units)
    }
}
