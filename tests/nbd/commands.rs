//! The NBD export under clients that others wrote: libnbd's tools, qemu-img and qemu-io, fio.

use crate::harness::{Server, raw, run, sample};
use std::path::Path;

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

/// Random writes with checksums by two jobs, then the image as qemu-img sees it.
#[test]
fn fio_verifies_what_it_wrote() {
    let server = Server::new(
        |directory| {
            let path = directory.join("disk.qcow2");
            run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "64M"]);
            path
        },
        &[],
    );
    let uri = format!("--uri={}", server.uri());
    run(
        "fio",
        &[
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--iodepth=16",
            "--rw=randwrite",
            "--bsrange=512-64k",
            "--ba=512",
            "--size=24M",
            "--offset_increment=32M",
            "--numjobs=2",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            "--verify_state_save=0",
            "--randseed=9",
        ],
    );
    let image = server.directory.path().join("disk.qcow2");
    let copy = server.directory.path().join("copy");
    // What the file lacks until then.
    run("qemu-io", &["-f", "raw", "-c", "flush", &server.uri()]);
    run("nbdcopy", &[&server.uri(), copy.to_str().unwrap()]);
    run("qemu-img", &["compare", "-U", "-f", "raw", "-F", "qcow2", copy.to_str().unwrap(), image.to_str().unwrap()]);
    run("qemu-img", &["bench", "-f", "raw", "-c", "2000", "-d", "16", "-w", "-s", "4k", &server.uri()]);
    run("qemu-img", &["bench", "-f", "raw", "-c", "2000", "-d", "16", "-s", "64k", &server.uri()]);
    let directory = tempfile::tempdir().unwrap();
    std::fs::rename(&image, directory.path().join("disk.qcow2")).unwrap();
    server.end();
    run("qemu-img", &["check", "-q", directory.path().join("disk.qcow2").to_str().unwrap()]);
}

/// What goes in through the export comes out of it, and out of the file: the clients' own copies, in both directions, with every length of
/// reply (simple, structured, and extended where libnbd has them).
#[test]
fn copies_in_and_out_agree() {
    let server = Server::new(raw, &[]);
    let source = server.directory.path().join("source");
    let mut bytes = vec![0u8; 16 << 20];
    for (at, chunk) in bytes.chunks_mut(100_000).enumerate().filter(|(at, _)| at % 3 > 0) {
        chunk.fill((at % 251) as u8 + 1);
    }
    std::fs::write(&source, &bytes).unwrap();
    for connections in ["1", "4"] {
        run("nbdcopy", &["--connections", connections, "--flush", source.to_str().unwrap(), &server.uri()]);
        assert!(std::fs::read(server.directory.path().join("disk.raw")).unwrap() == bytes);
        run("qemu-io", &["-f", "raw", "-c", "write -z -u 0 16M", &server.uri()]);
    }
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", source.to_str().unwrap(), &server.uri()]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", source.to_str().unwrap(), &server.uri()]);
    let out = server.directory.path().join("out.qcow2");
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &server.uri(), out.to_str().unwrap()]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", source.to_str().unwrap(), out.to_str().unwrap()]);
    server.end();
}

/// The map as nbdinfo prints it is the engine's.
#[test]
fn the_map_is_that_of_the_engine() {
    for name in ["overlay.qcow2", "cloud.qcow2", "over-raw.qcow2"] {
        let server = Server::new(sample(name), &["--read-only"]);
        let runs = |text: &str, start: &str, length: &str, is_data: &dyn Fn(&serde_json::Value) -> bool| {
            let mut found: Vec<(u64, bool)> = Vec::new();
            for run in serde_json::from_str::<serde_json::Value>(text).unwrap().as_array().unwrap() {
                assert!(run[length].as_u64().unwrap() > 0);
                if found.last().is_none_or(|(_, last)| *last != is_data(run)) {
                    found.push((run[start].as_u64().unwrap(), is_data(run)));
                }
            }
            found
        };
        let theirs = run("nbdinfo", &["--map", "--json", &server.uri()]);
        let image = sample(name)(Path::new(""));
        let ours = run(env!("CARGO_BIN_EXE_img-tcmu"), &["map", "--json", "-U", image.to_str().unwrap()]);
        let nbd = runs(&theirs, "offset", "length", &|run| run["type"].as_u64().unwrap() & 2 == 0);
        let map = runs(&ours, "start", "length", &|run| !run["zero"].as_bool().unwrap());
        assert_eq!(nbd, map, "{name}");
        server.end();
    }
}

