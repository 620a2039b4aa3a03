//! The descriptor: a text that says what a disk consists of, in a file of its own or inside a sparse extent.
//!
//! Lines of `key=value`, and one line per extent: access, length in sectors, type, and for most types a file name in quotes and the first sector in it
//! ("Virtual Disk Format 5.0", VMware 2011, "The Descriptor File").

use crate::error::{Error, Result};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Bytes of a sector.
pub(super) const SECTOR: u64 = 512;
/// The longest text that is read, in bytes.
pub(super) const MAX_LEN: u64 = 1 << 20;
/// The most extents that a disk may have.
const MAX_EXTENTS: usize = 4096;
/// The content id that stands for none.
const NO_CID: u32 = u32::MAX;

/// What the guest may do with an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    ReadWrite,
    ReadOnly,
    None,
}

/// Where an extent's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// As they are in a file, from this byte on.
    Flat { name: PathBuf, at: u64 },
    /// In a file with a grain directory.
    Sparse { name: PathBuf },
    /// Zeros.
    Zero,
}

/// A line that describes an extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ExtentLine {
    pub(super) access: Access,
    /// Length in bytes.
    pub(super) len: u64,
    pub(super) kind: Kind,
}

/// The content id, and where its digits are in the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ContentId {
    pub(super) value: u32,
    /// Byte offset in the text.
    pub(super) at: u64,
    /// Number of digits.
    pub(super) digits: usize,
}

/// What a descriptor says.
#[derive(Clone, Debug, Default)]
pub(super) struct Descriptor {
    pub(super) create_type: String,
    pub(super) cid: Option<ContentId>,
    /// The content id that the parent must have, if there is a parent.
    pub(super) parent_cid: Option<u32>,
    /// The parent's name, as it stands there.
    pub(super) parent_hint: Option<PathBuf>,
    pub(super) extents: Vec<ExtentLine>,
    /// A record of changed blocks, which the writer of the disk is to keep.
    pub(super) change_tracking: bool,
}

impl Descriptor {
    /// Parses a text; what follows its first NUL is padding.
    ///
    /// # Errors
    /// `Corrupt`, and `Unsupported` for encrypted disks and unknown types of extents.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let text = bytes.split(|b| *b == 0).next().unwrap_or_default();
        let mut found = Self::default();
        let mut start = 0;
        for line in text.split(|b| *b == b'\n') {
            let at = start;
            start += line.len() + 1;
            let content = line.trim_ascii();
            if content.is_empty() || content.starts_with(b"#") {
                continue;
            }
            if let Some(extent) = extent_line(content).map_err(|e| e.at_offset(at as u64))? {
                if found.extents.len() >= MAX_EXTENTS {
                    return Err(Error::corrupt(format!("the descriptor has more than {MAX_EXTENTS} extents")));
                }
                found.extents.push(extent);
            } else if let Some(equals) = line.iter().position(|b| *b == b'=') {
                let (key, value) = (line.get(..equals).unwrap_or_default(), line.get(equals + 1..).unwrap_or_default());
                found.entry(key.trim_ascii(), value, (at + equals + 1) as u64).map_err(|e| e.at_offset(at as u64))?;
            }
        }
        Ok(found)
    }

    /// Takes note of `key=value`, whose value begins at byte `at` of the text.
    fn entry(&mut self, key: &[u8], value: &[u8], at: u64) -> Result<()> {
        let plain = unquoted(value.trim_ascii());
        let is = |name: &str| key.eq_ignore_ascii_case(name.as_bytes());
        if is("CID") && self.cid.is_none() {
            let skipped = value.len() - value.trim_ascii_start().len();
            let digits = value.trim_ascii().len();
            self.cid = Some(ContentId { value: hex(plain)?, at: at + skipped as u64, digits });
        } else if is("parentCID") {
            self.parent_cid = Some(hex(plain)?).filter(|cid| *cid != NO_CID);
        } else if is("createType") {
            self.create_type = String::from_utf8_lossy(plain).into_owned();
        } else if is("parentFileNameHint") {
            self.parent_hint = Some(path(plain)).filter(|p| !p.as_os_str().is_empty());
        } else if is("changeTrackPath") {
            self.change_tracking = !plain.is_empty();
        } else if is("encryptionKeys") || is("keySafe") {
            return Err(Error::unsupported("the disk is encrypted by VMware, and its key is kept elsewhere (decrypt it there first)"));
        }
        Ok(())
    }

    /// Names under which the parent may be found: as it stands there, and beside the child, where both may have been moved to.
    pub(super) fn parent_names(&self) -> Vec<PathBuf> {
        let Some(hint) = &self.parent_hint else { return Vec::new() };
        let last = hint.as_os_str().as_bytes().rsplit(|b| matches!(b, b'/' | b'\\')).next().map(path);
        let mut names = vec![hint.clone()];
        names.extend(last.filter(|name| name != hint && !name.as_os_str().is_empty()));
        names
    }
}

