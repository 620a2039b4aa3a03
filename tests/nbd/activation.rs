//! Sockets that were passed on: by libnbd, which starts the server itself, and by systemd's own rules.

use crate::harness::{raw, run, try_run};
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

#[test]
fn clients_start_the_server_themselves() {
    let directory = tempfile::tempdir().unwrap();
    let image = raw(directory.path());
    let program = env!("CARGO_BIN_EXE_img-tcmu");
    let size = run("nbdinfo", &["--size", "[", program, "nbd", image.to_str().unwrap(), "]"]);
    assert!(size.starts_with("16777216"), "{size}");
    let source = directory.path().join("source");
    std::fs::write(&source, vec![7; 16 << 20]).unwrap();
    run("nbdcopy", &["--flush", source.to_str().unwrap(), "[", program, "nbd", image.to_str().unwrap(), "]"]);
    assert!(std::fs::read(&image).unwrap() == vec![7; 16 << 20]);
}

/// A TCP socket and readiness, as a service manager would have it.
#[test]
fn a_tcp_socket_is_passed_and_readiness_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let image = raw(directory.path());
    let notify = directory.path().join("notify");
    let socket = UnixDatagram::bind(&notify).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let script = r#"
import os, socket, sys
s = socket.socket()
s.bind(("127.0.0.1", 0))
s.listen()
print(s.getsockname()[1], flush=True)
os.dup2(s.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[1], sys.argv[1:])
"#;
    let mut child = Command::new("/usr/bin/python3")
        .args(["-c", script, env!("CARGO_BIN_EXE_img-tcmu"), "nbd"])
        .arg(&image)
        .env("NOTIFY_SOCKET", &notify)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut port = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut port).unwrap();
    let mut said = [0; 1024];
    let len = socket.recv(&mut said).unwrap();
    assert!(String::from_utf8_lossy(&said[..len]).contains("READY=1"));
    run("nbdinfo", &[&format!("nbd://127.0.0.1:{}", port.trim())]);
    run("kill", &[&child.id().to_string()]);
    assert!(child.wait().unwrap().success());
}

#[test]
fn without_a_socket_it_says_what_to_give() {
    let directory = tempfile::tempdir().unwrap();
    let image = raw(directory.path());
    let (good, said) = try_run(env!("CARGO_BIN_EXE_img-tcmu"), &["nbd", image.to_str().unwrap()]);
    assert!(!good && said.contains("--socket"), "{said}");
}
