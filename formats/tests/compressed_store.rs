//! What is around the codecs: stored indexes, the scratch file, reading ahead, holes, the cache.

mod streams;

use formats::Cache;
use formats::compressed::{self, Options};
use formats::store::Store;
use std::io::IoSliceMut;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use streams::{Workshop, check_reads, read};

const LEN: usize = (5 << 20) + 77;

fn indexes(workshop: &Workshop) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(workshop.path("cache")).unwrap();
    entries.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|suffix| suffix == "index")).collect()
}

/// A store that counts the bytes read from it.
struct Counting {
    inner: Arc<dyn Store>,
    read: AtomicU64,
}

impl Store for Counting {
    fn read_at(&self, bufs: &mut [IoSliceMut<'_>], at: u64) -> std::io::Result<usize> {
        let got = self.inner.read_at(bufs, at)?;
        self.read.fetch_add(got as u64, Ordering::Relaxed);
        Ok(got)
    }
    fn write_at(&self, _: &[std::io::IoSlice<'_>], _: u64) -> std::io::Result<()> {
        panic!("a compressed file was written")
    }
    fn len(&self) -> std::io::Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, _: u64) -> std::io::Result<()> {
        panic!("a compressed file was written")
    }
    fn punch(&self, _: u64, _: u64) -> std::io::Result<bool> {
        panic!("a compressed file was written")
    }
    fn zero(&self, _: u64, _: u64) -> std::io::Result<bool> {
        panic!("a compressed file was written")
    }
    fn sync(&self) -> std::io::Result<()> {
        Ok(())
    }
    fn path(&self) -> Option<&std::path::Path> {
        self.inner.path()
    }
}

fn counted(workshop: &Workshop, options: &Options, cache: &Arc<Cache>) -> (Arc<dyn Store>, Arc<Counting>) {
    let store = Arc::new(Counting { inner: streams::file(&workshop.path("out")), read: AtomicU64::new(0) });
    (compressed::open(store.clone(), options, cache).unwrap().unwrap(), store)
}

#[test]
fn an_index_is_made_once() {
    for command in [
        "gzip -c disk > out",
        "bzip2 -c disk > out",
        "lz4 -q -c disk > out",
        "split -b 900000 disk p.; for p in p.*; do zstd -qc < $p >> out; done",
    ] {
        let workshop = Workshop::new(LEN);
        workshop.run(command);
        let cache = Arc::new(Cache::new(16 << 20));
        let (first, store) = counted(&workshop, &workshop.options(), &cache);
        let coded = std::fs::metadata(workshop.path("out")).unwrap().len();
        assert!(store.read.load(Ordering::Relaxed) >= coded, "{command}: the first pass reads everything");
        assert_eq!(indexes(&workshop).len(), 1, "{command}");
        drop(first);
        let (second, store) = counted(&workshop, &workshop.options(), &cache);
        let opened_with = store.read.load(Ordering::Relaxed);
        assert!(opened_with < 400_000, "{command}: opened with {opened_with} of {coded} bytes");
        check_reads(&*second, &workshop.data);
    }
}

#[test]
fn an_index_of_another_version_of_the_file_is_not_used() {
    let workshop = Workshop::new(LEN);
    workshop.run("gzip -c disk > out");
    workshop.check("out");
    // Same name, same length, other contents: the bytes of the second half change, and the checksum with them.
    let mut other = Workshop::new(LEN);
    other.data[LEN / 2..].reverse();
    std::fs::write(workshop.path("disk"), &other.data).unwrap();
    workshop.run("gzip -c disk > out; truncate -s $(stat -c %s out) out");
    let stream = workshop.open("out").unwrap().unwrap();
    check_reads(&*stream, &other.data);
    // The same bytes with another time: indexed again, to the same effect.
    let file = std::fs::File::options().write(true).open(workshop.path("out")).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(1000)).unwrap();
    let stream = workshop.open("out").unwrap().unwrap();
    check_reads(&*stream, &other.data);
}

#[test]
fn a_damaged_index_is_made_anew() {
    for command in ["gzip -c disk > out", "bzip2 -1c disk > out", "lz4 -q -c disk > out"] {
        let workshop = Workshop::new(900_000);
        workshop.run(command);
        workshop.check("out");
        let [path] = indexes(&workshop).try_into().unwrap();
        let good = std::fs::read(&path).unwrap();
        let mut state = 1_u64;
        for n in 0..32 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
            let at = (state >> 33) as usize % good.len();
            let mut bad = good.clone();
            match n % 4 {
                0 => bad.truncate(at),
                1 => bad.extend_from_slice(b"more"),
                // With a right checksum, so that what is inside is looked at.
                2 => {
                    bad[at] ^= 1 << (n % 8);
                    let end = bad.len() - 4;
                    let sum = crc32fast::hash(&bad[..end]);
                    bad[end..].copy_from_slice(&sum.to_le_bytes());
                }
                _ => bad[at] ^= 0x10,
            }
            std::fs::write(&path, &bad).unwrap();
            let stream = workshop.open("out").unwrap().unwrap();
            if n % 4 != 2 {
                check_reads(&*stream, &workshop.data);
                assert!(std::fs::read(&path).unwrap() == good, "{command}: the index was not replaced");
            } else if stream.len().unwrap() == workshop.data.len() as u64 {
                // Whoever forges an index gets errors at most, where the codec has checksums; nothing breaks.
                let mut buf = vec![0; 1 << 16];
                for at in (0..LEN as u64).step_by(1 << 16) {
                    let _ = stream.read_at(&mut [IoSliceMut::new(&mut buf)], at);
                }
            }
        }
    }
}

