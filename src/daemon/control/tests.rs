//! Clients of every kind, against a daemon without disks.

use super::metrics::text;
use super::protocol::Status;
use super::*;
use crate::daemon::dbus::SharedEnvironment;
use crate::daemon::devices::{Devices, Means};
use crate::daemon::rings::Rings;
use crate::serve::Pool;
use crate::tcmu::configfs::{Backstore, Configfs};
use crate::tcmu::uio::UioDevice;
use crate::tcmu::{Error, Result, Ring};
use std::net::{TcpListener, TcpStream};

/// No disks.
struct Nothing;

impl Rings for Nothing {
    fn scan(&self) -> Result<Vec<UioDevice>> {
        Ok(Vec::new())
    }

    fn lookup(&self, _: u32) -> Result<Option<UioDevice>> {
        Ok(None)
    }

    fn attach(&self, _: &UioDevice, _: &Backstore) -> Result<Ring> {
        Err(Error::Invalid("there are no disks".into()))
    }
}

fn reporter() -> Reporter {
    let pool = Pool::new(Some(1)).expect("pool");
    let means = Means { configfs: Configfs::default(), rings: Box::new(Nothing), pool, environment: SharedEnvironment::default() };
    Reporter::new(Devices::new(means))
}

/// A daemon that takes orders and says which.
fn daemon() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("directory");
    listen(directory.path(), reporter(), |errand| errand.outcome.send(Ok(format!("{:?}", errand.order))).is_ok()).expect("socket");
    directory
}

fn say(directory: &Path, words: &[u8]) -> String {
    let mut stream = UnixStream::connect(directory.join(SOCKET)).expect("connect");
    stream.write_all(words).expect("write");
    let mut answer = String::new();
    // A connection that is closed with unread words is reset.
    let _ = stream.read_to_string(&mut answer);
    answer
}

#[test]
fn questions_and_orders() {
    let directory = daemon();
    let status: Status = ask(directory.path(), &Request::Status).expect("status");
    assert_eq!((status.pid, status.devices.len(), status.threads), (std::process::id(), 0, 1));
    assert_eq!(ask::<String>(directory.path(), &Request::Reload).expect("reload"), "Reload");
    let upgrade = Request::Upgrade { binary: "/x y".into() };
    assert_eq!(ask::<String>(directory.path(), &upgrade).expect("upgrade"), "Upgrade(\"/x y\")");
    assert_eq!(fs::metadata(directory.path().join(SOCKET)).expect("socket").permissions().mode() & 0o777, 0o600);
    // The name is free for whoever holds the lock next.
    listen(directory.path(), reporter(), |_| false).expect("socket");
    let error = ask::<String>(directory.path(), &Request::Reload).expect_err("nobody takes orders");
    assert_eq!(error.to_string(), "the daemon says: the daemon is ending");
    let absent = ask::<Status>(Path::new("/nowhere"), &Request::Status).expect_err("no daemon");
    assert!(absent.to_string().contains("is 'img-tcmu serve' running"), "{absent}");
}

#[test]
fn what_is_no_request_is_told_apart() {
    let directory = daemon();
    for (words, answer) in [
        (&b"status\n"[..], "not a request of this daemon"),
        (b"{}\n", "missing field `command`"),
        (b"{\"command\":\"format-all\"}\n", "unknown variant `format-all`"),
        (b"{\"command\":\"upgrade\"}\n", "missing field `binary`"),
        (b"{\"command\":\"upgrade\",\"binary\":\"/x\",\"force\":true}\n", "unknown field `force`"),
        (b"\xFF\xFE\n", "not a request"),
        (b"\n", "not a request"),
    ] {
        let said = say(directory.path(), words);
        assert!(said.starts_with("{\"protocol\":1,\"error\":") && said.contains(answer), "{said}");
    }
    assert_eq!(say(directory.path(), &[b'['; MAX_REQUEST + 4097]), "", "too long a request is not answered");
}

#[test]
fn silent_clients_hold_up_nobody() {
    let directory = daemon();
    let connect = || UnixStream::connect(directory.path().join(SOCKET)).expect("connect");
    let mut half = connect();
    half.write_all(b"{\"command\":").expect("write");
    let gone = connect();
    drop(gone);
    let crowd: Vec<UnixStream> = (0..MAX_CONNECTIONS - 4).map(|_| connect()).collect();
    assert!(say(directory.path(), b"{\"command\":\"status\"}\n").contains("\"pid\""));
    let more: Vec<UnixStream> = (0..200).map(|_| connect()).collect();
    // Beyond the limit connections are closed; whoever asks when there is room is answered.
    drop(more);
    drop(crowd);
    let patience = Instant::now();
    while ask::<Status>(directory.path(), &Request::Status).is_err() {
        assert!(patience.elapsed() < PATIENCE, "no room again");
        thread::sleep(Duration::from_millis(10));
    }
    // The half request ends the connection after a while.
    half.set_read_timeout(Some(2 * PATIENCE)).expect("time-out");
    assert_eq!(half.read(&mut [0; 10]).expect("closed"), 0);
    assert!(patience.elapsed() < 2 * PATIENCE);
}

#[test]
fn metrics_over_both_kinds_of_sockets() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("metrics.sock");
    metrics::listen(&crate::config::Endpoint::Unix(path.clone()), reporter()).expect("socket");
    let get = |words: &str| {
        let mut stream = UnixStream::connect(&path).expect("connect");
        stream.write_all(words.as_bytes()).expect("write");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("read");
        answer
    };
    let page = get("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(
        page.starts_with("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4") && page.contains("\nimg_tcmu_threads 1\n"),
        "{page}"
    );
    assert!(get("GET /secrets HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
    assert!(get("POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
    let head = get("HEAD / HTTP/1.1\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"));

    // A port that is free now.
    let address = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("port");
    metrics::listen(&crate::config::Endpoint::Loopback(address), reporter()).expect("socket");
    let mut stream = TcpStream::connect(address).expect("connect");
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").expect("write");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read");
    assert!(answer.contains("img_tcmu_info{version="), "{answer}");
}

/// The rules of the text format that a scraper would complain about.
#[test]
fn the_page_is_well_formed() {
    let page = text(&crate::cli::example_status(3000));
    let mut families = Vec::new();
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("name and type");
            assert!(!families.iter().any(|(other, _)| *other == name), "{name} twice");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            families.push((name, kind));
        } else if !line.starts_with("# HELP ") {
            let (name, kind) = families.last().expect("a family before its samples");
            let (sample, value) = line.rsplit_once(' ').expect("a value");
            let bare = sample.split('{').next().unwrap_or_default();
            let suffix = bare.strip_prefix(name).expect("the family's own sample");
            assert!(suffix.is_empty() || *kind == "histogram" && ["_bucket", "_sum", "_count"].contains(&suffix), "{line}");
            assert!(value.parse::<f64>().is_ok(), "{line}");
        }
    }
    let bucket = |le: &str| {
        let prefix = format!("img_tcmu_command_seconds_bucket{{device=\"user_0/disk0\",kind=\"read\",le=\"{le}\"}} ");
        page.lines()
            .find_map(|line| line.strip_prefix(&prefix))
            .unwrap_or_else(|| panic!("{prefix}\n{page}"))
            .parse::<u64>()
            .expect("a count")
    };
    assert_eq!((bucket("0.000005"), bucket("10"), bucket("+Inf")), (3000, 3000, 3000));
    assert!(page.contains("img_tcmu_device_up{device=\"user_1/gone\"} 0\n"), "{page}");
}
