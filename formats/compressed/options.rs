//! What the user may say about compressed streams, and progress reports.

use super::codec::IN_MEMORY;
use parking_lot::Mutex;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Called now and then with what is done ("indexing the gzip stream"), and how many of how many bytes of the file are; once more at the end with both equal.
pub type Progress = Arc<dyn Fn(&str, u64, u64) + Send + Sync>;

/// How compressed streams are opened.
#[derive(Clone)]
pub struct Options {
    /// Where indexes that are expensive to make are kept. `None`: `$CACHE_DIRECTORY` (set by systemd), `$XDG_CACHE_HOME/img-tcmu`, for root `/var/cache/img-tcmu`,
    /// otherwise `~/.cache/img-tcmu`.
    pub cache_dir: Option<PathBuf>,
    /// Keep indexes at all. They are only made for files with a path.
    pub keep_index: bool,
    /// Where streams that cannot be decoded in parts are decoded to, in a file without a name. `None`: the cache directory, or `$TMPDIR`.
    pub scratch_dir: Option<PathBuf>,
    /// The most bytes that may be used there, for this stream. `None`: as far as 5 % of the file system stay free.
    pub scratch_limit: Option<u64>,
    /// Parts of a stream that decode to more bytes than this are decoded to the scratch file, not in memory. At most [`MAX_UNIT`](crate::format::MAX_UNIT).
    pub in_memory: u64,
    /// The most bytes of memory that one decoder may need (the dictionary of xz, the window of zstd).
    pub memory_limit: u64,
    /// Told how far indexing or decoding is. By default draws a bar when standard error is a terminal, and otherwise logs a line now and then.
    pub progress: Option<Progress>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cache_dir: None,
            keep_index: true,
            scratch_dir: None,
            scratch_limit: None,
            in_memory: IN_MEMORY,
            memory_limit: 256 << 20,
            progress: Some(if std::io::stderr().is_terminal() { terminal_bar() } else { log_lines() }),
        }
    }
}

impl Options {
    /// The directory for indexes, which may not exist yet. `None` when the environment names none.
    pub(super) fn index_dir(&self) -> Option<PathBuf> {
        if let Some(dir) = &self.cache_dir {
            return Some(dir.clone());
        }
        let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        if let Some(dirs) = std::env::var_os("CACHE_DIRECTORY") {
            return std::env::split_paths(&dirs).next();
        }
        if let Some(dir) = absolute("XDG_CACHE_HOME") {
            return Some(dir.join("img-tcmu"));
        }
        if nix::unistd::geteuid().is_root() {
            return Some(PathBuf::from("/var/cache/img-tcmu"));
        }
        absolute("HOME").map(|home| home.join(".cache/img-tcmu"))
    }

    /// The directory for scratch files; exists if at all possible.
    pub(crate) fn scratch_dir(&self) -> PathBuf {
        if let Some(dir) = &self.scratch_dir {
            return dir.clone();
        }
        match self.index_dir() {
            Some(dir) if std::fs::create_dir_all(&dir).is_ok() => dir,
            _ => std::env::temp_dir(),
        }
    }
}

/// One task's progress, thinned out to a few calls a second.
pub(super) struct Report<'a> {
    progress: Option<&'a Progress>,
    what: &'static str,
    total: u64,
    next: Instant,
    told: bool,
}

const INTERVAL: Duration = Duration::from_millis(200);

impl<'a> Report<'a> {
    pub(super) fn new(options: &'a Options, what: &'static str, total: u64) -> Self {
        Self { progress: options.progress.as_ref(), what, total, next: Instant::now() + INTERVAL, told: false }
    }

    /// So many bytes are done.
    pub(super) fn update(&mut self, done: u64) {
        let Some(progress) = self.progress else { return };
        if Instant::now() >= self.next {
            progress(self.what, done.min(self.total.saturating_sub(1)), self.total);
            self.told = true;
            self.next = Instant::now() + INTERVAL;
        }
    }
}

impl Drop for Report<'_> {
    fn drop(&mut self) {
        if let (Some(progress), true) = (self.progress, self.told) {
            progress(self.what, self.total, self.total);
        }
    }
}

/// A progress bar on standard error.
pub fn terminal_bar() -> Progress {
    Arc::new(|what, done, total| {
        let percent = (u128::from(done) * 100).checked_div(u128::from(total)).unwrap_or(100).min(100) as usize;
        let mut err = std::io::stderr().lock();
        let filled = percent / 4;
        let end = if done >= total { "\n" } else { "" };
        // A terminal that is gone is no reason to stop.
        let _ = write!(err, "\r{what}: [{}{}] {percent:3} % of {} MiB{end}", "#".repeat(filled), " ".repeat(25 - filled), total >> 20);
        let _ = err.flush();
    })
}

/// How often [`log_lines`] says something.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Lines in the log: for a server, whose users wonder why a disk does not come up.
pub fn log_lines() -> Progress {
    let last = Mutex::new(Instant::now());
    Arc::new(move |what, done, total| {
        let percent = (u128::from(done) * 100).checked_div(u128::from(total)).unwrap_or(100);
        let mut last = last.lock();
        if last.elapsed() >= LOG_INTERVAL {
            *last = Instant::now();
            tracing::info!("{what}: {percent} % of {} MiB", total >> 20);
        }
    })
}
