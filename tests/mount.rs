//! `img-tcmu mount` and `umount` with this machine's kernel, by way of FUSE and a loop device. Needs root, /dev/fuse and loop devices.
//! (The way over the SCSI target is tested in the guest: tests/vm/guest.)

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A directory with an image, a mount point and the state of mounts.
struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Self {
        let bench = Self(tempfile::tempdir().unwrap());
        fs::create_dir(bench.point()).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn point(&self) -> PathBuf {
        self.path("mnt")
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_img-tcmu"));
        command.arg(name).arg("--run-dir").arg(self.path("run")).env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin");
        command
    }

    fn try_mount(&self, image: &Path, more: &[&str]) -> Output {
        self.command("mount").args(more).arg(image).arg(self.point()).output().unwrap()
    }

    fn mount(&self, image: &Path, more: &[&str]) -> String {
        let out = self.try_mount(image, more);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "mount {more:?}: {said}");
        assert!(is_mounted(&self.point()));
        said
    }

    fn try_umount(&self) -> Output {
        self.command("umount").arg(self.point()).output().unwrap()
    }

    fn umount(&self) {
        let out = self.try_umount();
        assert!(out.status.success(), "umount: {}", String::from_utf8_lossy(&out.stderr));
        self.assert_nothing_is_left();
    }

    fn assert_nothing_is_left(&self) {
        let mine = self.0.path().to_str().unwrap();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(mine), "{mounts}");
        assert_eq!(self.servers(), 0, "a server is left");
        // What the kernel lets go of it does a moment later.
        let start = Instant::now();
        while !loops_of(mine).is_empty() {
            assert!(start.elapsed() < Duration::from_secs(10), "loop devices are left: {:?}", loops_of(mine));
            std::thread::sleep(Duration::from_millis(10));
        }
        let states = fs::read_dir(self.path("run/mounts")).map_or(0, Iterator::count);
        assert_eq!(states, 0, "state is left");
    }

    /// Processes that serve one of our images.
    fn servers(&self) -> usize {
        let mine = self.0.path().to_str().unwrap();
        fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
            .map(|line| String::from_utf8_lossy(&line).into_owned())
            .filter(|line| line.contains("\0fuse\0") && line.contains(mine))
            .count()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if is_mounted(&self.point()) {
            let _ = Command::new("umount").arg("-l").arg(self.point()).status();
        }
    }
}

fn loops_of(needle: &str) -> Vec<String> {
    let list = run("losetup", &["--list", "--noheadings", "-O", "NAME,BACK-FILE"]);
    list.lines().filter(|line| line.contains(needle)).map(str::to_owned).collect()
}

