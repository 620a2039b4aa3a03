//! The keys of an image's description and the typed value they make.

use crate::error::{Error, Problem};
use crate::syntax::{self, Item};
use crate::value::{self, Parsed};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// What a discard of the guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Discard {
    /// Space is given back.
    #[default]
    Unmap,
    /// Nothing.
    Ignore,
}

/// What becomes of writes that hold only zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroDetection {
    /// They are written.
    #[default]
    Off,
    /// They are made cheap zeros where the format can.
    On,
    /// The same, and their space is given back.
    Unmap,
}

/// An image and how to open it. Fields that were not given have their defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spec {
    /// A name for logs and listings; means nothing else.
    pub id: Option<String>,
    /// The image. Never empty in a parsed value.
    pub file: PathBuf,
    /// The format's name in lower case; `None`: found by probing.
    pub format: Option<String>,
    /// The guest may not write.
    pub read_only: bool,
    /// Writes go to a temporary overlay that is thrown away at the end.
    pub snapshot: bool,
    /// The internal snapshot to show (read-only), by name or id.
    pub snapshot_name: Option<String>,
    /// Writes go to this file; the image itself is not changed.
    pub overlay: Option<PathBuf>,
    /// The parent, when it is not where the image says.
    pub parent: Option<PathBuf>,
    /// The parent's format, where the image does not say it.
    pub parent_format: Option<String>,
    /// Budget of caches, in bytes.
    pub cache_size: Option<u64>,
    /// What a discard does.
    pub discard: Discard,
    /// What becomes of zeros.
    pub detect_zeroes: ZeroDetection,
    /// First byte of the image that is served.
    pub offset: u64,
    /// How many bytes are served; `None`: to the end.
    pub size: Option<u64>,
    /// Serve this partition alone; numbers start at 1.
    pub partition: Option<u32>,
    /// Bypass the page cache (O_DIRECT).
    pub direct: bool,
}

/// A key: its names, what it means, and how to set and show it.
pub struct Key {
    names: &'static [&'static str],
    meaning: &'static str,
    set: fn(&mut Spec, &[u8]) -> Parsed<()>,
    /// The value, unescaped; `None` when it is the default.
    show: fn(&Spec) -> Option<Vec<u8>>,
}

impl Key {
    /// The name that is printed.
    pub fn name(&self) -> &'static str {
        self.names.first().copied().unwrap_or_default()
    }

    /// All names, synonyms last.
    pub fn names(&self) -> &'static [&'static str] {
        self.names
    }

    /// One line for people.
    pub fn meaning(&self) -> &'static str {
        self.meaning
    }
}

fn bytes(text: impl fmt::Display) -> Option<Vec<u8>> {
    Some(text.to_string().into_bytes())
}

fn path_bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

/// Every key, in the order in which they are printed.
pub static KEYS: &[Key] = &[
    Key {
        names: &["id"],
        meaning: "a name for logs and listings",
        set: |spec, v| value::text(v).map(|v| spec.id = Some(v)),
        show: |spec| spec.id.as_ref().and_then(bytes),
    },
    Key {
        names: &["file"],
        meaning: "the image",
        set: |spec, v| value::path(v).map(|v| spec.file = v),
        show: |spec| Some(path_bytes(&spec.file)),
    },
    Key {
        names: &["format", "driver"],
        meaning: "the image's format; auto (the default) finds it out",
        set: |spec, v| value::format(v).map(|v| spec.format = v),
        show: |spec| spec.format.as_ref().and_then(bytes),
    },
    Key {
        names: &["read-only"],
        meaning: "on: the disk is write-protected",
        set: |spec, v| value::switch(v).map(|v| spec.read_only = v),
        show: |spec| spec.read_only.then(|| b"on".to_vec()),
    },
    Key {
        names: &["snapshot"],
        meaning: "on: writes are thrown away at the end",
        set: |spec, v| value::switch(v).map(|v| spec.snapshot = v),
        show: |spec| spec.snapshot.then(|| b"on".to_vec()),
    },
    Key {
        names: &["snapshot-name"],
        meaning: "an internal snapshot to serve, read-only",
        set: |spec, v| value::text(v).map(|v| spec.snapshot_name = Some(v)),
        show: |spec| spec.snapshot_name.as_ref().and_then(bytes),
    },
    Key {
        names: &["overlay"],
        meaning: "a file that takes the writes; the image stays as it is",
        set: |spec, v| value::path(v).map(|v| spec.overlay = Some(v)),
        show: |spec| spec.overlay.as_deref().map(path_bytes),
    },
    Key {
        names: &["parent"],
        meaning: "the parent image, when it is not where the image says",
        set: |spec, v| value::path(v).map(|v| spec.parent = Some(v)),
        show: |spec| spec.parent.as_deref().map(path_bytes),
    },
    Key {
        names: &["parent-format"],
        meaning: "the parent's format, when the image does not say it",
        set: |spec, v| value::format(v).map(|v| spec.parent_format = v),
        show: |spec| spec.parent_format.as_ref().and_then(bytes),
    },
    Key {
        names: &["cache-size"],
        meaning: "memory for caches: bytes, or with K, M, G",
        set: |spec, v| value::size(v).map(|v| spec.cache_size = Some(v)),
        show: |spec| spec.cache_size.and_then(bytes),
    },
    Key {
        names: &["discard"],
        meaning: "unmap (the default) or ignore",
        set: |spec, v| value::discard(v).map(|v| spec.discard = v),
        show: |spec| (spec.discard == Discard::Ignore).then(|| b"ignore".to_vec()),
    },
    Key {
        names: &["detect-zeroes"],
        meaning: "off (the default), on or unmap",
        set: |spec, v| value::zero_detection(v).map(|v| spec.detect_zeroes = v),
        show: |spec| match spec.detect_zeroes {
            ZeroDetection::Off => None,
            ZeroDetection::On => Some(b"on".to_vec()),
            ZeroDetection::Unmap => Some(b"unmap".to_vec()),
        },
    },
    Key {
        names: &["offset"],
        meaning: "first byte of the image that is served",
        set: |spec, v| value::size(v).map(|v| spec.offset = v),
        show: |spec| (spec.offset != 0).then_some(spec.offset).and_then(bytes),
    },
    Key {
        names: &["size"],
        meaning: "how many bytes are served",
        set: |spec, v| value::nonzero_size(v).map(|v| spec.size = Some(v)),
        show: |spec| spec.size.and_then(bytes),
    },
    Key {
        names: &["partition"],
        meaning: "serve this partition alone; numbers start at 1",
        set: |spec, v| value::partition(v).map(|v| spec.partition = Some(v)),
        show: |spec| spec.partition.and_then(bytes),
    },
    Key {
        names: &["direct"],
        meaning: "on: bypass the host's page cache",
        set: |spec, v| value::switch(v).map(|v| spec.direct = v),
        show: |spec| spec.direct.then(|| b"on".to_vec()),
    },
];