/// An extent, if the line describes one.
fn extent_line(line: &[u8]) -> Result<Option<ExtentLine>> {
    let (word, rest) = word(line);
    let access = match word {
        b"RW" => Access::ReadWrite,
        b"RDONLY" => Access::ReadOnly,
        b"NOACCESS" => Access::None,
        _ => return Ok(None),
    };
    let wrong = || Error::corrupt(format!("\"{}\" is no description of an extent", String::from_utf8_lossy(line)));
    let (sectors, rest) = self::word(rest);
    let len = number(sectors).and_then(|n| n.checked_mul(SECTOR)).filter(|len| *len > 0 && *len <= i64::MAX as u64).ok_or_else(wrong)?;
    let (kind, rest) = self::word(rest);
    let named = || -> Result<(PathBuf, &[u8])> {
        let rest = rest.trim_ascii_start();
        let (name, rest) = match rest.strip_prefix(b"\"") {
            Some(quoted) => {
                let end = quoted.iter().position(|b| *b == b'"').ok_or_else(wrong)?;
                quoted.split_at_checked(end).ok_or_else(wrong)?
            }
            None => self::word(rest),
        };
        if name.is_empty() {
            return Err(wrong());
        }
        Ok((path(name), rest.strip_prefix(b"\"").unwrap_or(rest)))
    };
    let kind = match kind {
        b"FLAT" | b"VMFS" => {
            let (name, rest) = named()?;
            let (first, _) = self::word(rest);
            let at = if first.is_empty() { Some(0) } else { number(first).and_then(|n| n.checked_mul(SECTOR)) };
            let at = at.filter(|at| at.checked_add(len).is_some_and(|end| end <= i64::MAX as u64)).ok_or_else(wrong)?;
            Kind::Flat { name, at }
        }
        b"SPARSE" | b"VMFSSPARSE" | b"SESPARSE" => Kind::Sparse { name: named()?.0 },
        b"ZERO" => Kind::Zero,
        other => {
            return Err(Error::unsupported(format!(
                "extents of type {}; known are FLAT, SPARSE, ZERO, VMFS, VMFSSPARSE and SESPARSE",
                String::from_utf8_lossy(other)
            )));
        }
    };
    Ok(Some(ExtentLine { access, len, kind }))
}

/// The first word of a line, and the rest.
fn word(line: &[u8]) -> (&[u8], &[u8]) {
    let line = line.trim_ascii_start();
    let end = line.iter().position(u8::is_ascii_whitespace).unwrap_or(line.len());
    line.split_at_checked(end).unwrap_or((line, &[]))
}

fn number(digits: &[u8]) -> Option<u64> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

fn hex(digits: &[u8]) -> Result<u32> {
    let text = std::str::from_utf8(digits).ok().filter(|t| !t.starts_with('+'));
    text.and_then(|t| u32::from_str_radix(t, 16).ok())
        .ok_or_else(|| Error::corrupt(format!("\"{}\" is no content id", String::from_utf8_lossy(digits))))
}

fn unquoted(value: &[u8]) -> &[u8] {
    value.strip_prefix(b"\"").and_then(|v| v.strip_suffix(b"\"")).unwrap_or(value)
}

fn path(bytes: &[u8]) -> PathBuf {
    Path::new(OsStr::from_bytes(bytes)).to_path_buf()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor() {
        let text = b"# Disk DescriptorFile\nversion=1\nCID = 0123abcd\r\nparentCID=89abcdef\ncreateType=\"custom\"\n\
            parentFileNameHint=\"C:\\disks\\my base.vmdk\"\nRW 20 FLAT \"a b.vmdk\" 3\nRDONLY 8 SPARSE \"s.vmdk\"\nNOACCESS 5 ZERO\n\
            RW 7 VMFS \"f.vmdk\"\nddb.adapterType = \"ide\"\n\0\0\0RW 9 ZERO";
        let found = Descriptor::parse(text).unwrap();
        let cid = found.cid.unwrap();
        assert_eq!((cid.value, cid.digits), (0x0123_ABCD, 8));
        assert_eq!(&text[cid.at as usize..][..8], b"0123abcd");
        assert_eq!((found.parent_cid, found.create_type.as_str()), (Some(0x89AB_CDEF), "custom"));
        assert_eq!(found.parent_names(), [PathBuf::from("C:\\disks\\my base.vmdk"), PathBuf::from("my base.vmdk")]);
        let flat = |name: &str, at| Kind::Flat { name: name.into(), at };
        let line = |access, sectors: u64, kind| ExtentLine { access, len: sectors * SECTOR, kind };
        assert_eq!(
            found.extents,
            [
                line(Access::ReadWrite, 20, flat("a b.vmdk", 3 * SECTOR)),
                line(Access::ReadOnly, 8, Kind::Sparse { name: "s.vmdk".into() }),
                line(Access::None, 5, Kind::Zero),
                line(Access::ReadWrite, 7, flat("f.vmdk", 0)),
            ]
        );
    }

    #[test]
    fn what_is_refused() {
        for bad in ["RW", "RW x FLAT \"a\"", "RW 0 ZERO", "RW 1 FLAT", "RW 1 FLAT \"a", "RW 36028797018963968 ZERO", "CID=xyz", "CID=+1"] {
            assert_eq!(Descriptor::parse(bad.as_bytes()).unwrap_err().kind(), crate::Kind::Corrupt, "{bad}");
        }
        for bad in ["RW 1 VMFSRDM \"a\"", "encryptionKeys=\"x\""] {
            assert_eq!(Descriptor::parse(bad.as_bytes()).unwrap_err().kind(), crate::Kind::Unsupported, "{bad}");
        }
        assert_eq!(Descriptor::parse(b"parentCID=ffffffff").unwrap().parent_cid, None);
    }
}
