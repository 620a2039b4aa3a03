//! A server to be talked to, and the commands of others that talk.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A server of one image on a Unix socket.
pub struct Server {
    pub child: Child,
    pub directory: tempfile::TempDir,
}

impl Server {
    /// Serves an image that `make` puts into a directory; `more` goes to the command line.
    pub fn new(make: impl FnOnce(&Path) -> PathBuf, more: &[&str]) -> Self {
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
        let mut server = Self { child, directory };
        let start = Instant::now();
        while UnixStream::connect(server.directory.path().join("socket")).is_err() {
            assert!(server.child.try_wait().unwrap().is_none() && start.elapsed() < Duration::from_secs(30), "the server does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    /// The same on a TCP port of this host that is free.
    pub fn on_tcp(make: impl FnOnce(&Path) -> PathBuf, more: &[&str]) -> (Self, u16) {
        let directory = tempfile::tempdir().unwrap();
        let image = make(directory.path());
        let mut child = Command::new(env!("CARGO_BIN_EXE_img-tcmu"))
            .args(["nbd", "--listen", "127.0.0.1:0"])
            .args(more)
            .arg(image)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let port = said.find_map(|line| line.rsplit_once(" on 127.0.0.1:")?.1.parse().ok()).expect("the server says where it listens");
        std::thread::spawn(move || said.for_each(|line| eprintln!("{line}")));
        (Self { child, directory }, port)
    }

    /// The most memory that it had, in MiB.
    pub fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}/socket", self.directory.path().display())
    }

    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.directory.path().join("socket")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// Ends it as an operator would; it must end well.
    pub fn end(mut self) {
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

/// Runs a command of others, which must succeed: all that it said.
pub fn run(command: &str, args: &[&str]) -> String {
    let (good, text) = try_run(command, args);
    assert!(good, "{command} {args:?}: {text}");
    text
}

/// Runs a command of others: whether it succeeded, and all that it said.
pub fn try_run(command: &str, args: &[&str]) -> (bool, String) {
    // nbdsh runs the first python3 that it finds; libnbd's module belongs to the system's.
    let out = Command::new(command)
        .args(args)
        .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
        .output()
        .unwrap_or_else(|e| panic!("{command}: {e} (tests/vm/install installs what the tests call)"));
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    (out.status.success(), text)
}

/// An empty disk of 16 MiB.
pub fn raw(directory: &Path) -> PathBuf {
    let path = directory.join("disk.raw");
    std::fs::File::create(&path).unwrap().set_len(16 << 20).unwrap();
    path
}

pub fn sample(name: &'static str) -> impl FnOnce(&Path) -> PathBuf {
    move |_| Path::new(env!("CARGO_MANIFEST_DIR")).join("samples").join(name)
}
