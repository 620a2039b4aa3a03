//! An OVA: a tar archive of a virtual machine, its description first. The disk in it is served, read-only.
//!
//! The disk is the one member that is an image of a format that can be opened; if there are several, none is chosen. Headers of ustar, with the extensions of GNU
//! and pax for long names and large members (POSIX.1-2017, pax, "ustar Interchange Format").

use crate::compressed;
use crate::drivers::{self, Capabilities, Driver, Opened, Request};
use crate::error::{Error, Kind, Result};
use crate::format::{CheckReport, Extent, Format, FormatLimits, Unit};
use crate::probe::Head;
use crate::redo;
use crate::store::{PartStore, Store};
use std::path::Path;
use std::sync::Arc;

const NAME: &str = "ova";
const BLOCK: u64 = 512;
/// The most headers that are looked at.
const MAX_HEADERS: usize = 4096;
/// The longest extended header, in bytes.
const MAX_EXTENDED: u64 = 64 << 10;
/// How many names an error message has.
const SHOWN: usize = 12;

/// The format's row in the table.
pub(crate) const DRIVER: Driver = Driver {
    name: NAME,
    aliases: &[],
    recognise: |head| Header::parse(&head.head).is_some_and(|header| header.ustar && header.name.to_ascii_lowercase().ends_with(".ovf")),
    can: Capabilities {
        read: true,
        write: false,
        discard: false,
        cheap_zero: false,
        parent: false,
        check: true,
        repair: false,
        grow: false,
    },
    open,
};

/// A header of a tar archive.
struct Header {
    name: String,
    /// Bytes of the member.
    size: u64,
    kind: u8,
    ustar: bool,
}

impl Header {
    /// `None`: these bytes are none.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let block = bytes.get(..BLOCK as usize)?;
        let sum: u64 = block.iter().enumerate().map(|(at, b)| if (148..156).contains(&at) { 32 } else { u64::from(*b) }).sum();
        if number(block.get(148..156)?)? != sum {
            return None;
        }
        let text = |field: &[u8]| String::from_utf8_lossy(field.split(|b| *b == 0).next().unwrap_or_default()).into_owned();
        let (name, prefix) = (text(block.get(..100)?), text(block.get(345..500)?));
        let ustar = block.get(257..262)? == b"ustar";
        let posix = block.get(257..263)? == b"ustar\0";
        Some(Self {
            name: if posix && !prefix.is_empty() { format!("{prefix}/{name}") } else { name },
            size: number(block.get(124..136)?)?,
            kind: *block.get(156)?,
            ustar,
        })
    }
}

/// A field of octal digits, or GNU's of base 256.
fn number(field: &[u8]) -> Option<u64> {
    if let [first @ 0x80..=0xBF, rest @ ..] = field {
        return rest.iter().try_fold(u64::from(first & 0x3F), |n, b| n.checked_mul(256)?.checked_add(u64::from(*b)));
    }
    let digits = field.split(|b| *b == 0).next().unwrap_or_default().trim_ascii();
    if digits.is_empty() || digits.starts_with(b"+") {
        return digits.is_empty().then_some(0);
    }
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
}

/// A file in the archive.
struct Member {
    name: String,
    at: u64,
    size: u64,
}

