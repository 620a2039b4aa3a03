//! `img-tcmu list`: our backstores and their local disks.

use super::{Failure, info::human};
use crate::tcmu::configfs::Configfs;
use cfgstring::{Config, SUBTYPE};
use clap::Args;
use serde_json::{Value, json};
use std::io::{self, Write};
use std::process::ExitCode;

/// List the user:img backstores of this host, with size, image and local disk
#[derive(Debug, Args)]
pub struct List {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

struct Row {
    name: String,
    size: Option<u64>,
    config: String,
    image: String,
    disks: Vec<String>,
}

impl List {
    /// Prints one line a backstore.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let rows = rows(&Configfs::default())?;
        let text = if self.json { format!("{:#}\n", Value::Array(rows.iter().map(Row::json).collect())) } else { table(&rows) };
        io::stdout().write_all(text.as_bytes()).map_err(Failure::output)?;
        Ok(ExitCode::SUCCESS)
    }
}

fn rows(configfs: &Configfs) -> Result<Vec<Row>, Failure> {
    let failed = |error: crate::tcmu::Error| Failure::new(error.to_string());
    let luns = configfs.loopback_luns().map_err(failed)?;
    let mut rows = Vec::new();
    for backstore in configfs.backstores(SUBTYPE).map_err(failed)? {
        let real = backstore.path().canonicalize().unwrap_or_else(|_| backstore.path().to_path_buf());
        let disks = luns.iter().filter(|lun| lun.backstore == real);
        let disks = disks.filter_map(|lun| lun.target.block_device(lun.lun).ok().flatten()).map(|disk| disk.display().to_string());
        let config = backstore.dev_config().unwrap_or_default();
        let image = match Config::parse_dev_config(config.as_bytes()) {
            Ok(Config::Image(spec)) => spec.file.display().to_string(),
            Ok(Config::Export(name)) => format!("@{name}"),
            Err(_) => config.clone(),
        };
        rows.push(Row { name: backstore.name().to_owned(), size: backstore.size().ok(), config, image, disks: disks.collect() });
    }
    Ok(rows)
}

impl Row {
    fn json(&self) -> Value {
        json!({ "name": self.name, "size": self.size, "config": self.config, "image": self.image, "disks": self.disks })
    }
}

fn table(rows: &[Row]) -> String {
    let mut lines = vec![["NAME".to_owned(), "SIZE".to_owned(), "DISK".to_owned(), "IMAGE".to_owned()]];
    for row in rows {
        let size = row.size.map_or_else(|| "?".to_owned(), human);
        let disks = if row.disks.is_empty() { "-".to_owned() } else { row.disks.join(",") };
        lines.push([row.name.clone(), size, disks, row.image.clone()]);
    }
    let width = |column: usize| lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or_default();
    let (name, size, disk) = (width(0), width(1), width(2));
    lines.iter().map(|[n, s, d, image]| format!("{n:<name$}  {s:>size$}  {d:<disk$}  {image}\n")).collect()
}
