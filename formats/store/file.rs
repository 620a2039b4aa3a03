//! A store that is a file or a block device of the host.

use super::Store;
use nix::sys::uio::{preadv, pwritev};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use smallvec::SmallVec;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// The kernel takes at most this many buffers in one call (IOV_MAX).
const MAX_BUFFERS: usize = 1024;

/// An open file with the path it was opened by.
#[derive(Debug)]
pub struct FileStore {
    file: File,
    path: PathBuf,
    block_device: bool,
    /// The file system has said that it cannot do these; asked once.
    cannot_punch: AtomicBool,
    cannot_zero: AtomicBool,
    cannot_nowait: AtomicBool,
}

impl FileStore {
    /// Takes over an open file; `path` is for messages and for resolving names that the image holds.
    pub fn new(file: File, path: impl Into<PathBuf>) -> io::Result<Self> {
        let block_device = file.metadata()?.file_type().is_block_device();
        Ok(Self {
            file,
            path: path.into(),
            block_device,
            cannot_punch: AtomicBool::new(false),
            cannot_zero: AtomicBool::new(false),
            cannot_nowait: AtomicBool::new(false),
        })
    }

    /// The open file, for locks and facts about it.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn fallocate(&self, cannot: &AtomicBool, mode: FallocateFlags, at: u64, len: u64) -> io::Result<bool> {
        if len == 0 {
            return Ok(true);
        }
        if cannot.load(Ordering::Relaxed) {
            return Ok(false);
        }
        loop {
            return match fallocate(&self.file, mode, at, len) {
                Ok(()) => Ok(true),
                Err(Errno::INTR) => continue,
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => {
                    cannot.store(true, Ordering::Relaxed);
                    Ok(false)
                }
                // A block device wants whole sectors.
                Err(Errno::INVAL) if self.block_device => Ok(false),
                Err(e) => Err(e.into()),
            };
        }
    }
}

impl Store for FileStore {
    fn read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> io::Result<usize> {
        let mut rest = bufs;
        let mut done = 0usize;
        while !rest.is_empty() {
            let part = rest.len().min(MAX_BUFFERS);
            let offset = offset(at, done)?;
            let got = match preadv(&self.file, &mut rest[..part], offset) {
                Ok(got) => got,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(e) => return Err(e.into()),
            };
            done += got;
            if got == 0 && rest[..part].iter().any(|b| !b.is_empty()) {
                break;
            }
            IoSliceMut::advance_slices(&mut rest, got);
            skip_empty(&mut rest);
        }
        Ok(done)
    }

    fn try_read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> io::Result<Option<usize>> {
        if bufs.len() > MAX_BUFFERS || self.cannot_nowait.load(Ordering::Relaxed) {
            return Ok(None);
        }
        match preadv2(&self.file, bufs, at, ReadWriteFlags::NOWAIT) {
            Ok(got) if got == bufs.iter().map(|b| b.len()).sum::<usize>() => Ok(Some(got)),
            // Short: a part is not in the page cache, or the file ends.
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                self.cannot_nowait.store(true, Ordering::Relaxed);
                Ok(None)
            }
            Err(e) => Err(e.into()),
        }
    }

    fn write_at(&self, bufs: &[IoSlice<'_>], at: u64) -> io::Result<()> {
        let total: usize = bufs.iter().map(|b| b.len()).sum();
        if bufs.len() <= MAX_BUFFERS {
            // The usual case: one call does it all.
            match pwritev(&self.file, bufs, offset(at, 0)?) {
                Ok(done) if done == total => return Ok(()),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        let mut copy: SmallVec<[IoSlice<'_>; 32]> = bufs.iter().copied().collect();
        let mut rest = copy.as_mut_slice();
        let mut done = 0usize;
        while done < total {
            let part = rest.len().min(MAX_BUFFERS);
            match pwritev(&self.file, &rest[..part], offset(at, done)?) {
                Ok(0) if rest[..part].iter().any(|b| !b.is_empty()) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(put) => {
                    done += put;
                    IoSlice::advance_slices(&mut rest, put);
                    while rest.first().is_some_and(|b| b.is_empty()) {
                        rest = &mut std::mem::take(&mut rest)[1..];
                    }
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        if self.block_device { Ok(seek(&self.file, SeekFrom::End(0))?) } else { Ok(self.file.metadata()?.len()) }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if self.block_device {
            return if len <= self.len()? { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) };
        }
        self.file.set_len(len)
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<bool> {
        self.fallocate(&self.cannot_punch, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, len)
    }

    fn zero(&self, at: u64, len: u64) -> io::Result<bool> {
        self.fallocate(&self.cannot_zero, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, at, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn hole_or_data(&self, at: u64) -> io::Result<Option<(u64, bool)>> {
        let data = match seek(&self.file, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Only a hole from here to the end.
            Err(Errno::NXIO) => return Ok(Some((self.len()?.saturating_sub(at).max(1), false))),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        if data > at {
            return Ok(Some((data - at, false)));
        }
        let hole = seek(&self.file, SeekFrom::Hole(at))?;
        Ok((hole > at).then(|| (hole - at, true)))
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }
}

fn offset(at: u64, done: usize) -> io::Result<i64> {
    at.checked_add(done as u64)
        .and_then(|o| i64::try_from(o).ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::FileTooLarge, "an offset beyond what files can have"))
}

fn skip_empty(rest: &mut &mut [IoSliceMut<'_>]) {
    while rest.first().is_some_and(|b| b.is_empty()) {
        *rest = &mut std::mem::take(rest)[1..];
    }
}
