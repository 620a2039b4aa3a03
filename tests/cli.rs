//! The command line against images that `qemu-img` made: output, exit codes, messages.

use serde_json::Value;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

fn img_tcmu(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_img-tcmu")).args(args).output().expect("img-tcmu")
}

/// Stdout of a run that must succeed.
fn good(args: &[&str]) -> Vec<u8> {
    let output = img_tcmu(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{args:?}");
    output.stdout
}

fn good_json(args: &[&str]) -> Value {
    serde_json::from_slice(&good(args)).expect("JSON")
}

/// Exit code and stderr of a run that must fail.
fn bad(args: &[&str]) -> (i32, String) {
    let output = img_tcmu(args);
    let text = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(!output.status.success(), "{args:?} succeeded");
    (output.status.code().expect("not killed"), text)
}

fn qemu_img(dir: &Path, args: &[&str]) -> Vec<u8> {
    let output =
        Command::new("qemu-img").current_dir(dir).args(args).output().expect("these tests need qemu-img: apt-get install qemu-utils");
    assert!(output.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

struct Bed {
    dir: TempDir,
}

impl Bed {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("tempdir") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("UTF-8").to_owned()
    }

    /// 4 MiB with data at 1 MiB (64 KiB) and at the very end (1 sector); the rest is a hole.
    fn raw(&self, name: &str) -> String {
        let file = File::create(self.path(name)).expect("create");
        file.set_len(4 << 20).expect("set_len");
        let data: Vec<u8> = (0..65536u32).map(|at| (at * 7 + at / 256) as u8 | 1).collect();
        file.write_all_at(&data, 1 << 20).expect("write");
        file.write_all_at(&[0xA5; 512], (4 << 20) - 512).expect("write");
        self.text(name)
    }
}

#[test]
fn cat_gives_the_bytes_of_a_raw_image() {
    let bed = Bed::new();
    let raw = bed.raw("a.raw");
    let bytes = fs::read(&raw).expect("read");
    assert_eq!(good(&["cat", &raw]), bytes);
    assert_eq!(good(&["cat", &format!("@file={raw}@format=raw")]), bytes);
    let (from, to) = ((1 << 20) + 100, (1 << 20) + 70000);
    assert_eq!(good(&["cat", &raw, "--offset", &from.to_string(), "--length", &(to - from).to_string()]), bytes[from..to]);
    assert_eq!(good(&["cat", &raw, "--offset", "3M"]), bytes[3 << 20..]);
    assert_eq!(good(&["cat", &raw, "--offset", "4M"]), b"");
    let (code, text) = bad(&["cat", &raw, "--offset", "5M"]);
    assert_eq!(code, 1);
    assert!(text.contains("4194304 bytes"), "{text}");
    let (_, text) = bad(&["cat", &raw, "--offset", "3M", "--length", "2M"]);
    assert!(text.contains("1048576 bytes beyond the end"), "{text}");
}

#[test]
fn cat_into_a_file_leaves_holes() {
    let bed = Bed::new();
    let raw = bed.raw("a.raw");
    let out = bed.path("out.raw");
    let status = Command::new(env!("CARGO_BIN_EXE_img-tcmu")).args(["cat", &raw]).stdout(File::create(&out).expect("create")).status();
    assert!(status.expect("run").success());
    assert!(fs::read(&out).expect("read") == fs::read(&raw).expect("read"));
    let blocks = fs::metadata(&out).expect("metadata").blocks();
    assert!(blocks * 512 < 1 << 20, "{blocks} blocks: no holes");
}

#[test]
fn cat_into_a_file_with_contents_replaces_them() {
    let bed = Bed::new();
    let raw = bed.raw("a.raw");
    let out = bed.path("out.raw");
    fs::write(&out, vec![0xFF; 8 << 20]).expect("write");
    let stdout = File::options().write(true).open(&out).expect("open");
    let status = Command::new(env!("CARGO_BIN_EXE_img-tcmu")).args(["cat", &raw]).stdout(stdout).status();
    assert!(status.expect("run").success());
    let bytes = fs::read(&out).expect("read");
    assert!(bytes[..4 << 20] == fs::read(&raw).expect("read")[..]);
    assert!(bytes[4 << 20..].iter().all(|byte| *byte == 0xFF));
}

#[test]
fn cat_ends_quietly_when_nobody_reads() {
    let bed = Bed::new();
    let raw = bed.raw("a.raw");
    let mut child = Command::new(env!("CARGO_BIN_EXE_img-tcmu"))
        .args(["cat", &raw])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("img-tcmu");
    let mut first = [0; 10];
    child.stdout.take().expect("stdout").read_exact(&mut first).expect("read");
    let output = child.wait_with_output().expect("wait");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn info_of_a_raw_image_has_the_keys_of_qemu_img() {
    let bed = Bed::new();
    let raw = bed.raw("a.raw");
    let ours = good_json(&["info", "--json", &raw]);
    let theirs: Value = serde_json::from_slice(&qemu_img(bed.dir.path(), &["info", "--output=json", "-f", "raw", "a.raw"])).expect("JSON");
    for key in ["format", "virtual-size", "actual-size", "dirty-flag"] {
        assert_eq!(ours[key], theirs[key], "{key}");
    }
    assert_eq!(ours["filename"], raw);
    let text = String::from_utf8(good(&["info", &raw])).expect("UTF-8");
    assert!(text.contains("file format: raw\n") && text.contains("virtual size: 4 MiB (4194304 bytes)\n"), "{text}");
}

#[test]
fn map_covers_the_disk_and_agrees_with_qemu_img_about_a_raw_image() {
    let bed = Bed::new();
    let raw = bed.raw("a.raw");
    let ours = good_json(&["map", "--json", &raw]);
    let theirs: Value = serde_json::from_slice(&qemu_img(bed.dir.path(), &["map", "--output=json", "-f", "raw", "a.raw"])).expect("JSON");
    let key = |run: &Value| (run["start"].clone(), run["length"].clone(), run["zero"].clone(), run["data"].clone());
    let keys = |value: &Value| value.as_array().expect("array").iter().map(key).collect::<Vec<_>>();
    assert_eq!(keys(&ours), keys(&theirs));
    let table = String::from_utf8(good(&["map", &raw])).expect("UTF-8");
    assert!(table.lines().any(|line| line.starts_with("0x100000 ") && line.contains(" data ")), "{table}");
}

#[test]
fn check_config_prints_the_canonical_string_or_the_column() {
    let bed = Bed::new();
    let raw = bed.raw("a b.raw");
    let escaped = raw.replace(' ', "%20");
    let canonical = format!("@file={escaped}@format=raw\n");
    assert_eq!(String::from_utf8(good(&["check-config", &format!("img/@driver=raw@file={escaped}")])).expect("UTF-8"), canonical);
    assert_eq!(good(&["check-config", "--syntax", "/no/such/file"]), b"@file=/no/such/file\n");
    let (code, text) = bad(&["check-config", "/no/such/file"]);
    assert_eq!(code, 1);
    assert!(text.contains("/no/such/file: ") && text.contains("caused by: "), "{text}");
    let (_, text) = bad(&["check-config", "@file=/x@sise=1"]);
    assert_eq!(text, "img-tcmu: column 10: unknown key 'sise'; did you mean 'size'?\n");
}

#[test]
fn named_exports_come_from_the_configuration_file() {
    let bed = Bed::new();
    let raw = bed.raw("a.raw");
    let config = bed.text("config.toml");
    fs::write(&config, format!("[exports.disk]\nfile = \"{raw}\"\nformat = \"raw\"\n")).expect("write");
    assert_eq!(good(&["cat", "--config", &config, "@disk"]), fs::read(&raw).expect("read"));
    let (code, text) = bad(&["cat", "--config", &config, "@disc"]);
    assert_eq!(code, 1);
    assert!(text.contains("[exports.disc]"), "{text}");
}

#[test]
fn usage_errors_have_their_own_code() {
    assert_eq!(bad(&["no-such-command"]).0, 64);
    assert_eq!(bad(&["info"]).0, 64);
    let (code, text) = bad(&["info", "@file=/x@format=raw@format=raw"]);
    assert_eq!(code, 64);
    assert!(text.contains("column 21"), "{text}");
    assert_eq!(bad(&["cat", "/x", "--offset", "1X"]).0, 64);
    let help = String::from_utf8(good(&["--help"])).expect("UTF-8");
    assert!(help.contains("Exit codes:") && help.contains("64"), "{help}");
    assert_eq!(img_tcmu(&["--version"]).status.code(), Some(0));
}

#[test]
fn errors_are_one_line_and_its_causes() {
    let (code, text) = bad(&["info", "/no/such/file"]);
    assert_eq!(code, 1);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("img-tcmu: ") && lines[0].contains("/no/such/file"), "{text}");
    assert!(lines.len() > 1 && lines[1..].iter().all(|line| line.starts_with("caused by: ")), "{text}");
    let bed = Bed::new();
    let (_, text) = bad(&["info", &bed.text(".")]);
    assert!(text.contains("directory"), "{text}");
    let (_, text) = bad(&["info", &format!("@file={}@format=qcow9", bed.raw("a.raw"))]);
    assert!(text.contains("qcow9"), "{text}");
}

/// An overlay over a backing file, with data, zeros and compressed clusters.
fn chain(bed: &Bed) -> String {
    let dir = bed.dir.path();
    bed.raw("a.raw");
    qemu_img(dir, &["convert", "-c", "-f", "raw", "-O", "qcow2", "a.raw", "base.qcow2"]);
    qemu_img(dir, &["create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]);
    let status = Command::new("qemu-io")
        .current_dir(dir)
        .args(["-f", "qcow2", "-c", "write -P 7 256k 64k", "-c", "write -z 3M 64k", "top.qcow2"])
        .stdout(Stdio::null())
        .status();
    assert!(status.expect("these tests need qemu-io: apt-get install qemu-utils").success());
    bed.text("top.qcow2")
}

#[test]
fn info_of_a_qcow2_chain_has_the_keys_of_qemu_img() {
    let bed = Bed::new();
    let top = chain(&bed);
    let ours = good_json(&["info", "--json", &top]);
    let theirs: Value = serde_json::from_slice(&qemu_img(bed.dir.path(), &["info", "--output=json", "top.qcow2"])).expect("JSON");
    for key in ["format", "virtual-size", "actual-size", "cluster-size", "dirty-flag", "backing-filename-format"] {
        assert_eq!(ours[key], theirs[key], "{key}");
    }
    assert!(ours["full-backing-filename"].as_str().expect("string").ends_with("base.qcow2"));
    assert_eq!(ours["format-specific"]["type"], "qcow2");
    for key in ["compat", "compression-type", "lazy-refcounts", "refcount-bits", "corrupt"] {
        let at = format!("/format-specific/data/{key}");
        assert_eq!(ours.pointer(&at), theirs.pointer(&at), "{key}");
    }
    let all = good_json(&["info", "--json", "--backing-chain", &top]);
    assert_eq!(all.as_array().expect("array").len(), 2);
    let text = String::from_utf8(good(&["info", &top])).expect("UTF-8");
    assert!(text.contains("backing file: "), "{text}");
}

#[test]
fn map_and_cat_of_a_qcow2_chain_agree_with_qemu_img() {
    let bed = Bed::new();
    let top = chain(&bed);
    let ours = good_json(&["map", "--json", &top]);
    let theirs: Value = serde_json::from_slice(&qemu_img(bed.dir.path(), &["map", "--output=json", "top.qcow2"])).expect("JSON");
    // Whether compressed runs are split is nobody's business: compare byte by byte, in sectors.
    let states = |value: &Value| {
        let mut states = Vec::new();
        for run in value.as_array().expect("array") {
            let (start, length) = (run["start"].as_u64().expect("start"), run["length"].as_u64().expect("length"));
            assert_eq!(start, states.len() as u64 * 512);
            let state = (run["depth"].clone(), run["zero"].clone(), run["data"].clone());
            states.extend((0..length / 512).map(|_| state.clone()));
        }
        states
    };
    let (ours, theirs) = (states(&ours), states(&theirs));
    assert_eq!(ours.len(), theirs.len());
    let differing = ours.iter().zip(&theirs).position(|(a, b)| (&a.1, &a.2) != (&b.1, &b.2) || (a.2 == true && a.0 != b.0));
    assert_eq!(differing.map(|sector| (sector, &ours[sector], &theirs[sector])), None);
    qemu_img(bed.dir.path(), &["convert", "-O", "raw", "top.qcow2", "flat.raw"]);
    assert!(good(&["cat", &top]) == fs::read(bed.path("flat.raw")).expect("read"));
}

#[test]
fn parts_of_a_disk() {
    let bed = Bed::new();
    let raw = bed.raw("a.raw");
    // An MBR whose second entry is a Linux partition from sector 2048 with 128 sectors.
    let file = File::options().write(true).open(&raw).expect("open");
    let mut entry = vec![0, 0, 0, 0, 0x83, 0, 0, 0];
    entry.extend(2048u32.to_le_bytes());
    entry.extend(128u32.to_le_bytes());
    file.write_all_at(&entry, 446 + 16).expect("write");
    file.write_all_at(&[0x55, 0xAA], 510).expect("write");
    let bytes = fs::read(&raw).expect("read");
    assert!(good(&["cat", &format!("@file={raw}@partition=2")]) == bytes[1 << 20..(1 << 20) + 65536]);
    assert!(good(&["cat", &format!("@file={raw}@offset=1M@size=4K")]) == bytes[1 << 20..(1 << 20) + 4096]);
    assert!(good(&["cat", &format!("@file={raw}@offset=2M")]) == bytes[2 << 20..]);
    let (code, text) = bad(&["cat", &format!("@file={raw}@partition=1")]);
    assert_eq!(code, 1);
    assert!(text.contains("no partition 1; it has: 2"), "{text}");
    let (_, text) = bad(&["cat", &format!("@file={raw}@offset=5M")]);
    assert!(text.contains("beyond the end"), "{text}");
}

/// Flips bits of a qcow2 file that `qemu-img` made: marks it as damaged, and takes the refcount of the header, which is cluster 0, away.
fn damage(path: &Path) {
    let file = File::options().read(true).write(true).open(path).expect("open");
    let be64 = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).expect("read");
        u64::from_be_bytes(bytes)
    };
    file.write_all_at(&[2], 79).expect("write");
    file.write_all_at(&[0, 0], be64(be64(48))).expect("write");
}

#[test]
fn check_repairs_an_image_that_is_marked_as_damaged() {
    let bed = Bed::new();
    bed.raw("a.raw");
    qemu_img(bed.dir.path(), &["convert", "-f", "raw", "-O", "qcow2", "a.raw", "a.qcow2"]);
    let image = bed.text("a.qcow2");
    damage(&bed.path("a.qcow2"));
    let output = img_tcmu(&["check", "--json", &image]);
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["corruptions"], 1, "{report}");
    let (code, _) = bad(&["check", &image]);
    assert_eq!(code, 2);
    let text = String::from_utf8(good(&["check", "--repair", &image])).expect("UTF-8");
    assert!(text.contains("were repaired") && text.contains("No errors"), "{text}");
    good(&["check", &image]);
    qemu_img(bed.dir.path(), &["check", "-f", "qcow2", "a.qcow2"]);
    qemu_img(bed.dir.path(), &["compare", "-f", "raw", "-F", "qcow2", "a.raw", "a.qcow2"]);
    // What cannot be mended is not said to be.
    damage(&bed.path("a.qcow2"));
    let file = File::options().read(true).write(true).open(bed.path("a.qcow2")).expect("open");
    let be64 = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).expect("read");
        u64::from_be_bytes(bytes)
    };
    // An L2 entry with a bit that has no meaning: data at 1 MiB, clusters of 64 KiB.
    let entry = (be64(be64(40)) & 0x00ff_ffff_ffff_fe00) + 16 * 8;
    file.write_all_at(&(be64(entry) | 1 << 58).to_be_bytes(), entry).expect("write");
    let (code, _) = bad(&["check", "--repair", &image]);
    assert_eq!(code, 2);
}
