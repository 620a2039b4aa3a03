//! The parent of a differencing image: found by its UUID, and known by it.

use super::header::{self, Header};
use crate::drivers::ParentRef;
use crate::error::{Error, Result};
use crate::format::Format;
use crate::gate;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Where VirtualBox keeps differencing images, beside the directory of the first of their ancestors.
const SNAPSHOTS: &str = "Snapshots";

/// What a header says of the parent of the image at `path`.
pub(super) fn of(header: &Header, path: &Path) -> Result<ParentRef> {
    let (uuid, modified) = header.parent();
    if uuid.is_nil() {
        return Err(Error::corrupt("a differencing image that names no parent").at_offset(0x1A8));
    }
    let is_parent = |head: &[u8]| header::uuid_in(head) == Some(uuid);
    let mut names: Vec<PathBuf> = Vec::new();
    if let Some(name) = gate::find_beside(path, Path::new(""), header::LEN, is_parent) {
        names.push(name);
    } else if path.parent().and_then(Path::file_name).is_some_and(|name| name == SNAPSHOTS) {
        names.extend(gate::find_beside(path, Path::new(".."), header::LEN, is_parent));
    }
    // What VirtualBox would call it: also what the message says if there is none.
    names.push(format!("{{{uuid}}}.vdi").into());
    Ok(ParentRef { names, format: Some(super::NAME.to_owned()), verify: Some(Box::new(move |parent| verify(parent, uuid, modified))) })
}

/// Whether an opened image is the parent that a child was made for, and has not changed since.
fn verify(parent: &dyn Format, uuid: Uuid, modified: Uuid) -> Result<()> {
    let description = parent.describe();
    let field = |name: &str| description.get(name).and_then(|v| v.as_str()).and_then(|text| Uuid::parse_str(text).ok());
    let Some(found) = field("uuid").filter(|_| parent.name() == super::NAME) else {
        return Err(Error::corrupt(format!("the parent is a {} image; a VDI needs a VDI", parent.name())));
    };
    if found != uuid {
        return Err(Error::corrupt(format!(
            "the parent is not the one that this image was made for: it has the UUID {found}, expected was {uuid}"
        )));
    }
    if !modified.is_nil() && field("modification-uuid") != Some(modified) {
        return Err(Error::corrupt(
            "the parent has been changed since this image was made on it (its modification UUID differs): together they would show a mixture",
        ));
    }
    Ok(())
}
