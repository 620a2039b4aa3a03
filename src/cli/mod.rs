//! The command line: one file per sub-command, dispatch and exit codes here.
//!
//! To add a sub-command: a file with a `clap::Args` struct that has `fn run(self) -> Result<ExitCode, Failure>`, a variant of
//! [`Command`] and an arm in [`Command::run`].

mod attach;
mod cat;
mod check;
mod check_config;
mod detach;
mod documents;
mod failure;
mod formats;
mod fuse;
mod image;
mod info;
mod list;
mod map;
mod mount;
mod nbd;
mod reload;
mod resize;
mod serve;
mod status;
mod top;
mod umount;
mod upgrade;

pub use attach::load_module;
pub use failure::Failure;
pub use image::ImageArgs;
#[cfg(test)]
pub use status::tests::status as example_status;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Exit codes, as `--help` states them.
const EXIT_CODES: &str = "\
Exit codes:
  0   done
  1   failed; the reason is on stderr, its causes on lines that begin with 'caused by:'
  64  the command line makes no sense
  130 interrupted by a signal; what was done so far is undone ('mount')
  'check' also has those of 'qemu-img check': 2 corruptions, 3 leaks (but no corruptions), 63 no check for this format";

/// Opens VM disk images and serves them as SCSI disks.
#[derive(Debug, Parser)]
#[command(name = "img-tcmu", version, propagate_version = true, after_help = EXIT_CODES, max_term_width = 100)]
#[command(long_about = "\
Opens VM disk images of every common kind and serves each as a SCSI disk: as a user:img backstore of the Linux SCSI target, which \
targetcli exports over iSCSI and other fabrics, or as a local /dev/sdX.

The daemon is 'img-tcmu serve'. 'attach' makes a local disk of an image in one step; 'info', 'map', 'cat' and 'check' look at \
images without a daemon and without root.")]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Serve),
    Attach(attach::Attach),
    Detach(detach::Detach),
    List(list::List),
    Status(status::StatusArgs),
    Top(top::Top),
    Resize(resize::Resize),
    Reload(reload::Reload),
    Upgrade(upgrade::Upgrade),
    Info(info::Info),
    Map(map::Map),
    Cat(cat::Cat),
    Check(check::Check),
    Formats(formats::Formats),
    Nbd(nbd::Nbd),
    Fuse(fuse::Fuse),
    Mount(mount::Mount),
    Umount(umount::Umount),
    CheckConfig(check_config::CheckConfig),
    #[command(hide = true)]
    Documents(documents::Documents),
}

impl Command {
    fn run(self) -> Result<ExitCode, Failure> {
        match self {
            Self::Serve(command) => command.run(),
            Self::Attach(command) => command.run(),
            Self::Detach(command) => command.run(),
            Self::List(command) => command.run(),
            Self::Status(command) => command.run(),
            Self::Top(command) => command.run(),
            Self::Resize(command) => command.run(),
            Self::Reload(command) => command.run(),
            Self::Upgrade(command) => command.run(),
            Self::Info(command) => command.run(),
            Self::Map(command) => command.run(),
            Self::Cat(command) => command.run(),
            Self::Check(command) => command.run(),
            Self::Formats(command) => command.run(),
            Self::Nbd(command) => command.run(),
            Self::Fuse(command) => command.run(),
            Self::Mount(command) => command.run(),
            Self::Umount(command) => command.run(),
            Self::CheckConfig(command) => command.run(),
            Self::Documents(command) => command.run(),
        }
    }
}

/// Parses the arguments of the process and does what they say.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { failure::USAGE } else { 0 };
            // Nothing can be done about a closed stdout or stderr.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    match cli.command.run() {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
