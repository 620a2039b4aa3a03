//! TLS with a chain of certificates as it is in use: a root, an authority below it, and leaves of that for server and client.

use crate::harness::{Server, raw, run, try_run};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Keys and certificates in a directory.
struct Authority {
    directory: tempfile::TempDir,
}

impl Authority {
    fn new() -> Self {
        let authority = Self { directory: tempfile::tempdir().unwrap() };
        authority.make("root", None, "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign");
        authority.make("middle", Some("root"), "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign");
        let leaf = "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n";
        authority.make("server", Some("middle"), &format!("{leaf}extendedKeyUsage=serverAuth\nsubjectAltName=DNS:localhost,IP:127.0.0.1"));
        authority.make("client", Some("middle"), &format!("{leaf}extendedKeyUsage=clientAuth"));
        for leaf in ["server", "client"] {
            authority.join(&format!("{leaf}-chain.pem"), &[&format!("{leaf}.pem"), "middle.pem"]);
        }
        authority
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn join(&self, into: &str, parts: &[&str]) {
        let bytes: Vec<u8> = parts.iter().flat_map(|part| std::fs::read(self.path(part)).unwrap()).collect();
        std::fs::write(self.path(into), bytes).unwrap();
    }

    fn make(&self, name: &str, issuer: Option<&str>, extensions: &str) {
        let file = |suffix: &str| self.text(&format!("{name}{suffix}"));
        std::fs::write(file(".ext"), extensions).unwrap();
        run("openssl", &["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", &file(".ec")]);
        run("openssl", &["pkcs8", "-topk8", "-nocrypt", "-in", &file(".ec"), "-out", &file(".key")]);
        run("openssl", &["req", "-new", "-key", &file(".key"), "-subj", &format!("/CN=img-tcmu test {name}"), "-out", &file(".csr")]);
        let mut args = vec!["x509", "-req", "-days", "30"];
        let (csr, out, ext, key) = (file(".csr"), file(".pem"), file(".ext"), file(".key"));
        args.extend(["-in", &csr, "-out", &out, "-extfile", &ext]);
        let issuer = issuer.map(|i| (self.text(&format!("{i}.pem")), self.text(&format!("{i}.key"))));
        match &issuer {
            Some((certificate, key)) => args.extend(["-CA", certificate, "-CAkey", key, "-CAcreateserial"]),
            None => args.extend(["-signkey", &key]),
        }
        run("openssl", &args);
    }

    /// A directory as libnbd and QEMU want it: the root, and a certificate for the client if it has one.
    fn client(&self, name: &str, certificate: Option<&Self>) -> PathBuf {
        let directory = self.path(name);
        std::fs::create_dir(&directory).unwrap();
        std::fs::copy(self.path("root.pem"), directory.join("ca-cert.pem")).unwrap();
        if let Some(from) = certificate {
            std::fs::copy(from.path("client-chain.pem"), directory.join("client-cert.pem")).unwrap();
            std::fs::copy(from.path("client.key"), directory.join("client-key.pem")).unwrap();
        }
        directory
    }
}

fn uri(scheme: &str, port: u16, client: &Path) -> String {
    format!("{scheme}://localhost:{port}/?tls-certificates={}", client.display())
}

#[test]
fn a_chain_of_certificates_protects_the_disk() {
    let ours = Authority::new();
    let strangers = Authority::new();
    let (certificate, key, root) = (ours.text("server-chain.pem"), ours.text("server.key"), ours.text("root.pem"));
    let server = ["--tls-cert", certificate.as_str(), "--tls-key", &key];
    let anonymous = ours.client("anonymous", None);
    let (server_one, port) = Server::on_tcp(raw, &server);
    // Data in both directions, many requests at once, over several connections.
    let source = server_one.directory.path().join("source");
    let bytes: Vec<u8> = (0..16u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(&source, &bytes).unwrap();
    let copy = server_one.directory.path().join("copy");
    let secure = uri("nbds", port, &anonymous);
    run("nbdcopy", &["--flush", "--connections", "4", source.to_str().unwrap(), &secure]);
    assert!(std::fs::read(server_one.directory.path().join("disk.raw")).unwrap() == bytes);
    run("nbdcopy", &[&secure, copy.to_str().unwrap()]);
    assert!(std::fs::read(&copy).unwrap() == bytes);
    let info = run("nbdinfo", &[&secure]);
    assert!(info.contains("with TLS") || info.contains("TLS"), "{info}");
    // Nothing is told without TLS, and a client that knows another root does not believe us.
    let (plain, said) = try_run("nbdinfo", &[&format!("nbd://localhost:{port}")]);
    assert!(!plain && !said.contains("16777216"), "{said}");
    assert!(!try_run("nbdinfo", &["--list", &format!("nbd://localhost:{port}")]).0);
    assert!(!try_run("nbdinfo", &[&uri("nbds", port, &strangers.client("stranger", None))]).0);
    // QEMU as the client.
    let qemu = format!("driver=nbd,host=localhost,port={port},tls-creds=tls0");
    let credentials = format!("tls-creds-x509,id=tls0,endpoint=client,dir={}", anonymous.display());
    run(
        "qemu-img",
        &[
            "compare",
            "--object",
            &credentials,
            "--image-opts",
            &qemu,
            &format!("driver=raw,file.driver=file,file.filename={}", source.display()),
        ],
    );
    server_one.end();

    // Clients have to show a certificate of our authority.
    let mut with_clients = server.to_vec();
    with_clients.extend(["--tls-ca", &root]);
    let (server_two, port) = Server::on_tcp(raw, &with_clients);
    run("nbdinfo", &["--size", &uri("nbds", port, &ours.client("member", Some(&ours)))]);
    for (name, client) in [("without", ours.client("without", None)), ("forged", ours.client("forged", Some(&strangers)))] {
        let (good, said) = try_run("nbdinfo", &["--size", &uri("nbds", port, &client)]);
        assert!(!good, "{name}: {said}");
    }
    run("nbdinfo", &["--size", &uri("nbds", port, &ours.path("member"))]);
    server_two.end();
}

/// Options before TLS, TLS that is none, a second STARTTLS, and half a handshake.
#[test]
fn the_way_into_tls_cannot_be_cheated() {
    let ours = Authority::new();
    let (certificate, key) = (ours.text("server-chain.pem"), ours.text("server.key"));
    let (server, port) = Server::on_tcp(raw, &["--tls-cert", &certificate, "--tls-key", &key]);
    let hello = || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(15))).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        stream
    };
    let option = |stream: &mut TcpStream, number: u32, data: &[u8]| {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend(number.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
        stream.write_all(&bytes).unwrap();
    };
    let answer = |stream: &mut TcpStream| {
        let mut head = [0; 20];
        stream.read_exact(&mut head).unwrap();
        let mut text = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
        stream.read_exact(&mut text).unwrap();
        u32::from_be_bytes(head[12..16].try_into().unwrap())
    };
    let mut stream = hello();
    for number in [3, 6, 7, 8, 9, 10, 11, 99] {
        option(&mut stream, number, &[]);
        assert_eq!(answer(&mut stream), 0x8000_0005, "option {number} before TLS");
    }
    option(&mut stream, 5, b"data");
    assert_eq!(answer(&mut stream), 0x8000_0003, "STARTTLS takes no data");
    // The name is all that EXPORT_NAME has: no answer, the end.
    option(&mut stream, 1, b"");
    assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0);
    // After the answer everything is TLS: an option in the clear ends it.
    let mut stream = hello();
    option(&mut stream, 5, b"");
    assert_eq!(answer(&mut stream), 1);
    option(&mut stream, 3, b"");
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.len() < 40 && !rest.windows(8).any(|w| w == 0x0003_e889_0455_65a9u64.to_be_bytes()), "{rest:?}");
    // Smuggled in before the handshake: never taken for what came after it.
    let mut stream = hello();
    stream.write_all(b"IHAVEOPT\0\0\0\x05\0\0\0\0IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
    assert_eq!(answer(&mut stream), 1);
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.len() < 40);
    // Half handshakes stay behind, and the next client is served.
    let halves: Vec<TcpStream> = (0..50)
        .map(|_| {
            let mut stream = hello();
            option(&mut stream, 5, b"");
            assert_eq!(answer(&mut stream), 1);
            stream.write_all(&[0x16, 3, 1, 2, 0, 1]).unwrap();
            stream
        })
        .collect();
    run("nbdinfo", &["--size", &uri("nbds", port, &ours.client("client", None))]);
    drop(halves);
    server.end();
}

#[test]
fn files_that_do_not_fit_are_named() {
    let ours = Authority::new();
    let directory = tempfile::tempdir().unwrap();
    let image = raw(directory.path());
    for (certificate, key, named) in [
        ("server-chain.pem", "client.key", "server-chain.pem"),
        ("nothing.pem", "server.key", "nothing.pem"),
        ("server.key", "server.key", "server.key"),
        ("server-chain.pem", "server.pem", "server.pem"),
    ] {
        let args = [
            "nbd",
            "--listen",
            "127.0.0.1:0",
            "--tls-cert",
            &ours.text(certificate),
            "--tls-key",
            &ours.text(key),
            image.to_str().unwrap(),
        ];
        let (good, said) = try_run(env!("CARGO_BIN_EXE_img-tcmu"), &args);
        assert!(!good && said.contains(named), "{said}");
    }
}
