//! The parent locator: what a differencing image calls its parent, and how the right one is known ([MS-VHDX] 2.6.2.6).

use crate::error::{Error, Result};
use crate::field::{array, utf16};
use std::path::PathBuf;
use uuid::{Uuid, uuid};

const TYPE_VHDX: Uuid = uuid!("b04aefb7-d19e-4a81-b789-25b8e9445913");

/// Keys and values of a parent locator.
#[derive(Clone, Debug, Default)]
pub(super) struct Locator {
    pub(super) entries: Vec<(String, String)>,
}

impl Locator {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let kind = Uuid::from_bytes_le(array(bytes, 0)?);
        if kind != TYPE_VHDX {
            return Err(Error::unsupported(format!("the parent locator is of type {kind}; only VHDX parents are known")));
        }
        let count = usize::from(u16::from_le_bytes(array(bytes, 18)?));
        let table = bytes.get(20..).unwrap_or_default();
        if count > table.len() / 12 {
            return Err(Error::corrupt(format!("the parent locator has room for {} entries and says it has {count}", table.len() / 12)));
        }
        let mut entries = Vec::with_capacity(count);
        for entry in table.chunks_exact(12).take(count) {
            let key = text(bytes, u32::from_le_bytes(array(entry, 0)?), u16::from_le_bytes(array(entry, 8)?))?;
            let value = text(bytes, u32::from_le_bytes(array(entry, 4)?), u16::from_le_bytes(array(entry, 10)?))?;
            entries.push((key, value));
        }
        Ok(Self { entries })
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.entries.iter().find(|(k, _)| k.eq_ignore_ascii_case(key)).map(|(_, v)| v.as_str()).filter(|v| !v.is_empty())
    }

    /// Names to try, in the order of the specification: relative, on a volume, absolute. The latter two are Windows paths: they are tried below the root
    /// directory, and at last their file name alone beside the image.
    pub(super) fn names(&self) -> Vec<PathBuf> {
        let mut names = Vec::new();
        if let Some(name) = self.get("relative_path") {
            names.push(PathBuf::from(separators(name)));
        }
        let absolute: Vec<String> = ["volume_path", "absolute_win32_path"].iter().filter_map(|k| self.get(k)).map(below_root).collect();
        names.extend(absolute.iter().map(PathBuf::from));
        names.extend(absolute.iter().filter_map(|n| n.rsplit('/').next()).filter(|n| !n.is_empty()).map(PathBuf::from));
        let mut seen = Vec::new();
        names.retain(|n| {
            let new = !seen.contains(n);
            if new {
                seen.push(n.clone());
            }
            new
        });
        names
    }

    /// The DataWriteGuids that the parent may have: its own when the child was made, and what a merge was going to make of it.
    pub(super) fn linkages(&self) -> Vec<Uuid> {
        ["parent_linkage", "parent_linkage2"]
            .iter()
            .filter_map(|k| self.get(k))
            .filter_map(|text| Uuid::parse_str(text.trim()).ok())
            .filter(|guid| !guid.is_nil())
            .collect()
    }
}

fn text(bytes: &[u8], at: u32, len: u16) -> Result<String> {
    let start = at as usize;
    let units = start
        .checked_add(usize::from(len))
        .and_then(|end| bytes.get(start..end))
        .ok_or_else(|| Error::corrupt("a text of the parent locator lies outside it"))?;
    Ok(utf16(units.chunks_exact(2).map(|u| u16::from_le_bytes([u[0], u[1]]))))
}

/// With the separators of this system.
pub(crate) fn separators(name: &str) -> String {
    name.replace('\\', "/")
}

/// A Windows path as one below the root directory: without drive, volume or `\\?\`.
pub(crate) fn below_root(name: &str) -> String {
    let name = separators(name);
    let name = name.strip_prefix("//?/").or_else(|| name.strip_prefix("//./")).unwrap_or(&name);
    let (first, rest) = name.split_once('/').unwrap_or(("", name));
    let place = first.ends_with(':') || first.starts_with("Volume{");
    let rest = if place { rest } else { name };
    format!("/{}", rest.trim_start_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_paths_lose_their_drive() {
        assert_eq!(below_root(r"\\?\C:\vm\base.vhdx"), "/vm/base.vhdx");
        assert_eq!(below_root(r"C:\vm\base.vhdx"), "/vm/base.vhdx");
        assert_eq!(below_root(r"\\?\Volume{0000-11}\vm\base.vhdx"), "/vm/base.vhdx");
        assert_eq!(below_root("base.vhdx"), "/base.vhdx");
        assert_eq!(below_root(r"\vm\base.vhdx"), "/vm/base.vhdx");
    }

    #[test]
    fn names_come_in_the_documented_order() {
        let entry = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        let locator = Locator {
            entries: vec![
                entry("absolute_win32_path", r"C:\a\p.vhdx"),
                entry("volume_path", r"\\?\Volume{1}\b\p.vhdx"),
                entry("relative_path", r".\c\p.vhdx"),
                entry("parent_linkage", "{2dc27766-f623-4200-9d64-115e9bfd4a08}"),
            ],
        };
        let names: Vec<_> = locator.names().into_iter().map(|n| n.to_string_lossy().into_owned()).collect();
        assert_eq!(names, ["./c/p.vhdx", "/b/p.vhdx", "/a/p.vhdx", "p.vhdx"]);
        assert_eq!(locator.linkages(), [uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08")]);
    }
}
