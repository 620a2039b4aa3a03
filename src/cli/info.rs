//! `img-tcmu info`: what an image is.

use super::{Failure, ImageArgs};
use crate::image::Purpose;
use clap::Args;
use formats::{BlockDevice, Image};
use serde_json::{Map, Value, json};
use std::fmt::Write as _;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;

/// Show format, sizes and chain of an image
///
/// With --json: an object with the keys of 'qemu-img info --output=json'; sizes are bytes.
#[derive(Debug, Args)]
pub struct Info {
    #[command(flatten)]
    image: ImageArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Also show every image below, as an array with --json
    #[arg(long)]
    backing_chain: bool,
}

impl Info {
    /// Prints the description.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let image = self.image.open(Purpose::Inspect)?.image;
        let mut chain = vec![describe(&image)];
        if self.backing_chain {
            let mut below = image.parent();
            while let Some(parent) = below {
                chain.push(describe(parent));
                below = parent.parent();
            }
        }
        let text = match (self.json, chain.as_slice()) {
            (true, [one]) if !self.backing_chain => format!("{one:#}\n"),
            (true, _) => format!("{:#}\n", Value::Array(chain)),
            (false, _) => chain.iter().map(text).collect::<Vec<_>>().join("\n"),
        };
        io::stdout().write_all(text.as_bytes()).map_err(Failure::output)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// One image, under qemu-img's names.
pub fn describe(image: &Image) -> Value {
    let limits = image.limits();
    let mut info = Map::new();
    info.insert("filename".into(), json!(image.path().to_string_lossy()));
    info.insert("format".into(), json!(image.format().name()));
    if let Some(stream) = image.stream() {
        info.insert("compressed-stream".into(), json!(stream.name()));
    }
    info.insert("virtual-size".into(), json!(limits.size));
    if let Ok(metadata) = std::fs::metadata(image.path()) {
        // st_blocks counts 512 bytes, whatever the file system's block (stat(2)).
        info.insert("actual-size".into(), json!(metadata.blocks().saturating_mul(512)));
    }
    if image.format().name() != "raw" {
        info.insert("cluster-size".into(), json!(limits.granularity));
    }
    info.insert("sector-size".into(), json!(limits.sector));
    info.insert("dirty-flag".into(), json!(false));
    if let Some(parent) = image.parent() {
        let path = parent.path().to_string_lossy();
        info.insert("backing-filename".into(), json!(path));
        info.insert("full-backing-filename".into(), json!(path));
        info.insert("backing-filename-format".into(), json!(parent.format().name()));
    }
    let mut specific = image.format().describe();
    if let Value::Object(keys) = &mut specific {
        // What qemu-img has on the upper level moves there: the format knows better than we do.
        for key in
            ["backing-filename", "full-backing-filename", "backing-filename-format", "dirty-flag", "cluster-size", "encrypted", "snapshots"]
        {
            if let Some(value) = keys.remove(key) {
                info.insert(key.into(), value);
            }
        }
        if !keys.is_empty() {
            info.insert("format-specific".into(), json!({ "type": image.format().name(), "data": specific }));
        }
    }
    Value::Object(info)
}

fn text(info: &Value) -> String {
    let mut out = String::new();
    let field = |key: &str| info.get(key);
    let mut line = |name: &str, value: String| {
        let _ = writeln!(out, "{name}: {value}");
    };
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    if let Some(name) = field("filename").and_then(Value::as_str) {
        line("image", Path::new(name).display().to_string());
    }
    if let Some(format) = field("format") {
        line("file format", plain(format));
    }
    if let Some(stream) = field("compressed-stream") {
        line("compressed with", plain(stream));
    }
    if let Some(size) = field("virtual-size").and_then(Value::as_u64) {
        line("virtual size", format!("{} ({size} bytes)", human(size)));
    }
    if let Some(size) = field("actual-size").and_then(Value::as_u64) {
        line("disk size", human(size));
    }
    if let Some(size) = field("cluster-size") {
        line("cluster size", plain(size));
    }
    if let Some(sector) = field("sector-size") {
        line("sector size", plain(sector));
    }
    if field("dirty-flag") == Some(&Value::Bool(true)) {
        line("cleanly shut down", "no".into());
    }
    if let Some(backing) = field("backing-filename") {
        let full = field("full-backing-filename").unwrap_or(backing);
        let actual = if full == backing { String::new() } else { format!(" (actual path: {})", plain(full)) };
        line("backing file", plain(backing) + &actual);
    }
    if let Some(format) = field("backing-filename-format") {
        line("backing file format", plain(format));
    }
    if let Some(Value::Object(data)) = info.pointer("/format-specific/data") {
        line("format specific", String::new());
        for (key, value) in data {
            line(&format!("    {key}"), plain(value));
        }
    }
    out
}

/// Bytes as people read them: `1.5 GiB`.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = format!("{value:.2}");
    let digits = if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { &digits };
    format!("{digits} {}", UNITS.get(unit).copied().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::human;

    #[test]
    fn sizes_for_people() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(1000), "1000 B");
        assert_eq!(human(1536), "1.5 KiB");
        assert_eq!(human(10 << 30), "10 GiB");
        assert_eq!(human(u64::MAX), "16384 PiB");
    }
}
