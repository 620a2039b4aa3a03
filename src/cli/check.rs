//! `img-tcmu check`: the consistency of an image's metadata.

use super::{Failure, ImageArgs};
use crate::image::Purpose;
use clap::Args;
use formats::{CheckReport, Kind};
use std::io::{self, Write};
use std::process::ExitCode;

/// Exit codes of `qemu-img check`.
const CORRUPTIONS: u8 = 2;
const LEAKS: u8 = 3;
const NO_CHECK: u8 = 63;

/// Check an image's metadata, and repair them if asked
///
/// Exit codes as of 'qemu-img check': 0 clean (or all repaired), 1 the check failed, 2 corruptions, 3 leaks but no corruptions,
/// 63 there is no check for this format.
#[derive(Debug, Args)]
pub struct Check {
    #[command(flatten)]
    image: ImageArgs,
    /// Mend what can be mended; nobody else may have the image open
    #[arg(long)]
    repair: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Check {
    /// Checks, prints, and says by the exit code what was found.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let image = self.image.open(if self.repair { Purpose::Repair } else { Purpose::Read })?.image;
        let report = match image.check(self.repair) {
            Ok(report) => report,
            Err(error) if error.kind() == Kind::Unsupported => return Err(Failure::from(error).code(NO_CHECK)),
            Err(error) => return Err(error.into()),
        };
        image.close()?;
        let text = if self.json { json(&report) } else { text(&report) };
        io::stdout().write_all(text.as_bytes()).map_err(Failure::output)?;
        Ok(ExitCode::from(code(&report)))
    }
}

/// What is left after repair.
fn left(report: &CheckReport) -> (u64, u64) {
    (report.corruptions.saturating_sub(report.corruptions_fixed), report.leaks.saturating_sub(report.leaks_fixed))
}

fn code(report: &CheckReport) -> u8 {
    match left(report) {
        (0, 0) => 0,
        (0, _) => LEAKS,
        _ => CORRUPTIONS,
    }
}

fn text(report: &CheckReport) -> String {
    let mut lines = report.notes.clone();
    if report.corruptions_fixed > 0 || report.leaks_fixed > 0 {
        lines.push(format!("{} corruptions and {} leaks were repaired.", report.corruptions_fixed, report.leaks_fixed));
    }
    lines.push(match left(report) {
        (0, 0) => "No errors were found on the image.".to_owned(),
        (0, leaks) => format!("{leaks} leaks were found: they waste space but harm no data. 'img-tcmu check --repair' frees them."),
        (corruptions, leaks) => {
            format!("{corruptions} corruptions and {leaks} leaks were found: data may be lost. Copy the image before you repair it.")
        }
    });
    lines.push(format!("{} units are allocated, {} of them compressed.", report.allocated_units, report.encoded_units));
    lines.join("\n") + "\n"
}

fn json(report: &CheckReport) -> String {
    let (corruptions, leaks) = left(report);
    let value = serde_json::json!({
        "check-errors": 0,
        "corruptions": corruptions,
        "leaks": leaks,
        "corruptions-fixed": report.corruptions_fixed,
        "leaks-fixed": report.leaks_fixed,
        "allocated-clusters": report.allocated_units,
        "compressed-clusters": report.encoded_units,
        "notes": report.notes,
    });
    format!("{value:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_qemu_img() {
        let report = |corruptions, leaks, corruptions_fixed, leaks_fixed| CheckReport {
            corruptions,
            leaks,
            corruptions_fixed,
            leaks_fixed,
            ..CheckReport::default()
        };
        assert_eq!(code(&report(0, 0, 0, 0)), 0);
        assert_eq!(code(&report(0, 2, 0, 0)), 3);
        assert_eq!(code(&report(1, 2, 0, 2)), 2);
        assert_eq!(code(&report(1, 2, 1, 0)), 3);
        assert_eq!(code(&report(1, 2, 1, 2)), 0);
    }
}
