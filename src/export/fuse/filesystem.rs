//! The answers to the kernel.

use super::content::Sought;
use super::tree::{DISK_INODE, Tree};
use super::{Options, Share};
use formats::{Error, Kind, ZeroMode};
use fuser::{
    BackingId, BsdFileFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner,
    OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use nix::libc;
use parking_lot::Mutex;
use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, SystemTime};

/// The most that one request moves; the kernel's usual limit (fs.fuse.max_pages_limit) is the same.
const MAX_TRANSFER: u32 = 1 << 20;
/// Requests that the kernel lets wait in the background (readahead, asynchronous direct I/O).
const MAX_BACKGROUND: u16 = 128;
/// The kernel may keep names for ever and attributes for so long.
const NAME_TTL: Duration = Duration::from_secs(3600);
const ATTRIBUTE_TTL: Duration = Duration::from_secs(1);

/// Handles: whether a close has to flush.
const READING: FileHandle = FileHandle(0);
const WRITING: FileHandle = FileHandle(1);

/// The file whose bytes the kernel reads and writes by itself, and the kernel's number for it.
struct Backing {
    file: File,
    /// One for all opens of the disk, for as long as the mount lives. `None`: not asked for yet.
    id: Mutex<Option<BackingId>>,
}

/// The filesystem.
pub struct Disk {
    tree: Tree,
    direct_io: bool,
    backing: Option<Backing>,
}

thread_local! {
    /// What this thread reads into.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Disk {
    /// The filesystem for what is shared.
    ///
    /// # Errors
    /// Partitions that cannot be shown.
    pub fn new(share: Share, options: Options) -> formats::Result<Self> {
        let tree = Tree::new(&share)?;
        // A partition's file and the disk's are two files to the kernel: it must not keep pages of either, or one would not show what was written
        // to the other.
        let two_views = !share.partitions.is_empty() && !share.device.limits().read_only;
        let backing = share.backing.map(|file| Backing { file, id: Mutex::new(None) });
        Ok(Self { tree, direct_io: options.direct_io || two_views, backing })
    }

    /// Does `work` with the contents of an inode. A panic fails the request, and nothing else.
    fn with<T>(&self, inode: INodeNo, name: &str, work: impl FnOnce(&super::content::Content) -> formats::Result<T>) -> Result<T, Errno> {
        let content = self.tree.content(inode.0).ok_or(Errno::EISDIR)?;
        let result = catch_unwind(AssertUnwindSafe(|| work(content)))
            .unwrap_or_else(|_| Err(Error::new(Kind::Io, "internal error: the request panicked")));
        result.map_err(|error| {
            let number = errno(&error);
            if number.code() == libc::EIO {
                tracing::error!(request = name, error = %error.chain(), "a request failed");
            }
            number
        })
    }

    fn flush(&self, inode: INodeNo) -> Result<(), Errno> {
        if let Some(backing) = self.backing.as_ref().filter(|_| inode.0 == DISK_INODE) {
            // The engine does not know of what the kernel wrote by itself.
            backing.file.sync_data().map_err(|error| {
                tracing::error!(%error, "cannot flush the image's file");
                Errno::EIO
            })?;
        }
        self.with(inode, "flush", |content| content.flush())
    }
}

fn errno(error: &Error) -> Errno {
    match error.kind() {
        Kind::Io | Kind::Corrupt | Kind::InvalidFormat | Kind::NotFound | Kind::Denied | Kind::Locked => Errno::EIO,
        Kind::Unsupported => Errno::EOPNOTSUPP,
        Kind::OutOfBounds | Kind::InvalidOption => Errno::EINVAL,
        Kind::ReadOnly => Errno::EROFS,
        Kind::NoSpace => Errno::ENOSPC,
    }
}

