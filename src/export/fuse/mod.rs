//! FUSE: a disk as a regular file, for hosts without TCMU and for tools that want a file.
//!
//! [`content`] is what a file does (the ends, holes, zeroing), [`tree`] the few names that there are, [`filesystem`] the answers to the kernel,
//! [`mount`] the life of a mount from mount(2) to the last flush. The kernel keeps the queue: a fixed number of threads fetch a request each, do it,
//! answer it and fetch the next, so that answers come in any order, a slow one holds up nobody, and what waits is bounded by what the kernel lets wait.

mod content;
mod filesystem;
pub mod mount;
mod tree;

pub use mount::Mounted;

use formats::BlockDevice;
use formats::filter::partition::Partition;
use std::path::PathBuf;
use std::sync::Arc;

/// The disk as a file.
pub const DISK: &str = "disk";
/// The directory with a file for each partition.
pub const PARTITIONS: &str = "partitions";

/// What is shown.
pub struct Share {
    /// The disk.
    pub device: Arc<dyn BlockDevice>,
    /// The image that it comes from: owner, permissions and times of the files are the image's.
    pub image: PathBuf,
    /// Partitions to be shown beside it.
    pub partitions: Vec<Partition>,
    /// A file whose bytes are those of the disk, for the kernel to read and write by itself.
    pub backing: Option<std::fs::File>,
}

/// How it is shown.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Users other than the one who mounts may use the files, as the image's permissions let them.
    pub allow_other: bool,
    /// The kernel keeps no pages of the files: what is read is asked for each time, and writes run side by side.
    pub direct_io: bool,
    /// Threads that do requests.
    pub threads: usize,
}

impl Default for Options {
    fn default() -> Self {
        let cpus = std::thread::available_parallelism().map_or(2, usize::from);
        Self { allow_other: false, direct_io: false, threads: (2 * cpus).clamp(4, 64) }
    }
}
