//! QEMU's opinion of an image, and other readers'.

use super::Kind;
use std::path::Path;
use std::process::{Command, Output};

/// Runs a command and returns its output, whatever its exit code.
pub fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|e| panic!("cannot run {program} ({e}): the tests need the package qemu-utils"))
}

/// Runs a command that must succeed.
pub fn must(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    assert!(output.status.success(), "{program} {arguments:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `qemu-img check`: nothing worse than leaks.
pub fn check(kind: &Kind, file: &Path) -> Result<(), String> {
    if !kind.qemu_check {
        return Ok(());
    }
    let output = run("qemu-img", &["check", "-f", kind.format, file.to_str().unwrap()]);
    match output.status.code() {
        Some(0 | 3) => Ok(()),
        // Nothing else is wrong: one error, and it is that one.
        Some(2)
            if kind
                .qemu_tolerated
                .is_some_and(|t| text(&output.stderr).contains(t) && text(&output.stdout).contains("\n1 errors were found")) =>
        {
            Ok(())
        }
        code => Err(format!("qemu-img check ({code:?}): {}{}", text(&output.stdout), text(&output.stderr))),
    }
}

/// Whether QEMU, or who else can, reads the same guest bytes.
pub fn compare(kind: &Kind, file: &Path, content: &[u8]) -> Result<(), String> {
    if let Some(read) = kind.reader {
        read(file, content);
    }
    if !kind.qemu {
        return Ok(());
    }
    let other = tempfile::NamedTempFile::new_in(file.parent().unwrap()).unwrap();
    std::fs::write(other.path(), content).unwrap();
    let output = run("qemu-img", &["compare", "-f", kind.format, "-F", "raw", file.to_str().unwrap(), other.path().to_str().unwrap()]);
    if output.status.success() { Ok(()) } else { Err(format!("qemu-img compare: {}{}", text(&output.stdout), text(&output.stderr))) }
}

/// `qemu-img check`: not even leaks.
pub fn clean(kind: &Kind, file: &Path) -> Result<(), String> {
    if !kind.qemu_check {
        return Ok(());
    }
    let output = run("qemu-img", &["check", "-f", kind.format, file.to_str().unwrap()]);
    match output.status.code() {
        Some(0) => Ok(()),
        code => Err(format!("qemu-img check ({code:?}): {}{}", text(&output.stdout), text(&output.stderr))),
    }
}