/// The regular files of the archive in `store`.
fn members(store: &dyn Store) -> Result<Vec<Member>> {
    let fail = |e| Error::io("cannot read the archive", e);
    let len = store.len().map_err(fail)?;
    let mut found = Vec::new();
    let (mut at, mut long_name, mut long_size) = (0u64, None, None);
    for number in 0.. {
        if at >= len {
            break;
        }
        if number >= MAX_HEADERS {
            return Err(Error::unsupported(format!("an archive of more than {MAX_HEADERS} members")));
        }
        let mut block = [0; BLOCK as usize];
        store.read_zero_filled(&mut block, at).map_err(fail)?;
        if block.iter().all(|b| *b == 0) {
            break;
        }
        let header = Header::parse(&block).ok_or_else(|| match number {
            0 => Error::invalid_format("this is no tar archive"),
            _ => Error::corrupt("a header of the archive is damaged").at_offset(at),
        })?;
        let size = long_size.take().unwrap_or(header.size);
        let start = at + BLOCK;
        let end = start.checked_add(size).filter(|end| *end <= i64::MAX as u64);
        let end = end.ok_or_else(|| Error::corrupt(format!("a member of {size} bytes")).at_offset(at))?;
        match header.kind {
            b'x' | b'L' => {
                if size > MAX_EXTENDED || end > len {
                    return Err(Error::corrupt(format!("an extended header of {size} bytes")).at_offset(at));
                }
                let mut text = vec![0; usize::try_from(size).unwrap_or(0)];
                store.read_exact_at(&mut text, start).map_err(fail)?;
                if header.kind == b'L' {
                    long_name = Some(String::from_utf8_lossy(&text).trim_end_matches('\0').to_owned());
                } else {
                    (long_name, long_size) =
                        extended(&text).ok_or_else(|| Error::corrupt("an extended header is damaged").at_offset(at))?;
                }
            }
            b'0' | 0 | b'7' => {
                let name = long_name.take().unwrap_or(header.name);
                if end > len {
                    return Err(Error::corrupt(format!(
                        "the member \"{name}\" ends at byte {end}, and the file has {len}: it has been cut short"
                    ))
                    .at_offset(at));
                }
                found.push(Member { name, at: start, size });
            }
            b'S' => return Err(Error::unsupported("sparse members of GNU tar")),
            _ => long_name = None,
        }
        at = end.next_multiple_of(BLOCK);
    }
    Ok(found)
}

/// Path and size of a pax header's records; `None`: it is damaged.
fn extended(mut text: &[u8]) -> Option<(Option<String>, Option<u64>)> {
    let (mut name, mut size) = (None, None);
    while !text.is_empty() {
        let space = text.iter().position(|b| *b == b' ')?;
        let len: usize = std::str::from_utf8(text.get(..space)?).ok()?.parse().ok()?;
        let record = text.get(space + 1..len)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|b| *b == b'=')?;
        let value = String::from_utf8_lossy(record.get(equals + 1..)?);
        match record.get(..equals)? {
            b"path" => name = Some(value.into_owned()),
            b"size" => size = Some(value.parse().ok()?),
            _ => {}
        }
        text = text.get(len..)?;
    }
    Some((name, size))
}

fn listed(names: &[&str]) -> String {
    let mut list = names.iter().take(SHOWN).map(|n| format!("\"{n}\"")).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        list.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    list
}

/// The disk in the archive, and the name of its format.
fn find_disk(store: &Arc<dyn Store>) -> Result<(Member, &'static str)> {
    let all = members(&**store)?;
    let mut disks = Vec::new();
    for (number, member) in all.iter().enumerate() {
        let head = Head::read(&PartStore::new(store.clone(), member.at, member.size))?;
        let name = member.name.to_ascii_lowercase();
        if let Some(format) = head.recognise().filter(|f| *f != NAME) {
            disks.push((number, Some(format)));
        } else if [".img", ".raw"].iter().any(|end| name.ends_with(end)) {
            disks.push((number, Some("raw")));
        } else if compressed::recognise(&head.head).is_some()
            && [".vmdk", ".vhd", ".vhdx", ".img", ".gz"].iter().any(|end| name.contains(end))
        {
            disks.push((number, None));
        }
    }
    let names =
        |numbers: &mut dyn Iterator<Item = usize>| listed(&numbers.filter_map(|n| Some(all.get(n)?.name.as_str())).collect::<Vec<_>>());
    let (number, format) = match disks[..] {
        [one] => one,
        [] => {
            return Err(Error::invalid_format(format!(
                "no member of the archive is a disk image; there are: {}",
                names(&mut (0..all.len()))
            )));
        }
        _ => {
            return Err(Error::new(
                Kind::InvalidOption,
                format!(
                    "the archive holds several disks, {}: unpack the one that is meant (tar -xf)",
                    names(&mut disks.iter().map(|(number, _)| *number))
                ),
            ));
        }
    };
    let member = all.into_iter().nth(number).ok_or_else(|| Error::corrupt("the member is gone"))?;
    if member.name.ends_with(".000000000") {
        return Err(Error::unsupported(format!("the disk \"{}\" lies in the archive in chunks (unpack and join them)", member.name)));
    }
    match format {
        Some(format) => Ok((member, format)),
        None => Err(Error::unsupported(format!("the disk \"{}\" is compressed inside the archive (unpack it: tar -xf)", member.name))),
    }
}

