//! Clients that mean harm, or know no better: the next client is served.

use crate::harness::{Server, raw, run};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

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

fn request(kind: u16, offset: u64, len: u32) -> Vec<u8> {
    let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
    request.extend(0u16.to_be_bytes());
    request.extend(kind.to_be_bytes());
    request.extend(77u64.to_be_bytes());
    request.extend(offset.to_be_bytes());
    request.extend(len.to_be_bytes());
    request
}

/// A connection in transmission, with simple replies.
fn transmission(server: &Server) -> UnixStream {
    let mut stream = server.connect();
    let mut hello = [0; 18];
    stream.read_exact(&mut hello).unwrap();
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
    stream.read_exact(&mut [0; 10]).unwrap();
    stream
}

/// The error of a simple reply.
fn simple_reply(stream: &mut UnixStream) -> u32 {
    let mut reply = [0; 16];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..4], 0x6744_6698u32.to_be_bytes());
    assert_eq!(reply[8..], 77u64.to_be_bytes());
    u32::from_be_bytes(reply[4..8].try_into().unwrap())
}

/// Requests for as much as a length can say cost no memory, and the connection goes on where the protocol lets it.
#[test]
fn four_gibibytes_are_refused_without_memory_for_them() {
    let server = Server::new(raw, &[]);
    for _ in 0..10 {
        let mut stream = transmission(&server);
        for kind in [0, 4, 5, 6, 7] {
            stream.write_all(&request(kind, 0, u32::MAX)).unwrap();
            assert_ne!(simple_reply(&mut stream), 0, "command {kind}");
        }
        // 40 MiB arrive, more than is taken at once; the next request is understood.
        stream.write_all(&request(1, 0, 40 << 20)).unwrap();
        for _ in 0..40 {
            stream.write_all(&[1; 1 << 20]).unwrap();
        }
        assert_eq!(simple_reply(&mut stream), 22);
        stream.write_all(&request(0, 0, 512)).unwrap();
        assert_eq!(simple_reply(&mut stream), 0);
        stream.read_exact(&mut [1; 512]).unwrap();
        // Four GiB are announced and do not come.
        stream.write_all(&request(1, 0, u32::MAX)).unwrap();
        stream.write_all(&[1; 100_000]).unwrap();
    }
    run("qemu-io", &["-f", "raw", "-c", "read -P 0 0 16M", &server.uri()]);
    assert!(server.peak_memory() < 150, "{} MiB", server.peak_memory());
    server.end();
}

/// A write of which a part arrived before the client died is no write.
#[test]
fn a_client_that_dies_in_a_write_has_written_nothing() {
    let server = Server::new(raw, &[]);
    for len in [4096u32, 100_000, 200_000, 1 << 20, 20 << 20] {
        for part in [0, 1, len / 2, len - 1] {
            let mut stream = transmission(&server);
            stream.write_all(&request(1, 0, len.min(16 << 20))).unwrap();
            stream.write_all(&vec![9; part.min((16 << 20) - 1) as usize]).unwrap();
        }
    }
    run("qemu-io", &["-f", "raw", "-c", "read -P 0 0 16M", &server.uri()]);
    server.end();
}

/// A thousand idle connections, and fifty that send a byte now and then: the next client is served. When the most are open, one more is
/// turned away, not kept waiting.
#[test]
fn a_thousand_connections_and_clients_that_dawdle() {
    let server = Server::new(raw, &[]);
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 4096, 4096).expect("the test may open files");
    let mut dawdlers: Vec<UnixStream> = (0..50).map(|_| server.connect()).collect();
    let connections: Vec<UnixStream> = (0..1000 - dawdlers.len()).map(|_| server.connect()).collect();
    for round in 0..5 {
        for stream in &mut dawdlers {
            stream.write_all(&[0, 0, 0, 3, b'I', b'H'][round..=round]).unwrap();
        }
        run("nbdinfo", &["--size", &server.uri()]);
    }
    let start = Instant::now();
    let mut extra: Vec<UnixStream> = (0..100).map(|_| server.connect()).collect();
    assert!(extra.iter_mut().any(|stream| stream.read(&mut [0; 18]).unwrap() == 0), "somebody is turned away");
    assert!(start.elapsed() < Duration::from_secs(10));
    drop((connections, extra));
    let start = Instant::now();
    while !crate::harness::try_run("nbdinfo", &["--size", &server.uri()]).0 {
        assert!(start.elapsed() < Duration::from_secs(10), "places become free");
        std::thread::sleep(Duration::from_millis(50));
    }
    server.end();
}

/// Clients that ask for much and take none of it: their answers wait, the workers do not, and the next client is served at once.
#[test]
fn clients_that_do_not_read_hold_up_nobody() {
    // Compressed noise: reading it takes a worker.
    let server = Server::new(
        |directory| {
            let raw = directory.join("noise");
            let mut x = 1u64;
            let noise: Vec<u8> = (0..16 << 20)
                .map(|_| {
                    x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (x >> 56) as u8 & 0x3F
                })
                .collect();
            std::fs::write(&raw, noise).unwrap();
            let image = directory.join("disk.qcow2");
            run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-c", raw.to_str().unwrap(), image.to_str().unwrap()]);
            image
        },
        &[],
    );
    let _deaf: Vec<UnixStream> = (0..12)
        .map(|_| {
            let mut stream = transmission(&server);
            let requests: Vec<u8> = (0..64).flat_map(|n| request(0, n * 200_000, 1 << 20)).collect();
            stream.write_all(&requests).unwrap();
            stream
        })
        .collect();
    std::thread::sleep(Duration::from_millis(500));
    let start = Instant::now();
    run(
        "qemu-io",
        &["-f", "raw", "-c", "write -P 1 1M 64k", "-c", "flush", "-c", "read 8M 1M", "-c", "discard 2M 1M", "-c", "flush", &server.uri()],
    );
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    // 12 connections of at most 64 MiB and what one more request needs.
    assert!(server.peak_memory() < 1500, "{} MiB", server.peak_memory());
    // They are given up after a while; nobody waits for that here.
}
