//! The keys `overlay`, `snapshot` and `detect-zeroes` through the command line: who makes the overlay, who only looks, and what NBD clients write.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const SIZE: usize = 4 << 20;

struct Bed {
    dir: TempDir,
}

impl Bed {
    /// `disk.gz`, a compressed stream of 4 MiB, and `disk`, what is in it.
    fn new() -> Self {
        let bed = Self { dir: tempfile::tempdir().expect("tempdir") };
        let bytes: Vec<u8> = (0..SIZE).map(|at| if at % 65536 < 40000 { (at / 512 % 251) as u8 | 1 } else { 0 }).collect();
        fs::write(bed.path("disk"), bytes).expect("write");
        must(Command::new("sh").args(["-c", "gzip -c disk >disk.gz"]).current_dir(bed.dir.path()));
        bed
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn img_tcmu(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("img-tcmu")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_img-tcmu"));
        // Indexes and throw-away overlays stay here.
        command.args(args).env("CACHE_DIRECTORY", self.path("cache")).current_dir(self.dir.path());
        command
    }

    fn good(&self, args: &[&str]) -> Vec<u8> {
        let output = self.img_tcmu(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    fn config(&self, rest: &str) -> String {
        format!("@file={}{rest}", self.path("disk.gz").display())
    }

    fn overlay(&self) -> String {
        self.config(&format!("@overlay={}", self.path("over.qcow2").display()))
    }

    /// Serves `config` over NBD while `qemu-io` runs `commands`.
    fn write(&self, config: &str, commands: &[&str]) {
        let socket = self.path("socket");
        let server = self.command(&["nbd", "--socket", text(&socket), config]).stderr(Stdio::null()).spawn().expect("img-tcmu nbd");
        let mut server = Server(server);
        let deadline = Instant::now() + Duration::from_secs(20);
        while !socket.exists() {
            assert!(Instant::now() < deadline && server.0.try_wait().expect("wait").is_none(), "the server did not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut io = Command::new("qemu-io");
        io.args(["-f", "raw"]).args(commands.iter().flat_map(|c| ["-c", c])).arg(format!("nbd+unix:///?socket={}", socket.display()));
        must(&mut io);
        must(Command::new("kill").arg(server.0.id().to_string()));
        assert!(server.0.wait().expect("wait").success());
        assert!(!socket.exists());
    }
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn must(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e} (Debian: qemu-utils)"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn an_overlay_is_made_by_whoever_serves_it_and_kept() {
    let bed = Bed::new();
    let (stream, plain) = (fs::read(bed.path("disk.gz")).expect("read"), fs::read(bed.path("disk")).expect("read"));
    let config = bed.overlay();
    for command in ["check-config", "info", "map", "cat"] {
        bed.good(&[command, &config]);
    }
    assert!(!bed.path("over.qcow2").exists(), "looking makes nothing");
    assert_eq!(bed.img_tcmu(&["check", "--repair", &config]).status.code(), Some(1));
    bed.write(&config, &["write -q -P 0x5a 1M 64k", "write -q -z 2M 64k", "flush"]);
    let mut expected = plain;
    expected[1 << 20..][..65536].fill(0x5A);
    expected[2 << 20..][..65536].fill(0);
    assert!(bed.good(&["cat", &config]) == expected);
    assert!(bed.good(&["cat", text(&bed.path("over.qcow2"))]) == expected, "the overlay is an image of its own");
    assert!(bed.good(&["cat", &format!("{config}@offset=512K@size=1M")]) == expected[512 << 10..][..1 << 20], "a window lies above");
    bed.write(&format!("{config}@offset=3M"), &["write -q -P 0x77 0 512"]);
    expected[3 << 20..][..512].fill(0x77);
    assert!(bed.good(&["cat", &config]) == expected);
    let info: serde_json::Value = serde_json::from_slice(&bed.good(&["info", "--json", &config, "--backing-chain"])).expect("JSON");
    assert_eq!(info[0]["backing-filename-format"], "gzip+raw");
    assert_eq!(info[1]["compressed-stream"], "gzip");
    assert_eq!(bed.img_tcmu(&["check", &config]).status.code(), Some(0));
    bed.good(&["check-config", &config]);
    assert!(fs::read(bed.path("disk.gz")).expect("read") == stream);
}

#[test]
fn a_snapshot_is_thrown_away() {
    let bed = Bed::new();
    let plain = fs::read(bed.path("disk")).expect("read");
    let config = bed.config("@snapshot=on");
    bed.good(&["check-config", &config]);
    assert!(!bed.path("cache").exists(), "a check makes nothing, not even a directory");
    bed.write(&config, &["write -q -P 0x5a 1M 64k", "flush", "read -q -P 0x5a 1M 64k"]);
    assert!(bed.good(&["cat", &config]) == plain);
    let left: Vec<_> = fs::read_dir(bed.path("cache")).expect("read_dir").map(|e| e.expect("entry").file_name()).collect();
    assert!(left.iter().all(|name| name.to_string_lossy().ends_with(".index")), "{left:?}");
    let output = bed.img_tcmu(&["check", "--repair", &config]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("snapshot"), "{output:?}");
}

#[test]
fn zeros_are_detected() {
    let bed = Bed::new();
    let raw = bed.path("disk");
    let blocks = || fs::metadata(bed.path("disk")).expect("metadata").blocks();
    let config = |rest: &str| format!("@file={}@format=raw{rest}", raw.display());
    let before = blocks();
    bed.write(&config(""), &["write -q -P 0 0 1M"]);
    assert!(blocks() >= before, "written as they are");
    bed.write(&config("@detect-zeroes=unmap"), &["write -q -P 0 0 1M", "write -q -P 1 1M 512"]);
    assert!(blocks() * 512 <= before * 512 - (900 << 10), "{} of {before} blocks are left", blocks());
    assert!(fs::read(&raw).expect("read")[..1 << 20].iter().all(|byte| *byte == 0));
    let output = bed.img_tcmu(&["info", &config("@direct=on")]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("'direct' is not supported yet"));
}
