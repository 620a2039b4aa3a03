//! The table of formats: names, signatures, what each can do, and how it is opened. A new format is one row here.

use crate::error::{Error, Result};
use crate::format::Format;
use crate::probe::Head;
use crate::raw::Raw;
use crate::redo::RedoLog;
use crate::store::Store;
use crate::writeback::WriteBack;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One format.
pub struct Driver {
    /// QEMU's name for it.
    pub name: &'static str,
    /// Other names that are accepted.
    pub aliases: &'static [&'static str],
    /// Whether a file bears its signature.
    pub recognise: fn(&Head) -> bool,
    /// What can be done with it.
    pub can: Capabilities,
    /// Opens it.
    pub open: fn(Request<'_>) -> Result<Opened>,
}

/// What can be done with images of a format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Read the guest's bytes.
    pub read: bool,
    /// Write them.
    pub write: bool,
    /// Give back the space of discarded bytes.
    pub discard: bool,
    /// Zero whole units without writing zeros.
    pub cheap_zero: bool,
    /// Sit on a parent (backing file).
    pub parent: bool,
    /// Find damage.
    pub check: bool,
    /// Mend damage.
    pub repair: bool,
    /// Grow.
    pub grow: bool,
}

/// What a driver gets to open an image.
pub struct Request<'a> {
    /// The file.
    pub store: Arc<dyn Store>,
    /// Its path, for messages.
    pub path: &'a Path,
    /// Whether it will be written to; the file is open accordingly.
    pub writable: bool,
    /// It is opened to be mended: one that is marked as damaged is opened all the same, and refuses changes until it is mended.
    pub repair: bool,
    /// The mirror for pending metadata of `store` and of the files opened by `open_file`: these must be the format's stores, in this order.
    pub redo: Box<dyn RedoLog>,
    /// Opens a further file that the image names (extent, data file), through the gate: name, writable.
    pub open_file: &'a mut OpenFile<'a>,
    /// An internal snapshot to show instead of the current state.
    pub snapshot_name: Option<&'a str>,
}

/// Opens a file that an image names: name, writable.
pub type OpenFile<'a> = dyn FnMut(&Path, bool) -> Result<Arc<dyn Store>> + 'a;

/// An image that a driver has opened.
pub struct Opened {
    /// The format.
    pub format: Arc<dyn Format>,
    /// Its write-back buffer.
    pub writeback: Arc<WriteBack>,
    /// What it sits on.
    pub parent: Option<ParentRef>,
}

/// The parent that an image names.
pub struct ParentRef {
    /// Names to try, in order.
    pub names: Vec<PathBuf>,
    /// Its format; `None`: the image does not say, and nothing may be guessed.
    pub format: Option<String>,
    /// Whether an opened image is the one that is meant (see [`Format::identity`]).
    pub verify: Option<Verify>,
}

/// A check that an opened image is the parent that is meant.
pub type Verify = Box<dyn FnOnce(&dyn Format) -> Result<()>>;

/// What can be done with a format that is only read.
pub(crate) const READ: Capabilities =
    Capabilities { read: true, write: false, discard: false, cheap_zero: false, parent: false, check: false, repair: false, grow: false };

/// All formats, in the order in which signatures are tried.
pub static DRIVERS: &[Driver] = &[
    Driver {
        name: "qcow2",
        aliases: &[],
        recognise: |h| h.has(0, b"QFI\xfb") && matches!(h.be32(4), Some(2 | 3)),
        can: Capabilities { read: true, write: true, discard: true, cheap_zero: true, parent: true, check: true, repair: true, grow: true },
        open: crate::qcow2::open,
    },
    crate::qcow1::DRIVER,
    crate::vhdx::DRIVER,
    crate::vmdk::DRIVER,
    crate::vdi::DRIVER,
    crate::qed::DRIVER,
    crate::parallels::DRIVER,
    not_yet("luks", &[], |h| h.has(0, b"LUKS\xba\xbe")),
    crate::bochs::DRIVER,
    crate::cloop::DRIVER,
    crate::vhd::DRIVER,
    crate::dmg::DRIVER,
    crate::ova::DRIVER,
    crate::split::DRIVER,
    Driver {
        name: "raw",
        aliases: &[],
        recognise: |_| false,
        can: Capabilities {
            read: true,
            write: true,
            discard: true,
            cheap_zero: true,
            parent: false,
            check: false,
            repair: false,
            grow: true,
        },
        open: |request| {
            let format = Raw::open(request.store.clone(), request.writable)?;
            Ok(Opened { format: Arc::new(format), writeback: Arc::new(WriteBack::new(vec![request.store], request.redo)), parent: None })
        },
    },
];

/// A format that is recognised, so that it is never taken for raw, and refused by name.
const fn not_yet(name: &'static str, aliases: &'static [&'static str], recognise: fn(&Head) -> bool) -> Driver {
    const NOTHING: Capabilities = Capabilities {
        read: false,
        write: false,
        discard: false,
        cheap_zero: false,
        parent: false,
        check: false,
        repair: false,
        grow: false,
    };
    Driver {
        name,
        aliases,
        recognise,
        can: NOTHING,
        open: |request| Err(Error::unsupported("images of this format are recognised but cannot be opened yet").at_path(request.path)),
    }
}

/// Replays the log of the format's own that a file may hold, into it.
///
/// # Errors
/// The host's, and `Corrupt` when the log is damaged.
pub fn finish_log(store: &Arc<dyn Store>) -> Result<()> {
    if (crate::vhdx::DRIVER.recognise)(&Head::read(&**store)?) { crate::vhdx::finish_log(store) } else { Ok(()) }
}

/// The format of that name.
///
/// # Errors
/// `InvalidOption` that lists the names there are.
pub fn by_name(name: &str) -> Result<&'static Driver> {
    DRIVERS.iter().find(|d| d.name == name || d.aliases.contains(&name)).ok_or_else(|| {
        let names: Vec<&str> = DRIVERS.iter().map(|d| d.name).collect();
        Error::new(crate::Kind::InvalidOption, format!("there is no format \"{name}\"; there are: {}", names.join(", ")))
    })
}
