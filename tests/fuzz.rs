//! The fuzz targets on a stable toolchain, without libFuzzer: inputs that once found something, and a few thousand new ones.
//!
//! `fuzz/regressions/TARGET/` has the former, at most 4 KiB each. `FUZZ_SEED=n` makes other ones than the committed ones, `FUZZ_COUNT=n` more of them,
//! `FUZZ_SECONDS=n` as many as there is time for. `FUZZ_INPUTS=directory` runs inputs of one's own, which are in `directory/TARGET/`.

#[path = "../fuzz/src/lib.rs"]
mod targets;

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time for the random inputs of one target.
const TIME: Duration = Duration::from_secs(3);

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |n| n.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Inputs that found something: the committed ones, or those in another directory like that.
fn regressions(name: &str) {
    let committed = || Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/regressions");
    let dir = std::env::var_os("FUZZ_INPUTS").map_or_else(committed, PathBuf::from).join(name);
    let Ok(files) = std::fs::read_dir(dir) else { return };
    for file in files {
        let path = file.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        assert!(
            bytes.len() <= 4096 || std::env::var_os("FUZZ_INPUTS").is_some(),
            "{} is too long: minimise it with `cargo fuzz tmin`",
            path.display()
        );
        println!("{}", path.display());
        targets::run(name, &bytes);
    }
}

/// Inputs of random bytes: structured targets make something of any of them, others of a few.
fn random(name: &str) {
    let seconds = std::env::var_os("FUZZ_SECONDS").map(|_| Duration::from_secs(number("FUZZ_SECONDS", 0)));
    let (seed, count) = (number("FUZZ_SEED", 1), number("FUZZ_COUNT", if seconds.is_some() { u64::MAX } else { 2000 }));
    let time = seconds.unwrap_or(if count <= 2000 { TIME } else { Duration::MAX });
    let started = Instant::now();
    for number in 0..count {
        let mut rng = StdRng::seed_from_u64(seed.wrapping_mul(1_000_003) + number);
        let mut bytes = vec![0; rng.random_range(0..300)];
        rng.fill_bytes(&mut bytes);
        // Small numbers are telling ones.
        for byte in &mut bytes {
            if rng.random_ratio(1, 3) {
                *byte %= 4;
            }
        }
        let result = std::panic::catch_unwind(|| targets::run(name, &bytes));
        assert!(result.is_ok(), "{name}: random input {number} of seed {seed} (above): {bytes:02x?}");
        if started.elapsed() > time {
            println!("{name}: {} inputs of seed {seed} in {time:?}", number + 1);
            break;
        }
    }
}

macro_rules! tests {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                regressions(stringify!($name));
                random(stringify!($name));
            }
        )*

        #[test]
        fn every_target_has_a_test() {
            let names: Vec<&str> = targets::TARGETS.iter().map(|(name, _)| *name).collect();
            assert_eq!(names, [$(stringify!($name)),*]);
        }
    };
}

tests!(qcow2_structured vhdx_structured cdb ring vhd_structured gzip xz zstd bzip2 lz4 lzip nbd qcow2 vhdx vhd vmdk_structured vmdk ova netlink cfgstring raw_probe);
