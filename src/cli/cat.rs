//! `img-tcmu cat`: the guest's bytes on stdout.

use super::{Failure, ImageArgs};
use crate::image::Purpose;
use cfgstring::parse_size;
use clap::Args;
use formats::BlockDevice;
use std::fs::File;
use std::io::{self, IoSliceMut, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;

/// Bytes moved at a time.
const CHUNK: usize = 2 << 20;

/// Write the bytes of the disk inside an image to stdout
///
/// What is known to be zero is not read. When stdout is a file that this command fills from its end, it becomes a hole.
#[derive(Debug, Args)]
pub struct Cat {
    #[command(flatten)]
    image: ImageArgs,
    /// First byte to write: a number, or with K, M, G, T
    #[arg(long, value_parser = parse_size, default_value = "0")]
    offset: u64,
    /// How many bytes; to the end of the disk if not given
    #[arg(long, value_parser = parse_size)]
    length: Option<u64>,
    /// Read the image even while another program writes to it; what comes out may be of no moment in time
    #[arg(short = 'U', long)]
    force_share: bool,
}

impl Cat {
    /// Copies the range.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let disk = self.image.open(if self.force_share { Purpose::Inspect } else { Purpose::Read })?.device;
        let size = disk.limits().size;
        let Some(left) = size.checked_sub(self.offset) else {
            return Err(Failure::new(format!("--offset {} lies beyond the end of the disk, which has {size} bytes", self.offset)));
        };
        let length = self.length.unwrap_or(left);
        if length > left {
            return Err(Failure::new(format!(
                "--offset and --length reach {} bytes beyond the end of the disk, which has {size} bytes",
                length - left
            )));
        }
        copy(disk.as_ref(), self.offset, length, &mut Output::stdout().map_err(Failure::output)?)?;
        Ok(ExitCode::SUCCESS)
    }
}

fn copy(disk: &dyn BlockDevice, start: u64, length: u64, out: &mut Output) -> Result<(), Failure> {
    let mut buffer = vec![0; CHUNK];
    let mut at = start;
    let end = start + length;
    while at < end {
        let extent = disk.map(at, end - at)?;
        let run = extent.len.min(end - at);
        if extent.zero {
            out.zeros(run).map_err(Failure::output)?;
            at += run;
            continue;
        }
        let mut left = run;
        while left > 0 {
            let part = usize::try_from(left).map_or(CHUNK, |left| left.min(CHUNK));
            let chunk = buffer.get_mut(..part).unwrap_or_default();
            disk.read(&mut [IoSliceMut::new(chunk)], at)?;
            out.data(chunk).map_err(Failure::output)?;
            at += part as u64;
            left -= part as u64;
        }
    }
    out.finish().map_err(Failure::output)
}

/// Stdout, with zeros skipped where they can become holes.
struct Output {
    file: File,
    /// Zeros become holes: a regular file, not opened for appending, written from its end on.
    holes: bool,
    /// Zeros skipped since the last data.
    skipped: u64,
}

impl Output {
    fn stdout() -> io::Result<Self> {
        let file = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        let holes = may_skip(&file).unwrap_or(false);
        Ok(Self { file, holes, skipped: 0 })
    }

    fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.skipped > 0 {
            let skip = i64::try_from(self.skipped).map_err(io::Error::other)?;
            self.file.seek(SeekFrom::Current(skip))?;
            self.skipped = 0;
        }
        self.file.write_all(bytes)
    }

    fn zeros(&mut self, mut len: u64) -> io::Result<()> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        if self.holes {
            self.skipped += len;
            return Ok(());
        }
        while len > 0 {
            let part = usize::try_from(len).map_or(ZEROS.len(), |len| len.min(ZEROS.len()));
            self.file.write_all(ZEROS.get(..part).unwrap_or_default())?;
            len -= part as u64;
        }
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        if self.skipped > 0 {
            let end = self.file.stream_position()? + self.skipped;
            self.file.set_len(end)?;
            self.file.seek(SeekFrom::Start(end))?;
            self.skipped = 0;
        }
        Ok(())
    }
}

fn may_skip(file: &File) -> io::Result<bool> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Ok(false);
    }
    let flags = nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_GETFL)?;
    if nix::fcntl::OFlag::from_bits_truncate(flags).contains(nix::fcntl::OFlag::O_APPEND) {
        return Ok(false);
    }
    Ok((&*file).stream_position()? == metadata.len())
}
