//! `img-tcmu resize`: a disk grows while it is in use.

use super::{Failure, info::human};
use crate::tcmu::configfs::Configfs;
use cfgstring::SUBTYPE;
use clap::Args;
use std::io::{self, Write};
use std::process::ExitCode;

/// Make a disk larger while it is in use
///
/// The image grows with it, if it is smaller. Initiators are told that the capacity has changed; Linux looks after 'echo 1
/// >/sys/block/sdX/device/rescan', over iSCSI after 'iscsiadm -m session --rescan'. A disk that is in use is never made smaller.
#[derive(Debug, Args)]
pub struct Resize {
    /// Name of the backstore, as 'list' shows it
    name: String,
    /// The new size: bytes, or a number with K, M, G or T
    #[arg(value_parser = size)]
    size: u64,
}

fn size(text: &str) -> Result<u64, String> {
    cfgstring::parse_size(text).map_err(|expected| format!("expected {expected}"))
}

impl Resize {
    /// Asks the kernel, which asks the daemon.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let failed = |error: crate::tcmu::Error| Failure::new(error.to_string());
        let found = Configfs::default().backstores(SUBTYPE).map_err(failed)?;
        let mut named = found.iter().filter(|backstore| backstore.name() == self.name);
        let backstore = match (named.next(), named.next()) {
            (Some(one), None) => one,
            (None, _) => return Err(Failure::new(format!("there is no backstore '{}' of ours: 'img-tcmu list' shows all", self.name))),
            (Some(_), Some(_)) => return Err(Failure::new(format!("several backstores are named '{}'", self.name))),
        };
        let before = backstore.size().map_err(failed)?;
        backstore
            .set_attribute("dev_size", &self.size.to_string())
            .map_err(|error| Failure::caused(format!("{} stays {}; the daemon's log has the reason", self.name, human(before)), error))?;
        writeln!(io::stdout(), "{} was {} and is {}", self.name, human(before), human(self.size)).map_err(Failure::output)?;
        Ok(ExitCode::SUCCESS)
    }
}