#[test]
fn no_cache_directory_is_no_obstacle() {
    let workshop = Workshop::new(LEN);
    workshop.run("gzip -c disk > out; touch file");
    let options = Options {
        cache_dir: Some(workshop.path("file/below")),
        scratch_dir: Some(workshop.path(".")),
        progress: None,
        ..Options::default()
    };
    let stream = workshop.open_with("out", &options).unwrap().unwrap();
    check_reads(&*stream, &workshop.data);
}

#[test]
fn zeros_are_holes_and_need_no_decoding() {
    let workshop = Workshop::new(1000);
    workshop.run("(head -c 9M /dev/urandom; head -c 40M /dev/zero; head -c 9M /dev/urandom) > big; gzip -1c big > out");
    let stream = workshop.open("out").unwrap().unwrap();
    let (len, is_data) = stream.hole_or_data(0).unwrap().unwrap();
    assert!(is_data && (9 << 20..11 << 20).contains(&len), "{len}");
    let (hole, is_data) = stream.hole_or_data(len).unwrap().unwrap();
    assert!(!is_data && hole > 37 << 20, "{hole}");
    let mut buf = vec![1; 4096];
    assert_eq!(stream.try_read_at(&mut [IoSliceMut::new(&mut buf)], 30 << 20).unwrap(), Some(4096));
    assert!(buf.iter().all(|byte| *byte == 0));
    assert_eq!(stream.try_read_at(&mut [IoSliceMut::new(&mut buf)], 100).unwrap(), None, "not decoded yet");
    read(&*stream, &mut buf, 100);
    let mut again = vec![0; 4096];
    assert_eq!(stream.try_read_at(&mut [IoSliceMut::new(&mut again)], 100).unwrap(), Some(4096));
    assert_eq!(buf, again);
}

#[test]
fn a_stream_without_parts_goes_to_a_scratch_file_once() {
    let workshop = Workshop::new(LEN);
    workshop.run(
        "xz -0 -T1 -c disk > xz; zstd -q -c disk > zst; cat disk | zstd -q -c > pipe; lz4 -q -BD -B4 -c disk > lz4; lzip -0c disk > lz",
    );
    for name in ["xz", "zst", "pipe", "lz4", "lz"] {
        let calls = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&calls);
        let progress: compressed::Progress = Arc::new(move |what, done, total| seen.lock().unwrap().push((what.to_owned(), done, total)));
        let options = Options { progress: Some(progress), in_memory: 1 << 20, ..workshop.options() };
        let stream = workshop.open_with(name, &options).unwrap_or_else(|error| panic!("{name}: {}", error.chain())).unwrap();
        check_reads(&*stream, &workshop.data);
        let calls = calls.lock().unwrap();
        assert!(calls.iter().all(|(_, done, total)| done <= total), "{calls:?}");
        if let Some((_, done, total)) = calls.last() {
            assert_eq!(done, total, "{name}: progress ends at the end");
        }
        assert!(
            std::fs::read_dir(workshop.path("cache")).unwrap().all(|entry| entry.unwrap().path().extension().is_some()),
            "the scratch file has no name"
        );
    }
}

#[test]
fn units_come_and_go_in_a_small_scratch_file() {
    // Three blocks of 3 MiB, which are not to be decoded in memory, and a scratch file that holds two.
    let workshop = Workshop::new(9 << 20);
    workshop.run("xz -0 -T1 --block-size=3MiB -c disk > out");
    let options = Options { scratch_limit: Some(7 << 20), in_memory: 1 << 20, ..workshop.options() };
    let stream = workshop.open_with("out", &options).unwrap().unwrap();
    std::thread::scope(|scope| {
        for seed in 0..3 {
            let (stream, data) = (&*stream, &workshop.data[..]);
            scope.spawn(move || {
                for round in 0..3_u64 {
                    let at = ((round + seed) % 3 * (3 << 20) + 12_345) as usize;
                    let mut buf = vec![0; 5000];
                    // All three blocks at once do not fit: that is an error, not wrong bytes.
                    match stream.read_at(&mut [IoSliceMut::new(&mut buf)], at as u64) {
                        Ok(got) => assert!(buf[..got] == data[at..at + got]),
                        Err(error) => assert!(error.to_string().contains("scratch file is in use"), "{error}"),
                    }
                }
            });
        }
    });
    for block in [0, 1, 0, 1, 0] {
        let at = (block * (3 << 20)) + 3_099_999;
        let mut buf = vec![0; 100_000];
        assert_eq!(read(&*stream, &mut buf, at as u64), buf.len());
        assert!(buf[..] == workshop.data[at..at + buf.len()]);
    }
    let small = Options { scratch_limit: Some(2 << 20), in_memory: 1 << 20, ..workshop.options() };
    let error = workshop.open_with("out", &small).map(drop).unwrap_err();
    assert!(error.chain().contains("--block-size"), "{}", error.chain());
}

