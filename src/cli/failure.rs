//! How a sub-command fails: one line, its causes, an exit code.

use std::error::Error;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

/// Exit code for anything that is not a matter of its own.
pub const FAILED: u8 = 1;
/// Exit code for a command line that makes no sense (EX_USAGE of sysexits.h: 2 belongs to `check`).
pub const USAGE: u8 = 64;

/// Why a sub-command did not do what it was asked.
#[derive(Debug)]
pub struct Failure {
    message: String,
    source: Option<Box<dyn Error + Send + Sync>>,
    code: u8,
    quiet: bool,
}

impl Failure {
    /// A failure without a deeper cause.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), source: None, code: FAILED, quiet: false }
    }

    /// A failure of `what`, caused by `source`.
    pub fn caused(what: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { source: Some(source.into()), ..Self::new(what) }
    }

    /// Whoever reads our output went away: ends without a word, as a pipeline expects.
    pub fn broken_pipe() -> Self {
        Self { quiet: true, ..Self::new("broken pipe") }
    }

    /// A signal came, and what was done so far is undone.
    pub fn interrupted() -> Self {
        Self { code: 130, ..Self::new("interrupted") }
    }

    /// With another exit code.
    #[must_use]
    pub fn code(self, code: u8) -> Self {
        Self { code, ..self }
    }

    /// A failure to write to stdout.
    pub fn output(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe { Self::broken_pipe() } else { Self::caused("cannot write to stdout", error) }
    }

    /// Prints it on stderr.
    pub fn report(&self) -> ExitCode {
        if !self.quiet {
            // When stderr is gone there is nobody to tell.
            let _ = write!(io::stderr().lock(), "{self}");
        }
        ExitCode::from(self.code)
    }
}

/// One line for the failure and one for each cause.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "img-tcmu: {}", one_line(&self.message))?;
        let mut cause = self.source.as_deref().map(|error| error as &dyn Error);
        while let Some(error) = cause {
            writeln!(f, "caused by: {}", one_line(&error.to_string()))?;
            cause = error.source();
        }
        Ok(())
    }
}

fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

impl From<formats::Error> for Failure {
    fn from(error: formats::Error) -> Self {
        let message = error.to_string();
        match error.into_source() {
            Some(source) => Self::caused(message, source),
            None => Self::new(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_follow_line_by_line() {
        let io = io::Error::other("disk\ngone");
        let error = formats::Error::io("read header", io).at_path("/x").context("cannot open /x");
        assert_eq!(Failure::from(error).to_string(), "img-tcmu: cannot open /x\ncaused by: /x: read header\ncaused by: disk gone\n");
    }
}
