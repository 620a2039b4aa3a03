use super::*;
use proptest::prelude::*;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

fn spec(rest: &str) -> Spec {
    match Config::parse(rest.as_bytes()) {
        Ok(Config::Image(spec)) => *spec,
        other => panic!("{rest}: {other:?}"),
    }
}

fn fault(rest: &str) -> Error {
    Config::parse(rest.as_bytes()).expect_err(rest)
}

#[test]
fn the_usual_string() {
    let parsed = spec("@id=test@file=/root/test.file");
    assert_eq!(parsed, Spec { id: Some("test".into()), ..Spec::for_file("/root/test.file") });
    assert_eq!(parsed.to_string(), "@id=test@file=/root/test.file");
}

#[test]
fn every_key() {
    let parsed = spec(
        "@id=a@file=/x@driver=QCOW2@snapshot=off@snapshot-name=s1@read-only=on@parent=/p@parent-format=raw@cache-size=4M@discard=ignore\
         @detect-zeroes=on@offset=1K@size=2t@direct=yes",
    );
    let expected = Spec {
        id: Some("a".into()),
        format: Some("qcow2".into()),
        snapshot_name: Some("s1".into()),
        read_only: true,
        parent: Some("/p".into()),
        parent_format: Some("raw".into()),
        cache_size: Some(4 << 20),
        discard: Discard::Ignore,
        detect_zeroes: ZeroDetection::On,
        offset: 1024,
        size: Some(2 << 40),
        direct: true,
        ..Spec::for_file("/x")
    };
    assert_eq!(parsed, expected);
    assert_eq!(spec("@file=/x@overlay=/o@partition=3").partition, Some(3));
    assert_eq!(spec("@file=/x@overlay=/o@partition=3").overlay.as_deref(), Some(Path::new("/o")));
    assert_eq!(spec("@file=/x@format=auto").format, None);
}

#[test]
fn escapes() {
    assert_eq!(spec("@file=/a@@b%2Cc%3ad%20%FF=%25").file, PathBuf::from(OsString::from_vec(b"/a@b,c:d \xff=%".to_vec())));
    assert_eq!(spec("@file=/ends-with@@@id=x").file, Path::new("/ends-with@"));
    assert_eq!(spec("@file=/a=b").file, Path::new("/a=b"));
}

#[test]
fn plain_path_is_taken_as_it_is() {
    assert_eq!(spec("/var/images/50%25@home.raw").file, Path::new("/var/images/50%25@home.raw"));
}

#[test]
fn dev_config_with_its_subtype() {
    assert_eq!(Config::parse_dev_config(b"img//path/to/file"), Ok(Config::Image(Box::new(Spec::for_file("/path/to/file")))));
    assert_eq!(Config::parse_dev_config(b"img/@disk1\n"), Ok(Config::Export("disk1".into())));
    assert_eq!(Config::parse_dev_config(b"image//path").unwrap_err().problem(), &Problem::Subtype);
    assert_eq!(Config::parse_dev_config(b"img").unwrap_err().problem(), &Problem::Subtype);
    assert_eq!(Config::parse_dev_config(b"img/").unwrap_err().problem(), &Problem::Empty);
}

#[test]
fn a_name_of_an_export() {
    assert_eq!("@web-1.disk_0".parse::<Config>(), Ok(Config::Export("web-1.disk_0".into())));
    assert_eq!(fault("@/path").problem(), &Problem::BadName);
    assert_eq!(fault("@a%20b").problem(), &Problem::BadName);
}

