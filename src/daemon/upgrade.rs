//! Another program takes the place of this one, in the same process: `img-tcmu upgrade`.
//!
//! The daemon ends as on SIGTERM, with all disks flushed and blocked so that initiators wait, and then executes its successor
//! instead of exiting. The successor finds the disks as after any restart. Because the process stays, the service manager sees no
//! end and starts nothing.

use super::control::Reporter;
use super::devices::{Devices, State};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, SystemTime};

/// When the predecessor in this process stopped serving: microseconds since 1970.
const SINCE: &str = "IMG_TCMU_UPGRADE_SINCE";

/// How long the successor may take to say whether it would start.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether `binary` could take over: it is root's, is this program, and accepts our command line and configuration. The good answer is its version.
///
/// # Errors
/// Why not. Nothing has happened then.
pub fn check(binary: &Path) -> Result<String, String> {
    let problem = |text: String| Err(format!("{} does not take over: {text}", binary.display()));
    if !binary.is_absolute() {
        return problem("its path is not absolute".into());
    }
    match fs::metadata(binary) {
        Err(error) => return problem(error.to_string()),
        Ok(file) if !file.is_file() => return problem("it is no file".into()),
        Ok(file) if file.uid() != 0 && file.uid() != nix::unistd::geteuid().as_raw() => return problem("it is not root's".into()),
        Ok(file) if file.mode() & 0o022 != 0 => return problem("others than its owner can write to it".into()),
        Ok(_) => {}
    }
    let mut trial = Command::new(binary);
    trial.args(arguments()).arg("--dry-run");
    match run(trial) {
        Ok((true, text)) if !text.starts_with("img-tcmu ") => problem("it is another program".into()),
        Ok((true, text)) => Ok(format!("{} takes over: {}", binary.display(), text.trim())),
        Ok((false, text)) => problem(format!("it would not start: {}", text.trim())),
        Err(error) => problem(error.to_string()),
    }
}

/// Whether it went well, and what it printed.
fn run(mut command: Command) -> io::Result<(bool, String)> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // It prints a line or two, which fit into the pipes.
    let deadline = SystemTime::now() + PATIENCE;
    while child.try_wait()?.is_none() {
        if SystemTime::now() > deadline {
            child.kill()?;
            child.wait()?;
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", PATIENCE.as_secs())));
        }
        thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output()?;
    let text = if output.status.success() { output.stdout } else { output.stderr };
    Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
}

/// Executes `binary` with the arguments of this process, and, if that cannot be done, this program anew. Returns only why neither
/// could.
pub fn become_program(binary: &Path, begun: SystemTime) -> io::Error {
    let since = begun.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_micros();
    let error = Command::new(binary).args(arguments()).env(SINCE, since.to_string()).exec();
    tracing::error!("cannot execute {}: {error}; starts anew instead", binary.display());
    Command::new("/proc/self/exe").args(arguments()).env(SINCE, since.to_string()).exec()
}

/// Those of this process.
fn arguments() -> impl Iterator<Item = OsString> {
    std::env::args_os().skip(1)
}

/// If this program took another's place: tells the log and `reporter` for how long no disk was served, once all are.
pub fn measure(devices: Devices, reporter: Reporter) {
    let since = std::env::var(SINCE).ok().and_then(|text| text.parse().ok()).map(Duration::from_micros);
    let Some(since) = since.and_then(|since| SystemTime::UNIX_EPOCH.checked_add(since)) else { return };
    let watch = move || {
        let all_served = || devices.list().iter().all(|(_, state)| matches!(state, State::Served(_)));
        while devices.is_busy() || !all_served() {
            thread::sleep(Duration::from_millis(1));
            if since.elapsed().unwrap_or_default() > Duration::from_secs(60) {
                return;
            }
        }
        let pause = since.elapsed().unwrap_or_default();
        tracing::info!("took over {} disks within {:.1} ms", devices.list().len(), pause.as_secs_f64() * 1e3);
        reporter.paused_for(pause);
    };
    if let Err(error) = thread::Builder::new().name("takeover".into()).spawn(watch) {
        tracing::debug!("the pause is not measured: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_do_not_take_over() {
        let writable = tempfile::NamedTempFile::new().expect("a file");
        fs::set_permissions(writable.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("permissions");
        for (binary, why) in [
            (Path::new("img-tcmu"), "not absolute"),
            (Path::new("/no/such/program"), "No such file"),
            (Path::new("/usr"), "no file"),
            (writable.path(), "others than its owner"),
            (Path::new("/usr/bin/true"), "another program"),
            (Path::new("/usr/bin/false"), "would not start"),
            (Path::new("/etc/passwd"), "ermission denied"),
        ] {
            let error = check(binary).expect_err("refused");
            assert!(error.starts_with(&format!("{} does not take over: ", binary.display())) && error.contains(why), "{error}");
        }
    }
}
