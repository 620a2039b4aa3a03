//! Log lines: one a message, with the device they are about, with priorities that the journal understands.

use std::fmt;
use std::io::IsTerminal;
use std::os::linux::fs::MetadataExt;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

/// Sets up logging to stderr. `level` is a level or a filter ("info", "img_tcmu::tcmu=trace"); RUST_LOG overrides it.
///
/// # Errors
/// A filter that makes no sense, as text.
pub fn init(level: &str) -> Result<(), String> {
    let lines = Lines { journal: stderr_is_journal() };
    tracing_subscriber::fmt()
        .with_env_filter(filter(level)?)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .event_format(lines)
        .try_init()
        .map_err(|error| error.to_string())
}

/// Whether [`init`] would take it.
///
/// # Errors
/// A filter that makes no sense, as text.
pub fn check(level: &str) -> Result<(), String> {
    filter(level).map(drop)
}

fn filter(level: &str) -> Result<EnvFilter, String> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(filter) if !filter.is_empty() => filter,
        _ => level.to_owned(),
    };
    EnvFilter::builder().parse(&filter).map_err(|error| format!("log level '{filter}': {error}"))
}

/// systemd says in JOURNAL_STREAM which file it connected to the journal.
fn stderr_is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(stderr) = std::fs::metadata("/proc/self/fd/2") else { return false };
    stream == format!("{}:{}", stderr.st_dev(), stderr.st_ino())
}

struct Lines {
    /// Prefix with `<N>` (sd-daemon(3)) and leave the time to the journal.
    journal: bool,
}

fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = *event.metadata().level();
        if self.journal {
            write!(out, "<{}>", priority(level))?;
        } else {
            SystemTime.format_time(&mut out)?;
            write!(out, " {level:>5} ")?;
        }
        if let Some(scope) = context.event_scope() {
            for span in scope.from_root() {
                let extensions = span.extensions();
                match extensions.get::<FormattedFields<N>>() {
                    Some(fields) if !fields.is_empty() => write!(out, "{} {fields}: ", span.name())?,
                    _ => write!(out, "{}: ", span.name())?,
                }
            }
        }
        context.field_format().format_fields(out.by_ref(), event)?;
        writeln!(out)
    }
}
