//! Whether a configuration string would do: its grammar, and whether the image behind it opens.

use crate::image::{self, Environment};
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

/// Looks at the image without changing anything. May block for as long as its file system does; decodes no compressed stream, which can take longer than
/// anybody waits for an answer.
///
/// # Errors
/// Why it does not open.
pub fn open(environment: &Environment, config: &Config) -> formats::Result<()> {
    let spec = environment.resolve(config)?;
    image::require_absolute(&spec)?;
    environment.check(&spec)
}
