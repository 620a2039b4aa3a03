//! `img-tcmu status`: what the daemon and its disks are doing.

use super::{Failure, info::human};
use crate::daemon::RUN_DIRECTORY;
use crate::daemon::control::{
    self,
    protocol::{Device, Request, State, Status},
};
use crate::serve::{Counts, Snapshot};
use clap::Args;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

/// Show what the daemon and its disks are doing
///
/// Counts and latencies are those since each disk was taken into service; with --watch, those of each interval. A latency is the
/// time from when the daemon fetched a command to its completion.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Print JSON: everything there is, with the latencies' histograms
    #[arg(long, conflicts_with = "watch")]
    json: bool,
    /// Print rates again and again, every so many seconds
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = clap::value_parser!(u32).range(1..=3600))]
    watch: Option<u32>,
    #[arg(long, hide = true, default_value = RUN_DIRECTORY)]
    run_dir: PathBuf,
}

impl StatusArgs {
    /// Prints the daemon's answer.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let first: Status = control::ask(&self.run_dir, &Request::Status)?;
        let mut out = io::stdout();
        if self.json {
            let text = serde_json::to_string_pretty(&first).map_err(|error| Failure::caused("cannot print the answer", error))?;
            writeln!(out, "{text}").map_err(Failure::output)?;
            return Ok(ExitCode::SUCCESS);
        }
        let Some(seconds) = self.watch else {
            let text = format!("{}\n\n{}", headline(&first), table(&first, None));
            out.write_all(text.as_bytes()).map_err(Failure::output)?;
            return Ok(ExitCode::SUCCESS);
        };
        let mut last = (first, Instant::now());
        loop {
            thread::sleep(Duration::from_secs(u64::from(seconds)));
            let now = (control::ask(&self.run_dir, &Request::Status)?, Instant::now());
            let text = format!("{}\n", table(&now.0, Some((&last.0, now.1 - last.1))));
            out.write_all(text.as_bytes()).map_err(Failure::output)?;
            last = now;
        }
    }
}

/// The daemon in a line.
pub fn headline(status: &Status) -> String {
    let requests = status.cache.hits + status.cache.misses;
    let hits = match (status.cache.hits * 100).checked_div(requests) {
        Some(percent) => format!(", {percent} % hits"),
        None => String::new(),
    };
    format!(
        "img-tcmu {}, process {}, up {}, {} disks, {} threads, cache {} of {}{hits}",
        status.version,
        status.pid,
        span(Duration::from_secs_f64(status.uptime_s.clamp(0.0, 1e12))),
        status.devices.len(),
        status.threads,
        human(status.cache.used as u64),
        human(status.cache.budget as u64),
    )
}

/// What happened to a disk since `earlier`, or ever.
pub fn counters(device: &Device, earlier: Option<&Status>) -> Snapshot {
    let now = device.served.as_ref().map(|served| served.counters.clone()).unwrap_or_default();
    let before = earlier.and_then(|status| status.devices.iter().find(|other| other.name == device.name));
    match before.and_then(|before| before.served.as_ref()) {
        // It was taken into service anew in between.
        Some(before) if before.counters.reads.count > now.reads.count || before.counters.writes.count > now.writes.count => now,
        Some(before) => now.since(&before.counters),
        None => now,
    }
}

