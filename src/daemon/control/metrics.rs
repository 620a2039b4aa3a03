//! Metrics in Prometheus' text format (version 0.0.4), over HTTP, where the configuration asks for them.
//!
//! Whoever can connect can read them: names of disks and how busy they are, no paths. So they are only to be had on this machine.

use super::protocol::{Device, State, Status};
use super::{PATIENCE, Reporter, accept};
use crate::config::Endpoint;
use crate::serve::Counts;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;

/// Longest request that is read, in bytes.
const MAX_REQUEST: usize = 8 << 10;

/// Upper bounds of the latency histogram's buckets, in seconds.
const BOUNDS: [f64; 16] = [5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.5, 1.0, 10.0];

/// Answers there from now on.
///
/// # Errors
/// The socket or the thread cannot be made.
pub fn listen(endpoint: &Endpoint, reporter: Reporter) -> io::Result<()> {
    let serve = move |stream: UnixStream| answer(&stream, &reporter);
    match endpoint {
        Endpoint::Unix(path) => {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(path)?;
            accept(move || listener.accept().map(|(stream, _)| stream), "metrics", serve)
        }
        Endpoint::Loopback(address) => {
            let listener = TcpListener::bind(address)?;
            // What is asked of a stream here is the same for both kinds.
            accept(move || listener.accept().map(|(stream, _)| OwnedFd::from(stream).into()), "metrics", serve)
        }
    }
}

fn answer(mut stream: &UnixStream, reporter: &Reporter) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let head = read_head(stream)?;
    let mut words = head.split(|byte| *byte == b' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (status, body) = match (method, target) {
        (b"GET" | b"HEAD", b"/metrics" | b"/") => ("200 OK", text(&reporter.status())),
        (b"GET" | b"HEAD", _) => ("404 Not Found", "the metrics are at /metrics\n".into()),
        _ => ("405 Method Not Allowed", "GET /metrics\n".into()),
    };
    let len = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n"
    )?;
    if method == b"HEAD" { Ok(()) } else { stream.write_all(body.as_bytes()) }
}

/// The head of the request, up to the empty line.
fn read_head(mut stream: &UnixStream) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + PATIENCE;
    let (mut head, mut part) = (Vec::new(), [0; 1024]);
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || head.len() > MAX_REQUEST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut part)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            len => head.extend_from_slice(part.get(..len).unwrap_or_default()),
        }
    }
    Ok(head)
}

/// The page.
pub fn text(status: &Status) -> String {
    let mut page = Page(String::new());
    page.family("img_tcmu_info", "gauge", "The daemon's version.");
    page.sample("img_tcmu_info", &[("version", &status.version)], 1.0);
    page.family("img_tcmu_uptime_seconds", "gauge", "Time since the daemon started.");
    page.sample("img_tcmu_uptime_seconds", &[], status.uptime_s);
    page.family("img_tcmu_threads", "gauge", "Threads that do I/O.");
    page.sample("img_tcmu_threads", &[], status.threads as f64);
    page.family("img_tcmu_cache_requests_total", "counter", "Requests for decoded units, by whether the unit was in the cache.");
    page.sample("img_tcmu_cache_requests_total", &[("result", "hit")], status.cache.hits as f64);
    page.sample("img_tcmu_cache_requests_total", &[("result", "miss")], status.cache.misses as f64);
    page.family("img_tcmu_cache_bytes", "gauge", "Decoded bytes in the cache.");
    page.sample("img_tcmu_cache_bytes", &[], status.cache.used as f64);
    page.family("img_tcmu_device_up", "gauge", "1 if the disk is served, 0 if its initiators wait or get errors.");
    for device in &status.devices {
        page.sample("img_tcmu_device_up", &[("device", &device.name)], f64::from(u8::from(device.state == State::Served)));
    }
    page.family("img_tcmu_device_size_bytes", "gauge", "Size of the disk.");
    page.each(status, "img_tcmu_device_size_bytes", |served| served.size as f64);
    page.family("img_tcmu_commands_in_flight", "gauge", "Commands being executed.");
    page.each(status, "img_tcmu_commands_in_flight", |served| served.in_flight as f64);
    page.family("img_tcmu_oldest_command_seconds", "gauge", "Age of the oldest command, if that is a second or more; else 0.");
    page.each(status, "img_tcmu_oldest_command_seconds", |served| served.oldest_s.unwrap_or(0.0));
    page.family("img_tcmu_errors_total", "counter", "Commands that did not end with GOOD.");
    page.kinds(status, |page, labels, counts| page.sample("img_tcmu_errors_total", labels, counts.errors as f64));
    page.family("img_tcmu_bytes_total", "counter", "Bytes read and written.");
    page.kinds(status, |page, labels, counts| page.sample("img_tcmu_bytes_total", labels, counts.bytes as f64));
    page.family("img_tcmu_command_seconds", "histogram", "Time from when a command was fetched to its completion.");
    page.kinds(status, |page, labels, counts| page.histogram("img_tcmu_command_seconds", labels, counts));
    page.0
}

struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string cannot fail.
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.0.push_str(name);
        for (place, (label, text)) in labels.iter().enumerate() {
            let escaped = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.0, "{}{label}=\"{escaped}\"", if place == 0 { '{' } else { ',' });
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    fn each(&mut self, status: &Status, name: &str, value: impl Fn(&super::protocol::Served) -> f64) {
        for Device { name: device, served, .. } in &status.devices {
            if let Some(served) = served {
                self.sample(name, &[("device", device)], value(served));
            }
        }
    }

    fn kinds(&mut self, status: &Status, mut show: impl FnMut(&mut Self, &[(&str, &str)], &Counts)) {
        for Device { name, served, .. } in &status.devices {
            let Some(served) = served else { continue };
            for (kind, counts) in [("read", &served.counters.reads), ("write", &served.counters.writes), ("other", &served.counters.others)]
            {
                show(self, &[("device", name), ("kind", kind)], counts);
            }
        }
    }

    fn histogram(&mut self, name: &str, labels: &[(&str, &str)], counts: &Counts) {
        let bucket = format!("{name}_bucket");
        for bound in BOUNDS {
            // Of the finer buckets, those that end no later.
            let within = counts.latency.iter().filter(|(end, _)| *end as f64 <= bound * 1e9).map(|(_, count)| count).sum::<u64>();
            self.sample(&bucket, &[labels, &[("le", &bound.to_string())]].concat(), within as f64);
        }
        self.sample(&bucket, &[labels, &[("le", "+Inf")]].concat(), counts.count as f64);
        self.sample(&format!("{name}_sum"), labels, counts.total_ns as f64 / 1e9);
        self.sample(&format!("{name}_count"), labels, counts.count as f64);
    }
}
