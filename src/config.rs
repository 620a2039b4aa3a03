//! The configuration file: named exports, directories, defaults. TOML; everything in it is optional.

use crate::image::{Environment, Exports};
use cfgstring::Spec;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use toml::Value;

/// Where it lies unless `--config` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/img-tcmu/config.toml";

/// The file, parsed and checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Configuration {
    /// Level or filter of the log.
    pub log_level: Option<String>,
    /// Threads that do I/O; `None`: as many as CPUs.
    pub workers: Option<usize>,
    /// Budget of the shared cache of decoded units, in bytes.
    pub cache_size: Option<u64>,
    /// Directories in which files that images name may lie.
    pub allow: Vec<PathBuf>,
    /// Where metrics are to be had: `unix:/path`, or a loopback address with a port.
    pub metrics: Option<Endpoint>,
    /// Directories in which images have to lie; `None`: anywhere.
    pub image_directories: Option<Vec<PathBuf>>,
    /// Whether images may be block devices; `None`: where images may lie anywhere.
    pub block_devices: Option<bool>,
    /// `@NAME`.
    pub exports: Exports,
}

/// Where metrics are to be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP port of this machine's own.
    Loopback(SocketAddr),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Loopback(address) => address.fmt(f),
        }
    }
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.starts_with('/') { Ok(Self::Unix(path.into())) } else { Err(format!("'{text}': the path should be absolute")) };
        }
        match text.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Ok(Self::Loopback(address)),
            Ok(_) => {
                Err(format!("'{text}' is no address of this machine's own: use 127.0.0.1 or [::1], and a proxy where others are to see it"))
            }
            Err(_) => Err(format!("'{text}' should be unix:/path or 127.0.0.1:PORT")),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Raw {
    log_level: Option<String>,
    workers: Option<usize>,
    cache_size: Option<Value>,
    metrics: Option<String>,
    #[serde(default)]
    allow: Vec<PathBuf>,
    image_directories: Option<Vec<PathBuf>>,
    block_devices: Option<bool>,
    #[serde(default)]
    exports: BTreeMap<String, BTreeMap<String, Value>>,
}

/// Why a configuration file cannot be used.
#[derive(Debug)]
pub struct ConfigurationError {
    path: PathBuf,
    message: String,
}

impl fmt::Display for ConfigurationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.message)
    }
}

impl std::error::Error for ConfigurationError {}

impl Configuration {
    /// Reads the file at `path`; without one, [`DEFAULT_PATH`] if it exists.
    ///
    /// # Errors
    /// The file cannot be read, or what is wrong in it.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigurationError> {
        let named = path.unwrap_or(Path::new(DEFAULT_PATH));
        let error = |message: String| ConfigurationError { path: named.to_path_buf(), message };
        match std::fs::read_to_string(named) {
            Ok(text) => Self::parse(&text).map_err(error),
            Err(missing) if path.is_none() && missing.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            // The file is for the daemon; that somebody else may not read it means that it is not for him.
            Err(denied) if path.is_none() && denied.kind() == io::ErrorKind::PermissionDenied => Ok(Self::default()),
            Err(other) => Err(error(format!("cannot read the configuration file: {other}"))),
        }
    }

    /// Parses the text of a file.
    ///
    /// # Errors
    /// What is wrong, and where.
    pub fn parse(text: &str) -> Result<Self, String> {
        let raw: Raw = toml::from_str(text).map_err(|error| error.to_string().trim().replace('\n', " | "))?;
        let mut exports = Exports::new();
        for (name, keys) in raw.exports {
            let spec = export(&name, &keys).map_err(|reason| format!("[exports.{name}]: {reason}"))?;
            exports.insert(name, spec);
        }
        let cache_size = match &raw.cache_size {
            None => None,
            Some(value) => Some(size(value).map_err(|expected| format!("'cache-size' should be {expected}"))?),
        };
        if raw.workers == Some(0) || raw.workers > Some(1024) {
            return Err("'workers' should be from 1 to 1024".to_owned());
        }
        if let Some(relative) = raw.allow.iter().find(|dir| !dir.is_absolute()) {
            return Err(format!("'allow' should hold absolute paths, not '{}'", relative.display()));
        }
        let metrics = raw.metrics.map(|text| text.parse().map_err(|error| format!("'metrics': {error}"))).transpose()?;
        if let Some(relative) = raw.image_directories.iter().flatten().find(|dir| !dir.is_absolute()) {
            return Err(format!("'image-directories' should hold absolute paths, not '{}'", relative.display()));
        }
        Ok(Self {
            log_level: raw.log_level,
            workers: raw.workers,
            cache_size,
            allow: raw.allow,
            metrics,
            image_directories: raw.image_directories,
            block_devices: raw.block_devices,
            exports,
        })
    }

    /// What opening images needs of it.
    pub fn environment(&self) -> Environment {
        Environment {
            allowed: self.allow.clone(),
            images: self.image_directories.clone(),
            files_only: !self.block_devices.unwrap_or(self.image_directories.is_none()),
            exports: self.exports.clone(),
            redo: None,
        }
    }
}

