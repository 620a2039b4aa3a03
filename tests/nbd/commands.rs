//! The NBD export under clients that others wrote: libnbd's tools, qemu-img and qemu-io, and under clients that mean harm.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Server {
    child: Child,
    directory: tempfile::TempDir,
}

impl Server {
    /// Serves an image that `make` puts into a directory; `more` goes to the command line.
    fn new(make: impl FnOnce(&Path) -> PathBuf, more: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let image = make(directory.path());
        let child = Command::new(env!("CARGO_BIN_EXE_img-tcmu"))
            .arg("nbd")
            .arg("--socket")
            .arg(directory.path().join("socket"))
            .args(more)
            .arg(image)
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let server = Self { child, directory };
        let start = Instant::now();
        while UnixStream::connect(server.directory.path().join("socket")).is_err() {
            assert!(start.elapsed() < Duration::from_secs(30), "the server does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}/socket", self.directory.path().display())
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.directory.path().join("socket")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// Ends it as an operator would; it must end well.
    fn end(mut self) {
        Command::new("kill").arg(self.child.id().to_string()).status().unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
        assert!(!self.directory.path().join("socket").exists(), "the socket is removed");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(command: &str, args: &[&str]) -> String {
    // nbdsh runs the first python3 that it finds; libnbd's module belongs to the system's.
    let out = Command::new(command)
        .args(args)
        .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
        .output()
        .unwrap_or_else(|e| panic!("{command}: {e} (packages libnbd-bin, python3-libnbd, qemu-utils)"));
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{command} {args:?}: {text}");
    text
}

fn raw(directory: &Path) -> PathBuf {
    let path = directory.join("disk.raw");
    std::fs::File::create(&path).unwrap().set_len(16 << 20).unwrap();
    path
}

fn sample(name: &'static str) -> impl FnOnce(&Path) -> PathBuf {
    move |_| Path::new(env!("CARGO_MANIFEST_DIR")).join("samples").join(name)
}

#[test]
fn clients_see_the_disk_and_its_holes() {
    let server = Server::new(raw, &["--name", "disk"]);
    let uri = server.uri();
    run("qemu-io", &["-f", "raw", "-c", "write -P 5 1M 3M", "-c", "flush", "-c", "read -P 5 1M 3M", &uri]);
    run(
        "qemu-io",
        &["-f", "raw", "-c", "write -z -u 2M 512k", "-c", "discard 3M 64k", "-c", "read -P 0 2M 512k", "-c", "read -P 5 2560k 512k", &uri],
    );
    let list = run("nbdinfo", &["--list", &uri]);
    assert!(list.contains("export=\"disk\"") && list.contains("export-size: 16777216"), "{list}");
    let map = run("nbdinfo", &["--map", &uri]);
    let holes: u64 =
        map.lines().filter(|l| l.contains("hole,zero")).map(|l| l.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()).sum();
    assert!(holes >= (12 << 20) + (512 << 10), "{map}");
    let copy = server.directory.path().join("copy");
    run("nbdcopy", &[&uri, copy.to_str().unwrap()]);
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(server.directory.path().join("disk.raw")).unwrap());
    server.end();
}

#[test]
fn samples_are_served_as_qemu_reads_them() {
    for name in ["overlay.qcow2", "cloud.qcow2", "cloud-zstd.qcow2", "over-raw.qcow2"] {
        let server = Server::new(sample(name), &["--read-only"]);
        let image = sample(name)(Path::new(""));
        run("qemu-img", &["compare", "-U", "-f", "raw", "-F", "qcow2", &server.uri(), image.to_str().unwrap()]);
        server.end();
    }
}

/// Every command and flag, and what must be refused, through libnbd's Python.
#[test]
fn commands_flags_and_errors() {
    let server = Server::new(raw, &[]);
    let script = r#"
import errno
def fails(number, call, *args, **kw):
    try:
        call(*args, **kw)
    except nbd.Error as e:
        assert e.errnum == number, (e.errnum, number, e.string)
    else:
        raise AssertionError("no error")
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.connect_uri(URI)
assert h.get_size() == 16 << 20
h.pwrite(b"x" * 100, 3, nbd.CMD_FLAG_FUA)
assert h.pread(102, 2) == b"\0" + b"x" * 100 + b"\0"
h.zero(50, 3, nbd.CMD_FLAG_NO_HOLE)
h.zero(4096, 4096, nbd.CMD_FLAG_FAST_ZERO)
h.trim(8192, 0, nbd.CMD_FLAG_FUA)
h.cache(1 << 20, 0)
h.flush()
seen = []
h.block_status(16 << 20, 0, lambda context, offset, entries, error: seen.extend(entries))
assert sum(seen[0::2]) == 16 << 20, seen
one = []
h.block_status(16 << 20, 0, lambda context, offset, entries, error: one.extend(entries), nbd.CMD_FLAG_REQ_ONE)
assert len(one) == 2, one
h.pwrite(b"y" * (4 << 20), 5)
assert h.pread(4 << 20, 5, nbd.CMD_FLAG_DF) == b"y" * (4 << 20)
assert bytes(h.pread_structured(1 << 20, 12 << 20, lambda *a: None)) == bytes(1 << 20)
fails(errno.EINVAL, h.pread, 1, 16 << 20)
fails(errno.ENOSPC, h.pwrite, b"z", 16 << 20)
fails(errno.EINVAL, h.pread, 4096, (16 << 20) - 1)
fails(errno.ENOSPC, h.zero, 1 << 20, (16 << 20) - 1)
fails(errno.EINVAL, h.pread, 0, 0)
fails(errno.EINVAL, h.trim, 4096, 0, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(1, 5) == b"y"
h.shutdown()
"#;
    run("nbdsh", &["-c", &format!("URI = \"{}\"", server.uri()), "-c", script]);
    server.end();
}

#[test]
fn a_read_only_export_says_so() {
    let server = Server::new(raw, &["--read-only"]);
    let info = run("nbdinfo", &[&server.uri()]);
    assert!(info.contains("is_read_only: true") && info.contains("can_trim: false"), "{info}");
    let script = "h.set_strict_mode(0)\nh.connect_uri(URI)\ntry:\n    h.pwrite(b'x', 0)\nexcept nbd.Error as e:\n    assert e.errnum == 1\nelse:\n    raise AssertionError";
    run("nbdsh", &["-c", &format!("URI = \"{}\"", server.uri()), "-c", script]);
    server.end();
}

/// Bytes that are no NBD, requests cut short, promises of payloads that never come, and hundreds of idle connections: the next client is served.
#[test]
fn clients_that_mean_harm_harm_nobody() {
    let server = Server::new(raw, &[]);
    let mut x = 7u64;
    let mut random = move || {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        x >> 33
    };
    let mut hello = [0; 18];
    for round in 0..150 {
        let mut stream = server.connect();
        stream.read_exact(&mut hello).unwrap();
        let mut bytes = 3u32.to_be_bytes().to_vec();
        if round % 3 > 0 {
            bytes.extend(b"IHAVEOPT");
            let option = [1u32, 3, 6, 7, 8, 9, 10, 11, 99][random() as usize % 9];
            bytes.extend(option.to_be_bytes());
            bytes.extend((random() as u32 % 70_000).to_be_bytes());
        }
        bytes.extend((0..random() % 300).map(|_| random() as u8));
        // It may hang up on us.
        let _ = stream.write_all(&bytes);
    }
    for _ in 0..60 {
        let mut stream = server.connect();
        stream.read_exact(&mut hello).unwrap();
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
        let mut answer = [0; 10];
        stream.read_exact(&mut answer).unwrap();
        let mut request = Vec::new();
        request.extend(0x2560_9513u32.to_be_bytes());
        request.extend((random() as u16 & 0x3F).to_be_bytes());
        request.extend((random() as u16 % 12).to_be_bytes());
        request.extend(random().to_be_bytes());
        request.extend([0, random(), u64::MAX - 5, 16 << 20][random() as usize % 4].to_be_bytes());
        request.extend([0u32, 512, u32::MAX, 33 << 20][random() as usize % 4].to_be_bytes());
        let _ = stream.write_all(&request);
        let _ = stream.write_all(&[0; 100]);
    }
    let idle: Vec<UnixStream> = (0..300).map(|_| server.connect()).collect();
    run("nbdinfo", &["--size", &server.uri()]);
    drop(idle);
    run("qemu-io", &["-f", "raw", "-c", "write -P 1 0 4k", "-c", "read -P 1 0 4k", &server.uri()]);
    server.end();
}
