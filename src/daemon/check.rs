//! Whether a configuration string would do: its grammar, and whether the image behind it opens.

use crate::image::{self, Environment, Purpose};
use cfgstring::Config;

/// The grammar of the string after `img/`, as it comes from targetcli or a command line. The error is one line for people.
///
/// # Errors
/// What is wrong and what would be right.
pub fn syntax(rest: &[u8]) -> Result<Config, String> {
    let config = Config::parse(rest).map_err(|error| error.to_string())?;
    cfgstring::check_targetcli(rest).map_err(|error| error.to_string())?;
    Ok(config)
}

/// The same for `img/…`, as D-Bus has it.
///
/// # Errors
/// What is wrong and what would be right.
pub fn dev_config_syntax(dev_config: &[u8]) -> Result<Config, String> {
    let config = Config::parse_dev_config(dev_config).map_err(|error| error.to_string())?;
    let rest = dev_config.splitn(2, |byte| *byte == b'/').nth(1).unwrap_or_default();
    cfgstring::check_targetcli(rest).map_err(|error| error.to_string())?;
    Ok(config)
}

/// Opens the image, read-only, and asks for its size. May block for as long as its file system does.
///
/// # Errors
/// Why it does not open.
pub fn open(environment: &Environment, config: &Config) -> formats::Result<()> {
    let spec = environment.resolve(config)?;
    image::require_absolute(&spec)?;
    let disk = environment.open(&spec, Purpose::Read)?;
    if disk.device.limits().size == 0 {
        return Err(
            formats::Error::new(formats::Kind::InvalidOption, "the disk inside has no bytes: it cannot be served").at_path(&spec.file)
        );
    }
    Ok(())
}