impl Filesystem for Disk {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Refused values are replaced by the nearest allowed; each capability is taken where the kernel has it.
        let _ = config.set_max_write(MAX_TRANSFER);
        let _ = config.set_max_background(MAX_BACKGROUND);
        for wanted in [InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP] {
            let _ = config.add_capabilities(wanted);
        }
        if self.backing.is_some() {
            let there = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok() && config.set_max_stack_depth(2).is_ok();
            if !there {
                tracing::info!("this kernel has no FUSE passthrough: requests go through this process");
                self.backing = None;
            }
        }
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.tree.lookup(parent.0, name).and_then(|inode| self.tree.attributes(inode)) {
            Some(attributes) => reply.entry_with_ttls(&ATTRIBUTE_TTL, &NAME_TTL, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.tree.attributes(inode.0) {
            Some(attributes) => reply.attr(&ATTRIBUTE_TTL, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// Times are accepted and not kept. The size is the disk's, owner and permissions are the image's.
    fn setattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let Some(attributes) = self.tree.attributes(inode.0) else { return reply.error(Errno::ENOENT) };
        if mode.is_some() || uid.is_some() || gid.is_some() || size.is_some_and(|size| size != attributes.size) {
            return reply.error(Errno::EPERM);
        }
        reply.attr(&ATTRIBUTE_TTL, &attributes);
    }

    fn open(&self, _request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let Some(content) = self.tree.content(inode.0) else { return reply.error(Errno::EISDIR) };
        let writing = flags.acc_mode() != OpenAccMode::O_RDONLY;
        if writing && content.read_only() {
            return reply.error(Errno::EROFS);
        }
        let handle = if writing { WRITING } else { READING };
        if let Some(backing) = self.backing.as_ref().filter(|_| inode.0 == DISK_INODE) {
            let mut id = backing.id.lock();
            if id.is_none() {
                // All opens of a file must agree: what cannot be had now is not tried again, since `init` found the kernel able.
                *id = match reply.open_backing(&backing.file) {
                    Ok(new) => Some(new),
                    Err(error) => {
                        tracing::warn!(%error, "the kernel refuses to pass reads and writes through (it needs root): use --passthrough never");
                        return reply.error(Errno::from(error));
                    }
                };
            }
            if let Some(id) = id.as_ref() {
                return reply.opened_passthrough(handle, FopenFlags::empty(), id);
            }
        }
        // Nobody else changes the image, so that pages of an earlier open are good.
        let how = if self.direct_io {
            FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
        } else {
            FopenFlags::FOPEN_KEEP_CACHE
        };
        reply.opened(handle, how);
    }

    fn read(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        BUFFER.with_borrow_mut(|buffer| {
            let len = size as usize;
            if buffer.len() < len {
                buffer.resize(len, 0);
            }
            let room = buffer.get_mut(..len).unwrap_or_default();
            match self.with(inode, "read", |content| content.read(offset, room)) {
                Ok(bytes) => reply.data(bytes),
                Err(error) => reply.error(error),
            }
        });
    }

    fn write(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.with(inode, "write", |content| content.write(offset, data)) {
            Ok(written) => reply.written(u32::try_from(written).unwrap_or(0)),
            Err(error) => reply.error(error),
        }
    }

    /// Each close(2) comes here.
    fn flush(&self, _request: &Request, inode: INodeNo, handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        answer(reply, if handle == WRITING { Self::flush(self, inode) } else { Ok(()) });
    }

    fn fsync(&self, _request: &Request, inode: INodeNo, _handle: FileHandle, _data_only: bool, reply: ReplyEmpty) {
        answer(reply, Self::flush(self, inode));
    }

    fn fsyncdir(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _data_only: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fallocate(&self, _request: &Request, inode: INodeNo, _handle: FileHandle, offset: u64, length: u64, mode: i32, reply: ReplyEmpty) {
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let zero = match mode & !libc::FALLOC_FL_KEEP_SIZE {
            libc::FALLOC_FL_PUNCH_HOLE if keep_size => ZeroMode::MayUnmap,
            libc::FALLOC_FL_ZERO_RANGE => ZeroMode::KeepAllocated,
            // Space ahead of writes is not something that all formats can set aside.
            _ => return reply.error(Errno::EOPNOTSUPP),
        };
        let result = self.with(inode, "fallocate", |content| {
            if !keep_size && offset.checked_add(length).is_none_or(|end| end > content.size()) {
                return Err(Error::new(Kind::NoSpace, "the disk cannot grow"));
            }
            content.zero(offset, length, zero)
        });
        answer(reply, result);
    }

    fn lseek(&self, _request: &Request, inode: INodeNo, _handle: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let (Ok(at), Some(sought)) = (
            u64::try_from(offset),
            match whence {
                libc::SEEK_DATA => Some(Sought::Data),
                libc::SEEK_HOLE => Some(Sought::Hole),
                _ => None,
            },
        ) else {
            return reply.error(if offset < 0 { Errno::ENXIO } else { Errno::EINVAL });
        };
        match self.with(inode, "lseek", |content| content.seek(at, sought)) {
            Ok(found) => match found.and_then(|at| i64::try_from(at).ok()) {
                Some(at) => reply.offset(at),
                None => reply.error(Errno::ENXIO),
            },
            Err(error) => reply.error(error),
        }
    }

    fn readdir(&self, _request: &Request, inode: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let Some(entries) = self.tree.entries(inode.0) else { return reply.error(Errno::ENOTDIR) };
        for (next, entry) in (1..).zip(&entries).skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
            if reply.add(INodeNo(entry.inode), next, entry.kind, &entry.name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        let size = self.tree.content(DISK_INODE).map_or(0, super::content::Content::size);
        reply.statfs(size.div_ceil(4096), 0, 0, 1, 0, 4096, 255, 4096);
    }

    // Names are fixed: what would change them is not permitted, where the default answer would be "not implemented".

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(Errno::EPERM);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn rename(&self, _: &Request, _: INodeNo, _: &OsStr, _: INodeNo, _: &OsStr, _: RenameFlags, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }
}

fn answer(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}
