//! Power cuts, deaths of the process and failing disks, at every point of random runs, for every kind of image in the table.
//!
//! In the long mode (`FORMATS_TEST_LONG=1`) there are at least 20,000 power cuts a kind, otherwise 500.

mod table;

use formats::redo::{self, replay};
use formats::store::Store;
use formats::{BlockDevice, Image};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::path::Path;
use std::sync::Arc;
use table::cut::{self, Cutter, Run};
use table::operations::Operation;
use table::pages::{PageStore, Pages};
use table::{Kind, for_each_writable_kind, kind_tests, long, open, qemu, scratch, seed};

/// Requests in a run.
const OPERATIONS: usize = 150;
/// Cuts in a run.
const CUTS: usize = 170;

/// Runs that once failed, beside those of the seeds that every kind has: the kind and the seed.
const REGRESSIONS: [(&str, u64); 1] = [
    // A cut left the file's end in the middle of the last block.
    ("vhdx_differencing", 4),
];

fn runs() -> u64 {
    if long() { 120 } else { 3 }
}

/// What is asked of an image after a cut.
struct Verdict<'a> {
    kind: &'a Kind,
    path: &'a Path,
}

impl Verdict<'_> {
    fn open(&self, file: Pages) -> Result<Arc<Image>, String> {
        open::over(self.kind, self.path, Arc::new(PageStore::new(file)), true, Box::new(redo::None))
            .map_err(|e| format!("the image cannot be opened: {}", e.chain()))
    }

    fn check(&self, image: &Image) -> Result<(), String> {
        if self.kind.check {
            let report = image.check(false).map_err(|e| format!("check failed: {}", e.chain()))?;
            if report.corruptions > 0 {
                return Err(format!("check found {} corruptions: {:?}", report.corruptions, report.notes));
            }
        }
        Ok(())
    }

    /// QEMU's opinion of these bytes of a file.
    fn qemu(&self, bytes: &Pages) -> Result<(), String> {
        if !self.kind.qemu_check {
            return Ok(());
        }
        let file = tempfile::NamedTempFile::new_in(self.path.parent().unwrap()).unwrap();
        std::fs::write(file.path(), bytes.to_vec()).unwrap();
        qemu::check(self.kind, file.path())
    }

    /// A power cut at `position`.
    fn power_cut(&self, run: &Run, cutter: &mut Cutter<'_>, position: usize, seed: u64, thorough: bool) -> Result<(), String> {
        let bytes = cutter.after_power_cut(position, seed);
        let image = self.open(bytes.clone())?;
        let now = cut::content(self.kind, &image)?;
        run.history.allowed_after_cut(&now, position)?;
        self.check(&image)?;
        if thorough {
            self.qemu(&bytes)?;
            drop(image);
            // Life goes on: new writes must not meet what the cut left behind.
            let mut rng = StdRng::seed_from_u64(seed);
            let mix = cut::mix(self.kind, 4096);
            let more = cut::operations(&mut rng, &mix, 30);
            let next = cut::record(self.kind, self.path, bytes, now, &more).map_err(|e| format!("after the cut: {e}"))?;
            let end = next.entries.len();
            let mut cutter = Cutter::new(&next);
            let mut positions = [end, rng.random_range(0..=end), rng.random_range(0..=end)];
            positions.sort_unstable();
            for position in positions {
                let bytes = cutter.after_power_cut(position, rng.random());
                let image = self.open(bytes).map_err(|e| format!("after the second cut: {e}"))?;
                next.history
                    .allowed_after_cut(&cut::content(self.kind, &image)?, position)
                    .and_then(|()| self.check(&image))
                    .map_err(|e| format!("after the second cut: {e}"))?;
            }
        }
        Ok(())
    }

    /// The death of the process at `position`.
    fn death(&self, run: &Run, cutter: &mut Cutter<'_>, position: usize, seed: u64) -> Result<(), String> {
        let (bytes, records) = cutter.after_death(position, seed);
        let store: Arc<dyn Store> = Arc::new(PageStore::new(bytes));
        replay(&records, std::slice::from_ref(&store)).map_err(|e| format!("replay: {}", e.chain()))?;
        let image = open::over(self.kind, self.path, store, true, Box::new(redo::None))
            .map_err(|e| format!("the image cannot be opened: {}", e.chain()))?;
        run.history.allowed_after_death(&cut::content(self.kind, &image)?, position)?;
        self.check(&image)
    }
}