#[test]
fn sequential_reads_are_decoded_ahead() {
    let workshop = Workshop::new(20 << 20);
    workshop.run("bgzip -c disk > out");
    let cache = Arc::new(Cache::new(64 << 20));
    let (stream, _) = counted(&workshop, &workshop.options(), &cache);
    let mut buf = vec![0; 4096];
    for n in 0..20 {
        read(&*stream, &mut buf, n * 4096);
    }
    for _ in 0..200 {
        if cache.stats().used > 4 << 20 {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let stats = cache.stats();
    assert!(stats.used > 4 << 20, "nothing was decoded ahead of 80 kB: {stats:?}");
    // Random reads bring only what they need.
    let cache = Arc::new(Cache::new(64 << 20));
    let (stream, _) = counted(&workshop, &workshop.options(), &cache);
    for n in [17_u64, 3, 11, 5, 14, 1, 8] {
        read(&*stream, &mut buf, n << 20);
    }
    std::thread::sleep(Duration::from_millis(100));
    assert!(cache.stats().used <= 7 * (64 << 10), "{:?}", cache.stats());
    drop(stream);
    assert_eq!(cache.stats().used, 0, "a closed stream leaves nothing in the cache");
}

#[test]
fn a_closed_stream_holds_its_file_no_more() {
    let workshop = Workshop::new(12 << 20);
    workshop.run("xz -0 -T2 --block-size=1MiB -c disk > out");
    let path = workshop.path("out").canonicalize().unwrap();
    let held = || {
        let files = std::fs::read_dir("/proc/self/fd").unwrap();
        files.filter(|fd| std::fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|file| file == path)).count()
    };
    for round in 0..5 {
        let stream = workshop.open("out").unwrap().unwrap();
        assert_eq!(held(), 1);
        let mut buf = vec![0; 64 << 10];
        // From front to back, so that the helpers are at work when the stream is closed.
        for n in 0..4 + round {
            read(&*stream, &mut buf, n * (64 << 10));
        }
        drop(stream);
        assert_eq!(held(), 0, "the helpers still have the file open");
    }
}

#[test]
fn the_stream_cannot_be_written() {
    let workshop = Workshop::new(1000);
    workshop.run("gzip -c disk > out");
    let stream = workshop.open("out").unwrap().unwrap();
    assert_eq!(stream.write_all_at(b"x", 0).unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    assert!(stream.set_len(0).is_err() && stream.punch(0, 1).is_err() && stream.zero(0, 1).is_err());
    assert_eq!(stream.path(), Some(&*workshop.path("out")));
}

/// The seekable format's text, followed by a test writer: independent frames, then a skippable frame with the table.
#[test]
fn the_seekable_zstd_format_is_read_by_its_table() {
    let workshop = Workshop::new(LEN);
    for checksums in [false, true] {
        let (mut out, mut table) = (Vec::new(), Vec::new());
        let mut frames = 0_u32;
        for part in workshop.data.chunks(333_333) {
            let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3).unwrap();
            std::io::Write::write_all(&mut encoder, part).unwrap();
            let frame = encoder.finish().unwrap();
            table.extend_from_slice(&(frame.len() as u32).to_le_bytes());
            table.extend_from_slice(&(part.len() as u32).to_le_bytes());
            if checksums {
                table.extend_from_slice(&(twox_hash::XxHash64::oneshot(0, part) as u32).to_le_bytes());
            }
            out.extend_from_slice(&frame);
            frames += 1;
        }
        table.extend_from_slice(&frames.to_le_bytes());
        table.push(if checksums { 0x80 } else { 0 });
        table.extend_from_slice(&0x8F92_EAB1_u32.to_le_bytes());
        out.extend_from_slice(&0x184D_2A5E_u32.to_le_bytes());
        out.extend_from_slice(&(table.len() as u32).to_le_bytes());
        out.extend_from_slice(&table);
        std::fs::write(workshop.path("out"), &out).unwrap();
        workshop.run("zstd -dqc out | cmp - disk");
        let cache = Arc::new(Cache::new(8 << 20));
        let (_stream, store) = counted(&workshop, &workshop.options(), &cache);
        assert!(store.read.load(Ordering::Relaxed) < 1 << 20, "the frames have no sizes: without the table all would be decoded");
        workshop.check("out");
        if checksums {
            // A table whose checksum is wrong for one frame: its bytes are not given out.
            let at = out.len() - 9 - 12 + 8;
            out[at] ^= 1;
            std::fs::write(workshop.path("out"), &out).unwrap();
            let stream = workshop.open("out").unwrap().unwrap();
            let mut buf = vec![0; 100];
            assert!(stream.read_at(&mut [IoSliceMut::new(&mut buf)], LEN as u64 - 100).unwrap_err().to_string().contains("checksum"));
            assert_eq!(read(&*stream, &mut buf, 0), 100);
        }
    }
}
