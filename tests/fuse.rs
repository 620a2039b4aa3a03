//! The FUSE export under the kernel's own hands: read and written as a file, through loop devices, by fio; and the ends of a mount.
//!
//! Needs root and /dev/fuse.

use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek64};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Mount {
    child: Child,
    directory: tempfile::TempDir,
}

impl Mount {
    fn new(image: &Path, more: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let point = directory.path().join("mnt");
        std::fs::create_dir(&point).unwrap();
        // What systemd would hear.
        let notify = directory.path().join("notify");
        let socket = UnixDatagram::bind(&notify).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_img-tcmu"))
            .arg("fuse")
            .args(more)
            .arg(image)
            .arg(&point)
            .env("NOTIFY_SOCKET", &notify)
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mount = Self { child, directory };
        let mut said = [0; 1024];
        let len = socket.recv(&mut said).expect("the mount is ready");
        assert!(String::from_utf8_lossy(&said[..len]).contains("READY=1"));
        assert!(mount.disk().is_file(), "ready means that the file is there");
        mount
    }

    fn point(&self) -> PathBuf {
        self.directory.path().join("mnt")
    }

    fn disk(&self) -> PathBuf {
        self.point().join("disk")
    }

    fn open(&self) -> File {
        File::options().read(true).write(true).open(self.disk()).unwrap()
    }

    fn signal(&self, name: &str) {
        run("kill", &[name, &self.child.id().to_string()]);
    }

    fn wait(&mut self) -> std::process::ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "the process does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends it as an operator would; it must end well.
    fn end(mut self) {
        self.signal("-TERM");
        let status = self.wait();
        assert!(status.success(), "{status}");
        assert!(!is_mounted(&self.point()));
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if is_mounted(&self.point()) {
            let _ = Command::new("umount").arg("-l").arg(self.point()).status();
        }
    }
}

fn is_mounted(point: &Path) -> bool {
    std::fs::read_to_string("/proc/self/mounts").unwrap().lines().any(|l| l.split(' ').nth(1) == point.to_str())
}

