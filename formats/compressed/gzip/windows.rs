//! Where the windows of restart points are kept: deflated, in memory while they are few, in a file without a name when they are many, in the stored index
//! once there is one.

use super::super::scratch::nameless_file;
use crate::error::{Error, Kind, Result};
use libdeflater::{CompressionLvl, Compressor, Decompressor};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// More than this many bytes of windows go to a file.
const IN_MEMORY: usize = 16 << 20;

/// The windows of one stream. Append, then read by any number of threads.
pub(in super::super) struct Windows {
    memory: Vec<u8>,
    /// The windows before those in memory.
    file: Option<File>,
    /// Offset in the file of window byte 0.
    file_at: u64,
    /// Bytes in the file.
    in_file: u64,
    scratch_dir: PathBuf,
}

impl Windows {
    /// None yet; a file is made in `scratch_dir` when one is needed.
    pub(in super::super) fn new(scratch_dir: PathBuf) -> Self {
        Self { memory: Vec::new(), file: None, file_at: 0, in_file: 0, scratch_dir }
    }

    /// Those that lie in `file`, `len` bytes from `at`.
    pub(in super::super) fn stored(file: File, at: u64, len: u64) -> Self {
        Self { memory: Vec::new(), file: Some(file), file_at: at, in_file: len, scratch_dir: PathBuf::new() }
    }

    pub(in super::super) fn len(&self) -> u64 {
        self.in_file + self.memory.len() as u64
    }

    /// Keeps a window: where, and how long it is as it is kept.
    pub(super) fn append(&mut self, window: &[u8], deflate: &mut Compressor) -> Result<(u64, u32)> {
        let at = self.len();
        let mut coded = vec![0; deflate.deflate_compress_bound(window.len())];
        let len = deflate
            .deflate_compress(window, &mut coded)
            .map_err(|error| Error::new(Kind::Io, format!("cannot compress a window: {error}")))?;
        self.memory.extend_from_slice(coded.get(..len).unwrap_or_default());
        if self.memory.len() > IN_MEMORY {
            self.spill()
                .map_err(|error| Error::io(format!("cannot keep the index of a gzip stream in {}", self.scratch_dir.display()), error))?;
        }
        Ok((at, len as u32))
    }

    fn spill(&mut self) -> io::Result<()> {
        if self.file.is_none() {
            self.file = Some(nameless_file(&self.scratch_dir)?);
        }
        if let Some(file) = &self.file {
            file.write_all_at(&self.memory, self.file_at + self.in_file)?;
        }
        self.in_file += self.memory.len() as u64;
        self.memory.clear();
        Ok(())
    }

    /// The window of `len` kept bytes at `at`.
    pub(super) fn read(&self, at: u64, len: u32) -> Result<Vec<u8>> {
        let mut coded = vec![0; len as usize];
        self.read_kept(at, &mut coded).map_err(|error| Error::io("cannot read the index of the gzip stream", error))?;
        let mut window = vec![0; super::inflate::WINDOW];
        let got = Decompressor::new()
            .deflate_decompress(&coded, &mut window)
            .map_err(|_| Error::corrupt("the stored index of the gzip stream is damaged: remove it from the cache directory"))?;
        window.truncate(got);
        Ok(window)
    }

    /// Kept bytes as they are, for storing them elsewhere.
    pub(in super::super) fn read_kept(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        match (at.checked_sub(self.in_file), &self.file) {
            (Some(at), _) => {
                let kept =
                    usize::try_from(at).ok().and_then(|at| self.memory.get(at..)?.get(..out.len())).ok_or(io::ErrorKind::UnexpectedEof)?;
                out.copy_from_slice(kept);
                Ok(())
            }
            (None, Some(file)) => file.read_exact_at(out, self.file_at + at),
            (None, None) => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// A fast compressor for windows.
pub(super) fn compressor() -> Compressor {
    Compressor::new(CompressionLvl::fastest())
}
