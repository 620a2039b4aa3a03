//! The names: the root with the disk's file, and a directory of partitions if asked. Nothing can be added or taken away.

use super::content::Content;
use super::{DISK, PARTITIONS, Share};
use formats::filter::window::Window;
use formats::{Error, Result};
use fuser::{FileAttr, FileType, INodeNo};
use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// The root directory.
const ROOT: u64 = INodeNo::ROOT.0;
/// The file of the whole disk.
pub const DISK_INODE: u64 = 2;
/// The directory of partitions.
const PARTITIONS_INODE: u64 = 3;
/// Partition N is `PARTITION_BASE` + N.
const PARTITION_BASE: u64 = 1 << 32;

/// An entry of a directory.
pub struct Entry {
    /// Its inode.
    pub inode: u64,
    /// Directory or file.
    pub kind: FileType,
    /// Its name.
    pub name: String,
}

/// The tree.
pub struct Tree {
    image: PathBuf,
    disk: Content,
    /// By number.
    partitions: Vec<(u32, Content)>,
}

impl Tree {
    /// The tree for what is shared.
    ///
    /// # Errors
    /// A partition that is not inside the disk.
    pub fn new(share: &Share) -> Result<Self> {
        let partitions = share
            .partitions
            .iter()
            .map(|p| {
                let window = Window::new(share.device.clone(), p.start, Some(p.len))
                    .map_err(|e: Error| e.context(format!("partition {} cannot be shown", p.number)))?;
                Ok((p.number, Content::new(Arc::new(window))))
            })
            .collect::<Result<_>>()?;
        Ok(Self { image: share.image.clone(), disk: Content::new(share.device.clone()), partitions })
    }

    /// The contents behind an inode; `None` for directories and what does not exist.
    pub fn content(&self, inode: u64) -> Option<&Content> {
        match inode {
            DISK_INODE => Some(&self.disk),
            _ => self.partitions.iter().find(|(number, _)| PARTITION_BASE + u64::from(*number) == inode).map(|(_, content)| content),
        }
    }

    /// The inode of a name in a directory.
    pub fn lookup(&self, directory: u64, name: &OsStr) -> Option<u64> {
        self.entries(directory)?.into_iter().skip(2).find(|entry| OsStr::new(&entry.name) == name).map(|entry| entry.inode)
    }

    /// What is in a directory, `.` and `..` first; `None` if it is none.
    pub fn entries(&self, directory: u64) -> Option<Vec<Entry>> {
        let folder = |inode, name: &str| Entry { inode, kind: FileType::Directory, name: name.to_owned() };
        let file = |inode, name: String| Entry { inode, kind: FileType::RegularFile, name };
        match directory {
            ROOT => {
                let mut entries = vec![folder(ROOT, "."), folder(ROOT, ".."), file(DISK_INODE, DISK.to_owned())];
                if !self.partitions.is_empty() {
                    entries.push(folder(PARTITIONS_INODE, PARTITIONS));
                }
                Some(entries)
            }
            PARTITIONS_INODE if !self.partitions.is_empty() => {
                let mut entries = vec![folder(PARTITIONS_INODE, "."), folder(ROOT, "..")];
                entries.extend(self.partitions.iter().map(|(number, _)| file(PARTITION_BASE + u64::from(*number), number.to_string())));
                Some(entries)
            }
            _ => None,
        }
    }

    /// Attributes of an inode: owner, permissions and times of the image's file, and what the disk is.
    pub fn attributes(&self, inode: u64) -> Option<FileAttr> {
        let content = self.content(inode);
        if content.is_none() {
            self.entries(inode)?;
        }
        // An image that was renamed or removed meanwhile is still served.
        let image = std::fs::metadata(&self.image).ok();
        let time = image.as_ref().map_or(SystemTime::UNIX_EPOCH, |m| {
            let seconds = Duration::from_secs(u64::try_from(m.mtime()).unwrap_or(0));
            SystemTime::UNIX_EPOCH + seconds
        });
        let allowed = image.as_ref().map_or(0o600, |m| m.mode() & 0o666);
        let (kind, perm, size) = match content {
            Some(content) => (FileType::RegularFile, if content.read_only() { allowed & 0o444 } else { allowed }, content.size()),
            // Whoever may read the files may look at the directories.
            None => (FileType::Directory, allowed & 0o444 | (allowed & 0o444) >> 2, 4096),
        };
        // Programs that copy take a file without blocks for zeros from end to end: so small a number is never told.
        let blocks = image.as_ref().map_or(u64::MAX, MetadataExt::blocks).clamp(8, size.div_ceil(512).max(8));
        Some(FileAttr {
            ino: INodeNo(inode),
            size,
            blocks,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm: u16::try_from(perm).unwrap_or(0o600),
            nlink: if kind == FileType::Directory { 2 } else { 1 },
            uid: image.as_ref().map_or_else(|| nix::unistd::geteuid().as_raw(), MetadataExt::uid),
            gid: image.as_ref().map_or_else(|| nix::unistd::getegid().as_raw(), MetadataExt::gid),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}
