//! The IMAGE argument: a path, or a configuration string that begins with `@`.

use super::Failure;
use crate::config::Configuration;
use crate::image::{Disk, Environment, Purpose};
use cfgstring::{Config, Spec};
use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// The arguments that name an image.
#[derive(Debug, Args)]
pub struct ImageArgs {
    /// A path, or a configuration string that begins with '@' (for a file of such a name write ./@FILE)
    #[arg(value_parser = OsStringValueParser::new().try_map(parse))]
    image: Config,
    /// Directory in which backing files and extents may lie, besides the image's own
    #[arg(long, value_name = "DIR")]
    allow: Vec<PathBuf>,
    /// The configuration file, for @NAME [default: /etc/img-tcmu/config.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Takes `@…` as a configuration string and all else as a path.
fn parse(arg: OsString) -> Result<Config, cfgstring::Error> {
    if arg.as_bytes().starts_with(b"@") { Config::parse(arg.as_bytes()) } else { Ok(Config::Image(Box::new(Spec::for_file(arg)))) }
}

impl ImageArgs {
    /// As it was given.
    pub fn given(&self) -> &Config {
        &self.image
    }

    /// The same circumstances for another description.
    pub fn with(&self, image: Config) -> Self {
        Self { image, allow: self.allow.clone(), config: self.config.clone() }
    }

    /// As arguments of another process that is to open the same.
    pub fn to_arguments(&self) -> Vec<OsString> {
        let allow = self.allow.iter().flat_map(|directory| [OsString::from("--allow"), directory.into()]);
        let config = self.config.iter().flat_map(|path| [OsString::from("--config"), path.into()]);
        allow.chain(config).chain([self.image.to_string().into()]).collect()
    }

    /// With the configuration file's exports and directories.
    pub fn environment(&self) -> Result<Environment, Failure> {
        let configuration = match (&self.image, &self.config) {
            // Reading somebody's image needs no configuration.
            (Config::Image(_), None) => Configuration::default(),
            (_, path) => Configuration::load(path.as_deref()).map_err(|error| Failure::new(error.to_string()))?,
        };
        let mut environment = configuration.environment();
        environment.allowed.extend(self.allow.iter().cloned());
        Ok(environment)
    }

    /// What it describes.
    pub fn spec(&self) -> Result<Spec, Failure> {
        Ok(self.environment()?.resolve(&self.image)?)
    }

    /// Opens it.
    pub fn open(&self, purpose: Purpose) -> Result<Disk, Failure> {
        let environment = self.environment()?;
        Ok(environment.open(&environment.resolve(&self.image)?, purpose)?)
    }
}