fn size(value: &Value) -> Result<u64, &'static str> {
    match value {
        Value::String(text) => cfgstring::parse_size(text),
        Value::Integer(bytes) => u64::try_from(*bytes).map_err(|_| "a number of bytes"),
        _ => Err("a number of bytes, or a string with K, M, G or T"),
    }
}

fn export(name: &str, keys: &BTreeMap<String, Value>) -> Result<Spec, String> {
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')) {
        return Err("the name of an export holds letters, digits and '.', '_', '-'".to_owned());
    }
    let mut pairs = Vec::new();
    for (key, value) in keys {
        let text = match value {
            Value::String(text) => text.clone(),
            Value::Integer(number) => number.to_string(),
            Value::Boolean(on) => if *on { "on" } else { "off" }.to_owned(),
            _ => return Err(format!("'{key}' should be a string, a number or a truth value")),
        };
        pairs.push((key.as_str(), text));
    }
    let spec = Spec::from_pairs(pairs.iter().map(|(key, text)| (*key, text.as_bytes()))).map_err(|error| error.reason())?;
    crate::image::require_absolute(&spec).map_err(|error| error.to_string())?;
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_at_once() {
        let text = r#"
            log-level = "debug"
            workers = 3
            cache-size = "64M"
            allow = ["/srv/base"]
            metrics = "[::1]:9750"
            image-directories = ["/srv/images"]
            block-devices = true
            [exports.web]
            file = "/srv/a, b:c.qcow2"
            read-only = true
            cache-size = 1048576
        "#;
        let configuration = Configuration::parse(text).expect("a good file");
        let spec = Spec { read_only: true, cache_size: Some(1 << 20), ..Spec::for_file("/srv/a, b:c.qcow2") };
        let expected = Configuration {
            log_level: Some("debug".into()),
            workers: Some(3),
            cache_size: Some(64 << 20),
            allow: vec!["/srv/base".into()],
            metrics: Some(Endpoint::Loopback("[::1]:9750".parse().expect("an address"))),
            image_directories: Some(vec!["/srv/images".into()]),
            block_devices: Some(true),
            exports: [("web".to_owned(), spec)].into(),
        };
        assert_eq!(configuration, expected);
        assert_eq!(Configuration::parse(""), Ok(Configuration::default()));
    }

    #[test]
    fn faults_are_named() {
        let cases = [
            ("wokers = 3", "wokers"),
            ("workers = 0", "1 to 1024"),
            ("cache-size = \"1X\"", "K, M, G or T"),
            ("allow = [\"x\"]", "absolute"),
            ("metrics = \"10.0.0.1:80\"", "'metrics': '10.0.0.1:80' is no address of this machine's own"),
            ("metrics = \"unix:x\"", "absolute"),
            ("metrics = \"9750\"", "unix:/path or 127.0.0.1:PORT"),
            ("image-directories = [\"x\"]", "absolute"),
            ("[exports.a]\nfile = \"x\"", "absolute"),
            ("[exports.a]\nread-only = true", "[exports.a]: 'file' is missing"),
            ("[exports.a]\nfile = \"/x\"\nsise = 1", "did you mean 'size'?"),
            ("[exports.\"a b\"]\nfile = \"/x\"", "letters, digits"),
            ("[exports.a]\nfile = [1]", "should be a string"),
            ("workers =", "line 1"),
        ];
        for (text, words) in cases {
            let error = Configuration::parse(text).expect_err(text);
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn a_missing_file_is_fine_unless_named() {
        assert!(Configuration::load(Some(Path::new("/no/such/file.toml"))).is_err());
    }
}
