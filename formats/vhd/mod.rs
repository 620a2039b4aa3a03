//! VHD (QEMU calls it "vpc"): the image format of Virtual PC, older Hyper-V, Azure and Xen; fixed, dynamic and differencing.
//!
//! A fixed image (`fixed.rs`) is the disk with a footer behind it (`footer.rs`). The others (`sparse.rs`) begin with a copy of the footer, a dynamic header
//! (`header.rs`) and an allocation table; blocks follow, each behind a bitmap of its sectors, and the footer ends the file.
//!
//! # Changing
//! A new block lies where the footer was, or in the place of a freed one. The block with its bitmap and the footer behind it are durable before the table
//! refers to the block (`update.rs`). A file that was cut in between has no footer at its end: the copy at the start stands in, and the footer is put back at
//! the next first write.
//!
//! # Parents
//! A parent is known by its UUID. The time stamp that a child keeps is compared with the parent's footer and with the modification time of its file, both of
//! which writers use; since copying a file changes the latter, a mismatch is a warning.

mod check;
mod fixed;
mod footer;
mod grow;
mod header;
mod sparse;
mod update;

use crate::drivers::{Capabilities, Driver, Opened, Request};
use crate::error::{Error, Kind, Result};
use crate::format::Format;
use crate::writeback::WriteBack;
use fixed::Fixed;
use footer::{Footer, Footers, MAX_SIZE, SECTOR};
use sparse::Sparse;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use uuid::Uuid;

/// QEMU's name of the format.
const NAME: &str = "vpc";
/// Seconds from 1970 to 2000, when the time stamps of VHD begin.
const EPOCH: u64 = 946_684_800;

/// The format's row in the table.
pub(crate) const DRIVER: Driver = Driver {
    name: NAME,
    aliases: &["vhd"],
    recognise: |h| h.has(0, b"conectix") || h.has_at_end(512, b"conectix") || h.has_at_end(511, b"conectix"),
    can: Capabilities { read: true, write: true, discard: true, cheap_zero: true, parent: true, check: true, repair: true, grow: true },
    open,
};

fn open(request: Request<'_>) -> Result<Opened> {
    if request.snapshot_name.is_some() {
        return Err(Error::unsupported("VHD images have no internal snapshots"));
    }
    let footers = Footers::read(&*request.store)?;
    if request.writable && footers.footer.saved_state() {
        tracing::warn!(image = %request.path.display(), "this disk belongs to a virtual machine in saved state, which will not survive changes to the disk");
    }
    let writeback = Arc::new(WriteBack::new(vec![request.store], request.redo));
    if footers.footer.kind() == footer::Kind::Fixed {
        let format = Arc::new(Fixed::open(writeback.clone(), footers, request.writable)?);
        return Ok(Opened { format, writeback, parent: None });
    }
    let image = Sparse::open(writeback.clone(), footers, request.writable)?;
    let parent = image.parent();
    Ok(Opened { format: Arc::new(image), writeback, parent })
}

/// Whether an opened image is the parent that a child was made for.
fn verify(parent: &dyn Format, uuid: Uuid, timestamp: u32) -> Result<()> {
    let Some(found) = parent.identity().filter(|_| parent.name() == NAME).and_then(|text| Uuid::parse_str(&text).ok()) else {
        return Err(Error::corrupt(format!("the parent is a {} image; a VHD needs a VHD", parent.name())));
    };
    if found != uuid {
        return Err(Error::corrupt(format!(
            "the parent is not the one that this image was made for: it has the UUID {found}, expected was {uuid}"
        )));
    }
    let of_footer = parent.describe().get("timestamp").and_then(serde_json::Value::as_u64);
    let path = parent.stores().first().and_then(|s| s.path());
    let modified =
        path.and_then(|p| p.metadata().ok()?.modified().ok()?.duration_since(SystemTime::UNIX_EPOCH + Duration::from_secs(EPOCH)).ok());
    if of_footer != Some(u64::from(timestamp)) && modified.map(|m| m.as_secs()) != Some(u64::from(timestamp)) {
        tracing::warn!(
            parent = %path.unwrap_or(std::path::Path::new("")).display(),
            "the time stamp of the parent is not the one that its child remembers; if the parent was written to since, the child shows a mixture"
        );
    }
    Ok(())
}

fn check_new_size(size: u64) -> Result<()> {
    if size > MAX_SIZE || !size.is_multiple_of(SECTOR) {
        return Err(Error::new(
            Kind::InvalidOption,
            format!("a disk of {size} bytes: a VHD has a multiple of {SECTOR} bytes, at most 2040 GiB"),
        ));
    }
    Ok(())
}

fn describe(footer: &Footer, subformat: &str) -> serde_json::Value {
    serde_json::json!({
        "subformat": subformat,
        "creator": String::from_utf8_lossy(&footer.creator()).trim_end_matches(['\0', ' ']),
        "uuid": footer.uuid().to_string(),
        "timestamp": footer.timestamp(),
        "current-size": footer.current_size(),
        "saved-state": footer.saved_state(),
    })
}