fn is_mounted(point: &Path) -> bool {
    fs::read_to_string("/proc/self/mounts").unwrap().lines().any(|l| l.split(' ').nth(1) == point.to_str())
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

fn sparse(path: &Path, size: u64) -> &Path {
    File::create(path).unwrap().set_len(size).unwrap();
    path
}

/// A filesystem with a file `name` in it.
fn filesystem(bench: &Bench, mkfs: &[&str], size: u64, name: &str) -> PathBuf {
    let path = bench.path(&format!("{name}.fs"));
    sparse(&path, size);
    let content = bench.path(&format!("{name}.d"));
    fs::create_dir(&content).unwrap();
    fs::write(content.join(name), name.repeat(10_000)).unwrap();
    run(mkfs[0], &[&mkfs[1..], &["-d", text(&content), text(&path)]].concat());
    path
}

/// A disk with a GPT and these partitions, as qcow2.
fn partitioned(bench: &Bench, parts: &[PathBuf]) -> PathBuf {
    let raw = bench.path("disk.raw");
    let sizes: Vec<u64> = parts.iter().map(|p| p.metadata().unwrap().len()).collect();
    let disk = File::options().read(true).write(true).create(true).truncate(true).open(&raw).unwrap();
    disk.set_len((2 << 20) + sizes.iter().sum::<u64>() + (1 << 20)).unwrap();
    let (mut script, mut at) = ("label: gpt\n".to_owned(), 1u64 << 20);
    for (part, size) in parts.iter().zip(&sizes) {
        disk.write_all_at(&fs::read(part).unwrap(), at).unwrap();
        script += &format!("start={}, size={}\n", at / 512, size / 512);
        at += size;
    }
    let mut sfdisk = Command::new("sfdisk").arg("-q").arg(&raw).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    sfdisk.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(sfdisk.wait().unwrap().success());
    let image = bench.path("disk.qcow2");
    run("qemu-img", &["convert", "-O", "qcow2", text(&raw), text(&image)]);
    image
}

const EXT4: &[&str] = &["mkfs.ext4", "-q"];

#[test]
fn an_image_is_read_without_changing_it() {
    let bench = Bench::new();
    let part = filesystem(&bench, EXT4, 16 << 20, "hello");
    let (whole, one) = (bench.path("whole.qcow2"), partitioned(&bench, std::slice::from_ref(&part)));
    run("qemu-img", &["convert", "-O", "qcow2", text(&part), text(&whole)]);
    for image in [&part, &whole, &one] {
        let before = fs::read(image).unwrap();
        bench.mount(image, &[]);
        assert_eq!(fs::read_to_string(bench.point().join("hello")).unwrap(), "hello".repeat(10_000));
        assert!(fs::write(bench.point().join("x"), "x").is_err_and(|e| e.raw_os_error() == Some(nix::libc::EROFS)));
        // A second one is refused, and the first stays.
        let again = bench.try_mount(image, &[]);
        assert!(!again.status.success() && String::from_utf8_lossy(&again.stderr).contains("umount"));
        assert!(is_mounted(&bench.point()));
        bench.umount();
        assert!(fs::read(image).unwrap() == before, "{}", image.display());
    }
}

#[test]
fn files_are_written_when_asked_and_a_mount_in_use_stays() {
    let bench = Bench::new();
    let part = filesystem(&bench, EXT4, 32 << 20, "hello");
    let image = partitioned(&bench, &[part]);
    bench.mount(&image, &["--read-write"]);
    let bytes: Vec<u8> = (0..3_000_000u32).map(|i| ((i * 7) >> 3) as u8).collect();
    fs::write(bench.point().join("new"), &bytes).unwrap();
    let in_use = File::open(bench.point().join("hello")).unwrap();
    let out = bench.try_umount();
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("busy"), "{out:?}");
    assert!(is_mounted(&bench.point()));
    drop(in_use);
    bench.umount();
    // Everything is in the image, and nobody holds it.
    run("qemu-img", &["check", "-q", text(&image)]);
    bench.mount(&image, &["--via", "fuse"]);
    assert!(fs::read(bench.point().join("new")).unwrap() == bytes);
    bench.umount();
}

#[test]
fn one_of_several_partitions_has_to_be_chosen() {
    let bench = Bench::new();
    let parts = [filesystem(&bench, EXT4, 8 << 20, "first"), filesystem(&bench, &["mke2fs", "-q", "-t", "ext2"], 4 << 20, "second")];
    let image = partitioned(&bench, &parts);
    let out = bench.try_mount(&image, &[]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("1 (8 MiB, ext4), 2 (4 MiB, ext2)"), "{said}");
    let out = bench.try_mount(&image, &["--partition", "3"]);
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("no partition 3"));
    for (number, name) in [("1", "first"), ("2", "second")] {
        bench.mount(&image, &["--partition", number]);
        assert!(bench.point().join(name).is_file());
        bench.umount();
    }
    // What the description of the image says counts as well.
    let config = format!("@file={}@partition=2", text(&image));
    bench.mount(Path::new(&config), &[]);
    assert!(bench.point().join("second").is_file());
    bench.umount();
}