fn run(command: &str, args: &[&str]) -> String {
    let out = Command::new(command)
        .args(args)
        .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
        .output()
        .unwrap_or_else(|e| panic!("{command}: {e} (tests/vm/install installs what the tests call)"));
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{command} {args:?}: {text}");
    text
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A qcow2 image of `size`, with what `qemu-io` commands put into it.
fn qcow2(directory: &Path, size: &str, commands: &[&str]) -> PathBuf {
    let path = directory.join("disk.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&path), size]);
    for command in commands {
        run("qemu-io", &["-f", "qcow2", "-c", command, text(&path)]);
    }
    path
}

/// Where SEEK_DATA and SEEK_HOLE change their answer: runs of (start, is data).
fn seek_map(file: &File) -> Vec<(u64, bool)> {
    let size = file.metadata().unwrap().len();
    let mut runs = Vec::new();
    let mut at = 0;
    while at < size {
        let data = match lseek64(file, at as i64, Whence::SeekData) {
            Ok(found) => found as u64,
            Err(nix::Error::ENXIO) => size,
            Err(e) => panic!("SEEK_DATA: {e}"),
        };
        if data > at {
            runs.push((at, false));
        }
        if data == size {
            break;
        }
        runs.push((data, true));
        at = lseek64(file, data as i64, Whence::SeekHole).unwrap() as u64;
    }
    runs
}

/// The same of `img-tcmu map`.
fn map_of(image: &Path) -> Vec<(u64, bool)> {
    let json = run(env!("CARGO_BIN_EXE_img-tcmu"), &["map", "--json", "-U", text(image)]);
    let runs: serde_json::Value = serde_json::from_str(&json).unwrap();
    let mut found: Vec<(u64, bool)> = Vec::new();
    for run in runs.as_array().unwrap() {
        let data = !run["zero"].as_bool().unwrap();
        if found.last().is_none_or(|(_, last)| *last != data) {
            found.push((run["start"].as_u64().unwrap(), data));
        }
    }
    found
}

#[test]
fn samples_read_as_qemu_reads_them_and_holes_are_those_of_the_map() {
    let scratch = tempfile::tempdir().unwrap();
    for name in ["overlay.qcow2", "cloud.qcow2", "cloud-zstd.qcow2", "over-raw.qcow2"] {
        let image = Path::new(env!("CARGO_MANIFEST_DIR")).join("samples").join(name);
        let mount = Mount::new(&image, &["--read-only"]);
        let raw = scratch.path().join("raw");
        run("qemu-img", &["convert", "-U", "-O", "raw", text(&image), text(&raw)]);
        assert_eq!(mount.disk().metadata().unwrap().len(), raw.metadata().unwrap().len());
        run("cmp", &[text(&mount.disk()), text(&raw)]);
        let map = seek_map(&File::open(mount.disk()).unwrap());
        assert_eq!(map, map_of(&image), "{name}");
        // A copy that looks for holes says the same.
        let copy = scratch.path().join("copy");
        run("cp", &["--sparse=auto", text(&mount.disk()), text(&copy)]);
        run("cmp", &[text(&copy), text(&raw)]);
        assert!(File::options().write(true).open(mount.disk()).is_err_and(|e| e.raw_os_error() == Some(nix::libc::EROFS)));
        mount.end();
    }
}

/// What a file can do, against a vector; then qemu-img's opinion of the image.
#[test]
fn a_file_is_written_punched_and_zeroed() {
    let scratch = tempfile::tempdir().unwrap();
    let image = qcow2(scratch.path(), "16M", &["write -P 1 0 1M", "write -P 2 8M 100k"]);
    for more in [&[][..], &["--direct-io"][..]] {
        let mut want = vec![0u8; 16 << 20];
        run("qemu-img", &["convert", "-O", "raw", text(&image), text(&scratch.path().join("raw"))]);
        File::open(scratch.path().join("raw")).unwrap().read_exact(&mut want).unwrap();
        let mount = Mount::new(&image, more);
        let mut file = mount.open();
        for (at, len, byte) in [(5, 3, 7), (1 << 20, 1 << 20, 8), ((4 << 20) - 1, 70_000, 9), ((16 << 20) - 10, 10, 10)] {
            file.write_all_at(&vec![byte; len], at as u64).unwrap();
            want[at..at + len].fill(byte);
        }
        fallocate(&file, FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE, 65536, 131_072).unwrap();
        want[65536..65536 + 131_072].fill(0);
        fallocate(&file, FallocateFlags::FALLOC_FL_ZERO_RANGE, (8 << 20) + 3, 1000).unwrap();
        want[(8 << 20) + 3..(8 << 20) + 1003].fill(0);
        // Across the end: a hole there is no growth, zeros are.
        fallocate(&file, FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE, (16 << 20) - 4, 100).unwrap();
        want[(16 << 20) - 4..].fill(0);
        assert_eq!(fallocate(&file, FallocateFlags::FALLOC_FL_ZERO_RANGE, (16 << 20) - 4, 100), Err(nix::Error::ENOSPC));
        assert_eq!(fallocate(&file, FallocateFlags::empty(), 0, 4096), Err(nix::Error::EOPNOTSUPP));
        // The size is the disk's.
        assert_eq!(file.set_len(1 << 20).unwrap_err().raw_os_error(), Some(nix::libc::EPERM));
        assert_eq!(file.set_len(32 << 20).unwrap_err().raw_os_error(), Some(nix::libc::EPERM));
        file.set_len(16 << 20).unwrap();
        file.seek(SeekFrom::Start((16 << 20) - 2)).unwrap();
        assert_eq!(file.write(b"abc").unwrap(), 2, "cut at the end");
        want[(16 << 20) - 2..].copy_from_slice(b"ab");
        assert_eq!(file.write(b"abc").unwrap_err().raw_os_error(), Some(nix::libc::ENOSPC));
        file.sync_all().unwrap();
        let mut got = Vec::new();
        File::open(mount.disk()).unwrap().read_to_end(&mut got).unwrap();
        assert!(got == want, "{more:?}");
        assert!(seek_map(&file).iter().any(|(at, data)| *at == 65536 && !data), "{:?}", seek_map(&file));
        // Names are fixed.
        assert!(std::fs::remove_file(mount.disk()).is_err_and(|e| e.raw_os_error() == Some(nix::libc::EPERM)));
        assert!(File::create(mount.point().join("other")).is_err_and(|e| e.raw_os_error() == Some(nix::libc::EPERM)));
        assert_eq!(std::fs::read_dir(mount.point()).unwrap().count(), 1);
        drop(file);
        mount.end();
        run("qemu-img", &["check", "-q", text(&image)]);
        std::fs::write(scratch.path().join("want"), &want).unwrap();
        run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&image), text(&scratch.path().join("want"))]);
    }
}