/// Every error that the protocol has for a command, and that the connection lives on after each.
#[test]
fn errors_are_answered_and_the_connection_lives_on() {
    let server = Server::new(raw, &["--name", "here"]);
    let script = r#"
import errno
def fails(numbers, call, *args, **kw):
    try:
        call(*args, **kw)
    except nbd.Error as e:
        assert e.errnum in numbers, (call, args, e.errnum, e.string)
    else:
        raise AssertionError((call, args))
    assert h.pread(4, 0) == b"live"
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:allocation-depth")
h.set_export_name("here")
h.connect_unix(SOCKET)
assert h.can_meta_context("base:allocation") and not h.can_meta_context("qemu:allocation-depth")
assert h.can_multi_conn() and h.can_fua() and h.can_flush() and h.can_zero() and h.can_fast_zero() and h.can_cache() and h.can_df()
assert h.get_block_size(nbd.SIZE_MINIMUM) == 1 and h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
h.pwrite(b"live", 0)
size = h.get_size()
inval, nospc = [errno.EINVAL], [errno.ENOSPC]
huge = 1 << 62
for at in (size, huge, (1 << 64) - 512):
    fails(inval, h.pread, 512, at)
    fails(nospc, h.pwrite, b"x" * 512, at)
    fails(nospc, h.zero, 512, at)
    fails(nospc + inval, h.trim, 512, at)
    fails(inval, h.cache, 512, at)
    fails(inval, h.block_status, 512, at, lambda *a: 0)
fails(inval, h.pread, 33 << 20, 0)
fails(inval, h.pread, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
fails(inval, h.pwrite, b"x", 9, nbd.CMD_FLAG_DF)
fails(inval, h.flush, nbd.CMD_FLAG_NO_HOLE)
fails(inval, h.trim, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
fails(inval, h.zero, 512, 512, nbd.CMD_FLAG_REQ_ONE)
fails(inval, h.cache, 512, 0, nbd.CMD_FLAG_FUA)
fails(inval, h.block_status, 512, 0, lambda *a: 0, nbd.CMD_FLAG_NO_HOLE)
for call in (lambda: h.zero(0, 0), lambda: h.trim(0, 0), lambda: h.cache(0, 0), lambda: h.pwrite(b"", 0)):
    fails(inval, call)
# Many at once, answered in any order, each with its own data.
buffers = []
for i in range(500):
    buffers.append(h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([i % 250 + 1]) * 700), 4096 + i * 700))
def finish(cookies):
    for cookie in cookies:
        while not h.aio_command_completed(cookie):
            h.poll(-1)
finish(buffers)
buffers = []
for i in range(500):
    buffer = nbd.Buffer(700)
    buffers.append((buffer, i, h.aio_pread(buffer, 4096 + i * 700)))
finish([cookie for _, _, cookie in buffers])
for buffer, i, _ in buffers:
    assert buffer.to_bytearray() == bytearray([i % 250 + 1]) * 700, i
h.shutdown()
for name in ("there", "x" * 4096):
    g = nbd.NBD()
    g.set_export_name(name)
    try:
        g.connect_unix(SOCKET)
    except nbd.Error as e:
        pass
    else:
        raise AssertionError(name)
# Without structured replies, and without any negotiation at all: the oldest ways still work.
for set_up in (lambda g: g.set_request_structured_replies(False), lambda g: g.set_handshake_flags(0), lambda g: g.set_opt_mode(False)):
    g = nbd.NBD()
    set_up(g)
    g.connect_unix(SOCKET)
    assert g.pread(4, 0) == b"live"
    g.shutdown()
"#;
    let socket = server.directory.path().join("socket");
    run("nbdsh", &["-c", &format!("SOCKET = \"{}\"", socket.display()), "-c", script]);
    server.end();
}
