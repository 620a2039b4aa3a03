//! `img-tcmu formats`: what can be opened, and what can be done with it.

use super::Failure;
use clap::Args;
use formats::drivers::{Capabilities, DRIVERS};
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

/// List the image formats, and what can be done with each
#[derive(Debug, Args)]
pub struct Formats {}

impl Formats {
    /// Prints the table.
    pub fn run(self) -> Result<ExitCode, Failure> {
        std::io::stdout().write_all(table().as_bytes()).map_err(Failure::output)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// The table as Markdown, which is what the README shows.
pub fn table() -> String {
    let mut text = String::from(
        "| format | read | write | discard | cheap zero | parent | check | repair | grow |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    for driver in DRIVERS.iter().filter(|d| d.can.read) {
        let Capabilities { read, write, discard, cheap_zero, parent, check, repair, grow } = driver.can;
        let mut name = driver.name.to_owned();
        for alias in driver.aliases {
            name.push_str(" (");
            name.push_str(alias);
            name.push(')');
        }
        // Writing to a String cannot fail.
        let _ = write!(text, "| {name} |");
        for can in [read, write, discard, cheap_zero, parent, check, repair, grow] {
            text.push_str(if can { " yes |" } else { " – |" });
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    /// The README shows what the program prints.
    #[test]
    fn the_readme_has_this_table() {
        let readme = include_str!("../../README.md");
        let (_, rest) = readme.split_once("prints -->\n").expect("the README's marker");
        let (shown, _) = rest.split_once("\n<!-- end of formats -->").expect("the README's end marker");
        let table = super::table();
        assert_eq!(shown.trim(), table.trim(), "README.md should have, between its markers:\n{table}");
    }
}
