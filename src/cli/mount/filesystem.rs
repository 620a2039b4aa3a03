//! Which filesystem a disk or partition holds, by its magic number: what is needed to mount it without changing it, and to say what is where.

use formats::{BlockDevice, Result};
use std::io::IoSliceMut;

/// A filesystem, as far as we care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filesystem {
    /// Its name for people and for mount(8).
    pub name: &'static str,
    /// The option with which a read-only mount leaves a journal alone. Without it the kernel would want to write first, also for a read-only mount.
    pub no_replay: Option<&'static str>,
    /// There are changes in the journal that a read-only mount will not show.
    pub dirty: bool,
}

impl Filesystem {
    const fn plain(name: &'static str) -> Self {
        Self { name, no_replay: None, dirty: false }
    }
}

/// Bytes that are looked at: btrfs' superblock is the farthest.
pub const LOOKED_AT: usize = 0x1_1000;

/// What is on `device`; `None` if nothing that we know.
///
/// # Errors
/// The device's.
pub fn find(device: &dyn BlockDevice) -> Result<Option<Filesystem>> {
    let len = usize::try_from(device.limits().size).unwrap_or(usize::MAX).min(LOOKED_AT);
    let mut bytes = vec![0; len];
    device.read(&mut [IoSliceMut::new(&mut bytes)], 0)?;
    Ok(recognise(&bytes))
}

/// Filesystems of the kind whose first sector could be taken for a partition table.
pub fn is_boot_sector(found: Option<Filesystem>) -> bool {
    found.is_some_and(|f| matches!(f.name, "vfat" | "ntfs" | "exfat"))
}

/// What begins with `bytes`, of which [`LOOKED_AT`] suffice.
pub fn recognise(bytes: &[u8]) -> Option<Filesystem> {
    let at = |offset: usize, magic: &[u8]| bytes.get(offset..).is_some_and(|b| b.starts_with(magic));
    let word = |offset: usize| bytes.get(offset..).and_then(|b| b.first_chunk::<4>()).map_or(0, |b| u32::from_le_bytes(*b));
    if at(0x438, &[0x53, 0xEF]) {
        // s_feature_compat: has_journal; s_feature_incompat: extents, needs_recovery.
        let (journal, recovery) = (word(0x45C) & 4 != 0, word(0x460) & 4 != 0);
        let name = match (word(0x460) & 0x40 != 0, journal) {
            (true, _) => "ext4",
            (false, true) => "ext3",
            (false, false) => "ext2",
        };
        return Some(Filesystem { name, no_replay: journal.then_some("noload"), dirty: recovery });
    }
    if at(0, b"XFSB") {
        // The log tells whether it is dirty; reading it is more than we do here.
        return Some(Filesystem { name: "xfs", no_replay: Some("norecovery"), dirty: false });
    }
    if at(0x1_0040, b"_BHRfS_M") {
        // log_root: a log tree waits.
        let dirty = bytes.get(0x1_0060..0x1_0068).is_some_and(|b| b.iter().any(|byte| *byte != 0));
        return Some(Filesystem { name: "btrfs", no_replay: Some("rescue=nologreplay"), dirty });
    }
    let found = match () {
        () if at(3, b"NTFS    ") => "ntfs",
        () if at(3, b"EXFAT   ") => "exfat",
        () if at(0x36, b"FAT1") || at(0x52, b"FAT32") => "vfat",
        () if at(0, b"hsqs") => "squashfs",
        () if at(0x400, &[0xE2, 0xE1, 0xF5, 0xE0]) => "erofs",
        () if at(0x8001, b"CD001") => "iso9660",
        () if at(0x400, b"H+") || at(0x400, b"HX") => "hfsplus",
        () if at(0, b"LUKS\xBA\xBE") => "crypto_LUKS",
        () if at(0x218, b"LVM2 001") => "LVM2_member",
        () if at(0xFF6, b"SWAPSPACE2") => "swap",
        () => return None,
    };
    Some(Filesystem::plain(found))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What mkfs makes, and how the test's machine knows it.
    #[test]
    fn what_mkfs_makes_is_recognised() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("disk");
        for (command, name, no_replay) in [
            (&["mkfs.ext4", "-q"][..], "ext4", Some("noload")),
            (&["mkfs.ext4", "-q", "-O", "^has_journal"][..], "ext4", None),
            (&["mkfs.ext3", "-q"][..], "ext3", Some("noload")),
            (&["mkfs.ext2", "-q"][..], "ext2", None),
            (&["mkfs.xfs", "-q"][..], "xfs", Some("norecovery")),
            (&["mkswap", "-q"][..], "swap", None),
        ] {
            std::fs::File::create(&path).unwrap().set_len(400 << 20).unwrap();
            let out = std::process::Command::new(command[0])
                .args(&command[1..])
                .arg(&path)
                .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
                .output()
                .unwrap_or_else(|e| panic!("{command:?}: {e} (packages e2fsprogs, xfsprogs, util-linux)"));
            assert!(out.status.success(), "{command:?}: {out:?}");
            let image = formats::open(&formats::OpenOptions::new(&path).format("raw").read_only(true)).unwrap();
            assert_eq!(find(&*image).unwrap(), Some(Filesystem { name, no_replay, dirty: false }), "{command:?}");
        }
        assert_eq!(recognise(&[]), None);
        assert_eq!(recognise(&[0; LOOKED_AT]), None);
        let mut fat = [0; 512];
        fat[0x52..0x57].copy_from_slice(b"FAT32");
        assert!(is_boot_sector(recognise(&fat)));
    }
}
