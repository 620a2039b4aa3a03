//! libiscsi's `iscsi-test-cu` against the SCSI layer, by way of a small iSCSI target and no kernel.
//!
//! The kernel's part (reservations, task management, sessions) is not under test here: `tests/vm` has all of it.

use crate::harness::*;
use crate::iscsi_target;
use formats::Limits;
use img_tcmu::scsi::Config;
use std::collections::BTreeMap;
use std::process::Command;

/// Suites that test the transport or what the kernel answers.
const KERNELS: &[&str] =
    &["Sanitize.Reservations", "Prin", "Prout", "Reserve6", "PreventAllow", "MultipathIO", "iSCSIcmdsn", "iSCSIdatasn", "iSCSITMF"];

/// Failures that are expected, with the reason.
const EXPECTED: &[(&str, &str)] = &[
    ("Sanitize.Reset", "takes it that overwriting the medium takes more than three seconds"),
    ("WriteAtomic16.Simple", "writes 256 blocks whatever the maximum in the block limits page"),
    ("WriteSame10.UnmapUntilEnd", "expects zeros where it wrote others; LBPRZ does not make UNMAP ignore its data"),
    ("iSCSIResiduals.Write10Residuals", "of the two answers that FCP-4 allows to a short data-out it knows but the other"),
    ("iSCSIResiduals.Write12Residuals", "the same"),
    ("iSCSIResiduals.Write16Residuals", "the same"),
    ("iSCSIResiduals.WriteVerify10Residuals", "the same"),
    ("iSCSIResiduals.WriteVerify12Residuals", "the same"),
    ("iSCSIResiduals.WriteVerify16Residuals", "the same"),
];

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Verdict {
    Pass,
    Fail,
    Skip,
}

/// Runs the suites; the verdict of each test, and the output.
fn run(config: Config, limits: Limits, tests: &str) -> Option<(BTreeMap<String, Verdict>, String)> {
    if Command::new("iscsi-test-cu").arg("--help").output().is_err() {
        println!("SKIPPED: there is no iscsi-test-cu (Debian: libiscsi-bin)");
        return None;
    }
    let disk = Disk::with(Memory::with_limits(limits), config);
    let address = iscsi_target::serve(disk.lun.clone());
    let url = format!("iscsi://{address}/{}/0", iscsi_target::NAME);
    let output =
        Command::new("timeout").args(["120", "iscsi-test-cu", "--dataloss", "--allow-sanitize", "-v", "-t", tests, &url]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut verdicts = BTreeMap::new();
    let (mut suite, mut test, mut skipped) = (String::new(), String::new(), false);
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("Suite: ") {
            suite = name.trim().into();
        } else if let Some(rest) = line.strip_prefix("  Test: ") {
            test = rest.split_whitespace().next().unwrap_or_default().into();
            skipped = false;
        }
        // What is skipped between suites is the clean-up of reservations.
        skipped |= line.contains("[SKIPPED]") && !line.contains("PERSISTENT RESERVE IN");
        // The verdict follows the test's name, or stands on a line of its own after what the test printed.
        let last = line.split("...").last().unwrap_or_default();
        let verdict = match last {
            l if l.starts_with("passed") && skipped => Verdict::Skip,
            l if l.starts_with("passed") => Verdict::Pass,
            l if l.starts_with("FAILED") => Verdict::Fail,
            _ => continue,
        };
        verdicts.insert(format!("{suite}.{test}"), verdict);
    }
    assert!(text.contains("Run Summary"), "the suite did not end:\n{text}");
    Some((verdicts, text))
}

fn check(name: &str, config: Config, limits: Limits, tests: &str) {
    let Some((verdicts, text)) = run(config.clone(), limits, tests) else { return };
    let physical = (limits.physical_sector > config.block_size).then_some(&EXPECTED_512E);
    let logical = (config.block_size > 512).then_some(&EXPECTED_4KN);
    let ours = verdicts.iter().filter(|(test, _)| !KERNELS.iter().any(|k| test.starts_with(k)));
    let count = |v| ours.clone().filter(|(_, verdict)| **verdict == v).count();
    let failed: Vec<&String> = ours
        .clone()
        .filter(|(test, verdict)| {
            **verdict == Verdict::Fail && !EXPECTED.iter().chain(physical).chain(logical).any(|(name, _)| name == test)
        })
        .map(|(test, _)| test)
        .collect();
    let skipped: Vec<&String> = ours.clone().filter(|(_, v)| **v == Verdict::Skip).map(|(test, _)| test).collect();
    println!("{name}: {} pass, {} fail, {} skip; skipped: {skipped:?}", count(Verdict::Pass), count(Verdict::Fail), count(Verdict::Skip));
    assert!(failed.is_empty(), "{name}: {failed:#?}\n{text}");
}

/// Expected only with a physical block of several logical ones, or with logical blocks of 4096 bytes.
const EXPECTED_512E: (&str, &str) =
    ("GetLBAStatus.UnmapSingle", "asks for the status of one block and expects the descriptor to begin at another");
const EXPECTED_4KN: (&str, &str) = ("Write10.Async", "takes all blocks for 512 bytes, and so sends too short data-out");

fn limits(size: u64) -> Limits {
    Memory::new(size).limits_now()
}

#[test]
fn blocks_of_512() {
    check("512", Config::default(), limits(64 << 20), "ALL");
}

#[test]
fn blocks_of_512_over_4096() {
    check("512e", Config::default(), Limits { physical_sector: 4096, ..limits(64 << 20) }, "ALL");
}

#[test]
fn blocks_of_4096() {
    let config = Config { block_size: 4096, ..Config::default() };
    check("4Kn", config, Limits { physical_sector: 4096, ..limits(512 << 20) }, "ALL");
}

#[test]
fn read_only() {
    check("read-only", Config { read_only: true, ..Config::default() }, limits(64 << 20), "ALL.ReadOnly");
}

#[test]
fn thick() {
    check("thick", Config { discard: false, ..Config::default() }, limits(64 << 20), "ALL");
}