/// Makes an image and runs `test` on recorded runs of it, each with its seed; shrinks what fails.
fn over_runs(kind: &Kind, runs: u64, test: impl Fn(&Verdict<'_>, &Run, u64) -> Result<(), String>) {
    let dir = scratch();
    let made = kind.make(dir.path());
    let base = Pages::from(open::bytes(&made).as_slice());
    let unit = open::file(kind, &made.file, true).limits().granularity;
    let verdict = Verdict { kind, path: &made.file };
    let once_failed = REGRESSIONS.iter().filter(|(name, _)| *name == kind.name).map(|(_, seed)| *seed);
    for run_seed in (seed()..seed() + runs).chain(once_failed) {
        let mut rng = StdRng::seed_from_u64(run_seed);
        let mut mix = cut::mix(kind, unit);
        mix.flush_one_in = [4, 12, 40][rng.random_range(0..3)];
        let operations = cut::operations(&mut rng, &mix, OPERATIONS);
        let attempt = |operations: &[Operation]| {
            cut::record(kind, &made.file, base.clone(), made.content.clone(), operations).and_then(|run| test(&verdict, &run, run_seed))
        };
        if let Err(first) = attempt(&operations) {
            let (fewer, why) = cut::shrink(operations, |o| attempt(o).err());
            panic!("{}, seed {run_seed}: {first}\nshrunk to {} operations: {fewer:?}\n{why}", kind.name, fewer.len());
        }
    }
}

fn power_cuts(kind: &Kind) {
    over_runs(kind, runs(), |verdict, run, seed| {
        let (mut rng, mut cutter) = (StdRng::seed_from_u64(seed), Cutter::new(run));
        for (index, position) in cut::positions(run, CUTS, &mut rng).into_iter().enumerate() {
            let cut_seed = rng.random();
            verdict
                .power_cut(run, &mut cutter, position, cut_seed, index % 50 == 0)
                .map_err(|e| format!("power cut at {position} of {}, {cut_seed}: {e}", run.entries.len()))?;
        }
        Ok(())
    });
}

fn deaths(kind: &Kind) {
    over_runs(kind, runs(), |verdict, run, seed| {
        let (mut rng, mut cutter) = (StdRng::seed_from_u64(seed), Cutter::new(run));
        for position in cut::positions(run, CUTS, &mut rng) {
            let cut_seed = rng.random();
            verdict
                .death(run, &mut cutter, position, cut_seed)
                .map_err(|e| format!("death at {position} of {}, {cut_seed}: {e}", run.entries.len()))?;
        }
        Ok(())
    });
}

/// Several threads at once; then cuts and deaths as above.
fn cuts_in_a_crowd(kind: &Kind) {
    let dir = scratch();
    let made = kind.make(dir.path());
    let base = Pages::from(open::bytes(&made).as_slice());
    let verdict = Verdict { kind, path: &made.file };
    for run_seed in seed()..seed() + runs() {
        let run = cut::record_crowd(kind, &made.file, base.clone(), made.content.clone(), 3, run_seed, OPERATIONS / 3)
            .unwrap_or_else(|e| panic!("{}, seed {run_seed}: {e}", kind.name));
        let (mut rng, mut cutter) = (StdRng::seed_from_u64(run_seed), Cutter::new(&run));
        for position in cut::positions(&run, CUTS, &mut rng) {
            let cut_seed = rng.random();
            let result = verdict
                .power_cut(&run, &mut cutter, position, cut_seed, false)
                .and_then(|()| verdict.death(&run, &mut cutter, position, cut_seed));
            result.unwrap_or_else(|e| panic!("{}, seed {run_seed}, cut at {position}, {cut_seed}: {e}", kind.name));
        }
    }
}

macro_rules! tests {
    ($($kind:ident)*) => {
        kind_tests!(power_cuts: $($kind)*);
        kind_tests!(deaths: $($kind)*);
        kind_tests!(cuts_in_a_crowd: $($kind)*);
    };
}
for_each_writable_kind!(tests);

/// Power cuts and deaths of images whose data are in a second file: either file may be ahead of the other.
fn cuts_of_two_files(kind: &Kind) {
    let dir = scratch();
    let made = kind.make(dir.path());
    let second = made.file.with_file_name("data");
    let bases = [&made.file, &second].map(|file| Pages::from(std::fs::read(file).unwrap().as_slice()));
    let unit = open::file(kind, &made.file, true).limits().granularity;
    let verdict = Verdict { kind, path: &made.file };
    for run_seed in seed()..seed() + runs() {
        let mut rng = StdRng::seed_from_u64(run_seed);
        let mut mix = cut::mix(kind, unit);
        mix.flush_one_in = [4, 12, 40][rng.random_range(0..3)];
        let operations = cut::operations(&mut rng, &mix, OPERATIONS);
        let run = cut::record_two(kind, &made.file, bases.clone(), made.content.clone(), &operations)
            .unwrap_or_else(|e| panic!("{}, seed {run_seed}: {e}", kind.name));
        let mut cutters = [Cutter::new(&run), Cutter::of_second(&run, bases[1].clone())];
        for (index, position) in cut::positions(&run, CUTS, &mut rng).into_iter().enumerate() {
            let fail = |e: String| -> ! { panic!("{}, seed {run_seed}, cut at {position} of {}: {e}", kind.name, run.entries.len()) };
            let open = |files: [Pages; 2], records: &[redo::Record]| {
                let stores = files.map(|file| Arc::new(PageStore::new(file)) as Arc<dyn Store>);
                replay(records, &stores).unwrap_or_else(|e| fail(e.chain()));
                let [first, second] = stores;
                open::over_files(kind, &made.file, first, Some(second), true, Box::new(redo::None)).unwrap_or_else(|e| fail(e.chain()))
            };
            let files = cutters.each_mut().map(|cutter| cutter.after_power_cut(position, rng.random()));
            if index % 50 == 0 {
                std::fs::write(&second, files[1].to_vec()).unwrap();
                verdict.qemu(&files[0]).unwrap_or_else(|e| fail(e));
            }
            let raw = files[1].clone();
            let image = open(files, &[]);
            let now = cut::content(kind, &image).unwrap_or_else(|e| fail(e));
            run.history.allowed_after_cut(&now, position).and_then(|()| verdict.check(&image)).unwrap_or_else(|e| fail(e));
            if kind.name == "qcow2_data_file_raw" {
                // The data file alone is a raw image: what it holds is the guest's as well, without the other.
                let mut raw = raw.to_vec();
                raw.resize(now.len(), 0);
                assert!(raw == now, "{}, seed {run_seed}, cut at {position}: the data file differs from the disk", kind.name);
            }
            let [(first, records), (second, _)] = cutters.each_mut().map(|cutter| cutter.after_death(position, rng.random()));
            let image = open([first, second], &records);
            let now = cut::content(kind, &image).unwrap_or_else(|e| fail(e));
            run.history.allowed_after_death(&now, position).and_then(|()| verdict.check(&image)).unwrap_or_else(|e| fail(e));
        }
    }
}

macro_rules! two_file_tests {
    ($($kind:ident)*) => {
        kind_tests!(cuts_of_two_files: $($kind)*);
    };
}
two_file_tests!(qcow2_data_file qcow2_data_file_raw qcow2_data_file_subclusters qcow2_data_file_on_raw);
