//! Copies the modules that have models into the build directory, with the scheduler's locks and atomics in place of the real ones: the code under the models is
//! the code that is shipped, and the code that is shipped knows nothing of models.
//!
//! Beside each copy come mutants of it, each with one mistake: the models' tests show that they find it.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// A module to copy: its name here, its root file, and the directory (if it has more files) to copy whole.
struct Part {
    name: &'static str,
    root: &'static str,
    tree: Option<&'static str>,
    /// Name of the mutant, file (relative to the tree, or empty), what is replaced by what.
    mutants: &'static [(&'static str, &'static str, &'static str, &'static str)],
}

const PARTS: [Part; 4] = [
    Part {
        name: "ranges",
        root: "formats/ranges.rs",
        tree: None,
        mutants: &[
            ("ranges_shared_beside_exclusive", "", "(self.exclusive || other.exclusive)", "(self.exclusive && other.exclusive)"),
            ("ranges_touching_is_not_overlapping", "", "self.start < other.end &&", "self.start + 1 < other.end &&"),
            ("ranges_last_waiter_forgotten", "", "if state.waiting > 0 {", "if state.waiting > 1 {"),
            ("ranges_one_waiter_woken", "", "self.locks.changed.notify_all();", "self.locks.changed.notify_one();"),
        ],
    },
    Part {
        name: "cache",
        root: "formats/cache.rs",
        tree: None,
        mutants: &[
            (
                "cache_stale_unit_kept",
                "",
                "if shard.flights.get(&key).is_some_and(|current| Arc::ptr_eq(current, flight)) {",
                "if shard.flights.remove(&key).is_some() || true {",
            ),
            ("cache_another_flight_ended", "", ".is_some_and(|current| Arc::ptr_eq(current, flight))", ".is_some()"),
            ("cache_decoded_twice", "", "shard.flights.insert(key, Arc::clone(&flight));", "let _ = &mut shard;"),
            ("cache_waiters_not_woken", "", "flight.landed.notify_all();", ""),
            (
                "cache_outcome_after_the_call",
                "",
                "*flight.outcome.lock() = Some(outcome);\n        flight.landed.notify_all();",
                "flight.landed.notify_all();\n        *flight.outcome.lock() = Some(outcome);",
            ),
            (
                "cache_bytes_miscounted",
                "",
                "self.used.fetch_add(unit.len(), Ordering::Relaxed);",
                "self.used.fetch_add(unit.len() + 1, Ordering::Relaxed);",
            ),
        ],
    },
    Part {
        name: "grace",
        root: "formats/grace.rs",
        tree: None,
        mutants: &[
            ("grace_one_epoch_is_enough", "", "now >= stamp.saturating_add(2)", "now >= stamp.saturating_add(1)"),
            ("grace_nobody_is_waited_for", "", ".load(Ordering::SeqCst) != 0 {", ".load(Ordering::SeqCst) == u64::MAX {"),
            (
                "grace_stamp_of_the_past",
                "",
                "pub fn stamp(&self) -> u64 {\n        self.epoch.load(Ordering::SeqCst)",
                "pub fn stamp(&self) -> u64 {\n        self.epoch.load(Ordering::SeqCst).saturating_sub(1)",
            ),
        ],
    },
    Part {
        name: "tcmu",
        root: "models/tcmu.rs",
        tree: Some("src/tcmu"),
        mutants: &[
            (
                "tcmu_completions_not_announced",
                "ring/mod.rs",
                "if moved {\n            self.unkicked.store(true, Release);",
                "if false && moved {\n            self.unkicked.store(true, Release);",
            ),
            (
                "tcmu_kick_before_the_flag",
                "ring/mod.rs",
                "if self.0.unkicked.swap(false, AcqRel) {\n            self.0.kicks.fetch_add(1, Relaxed);\n            self.0.doorbell.kick()?;",
                "if self.0.unkicked.load(Acquire) {\n            self.0.kicks.fetch_add(1, Relaxed);\n            self.0.doorbell.kick()?;\n            self.0.unkicked.store(false, Release);",
            ),
            ("tcmu_slot_too_small", "ring/slots.rs", "slot.len >= need", "slot.len >= need || slot.len > 0"),
            ("tcmu_command_not_moved", "ring/slots.rs", "spare.owner = Some(owner);", "spare.owner = spare.owner;"),
            (
                "tcmu_last_look_forgotten",
                "ring/mod.rs",
                "        while fetched.is_none() && state.cursor != head {",
                "        while fetched.is_none() && state.cursor != head && geometry.distance(state.cursor, head) > 80 {",
            ),
        ],
    },
];

/// Files that stay as they are: atomics on memory that is shared with the kernel are no locks.
const REAL: [&str; 1] = ["ring/region.rs"];

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap()).parent().unwrap().to_path_buf();
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap());
    let mut modules = String::new();
    println!("cargo::rerun-if-changed=build.rs");
    for part in PARTS {
        let plain = [(part.name, "", "", "")];
        for (name, file, from, to) in plain.iter().chain(part.mutants) {
            let edit = |path: &str, text: String| {
                let text = under_the_scheduler(path, &text).replace("crate::tcmu", &format!("crate::{name}"));
                if from.is_empty() || path != *file {
                    return text;
                }
                let found = text.matches(from).count();
                assert_eq!(found, 1, "{name}: what the mutant changes is {found} times in {path}; see models/build.rs");
                text.replace(from, to)
            };
            println!("cargo::rerun-if-changed={}", root.join(part.root).display());
            let text = edit("", fs::read_to_string(root.join(part.root)).unwrap());
            let target = out.join(name);
            fs::create_dir_all(&target).unwrap();
            fs::write(target.join("mod.rs"), text).unwrap();
            if let Some(tree) = part.tree {
                copy(&root.join(tree), &target, "", &edit);
            }
            let doc = if from.is_empty() { "The shipped code." } else { "A mutant." };
            writeln!(modules, "#[doc = {doc:?}]\n#[path = {:?}]\npub mod {name};", target.join("mod.rs")).unwrap();
        }
    }
    fs::write(out.join("modules.rs"), modules).unwrap();
}

/// The text with the scheduler's locks and atomics.
fn under_the_scheduler(path: &str, text: &str) -> String {
    if REAL.contains(&path) {
        text.into()
    } else {
        text.replace("parking_lot::", "crate::sync::").replace("std::sync::atomic", "crate::sync::atomic")
    }
}

/// Copies what the root names of a tree.
fn copy(from: &Path, to: &Path, below: &str, edit: &impl Fn(&str, String) -> String) {
    for entry in ["abi.rs", "error.rs", "ring", "fake"] {
        let source = from.join(entry);
        println!("cargo::rerun-if-changed={}", source.display());
        if source.is_dir() {
            fs::create_dir_all(to.join(entry)).unwrap();
            for file in fs::read_dir(&source).unwrap() {
                let name = file.unwrap().file_name().into_string().unwrap();
                let path = format!("{below}{entry}/{name}");
                let text = edit(&path, fs::read_to_string(source.join(&name)).unwrap());
                fs::write(to.join(entry).join(&name), text).unwrap();
            }
        } else {
            fs::write(to.join(entry), edit(entry, fs::read_to_string(&source).unwrap())).unwrap();
        }
    }
}
