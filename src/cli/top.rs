//! `img-tcmu top`: the busiest disks, live.

use super::Failure;
use super::info::human;
use super::status::{both, counters, headline, span, state};
use crate::daemon::RUN_DIRECTORY;
use crate::daemon::control::{
    self,
    protocol::{Request, Status},
};
use clap::Args;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Show the busiest disks, live; q ends it
#[derive(Debug, Args)]
pub struct Top {
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=60))]
    interval: u32,
    #[arg(long, hide = true, default_value = RUN_DIRECTORY)]
    run_dir: PathBuf,
}

impl Top {
    /// Shows them until somebody has seen enough.
    pub fn run(self) -> Result<ExitCode, Failure> {
        if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
            return Err(Failure::new("'top' needs a terminal; 'status --watch' does not"));
        }
        let mut last: (Status, Instant) = (control::ask(&self.run_dir, &Request::Status)?, Instant::now());
        let ended = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&ended)).map_err(|error| Failure::caused("cannot catch signals", error))?;
        }
        let _screen = Screen::take().map_err(|error| Failure::caused("cannot use the terminal", error))?;
        let mut message = None;
        draw(&page(&last.0, None, message.as_deref(), size())).map_err(Failure::output)?;
        let interval = Duration::from_secs(u64::from(self.interval));
        while !ended.load(Ordering::Relaxed) {
            if key_within(interval.saturating_sub(last.1.elapsed())) {
                break;
            }
            if last.1.elapsed() < interval {
                continue;
            }
            match control::ask::<Status>(&self.run_dir, &Request::Status) {
                Ok(status) => {
                    let now = (status, Instant::now());
                    message = None;
                    let earlier = Some((&last.0, now.1 - last.1));
                    draw(&page(&now.0, earlier, message.as_deref(), size())).map_err(Failure::output)?;
                    last = now;
                }
                // A daemon that is being replaced comes back.
                Err(error) => {
                    last.1 = Instant::now();
                    message = Some(error.to_string());
                    draw(&page(&last.0, None, message.as_deref(), size())).map_err(Failure::output)?;
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The terminal while it is ours; as it was, afterwards.
struct Screen(Termios);

impl Screen {
    fn take() -> io::Result<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(&stdin)?;
        let mut ours = before.clone();
        ours.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
        tcsetattr(&stdin, SetArg::TCSANOW, &ours)?;
        let screen = Self(before);
        // The other screen, no cursor.
        draw("\x1b[?1049h\x1b[?25l")?;
        Ok(screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // There is nobody to tell if the terminal has gone.
        let _ = draw("\x1b[?25h\x1b[?1049l");
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0);
    }
}

fn draw(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Whether a key that ends it was pressed within that time.
fn key_within(patience: Duration) -> bool {
    let stdin = io::stdin();
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    let mut wait = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    if !poll(&mut wait, timeout).is_ok_and(|ready| ready > 0) {
        return false;
    }
    let mut keys = [0; 64];
    match stdin.lock().read(&mut keys) {
        Ok(0) | Err(_) => true,
        Ok(len) => keys.iter().take(len).any(|key| matches!(key, b'q' | b'Q' | 3 | 4)),
    }
}

/// Columns and lines of the terminal.
fn size() -> (usize, usize) {
    let known = terminal_size::terminal_size().map(|(width, height)| (usize::from(width.0), usize::from(height.0)));
    known.filter(|(columns, lines)| *columns > 0 && *lines > 0).unwrap_or((80, 24))
}

/// A page of so many columns and lines, with the codes that put it onto the screen.
fn page(status: &Status, earlier: Option<(&Status, Duration)>, message: Option<&str>, (columns, height): (usize, usize)) -> String {
    let seconds = earlier.map_or(f64::INFINITY, |(_, ago)| ago.as_secs_f64().max(1e-3));
    let mut rows: Vec<_> = status.devices.iter().map(|device| (counters(device, earlier.map(|(status, _)| status)), device)).collect();
    rows.sort_by(|(a, x), (b, y)| both(b).count.cmp(&both(a).count).then_with(|| x.name.cmp(&y.name)));
    let mut lines = vec![headline(status), message.unwrap_or_default().to_owned()];
    lines.push(format!(
        "{:<18} {:<8} {:>7} {:>10} {:>7} {:>10} {:>8} {:>8} {:>4} {}",
        "NAME", "STATE", "READ/s", "", "WRITE/s", "", "p50", "p99", "QUE", "IMAGE"
    ));
    for (counters, device) in rows {
        let rate = |count: u64| format!("{:.0}", count as f64 / seconds);
        let bytes = |bytes: u64| human((bytes as f64 / seconds) as u64);
        let both = both(&counters);
        let time = |quantile: f64| if seconds.is_finite() { both.quantile(quantile).map_or_else(|| "-".into(), span) } else { "-".into() };
        let (queue, image) = match &device.served {
            Some(served) => (served.in_flight.to_string(), served.chain.first().map(|link| link.path.display().to_string())),
            None => (String::new(), device.reason.clone()),
        };
        lines.push(format!(
            "{:<18} {:<8} {:>7} {:>10} {:>7} {:>10} {:>8} {:>8} {queue:>4} {}",
            device.name,
            state(device.state),
            rate(counters.reads.count),
            bytes(counters.reads.bytes),
            rate(counters.writes.count),
            bytes(counters.writes.bytes),
            time(0.5),
            time(0.99),
            image.unwrap_or_default(),
        ));
    }
    let fit = |line: &String| line.chars().map(|c| if c.is_control() { '?' } else { c }).take(columns).collect::<String>();
    let shown: Vec<String> = lines.iter().take(height.saturating_sub(1)).map(fit).collect();
    // Home, each line cleared behind its end, then all below.
    format!("\x1b[H{}\x1b[K\r\n\x1b[J", shown.join("\x1b[K\r\n"))
}