fn open(request: Request<'_>) -> Result<Opened> {
    let (member, format) = find_disk(&request.store)?;
    if request.writable {
        tracing::warn!(
            image = %request.path.display(),
            "nothing can be written to a disk inside an archive: served read-only (overlay=FILE keeps writes in a file of their own, snapshot=on for a while)"
        );
    }
    let mut no_files = |name: &Path, _: bool| -> Result<Arc<dyn Store>> {
        Err(Error::unsupported(format!(
            "the disk inside the archive names a further file, \"{}\" (unpack the archive: tar -xf)",
            name.display()
        )))
    };
    let inner = Request {
        store: Arc::new(PartStore::new(request.store.clone(), member.at, member.size)),
        path: request.path,
        writable: false,
        repair: false,
        redo: Box::new(redo::None),
        open_file: &mut no_files,
        snapshot_name: request.snapshot_name,
    };
    let opened = (drivers::by_name(format)?.open)(inner)
        .map_err(|e| e.context(format!("the disk \"{}\" in the archive cannot be opened", member.name)))?;
    if opened.parent.is_some() {
        return Err(Error::unsupported(format!("the disk \"{}\" in the archive has a parent (unpack the archive: tar -xf)", member.name)));
    }
    Ok(Opened { format: Arc::new(Ova { inner: opened.format, member }), ..opened })
}

/// The disk inside an OVA.
struct Ova {
    inner: Arc<dyn Format>,
    member: Member,
}

impl Format for Ova {
    fn name(&self) -> &'static str {
        NAME
    }

    fn limits(&self) -> FormatLimits {
        FormatLimits { read_only: true, ..self.inner.limits() }
    }

    fn stores(&self) -> &[Arc<dyn Store>] {
        self.inner.stores()
    }

    fn map(&self, at: u64, want: u64) -> Result<Extent> {
        self.inner.map(at, want)
    }

    fn decode(&self, unit: &Unit, out: &mut [u8]) -> Result<()> {
        self.inner.decode(unit, out)
    }

    fn check(&self, repair: bool) -> Result<CheckReport> {
        self.inner.check(repair)
    }

    fn describe(&self) -> serde_json::Value {
        serde_json::json!({
            "member": self.member.name,
            "offset": self.member.at,
            "length": self.member.size,
            "format": self.inner.name(),
            "format-specific": self.inner.describe(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   17 \0\0"), Some(0o17));
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 5]), Some((1 << 32) + 5));
        assert_eq!(number(&[0x80, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF]), None);
        assert_eq!(number(b"+17\0"), None);
        assert_eq!(number(b"8\0"), None);
    }

    #[test]
    fn extended_headers() {
        assert_eq!(extended(b"18 path=long name\n20 size=12345678901\n"), Some((Some("long name".into()), Some(12_345_678_901))));
        for bad in [&b"x"[..], b"9 a=b\n", b"0 a=b\n", b"6 a=bc", b"99999999999999999999 a=b\n", b"2 a=b\n"] {
            assert_eq!(extended(bad), None, "{}", String::from_utf8_lossy(bad));
        }
    }
}