/// An image of a machine that lost power: its journals are full. They are left as they are.
#[test]
fn a_dirty_journal_is_neither_replayed_nor_in_the_way() {
    let bench = Bench::new();
    for (mkfs, size, warns) in [(&["mkfs.ext4", "-q"][..], 32 << 20, true), (&["mkfs.xfs", "-q", "-m", "crc=1"][..], 400 << 20, false)] {
        let live = bench.path("live");
        sparse(&live, size);
        run(mkfs[0], &[&mkfs[1..], &[text(&live)]].concat());
        let scratch = bench.path("scratch");
        fs::create_dir_all(&scratch).unwrap();
        run("mount", &["-o", "loop", text(&live), text(&scratch)]);
        fs::write(scratch.join("file"), "there").unwrap();
        run("sync", &["-f", text(&scratch)]);
        fs::write(scratch.join("later"), "in the journal only").unwrap();
        File::open(scratch.join("later")).unwrap().sync_all().unwrap();
        let cut = bench.path("cut.raw");
        run("cp", &["--sparse=always", text(&live), text(&cut)]);
        run("umount", &[text(&scratch)]);
        let before = bench.path("before.raw");
        run("cp", &["--sparse=always", text(&cut), text(&before)]);
        let said = bench.mount(&cut, &[]);
        assert_eq!(said.contains("not unmounted cleanly"), warns, "{said}");
        bench.umount();
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&cut), text(&before)]);
        // Written to, it is replayed.
        bench.mount(&cut, &["-w"]);
        assert_eq!(fs::read_to_string(bench.point().join("later")).unwrap(), "in the journal only");
        bench.umount();
        fs::remove_file(&cut).unwrap();
    }
}

#[test]
fn umount_8_alone_is_enough_and_umount_of_others_is_refused() {
    let bench = Bench::new();
    let image = filesystem(&bench, EXT4, 8 << 20, "hello");
    bench.mount(&image, &["-w"]);
    run("umount", &[text(&bench.point())]);
    let start = Instant::now();
    while bench.servers() > 0 {
        assert!(start.elapsed() < Duration::from_secs(20), "the server does not end by itself");
        std::thread::sleep(Duration::from_millis(20));
    }
    // The next one clears up.
    bench.mount(&image, &[]);
    bench.umount();
    let out = bench.try_umount();
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("nothing is mounted"));
    run("mount", &["-t", "tmpfs", "none", text(&bench.point())]);
    let out = bench.try_umount();
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("umount(8)"));
    run("umount", &[text(&bench.point())]);
    // Nothing that can be mounted.
    let out = bench.try_mount(sparse(&bench.path("empty"), 1 << 20), &[]);
    assert!(!out.status.success());
    bench.assert_nothing_is_left();
}

/// A signal, at many instants from the start to the end: either all is mounted, or nothing is left.
#[test]
fn an_interruption_leaves_nothing_behind() {
    let bench = Bench::new();
    let image = filesystem(&bench, EXT4, 8 << 20, "hello");
    // How long it takes without one.
    let start = Instant::now();
    bench.mount(&image, &[]);
    let usual = start.elapsed();
    bench.umount();
    let (mut undone, mut mounted) = (0, 0);
    for step in 0..24 {
        let signal = ["-INT", "-TERM", "-KILL"][step % 3];
        let mut child = bench.command("mount").arg(&image).arg(bench.point()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(usual * u32::try_from(step).unwrap() / 20);
        let _ = Command::new("kill").arg(signal).arg(child.id().to_string()).stderr(Stdio::null()).status();
        let status = child.wait().unwrap();
        if status.success() {
            mounted += 1;
            bench.umount();
        } else if signal == "-KILL" {
            // It could not clean up; its server ends by itself, and whoever comes next does the rest.
            undone += 1;
            std::thread::sleep(Duration::from_millis(200));
            if is_mounted(&bench.point()) {
                bench.umount();
            }
            let start = Instant::now();
            while bench.servers() > 0 {
                assert!(start.elapsed() < Duration::from_secs(20), "the server outlives who started it");
                std::thread::sleep(Duration::from_millis(20));
            }
            bench.mount(&image, &[]);
            bench.umount();
        } else {
            undone += 1;
            // Before it can handle signals, one ends it as any program.
            assert!(status.code() == Some(130) || status.code().is_none(), "{status}");
            bench.assert_nothing_is_left();
        }
    }
    assert!(undone > 3, "{undone} were interrupted, {mounted} were not");
}

/// The server dies under a mounted filesystem: that can be unmounted still, and the image used again.
#[test]
fn a_killed_server_does_not_leave_a_mount_that_cannot_go() {
    let bench = Bench::new();
    let image = filesystem(&bench, EXT4, 8 << 20, "hello");
    bench.mount(&image, &[]);
    run("pkill", &["-KILL", "-f", &format!("fuse --leash .*{}", text(bench.0.path()))]);
    bench.umount();
    bench.mount(&image, &["-w"]);
    assert!(bench.point().join("hello").is_file());
    bench.umount();
}
