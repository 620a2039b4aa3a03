//! Loop devices: a file as a block device (loop(4)). The one place of the command line that has no safe wrapper for its system calls.

use nix::libc::{c_int, c_ulong};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};

/// Flags of `LOOP_CONFIGURE` (linux/loop.h).
const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;
const DIRECT_IO: u32 = 16;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Configuration {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Info>() == 232 && size_of::<Configuration>() == 304, "the layout of linux/loop.h");

nix::ioctl_none_bad!(get_free, 0x4C82 as c_ulong);
nix::ioctl_write_ptr_bad!(configure, 0x4C0A as c_ulong, Configuration);

/// A loop device. It goes when nothing uses it any more: this value, a mount.
pub struct LoopDevice {
    path: PathBuf,
    #[expect(dead_code, reason = "keeps the device from going before it is mounted")]
    device: File,
}

impl LoopDevice {
    /// A block device over `file`; `label` is what `losetup` shows. Sectors of `sector` bytes.
    ///
    /// # Errors
    /// /dev/loop-control is not there or not ours to use; the kernel is older than 5.8; no device file.
    pub fn new(file: &File, label: &Path, read_only: bool, sector: u32) -> io::Result<Self> {
        let control = File::options().read(true).write(true).open("/dev/loop-control").map_err(|error| {
            io::Error::new(error.kind(), format!("/dev/loop-control: {error} (it needs root and the module 'loop': try 'modprobe loop')"))
        })?;
        let mut file_name = [0; 64];
        // The last byte stays 0: it ends the name.
        let bytes = label.as_os_str().as_encoded_bytes();
        file_name.iter_mut().take(63).zip(bytes).for_each(|(to, from)| *to = *from);
        let configuration = Configuration {
            fd: u32::try_from(file.as_raw_fd()).map_err(io::Error::other)?,
            block_size: sector,
            info: Info {
                device: 0,
                inode: 0,
                rdevice: 0,
                offset: 0,
                size_limit: 0,
                number: 0,
                encrypt_type: 0,
                encrypt_key_size: 0,
                flags: AUTOCLEAR | DIRECT_IO | if read_only { READ_ONLY } else { 0 },
                file_name,
                crypt_name: [0; 64],
                encrypt_key: [0; 32],
                init: [0; 2],
            },
            reserved: [0; 8],
        };
        // Somebody may take the free one before we do.
        for _ in 0..64 {
            let number = free(control.as_raw_fd())?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = File::options()
                .read(true)
                .write(!read_only)
                .open(&path)
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
            // SAFETY: LOOP_CONFIGURE reads one `struct loop_config` from the pointer, which is a live reference to a value of that layout (asserted
            // above), and keeps neither the pointer nor our descriptor numbers; both descriptors are open.
            match unsafe { configure(device.as_raw_fd(), &configuration) } {
                Ok(_) => return Ok(Self { path, device }),
                Err(nix::Error::EBUSY) => {}
                Err(error) => {
                    return Err(io::Error::new(io::Error::from(error).kind(), format!("{}: LOOP_CONFIGURE: {error}", path.display())));
                }
            }
        }
        Err(io::Error::other("other programs took every loop device that was free"))
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn free(control: RawFd) -> io::Result<c_int> {
    // SAFETY: LOOP_CTL_GET_FREE takes no argument and gives a number; the descriptor is open.
    Ok(unsafe { get_free(control) }?)
}
