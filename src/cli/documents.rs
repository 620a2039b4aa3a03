//! `img-tcmu documents`: what a package holds besides the program, made from the command line's own description.

use super::{Cli, Failure};
use clap::{Args, CommandFactory};
use clap_complete::{Shell, generate_to};
use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

/// Write manual pages (man1/) and completions (completions/) into a directory
#[derive(Debug, Args)]
pub struct Documents {
    directory: PathBuf,
}

impl Documents {
    /// Writes them.
    pub fn run(self) -> Result<ExitCode, Failure> {
        self.write().map_err(|error| Failure::caused(format!("cannot write into {}", self.directory.display()), error))?;
        Ok(ExitCode::SUCCESS)
    }

    fn write(&self) -> io::Result<()> {
        let (manual, completions) = (self.directory.join("man1"), self.directory.join("completions"));
        fs::create_dir_all(&manual)?;
        fs::create_dir_all(&completions)?;
        let mut command = Cli::command();
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            generate_to(shell, &mut command, "img-tcmu", &completions)?;
        }
        clap_mangen::generate_to(Cli::command().disable_help_subcommand(true), manual)
    }
}