/// An acknowledged fsync survives the death of the process; its mount is cleared by umount(8).
#[test]
fn a_killed_process_leaves_what_was_flushed_and_a_mount_to_clear() {
    let scratch = tempfile::tempdir().unwrap();
    let image = qcow2(scratch.path(), "16M", &[]);
    let mut mount = Mount::new(&image, &[]);
    let file = mount.open();
    file.write_all_at(&[5; 300_000], 1000).unwrap();
    file.sync_all().unwrap();
    mount.signal("-KILL");
    mount.wait();
    assert_eq!(file.read_at(&mut [0; 10], 4 << 20).unwrap_err().raw_os_error(), Some(nix::libc::ENOTCONN));
    drop(file);
    let again = Command::new(env!("CARGO_BIN_EXE_img-tcmu")).arg("fuse").arg(&image).arg(mount.point()).output().unwrap();
    let said = String::from_utf8_lossy(&again.stderr);
    assert!(!again.status.success() && said.contains("umount"), "{said}");
    run("umount", &[text(&mount.point())]);
    run("qemu-img", &["check", "-q", text(&image)]);
    let mount = Mount::new(&image, &[]);
    let mut got = vec![0; 300_000];
    mount.open().read_exact_at(&mut got, 1000).unwrap();
    assert!(got == vec![5; 300_000]);
    mount.end();
}

#[test]
fn umount_ends_the_process_and_a_file_in_use_lives_on() {
    let scratch = tempfile::tempdir().unwrap();
    let image = qcow2(scratch.path(), "4M", &["write -P 1 0 1M"]);
    let mut mount = Mount::new(&image, &[]);
    run("umount", &[text(&mount.point())]);
    assert!(mount.wait().success());

    let mut mount = Mount::new(&image, &[]);
    let file = mount.open();
    mount.signal("-INT");
    let start = Instant::now();
    while is_mounted(&mount.point()) {
        assert!(start.elapsed() < Duration::from_secs(30), "it is not out of sight");
        std::thread::sleep(Duration::from_millis(10));
    }
    file.write_all_at(b"still here", 100).unwrap();
    let mut got = [0; 10];
    file.read_exact_at(&mut got, 100).unwrap();
    assert_eq!(&got, b"still here");
    assert!(mount.child.try_wait().unwrap().is_none());
    drop(file);
    assert!(mount.wait().success());
    run("qemu-img", &["check", "-q", text(&image)]);

    // The second signal does not wait.
    let mut mount = Mount::new(&image, &[]);
    let file = mount.open();
    mount.signal("-TERM");
    while is_mounted(&mount.point()) {
        std::thread::sleep(Duration::from_millis(10));
    }
    mount.signal("-TERM");
    assert_eq!(mount.wait().code(), Some(1));
    drop(file);
    run("qemu-img", &["check", "-q", text(&image)]);
}

