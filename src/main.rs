//! The `img-tcmu` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    img_tcmu::cli::main()
}
