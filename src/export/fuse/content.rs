//! A device with the manners of a file: reads end at the end, writes that begin before it are cut, holes can be looked for and made.

use formats::{BlockDevice, Error, Kind, Result, ZeroMode};
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

/// What lseek(2) looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sought {
    /// Bytes that may be other than zero.
    Data,
    /// Bytes that are known to be zero, or the end.
    Hole,
}

/// The contents of one file.
#[derive(Clone)]
pub struct Content(Arc<dyn BlockDevice>);

impl Content {
    /// Those of a device, whole.
    pub fn new(device: Arc<dyn BlockDevice>) -> Self {
        Self(device)
    }

    /// Bytes in the file.
    pub fn size(&self) -> u64 {
        self.0.limits().size
    }

    /// Nothing can be changed.
    pub fn read_only(&self) -> bool {
        self.0.limits().read_only
    }

    /// Reads at most `buffer` from `at`: less at the end of the file, nothing behind it.
    pub fn read<'a>(&self, at: u64, buffer: &'a mut [u8]) -> Result<&'a [u8]> {
        let len = self.inside(at, buffer.len() as u64);
        let part = buffer.get_mut(..usize::try_from(len).unwrap_or(0)).unwrap_or_default();
        if !part.is_empty() {
            self.0.read(&mut [IoSliceMut::new(part)], at)?;
        }
        Ok(part)
    }

    /// Writes what of `bytes` has room before the end: how many bytes that is.
    ///
    /// # Errors
    /// `NoSpace` when nothing has, as for a block device.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<u64> {
        let len = self.inside(at, bytes.len() as u64);
        if len == 0 && !bytes.is_empty() {
            return Err(Error::new(Kind::NoSpace, "a write behind the end of the disk, which cannot grow"));
        }
        let part = bytes.get(..usize::try_from(len).unwrap_or(0)).unwrap_or_default();
        if !part.is_empty() {
            self.0.write(&[IoSlice::new(part)], at)?;
        }
        Ok(len)
    }

    /// Makes a range zero; what of it lies behind the end is zero already, for whoever may look there.
    pub fn zero(&self, at: u64, len: u64, mode: ZeroMode) -> Result<()> {
        match self.inside(at, len) {
            0 => Ok(()),
            len => self.0.zero(at, len, mode),
        }
    }

    /// Makes completed writes safe from a power cut.
    pub fn flush(&self) -> Result<()> {
        self.0.flush()
    }

    /// The first place at or after `at` that is of the kind sought. `None`: there is none, or `at` is not in the file (ENXIO of lseek(2)).
    pub fn seek(&self, at: u64, sought: Sought) -> Result<Option<u64>> {
        let size = self.size();
        let mut here = at;
        while here < size {
            let extent = self.0.map(here, size - here)?;
            if extent.zero == (sought == Sought::Hole) {
                return Ok(Some(here));
            }
            here = here.saturating_add(extent.len.max(1));
        }
        // The end counts as a hole, for whoever comes from inside.
        Ok((sought == Sought::Hole && at < size).then_some(size))
    }

    /// How many of `len` bytes from `at` are in the file.
    fn inside(&self, at: u64, len: u64) -> u64 {
        self.size().saturating_sub(at).min(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use formats::{OpenOptions, open};
    use std::io::Write;

    /// 64 KiB of data, a hole of 64 KiB, 100 bytes.
    fn content() -> (tempfile::NamedTempFile, Content) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 64 << 10]).unwrap();
        file.as_file().set_len((128 << 10) + 512).unwrap();
        std::os::unix::fs::FileExt::write_all_at(file.as_file(), &[8; 512], 128 << 10).unwrap();
        let image = open(&OpenOptions::new(file.path()).format("raw")).unwrap();
        (file, Content::new(image))
    }

    #[test]
    fn reads_and_writes_stop_at_the_end() {
        let (_file, content) = content();
        let size = content.size();
        let mut buffer = [0; 1024];
        assert_eq!(content.read(size - 100, &mut buffer).unwrap(), [8; 100]);
        assert_eq!(content.read(size, &mut buffer).unwrap(), b"");
        assert_eq!(content.read(u64::MAX, &mut buffer).unwrap(), b"");
        assert_eq!(content.write(size - 3, b"abcdef").unwrap(), 3);
        assert_eq!(content.read(size - 3, &mut buffer).unwrap(), b"abc");
        assert_eq!(content.write(size, b"x").unwrap_err().kind(), Kind::NoSpace);
        assert_eq!(content.write(u64::MAX, b"x").unwrap_err().kind(), Kind::NoSpace);
        assert_eq!(content.write(size, b"").unwrap(), 0);
        content.zero(size - 1, 100, ZeroMode::MayUnmap).unwrap();
        content.zero(size + 1, u64::MAX, ZeroMode::MayUnmap).unwrap();
        assert_eq!(content.read(size - 3, &mut buffer).unwrap(), b"ab\0");
        assert_eq!(content.size(), size);
    }

    #[test]
    fn holes_are_found_and_the_end_is_one() {
        let (_file, content) = content();
        let size = content.size();
        let seek = |at, sought| content.seek(at, sought).unwrap();
        assert_eq!(seek(0, Sought::Data), Some(0));
        assert_eq!(seek(5, Sought::Hole), Some(64 << 10));
        assert_eq!(seek(64 << 10, Sought::Hole), Some(64 << 10));
        assert_eq!(seek(70 << 10, Sought::Data), Some(128 << 10));
        assert_eq!(seek(128 << 10, Sought::Hole), Some(size));
        assert_eq!(seek(size, Sought::Hole), None);
        assert_eq!(seek(size, Sought::Data), None);
        assert_eq!(seek(u64::MAX, Sought::Hole), None);
    }
}