/// One line a disk, and one for each further file of its chain; rates if there is an earlier status and how long ago that was.
pub fn table(status: &Status, earlier: Option<(&Status, Duration)>) -> String {
    let seconds = earlier.map(|(_, ago)| ago.as_secs_f64().max(1e-3));
    let per = if seconds.is_some() { "/s" } else { "" };
    let heads = [
        "NAME".into(),
        "STATE".into(),
        "SIZE".into(),
        format!("READS{per}"),
        format!("READ{per}"),
        format!("WRITES{per}"),
        format!("WRITTEN{per}"),
        "p50".into(),
        "p99".into(),
        "p99.9".into(),
        "MAX".into(),
        "QUEUE".into(),
        "ERRORS".into(),
        "IMAGE".into(),
    ];
    let mut lines = vec![heads];
    for device in &status.devices {
        let counters = counters(device, earlier.map(|(status, _)| status));
        lines.push(row(device, &counters, seconds));
        for link in device.served.iter().flat_map(|served| served.chain.iter().skip(1)) {
            let mut more: [String; 14] = Default::default();
            if let Some(last) = more.last_mut() {
                *last = format!("  on {} {}", link.format, link.path.display());
            }
            lines.push(more);
        }
    }
    let width = |column: usize| lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..14).map(width).collect();
    let mut text = String::new();
    for line in &lines {
        let cells = line.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match column {
            0 | 1 => format!("{cell:<width$}"),
            13 => cell.clone(),
            _ => format!("{cell:>width$}"),
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn row(device: &Device, counters: &Snapshot, seconds: Option<f64>) -> [String; 14] {
    let Some(served) = &device.served else {
        let mut row: [String; 14] = Default::default();
        let reason = device.reason.clone().unwrap_or_default();
        for (cell, text) in [(0, device.name.clone()), (1, state(device.state).into()), (13, reason)] {
            if let Some(place) = row.get_mut(cell) {
                *place = text;
            }
        }
        return row;
    };
    let both = both(counters);
    let count = |count: u64| seconds.map_or_else(|| count.to_string(), |seconds| format!("{:.0}", count as f64 / seconds));
    let bytes = |bytes: u64| human(seconds.map_or(bytes, |seconds| (bytes as f64 / seconds) as u64));
    let time = |quantile: f64| both.quantile(quantile).map_or_else(|| "-".into(), span);
    let queue = match served.oldest_s {
        Some(age) => format!("{} ({age:.0} s)", served.in_flight),
        None => served.in_flight.to_string(),
    };
    let image = served.chain.first().map(|link| format!("{} {}", link.format, link.path.display())).unwrap_or_default();
    [
        device.name.clone(),
        format!("{}{}", state(device.state), if served.read_only { ", ro" } else { "" }),
        human(served.size),
        count(counters.reads.count),
        bytes(counters.reads.bytes),
        count(counters.writes.count),
        bytes(counters.writes.bytes),
        time(0.5),
        time(0.99),
        time(0.999),
        time(1.0),
        queue,
        (both.errors + counters.others.errors).to_string(),
        image,
    ]
}

/// Reads and writes together.
pub fn both(counters: &Snapshot) -> Counts {
    let (reads, writes) = (&counters.reads, &counters.writes);
    let mut latency = [reads.latency.as_slice(), writes.latency.as_slice()].concat();
    latency.sort_unstable();
    Counts {
        count: reads.count + writes.count,
        errors: reads.errors + writes.errors,
        bytes: reads.bytes + writes.bytes,
        total_ns: reads.total_ns.saturating_add(writes.total_ns),
        max_ns: reads.max_ns.max(writes.max_ns),
        latency,
    }
}

/// A state in a word.
pub fn state(state: State) -> &'static str {
    match state {
        State::Served => "served",
        State::Waiting => "WAITING",
        State::OutOfService => "FAILED",
    }
}

/// A time with its unit, in three digits or so.
pub fn span(time: Duration) -> String {
    let ns = time.as_nanos();
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..10_000 => format!("{:.1} µs", ns as f64 / 1e3),
        10_000..1_000_000 => format!("{} µs", ns / 1_000),
        1_000_000..10_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        10_000_000..1_000_000_000 => format!("{} ms", ns / 1_000_000),
        1_000_000_000..120_000_000_000 => format!("{:.1} s", ns as f64 / 1e9),
        _ => match time.as_secs() / 60 {
            minutes @ 0..120 => format!("{minutes} min"),
            minutes @ 120..2880 => format!("{} h {} min", minutes / 60, minutes % 60),
            minutes => format!("{} d {} h", minutes / 1440, minutes / 60 % 24),
        },
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::daemon::control::protocol::{Cache, Link, Served};

    /// Two disks, of which one is served and did so many reads.
    pub fn status(reads: u64) -> Status {
        let latency = if reads == 0 { Vec::new() } else { vec![(2048, reads)] };
        let reads = Counts { count: reads, errors: 0, bytes: reads * 4096, total_ns: reads * 1500, max_ns: 1500, latency };
        let counters = Snapshot { reads, ..Snapshot::default() };
        let link = |path: &str, format: &str| Link { path: path.into(), format: format.into() };
        let served = Served {
            chain: vec![link("/i/top.qcow2", "qcow2"), link("/i/base.raw", "raw")],
            size: 10 << 30,
            block_size: 512,
            read_only: false,
            write_cache: true,
            in_flight: 3,
            oldest_s: None,
            counters,
        };
        let one = Device { name: "user_0/disk0".into(), state: State::Served, reason: None, served: Some(served) };
        let two = Device { name: "user_1/gone".into(), state: State::Waiting, reason: Some("/i/gone: no such file".into()), served: None };
        Status {
            version: "1.2.3".into(),
            pid: 7,
            incarnation: "x".into(),
            uptime_s: 7265.0,
            pause_ms: None,
            threads: 2,
            cache: Cache { hits: 3, misses: 1, used: 1 << 20, budget: 256 << 20 },
            devices: vec![one, two],
        }
    }

    #[test]
    fn rates_and_totals() {
        let (before, now) = (status(1000), status(3000));
        assert_eq!(headline(&now), "img-tcmu 1.2.3, process 7, up 2 h 1 min, 2 disks, 2 threads, cache 1 MiB of 256 MiB, 75 % hits");
        let totals = table(&now, None);
        assert!(totals.lines().nth(1).unwrap().contains("  3000  11.72 MiB  "), "{totals}");
        assert!(totals.lines().nth(2).unwrap().trim() == "on raw /i/base.raw", "{totals}");
        assert!(
            totals.lines().nth(3).unwrap().starts_with("user_1/gone   WAITING") && totals.contains("/i/gone: no such file"),
            "{totals}"
        );
        let rates = table(&now, Some((&before, Duration::from_secs(2))));
        let words: Vec<&str> = rates.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(words[..9], ["user_0/disk0", "served", "10", "GiB", "1000", "3.91", "MiB", "0", "0"], "{rates}");
        assert!(rates.contains("1.5 µs"), "{rates}");
    }

    #[test]
    fn a_disk_that_came_again_has_no_negative_rates() {
        let rates = table(&status(10), Some((&status(1000), Duration::from_secs(1))));
        assert_eq!(rates.lines().nth(1).unwrap().split_whitespace().nth(4), Some("10"));
    }

    #[test]
    fn the_answer_survives_the_socket() {
        let text = serde_json::to_string(&status(5)).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&text).unwrap(), status(5));
    }
}