/// Each: the string, the column, the key, and words that the message must hold.
#[test]
fn faults_name_column_key_and_cure() {
    let long = format!("@file=/{}", "x".repeat(245));
    let cases: &[(&str, usize, Option<&str>, &str)] = &[
        ("", 1, None, "@file="),
        ("file=/x", 1, None, "start with '@'"),
        ("@", 2, None, "key should follow"),
        ("@@x", 2, None, "key should follow"),
        ("@file=/x@", 10, None, "key should follow"),
        ("@file=/x@id", 10, Some("id"), "followed by '='"),
        ("@file=/x@id=", 13, Some("id"), "no value"),
        ("@id=@file=/x", 5, Some("id"), "no value"),
        ("@file=/x@readonly=on", 10, Some("readonly"), "did you mean 'read-only'?"),
        ("@file=/x@read_only=on", 10, Some("read_only"), "did you mean 'read-only'?"),
        ("@fiel=/x", 2, Some("fiel"), "did you mean 'file'?"),
        ("@file=/x@colour=red", 10, Some("colour"), "the keys are id, file, format"),
        ("@file=/x@file=/y", 10, Some("file"), "column 2"),
        ("@file=/x@format=raw@driver=raw", 21, Some("driver"), "column 10"),
        ("@file=/x@read-only=maybe", 20, Some("read-only"), "'on' or 'off'"),
        ("@file=/x@size=0", 15, Some("size"), "larger than 0"),
        ("@file=/x@size=12X", 15, Some("size"), "K, M, G or T"),
        ("@file=/x@size=9223372036854775808", 15, Some("size"), "K, M, G or T"),
        ("@file=/x@size=99999999T", 15, Some("size"), "K, M, G or T"),
        ("@file=/x@offset=-1", 17, Some("offset"), "K, M, G or T"),
        ("@file=/x@cache-size=+1", 21, Some("cache-size"), "K, M, G or T"),
        ("@file=/x@partition=0", 20, Some("partition"), "from 1"),
        ("@file=/x@discard=yes", 18, Some("discard"), "'unmap' or 'ignore'"),
        ("@file=/x@detect-zeroes=1", 24, Some("detect-zeroes"), "'off', 'on' or 'unmap'"),
        ("@file=/x@format=q%20w", 17, Some("format"), "image format"),
        ("@file=/x@id=a%0ab", 13, Some("id"), "printable"),
        ("@file=%00", 7, Some("file"), "NUL"),
        ("@file=/x%2", 9, None, "two hexadecimal digits"),
        ("@file=/x%zz", 9, None, "%25"),
        ("@file=/x,y", 9, None, "%2C"),
        ("@file=/x\ny", 9, None, "%0A"),
        ("/x,y", 3, None, "%2C"),
        ("@id=x", 1, None, "'file' is missing"),
        ("@id=x@format=raw", 1, None, "'file' is missing"),
        ("@file=/x@snapshot=on@overlay=/o", 22, Some("overlay"), "'snapshot'"),
        ("@file=/x@overlay=/o@read-only=on", 10, Some("overlay"), "'read-only'"),
        ("@file=/x@partition=1@offset=1M", 10, Some("partition"), "'offset'"),
        ("@file=/x@partition=1@size=1M", 10, Some("partition"), "'size'"),
        ("@file=/x@detect-zeroes=unmap@discard=ignore", 10, Some("detect-zeroes"), "'discard'"),
        (&long, 252, None, "256 bytes"),
    ];
    for (rest, column, key, words) in cases {
        let error = fault(rest);
        let text = error.to_string();
        assert_eq!(error.column(), *column, "{rest:?}: {text}");
        assert_eq!(error.key(), *key, "{rest:?}: {text}");
        assert!(text.contains(words), "{rest:?}: {text}");
        assert!(text.starts_with(&format!("column {column}: ")), "{rest:?}: {text}");
    }
}

#[test]
fn the_longest_string_that_fits() {
    let rest = format!("@file=/{}", "x".repeat(244));
    assert_eq!(rest.len() + 4, MAX_LEN);
    assert_eq!(spec(&rest).file.as_os_str().len(), 245);
}

#[test]
fn what_targetcli_loses() {
    assert_eq!(check_targetcli(b"@id=a@file=/x%20y+~"), Ok(()));
    for (rest, column) in [("@file=/a b", 9), ("@file=nbd:x", 10), ("@file=\"/x\"", 7), ("@file=/x\u{e9}", 9)] {
        let error = check_targetcli(rest.as_bytes()).expect_err(rest);
        assert_eq!(error.column(), column, "{rest}");
        assert!(error.to_string().contains('%'), "{error}");
    }
}

