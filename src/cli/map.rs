//! `img-tcmu map`: the runs of a disk, as the engine sees them.

use super::{Failure, ImageArgs};
use crate::image::Purpose;
use clap::Args;
use formats::{BlockDevice, MapExtent};
use serde::Serialize;
use std::io::{self, BufWriter, Write};
use std::process::ExitCode;

/// Show which parts of an image hold data, zeros or nothing
///
/// With --json: the array that 'qemu-img map --output=json' prints, with its keys.
#[derive(Debug, Args)]
pub struct Map {
    #[command(flatten)]
    image: ImageArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Look at the image even while another program writes to it
    #[arg(short = 'U', long)]
    force_share: bool,
}

/// One run, under qemu-img's names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Run {
    start: u64,
    length: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

impl Run {
    fn new(start: u64, extent: &MapExtent) -> Self {
        Self {
            start,
            length: extent.len,
            depth: extent.depth,
            present: extent.allocated,
            zero: extent.zero,
            data: extent.allocated && !extent.zero,
            compressed: extent.encoded,
            offset: extent.offset,
        }
    }

    /// Makes one run of two that look the same and adjoin, also in the file.
    fn join(&mut self, next: &Self) -> bool {
        let offset = self.offset.map(|offset| offset + self.length);
        let same = (self.depth, self.present, self.zero, self.data, self.compressed, offset)
            == (next.depth, next.present, next.zero, next.data, next.compressed, next.offset);
        if same {
            self.length += next.length;
        }
        same
    }
}

impl Map {
    /// Prints the map.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let disk = self.image.open(if self.force_share { Purpose::Inspect } else { Purpose::Read })?.device;
        let mut out = BufWriter::new(io::stdout().lock());
        if self.json {
            print_json(disk.as_ref(), &mut out)?;
        } else {
            print_table(disk.as_ref(), &mut out)?;
        }
        out.flush().map_err(Failure::output)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Calls `each` for every run, in order, none of which could be joined with the next.
fn runs(disk: &dyn BlockDevice, mut each: impl FnMut(&Run) -> Result<(), Failure>) -> Result<(), Failure> {
    let size = disk.limits().size;
    let mut current: Option<Run> = None;
    let mut at = 0;
    while at < size {
        let extent = disk.map(at, size - at)?;
        let next = Run::new(at, &extent);
        at += extent.len;
        match &mut current {
            None => current = Some(next),
            Some(run) => {
                if !run.join(&next) {
                    each(run)?;
                    *run = next;
                }
            }
        }
    }
    current.as_ref().map_or(Ok(()), each)
}

fn print_json(disk: &dyn BlockDevice, out: &mut impl Write) -> Result<(), Failure> {
    let mut first = true;
    runs(disk, |run| {
        let line = serde_json::to_string(run).map_err(|error| Failure::caused("cannot print the map", error))?;
        write!(out, "{}{line}", if first { "[" } else { ",\n" }).map_err(Failure::output)?;
        first = false;
        Ok(())
    })?;
    writeln!(out, "{}]", if first { "[" } else { "" }).map_err(Failure::output)
}

fn print_table(disk: &dyn BlockDevice, out: &mut impl Write) -> Result<(), Failure> {
    writeln!(out, "{:<18} {:<18} {:>5} {:<11} File offset", "Start", "Length", "Depth", "State").map_err(Failure::output)?;
    runs(disk, |run| {
        let state = match run {
            Run { compressed: true, .. } => "compressed",
            Run { data: true, .. } => "data",
            Run { present: true, .. } => "zero",
            _ => "hole",
        };
        let offset = run.offset.map_or_else(|| "-".to_owned(), |offset| format!("{offset:#x}"));
        let (start, length) = (format!("{:#x}", run.start), format!("{:#x}", run.length));
        writeln!(out, "{start:<18} {length:<18} {:>5} {state:<11} {offset}", run.depth).map_err(Failure::output)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_only_when_their_bytes_adjoin() {
        let extent = |offset| MapExtent { len: 512, allocated: true, zero: false, encoded: false, depth: 0, offset };
        let mut run = Run::new(0, &extent(Some(1024)));
        assert!(run.join(&Run::new(512, &extent(Some(1536)))));
        assert_eq!(run.length, 1024);
        assert!(!run.join(&Run::new(1024, &extent(Some(4096)))));
        assert!(!run.join(&Run::new(1024, &extent(None))));
        let mut hole = Run::new(0, &extent(None));
        assert!(hole.join(&Run::new(512, &extent(None))));
    }
}
