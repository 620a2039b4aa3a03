//! VMDK: the disks of VMware, of one or many files.
//!
//! A descriptor (`descriptor.rs`) names the extents of a disk, which lie one behind the other (`layout.rs`): flat ones, zeros, and sparse ones. A sparse extent
//! (`header.rs`, `sparse.rs`) has a grain directory, which leads to grain tables, which lead to grains; `pages.rs` keeps those in memory that are in use. A sparse
//! extent that is a whole disk holds the descriptor itself.
//!
//! # Changing
//! Hosted sparse extents and flat ones are written to (`update.rs`, `slots.rs`). A grain's data are durable before a table refers to it. The redundant directory's
//! tables change together with the others: a power cut may leave them a few entries behind, which the next first write mends. The content id in
//! the descriptor changes, durably, before anything else does: children notice by it that their parent has changed.
//!
//! Compressed extents (streamOptimized, `stream.rs`) and those of ESX (COWD, seSparse) are served read-only; an overlay takes writes to them.
//!
//! # Parents
//! A child has the content id that its parent had when the child was made. If the parent's is another one, the two do not fit together.

mod check;
mod descriptor;
mod header;
mod image;
mod layout;
mod pages;
mod slots;
mod sparse;
mod stream;
mod update;

use crate::drivers::{Capabilities, Driver, Opened, ParentRef, Request};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::probe::Head;
use crate::writeback::WriteBack;
use image::Vmdk;
use layout::Layout;
use std::sync::Arc;

/// QEMU's name of the format.
const NAME: &str = "vmdk";

/// The format's row in the table.
pub(crate) const DRIVER: Driver = Driver {
    name: NAME,
    aliases: &[],
    recognise,
    can: Capabilities { read: true, write: true, discard: true, cheap_zero: true, parent: true, check: true, repair: true, grow: false },
    open,
};

fn recognise(head: &Head) -> bool {
    head.has(0, header::HOSTED) || head.has(0, header::COWD) || head.has(0, &header::SESPARSE) || is_descriptor(&head.head)
}

/// A text whose first line that is neither blank nor a comment is `version=1`, `2` or `3`.
fn is_descriptor(head: &[u8]) -> bool {
    let first = head.split(|b| *b == b'\n').map(<[u8]>::trim_ascii).find(|l| !l.is_empty() && !l.starts_with(b"#"));
    matches!(first, Some(b"version=1" | b"version=2" | b"version=3"))
}

fn open(request: Request<'_>) -> Result<Opened> {
    if request.snapshot_name.is_some() {
        return Err(Error::unsupported("VMDK images have no internal snapshots"));
    }
    let layout = Layout::open(request.store, request.writable, request.open_file)?;
    if request.writable {
        let image = request.path.display();
        if let Some(why) = &layout.fixed {
            tracing::warn!(
                %image,
                "nothing can be written to this VMDK, {why}: served read-only (overlay=FILE keeps writes in a file of their own, snapshot=on for a while)"
            );
        } else if layout.pieces.iter().any(|piece| !piece.writable) {
            tracing::warn!(%image, "parts of this disk are marked as read-only or have no file: writes to them fail");
        }
        if layout.descriptor.change_tracking && layout.fixed.is_none() {
            tracing::warn!(
                %image,
                "VMware keeps a record of the blocks of this disk that change, for incremental backups; what is written here is not in it (make a full backup next)"
            );
        }
    }
    let writeback = Arc::new(WriteBack::new(layout.stores.clone(), request.redo));
    let parent = parent(&layout);
    let format = Arc::new(Vmdk::new(writeback.clone(), layout, request.writable, parent.is_some()));
    Ok(Opened { format, writeback, parent })
}

/// What a child says of its parent.
fn parent(layout: &Layout) -> Option<ParentRef> {
    let cid = layout.descriptor.parent_cid?;
    Some(ParentRef {
        names: layout.descriptor.parent_names(),
        format: Some(NAME.to_owned()),
        verify: Some(Box::new(move |parent| verify(parent, cid))),
    })
}

/// Whether an opened image is the parent that a child was made for.
fn verify(parent: &dyn Format, expected: u32) -> Result<()> {
    let found = parent.identity().unwrap_or_else(|| "none".to_owned());
    if found == format!("{expected:08x}") {
        return Ok(());
    }
    let of = parent.stores().first().and_then(|s| s.path()).map_or_else(String::new, |path| format!(" {}", path.display()));
    Err(Error::corrupt(format!(
        "the parent{of} has changed since this image was made on it (its CID is {found}, expected was {expected:08x}), so that the two show no disk that ever was; restore the parent as it was, or, if only its CID is another one, put {found} for parentCID into this image's descriptor"
    )))
}