/// A table of two partitions. One is written through its own file and read through the disk's, and the other way round.
#[test]
fn partitions_are_files() {
    let scratch = tempfile::tempdir().unwrap();
    let image = scratch.path().join("disk.raw");
    File::create(&image).unwrap().set_len(32 << 20).unwrap();
    let mut sfdisk = Command::new("sfdisk").arg("-q").arg(&image).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    sfdisk.stdin.take().unwrap().write_all(b"label: gpt\nstart=2048, size=16384\nstart=20480, size=8192\n").unwrap();
    assert!(sfdisk.wait().unwrap().success());
    let mount = Mount::new(&image, &["--partition-dir", "--passthrough", "always"]);
    let partition = |n: u32| mount.point().join("partitions").join(n.to_string());
    assert_eq!(partition(1).metadata().unwrap().len(), 16384 * 512);
    assert_eq!(partition(2).metadata().unwrap().len(), 8192 * 512);
    assert_eq!(std::fs::read_dir(mount.point().join("partitions")).unwrap().count(), 2);
    let (disk, second) = (mount.open(), File::options().read(true).write(true).open(partition(2)).unwrap());
    let mut got = [0; 7];
    for round in 0..3u8 {
        second.write_all_at(&[round; 7], 4096).unwrap();
        disk.read_exact_at(&mut got, 20480 * 512 + 4096).unwrap();
        assert_eq!(got, [round; 7]);
        disk.write_all_at(&[round + 100; 7], 20480 * 512 + 100).unwrap();
        second.read_exact_at(&mut got, 100).unwrap();
        assert_eq!(got, [round + 100; 7]);
    }
    assert_eq!(second.write_at(b"x", 8192 * 512).unwrap_err().raw_os_error(), Some(nix::libc::ENOSPC));
    drop((disk, second));
    mount.end();
    // Without a table there is nothing to show.
    let plain = qcow2(scratch.path(), "4M", &[]);
    let out =
        Command::new(env!("CARGO_BIN_EXE_img-tcmu")).args(["fuse", "--partition-dir"]).arg(&plain).arg(scratch.path()).output().unwrap();
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("partition"));
}

/// The kernel reads and writes the raw image by itself where it can, and it makes no difference but for speed.
#[test]
fn a_raw_image_is_passed_through() {
    let scratch = tempfile::tempdir().unwrap();
    let image = scratch.path().join("disk.raw");
    let bytes: Vec<u8> = (0..8u32 << 20).map(|i| (i / 512) as u8).collect();
    std::fs::write(&image, &bytes).unwrap();
    for when in ["never", "always"] {
        let mount = Mount::new(&image, &["--passthrough", when]);
        let file = mount.open();
        let mut got = vec![0; bytes.len()];
        file.read_exact_at(&mut got, 0).unwrap();
        assert!(got == bytes, "{when}");
        file.write_all_at(b"through", 1 << 20).unwrap();
        fallocate(&file, FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE, 2 << 20, 1 << 20).unwrap();
        file.sync_all().unwrap();
        file.read_exact_at(&mut got, 0).unwrap();
        assert!(got[2 << 20..3 << 20].iter().all(|b| *b == 0) && &got[1 << 20..(1 << 20) + 7] == b"through", "{when}");
        assert!(std::fs::read(&image).unwrap() == got, "{when}");
        assert!(seek_map(&file).contains(&(2 << 20, false)), "{when}");
        // Several opens at once, of both kinds.
        let more = File::open(mount.disk()).unwrap();
        more.read_exact_at(&mut got[..7], 1 << 20).unwrap();
        drop((file, more));
        mount.end();
        std::fs::write(&image, &bytes).unwrap();
    }
    let mount = Mount::new(&image, &["--read-only"]);
    run("cmp", &[text(&mount.disk()), text(&image)]);
    mount.end();
    // A kernel that has it must use it: the one thing to see is that only it lets the image grow.
    let has = Command::new("zgrep").args(["-q", "CONFIG_FUSE_PASSTHROUGH=y", "/proc/config.gz"]).status().unwrap().success();
    let mount = Mount::new(&image, &["--passthrough", "always"]);
    let wrote = mount.open().write_at(b"x", bytes.len() as u64);
    mount.end();
    assert!(!has || wrote.is_ok(), "{wrote:?}");
    assert_eq!(image.metadata().unwrap().len(), bytes.len() as u64 + u64::from(wrote.is_ok()));
}