#[test]
fn pairs_from_a_configuration_file() {
    let pairs = [("file", b"/a,b@%zz".as_slice()), ("read-only", b"on")];
    assert_eq!(Spec::from_pairs(pairs), Ok(Spec { read_only: true, ..Spec::for_file("/a,b@%zz") }));
    let error = Spec::from_pairs([("file", b"/x".as_slice()), ("sise", b"1")]).expect_err("unknown key");
    assert_eq!((error.column(), error.key()), (2, Some("sise")));
    assert_eq!(error.reason(), "unknown key 'sise'; did you mean 'size'?");
}

#[test]
fn every_key_is_in_the_description() {
    for key in KEYS {
        for name in key.names() {
            assert!(DESCRIPTION.contains(name), "{name}");
        }
        assert!(!key.meaning().is_empty());
    }
}

fn text() -> impl Strategy<Value = Option<String>> {
    proptest::option::of("[^\\p{Cc}]{1,8}")
}

fn path() -> impl Strategy<Value = PathBuf> {
    proptest::collection::vec(1u8..=255, 1..10).prop_map(|bytes| PathBuf::from(OsString::from_vec(bytes)))
}

prop_compose! {
    fn any_spec()(
        id in text(),
        file in path(),
        format in proptest::option::of("[a-z0-9]{1,5}".prop_filter("auto is None", |name| name != "auto")),
        (read_only, snapshot, direct) in any::<(bool, bool, bool)>(),
        snapshot_name in text(),
        overlay in proptest::option::of(path()),
        parent in proptest::option::of(path()),
        parent_format in proptest::option::of("[a-z0-9]{1,5}".prop_filter("auto is None", |name| name != "auto")),
        cache_size in proptest::option::of(0..1u64 << 40),
        unmap in any::<bool>(),
        zeroes in 0..3u8,
        offset in 0..1u64 << 40,
        size in proptest::option::of(1..1u64 << 40),
        partition in proptest::option::of(1..100u32),
    ) -> Spec {
        let overlay = overlay.filter(|_| !snapshot && !read_only);
        Spec {
            id, file, format, read_only, snapshot, snapshot_name, parent, parent_format, cache_size, direct, overlay,
            discard: if unmap { Discard::Unmap } else { Discard::Ignore },
            detect_zeroes: match zeroes {
                0 => ZeroDetection::Off,
                1 if unmap => ZeroDetection::Unmap,
                _ => ZeroDetection::On,
            },
            offset: if partition.is_some() { 0 } else { offset },
            size: if partition.is_some() { None } else { size },
            partition,
        }
    }
}

proptest! {
    #[test]
    fn printing_and_parsing_agree(spec in any_spec()) {
        let text = spec.to_string();
        prop_assert!(check_targetcli(text.as_bytes()).is_ok(), "{}", text);
        match Config::parse(text.as_bytes()) {
            Ok(parsed) => prop_assert_eq!(parsed, Config::Image(Box::new(spec))),
            // Escapes may make it longer than the kernel keeps.
            Err(error) => prop_assert!(text.len() + 4 > MAX_LEN, "{}: {}", text, error),
        }
    }

    #[test]
    fn any_bytes_parse_or_fail_inside_the_string(rest in proptest::collection::vec(any::<u8>(), 0..300)) {
        match Config::parse(&rest) {
            Ok(config) => {
                let text = config.to_string();
                if text.len() + 4 <= MAX_LEN {
                    prop_assert_eq!(Config::parse(text.as_bytes()), Ok(config));
                }
            }
            Err(error) => prop_assert!((1..=rest.len() + 1).contains(&error.column()), "{}", error),
        }
    }

    #[test]
    fn bytes_of_the_grammar_parse_or_fail_inside_the_string(rest in "@((file|id|size|read-only|x)?(=|@|%|%4[0-9a-f]|/a|on|1K|é)?){0,9}") {
        match rest.parse::<Config>() {
            Ok(config) => prop_assert_eq!(config.to_string().parse::<Config>(), Ok(config)),
            Err(error) => prop_assert!((1..=rest.len() + 1).contains(&error.column()), "{}", error),
        }
    }
}