impl Spec {
    /// The image at `path`, all else by default.
    pub fn for_file(path: impl Into<PathBuf>) -> Self {
        Self { file: path.into(), ..Self::default() }
    }

    pub(crate) fn from_path(path: &[u8]) -> Self {
        Self::for_file(std::ffi::OsStr::from_bytes(path))
    }

    /// From keys and values that come from elsewhere than a string (a configuration file): the same keys, checks and errors, no
    /// escapes, no limit of length. Columns in errors count the pairs, from 1.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Result<Self, Error> {
        let items: Vec<Item> = pairs
            .into_iter()
            .enumerate()
            .map(|(index, (key, value))| Item { column: index + 1, key: key.to_owned(), value: Some((index + 1, value.to_vec())) })
            .collect();
        Self::from_items(&items)
    }

    pub(crate) fn from_items(items: &[Item]) -> Result<Self, Error> {
        let mut spec = Self::default();
        let mut seen: Vec<(&'static str, usize)> = Vec::new();
        for item in items {
            let Some(key) = KEYS.iter().find(|key| key.names.contains(&item.key.as_str())) else {
                return Err(Error::of_key(item.column, &item.key, Problem::UnknownKey { nearest: nearest(&item.key) }));
            };
            let Some((column, value)) = &item.value else {
                return Err(Error::of_key(item.column, &item.key, Problem::NoEquals));
            };
            if let Some((_, first)) = seen.iter().find(|(name, _)| *name == key.name()) {
                return Err(Error::of_key(item.column, &item.key, Problem::Duplicate { first: *first }));
            }
            if value.is_empty() {
                return Err(Error::of_key(*column, &item.key, Problem::EmptyValue));
            }
            seen.push((key.name(), item.column));
            (key.set)(&mut spec, value).map_err(|expected| Error::of_key(*column, &item.key, value::bad(value, expected)))?;
        }
        spec.check_conflicts(&seen)?;
        Ok(spec)
    }

    fn check_conflicts(&self, seen: &[(&'static str, usize)]) -> Result<(), Error> {
        let column = |name: &str| seen.iter().find(|(seen, _)| *seen == name).map_or(1, |(_, column)| *column);
        let conflict = |key, other, why| Err(Error::of_key(column(key), key, Problem::Conflict { other, why }));
        if self.file.as_os_str().is_empty() {
            return Err(Error::at(1, Problem::NoFile));
        }
        if self.overlay.is_some() && self.snapshot {
            return conflict("overlay", "snapshot", "one keeps the writes, the other throws them away");
        }
        if self.overlay.is_some() && self.read_only {
            return conflict("overlay", "read-only", "there are no writes to keep");
        }
        if self.partition.is_some() && self.offset != 0 {
            return conflict("partition", "offset", "the partition says where to start");
        }
        if self.partition.is_some() && self.size.is_some() {
            return conflict("partition", "size", "the partition says where to end");
        }
        if self.detect_zeroes == ZeroDetection::Unmap && self.discard == Discard::Ignore {
            return conflict("detect-zeroes", "discard", "zeros cannot be unmapped when discard=ignore");
        }
        Ok(())
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for key in KEYS {
            if let Some(value) = (key.show)(self) {
                write!(f, "@{}=", key.name())?;
                syntax::escape(&value, f)?;
            }
        }
        Ok(())
    }
}

/// The key that was probably meant: at most a third of its letters away.
fn nearest(word: &str) -> Option<&'static str> {
    let word = word.to_ascii_lowercase().replace('_', "-");
    KEYS.iter()
        .flat_map(|key| key.names.iter().copied())
        .map(|name| (distance(&word, name), name))
        .filter(|(distance, name)| *distance <= name.len().div_ceil(3))
        .min()
        .map(|(_, name)| name)
}

/// Levenshtein distance, in bytes.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut left = i + 1;
        let mut next = vec![left];
        for (above, y) in row.windows(2).zip(b.bytes()) {
            let &[diagonal, up] = above else { continue };
            left = (diagonal + usize::from(x != y)).min(up + 1).min(left + 1);
            next.push(left);
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}