#[test]
fn others_may_look_only_when_asked() {
    let scratch = tempfile::tempdir().unwrap();
    let image = scratch.path().join("disk.raw");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    run("chmod", &["644", text(&image)]);
    for (more, allowed) in [(&["--read-only"][..], false), (&["--read-only", "--allow-other"][..], true)] {
        let mount = Mount::new(&image, more);
        run("chmod", &["755", text(mount.directory.path())]);
        let status = Command::new("setpriv")
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "cmp", "-n", "4096", text(&mount.disk()), "/dev/zero"])
            .stderr(Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.success(), allowed, "{more:?}");
        assert_eq!(mount.disk().metadata().unwrap().mode() & 0o777, 0o444);
        mount.end();
    }
}

/// Random writes with checksums by several jobs at once, with and without the kernel's pages.
#[test]
fn fio_verifies_what_it_wrote() {
    let scratch = tempfile::tempdir().unwrap();
    let image = qcow2(scratch.path(), "64M", &[]);
    for (more, direct) in [(&[][..], "--direct=0"), (&["--direct-io"][..], "--direct=1")] {
        let mount = Mount::new(&image, more);
        let file = format!("--filename={}", text(&mount.disk()));
        run(
            "fio",
            &[
                "--name=verify",
                &file,
                "--ioengine=libaio",
                "--iodepth=16",
                direct,
                "--rw=randwrite",
                "--bsrange=4k-64k",
                "--size=14M",
                "--io_size=14M",
                "--offset_increment=16M",
                "--numjobs=4",
                "--fallocate=none",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--do_verify=1",
                "--verify_state_save=0",
                "--end_fsync=1",
                "--randseed=7",
                "--output-format=terse",
            ],
        );
        mount.end();
        run("qemu-img", &["check", "-q", text(&image)]);
    }
}

/// The route from an image to its files: a loop device over the file.
#[test]
fn a_filesystem_lives_on_a_loop_device_over_the_file() {
    let scratch = tempfile::tempdir().unwrap();
    let image = qcow2(scratch.path(), "64M", &[]);
    let mount = Mount::new(&image, &[]);
    run("mkfs.ext4", &["-q", "-F", text(&mount.disk())]);
    let files = scratch.path().join("files");
    std::fs::create_dir(&files).unwrap();
    let bytes: Vec<u8> = (0..5_000_000u32).map(|i| ((i * 7) >> 3) as u8).collect();
    for round in 0..2 {
        let options = if round == 0 { "loop,discard" } else { "loop,ro" };
        run("mount", &["-o", options, text(&mount.disk()), text(&files)]);
        if round == 0 {
            std::fs::write(files.join("a"), &bytes).unwrap();
            std::fs::write(files.join("b"), &bytes).unwrap();
            run("sync", &["-f", text(&files)]);
            std::fs::remove_file(files.join("b")).unwrap();
            run("fstrim", &[text(&files)]);
        } else {
            assert!(std::fs::read(files.join("a")).unwrap() == bytes);
        }
        run("umount", &[text(&files)]);
        // The loop device goes with its mount; a moment later it lets go of the file.
        std::thread::sleep(Duration::from_millis(100));
        run("e2fsck", &["-fn", text(&mount.disk())]);
    }
    mount.end();
    run("qemu-img", &["check", "-q", text(&image)]);
}
