//! How the models are run: schedules at random, and such that change the running thread at few, random points (which find what needs a certain order of few
//! steps); a few seconds of them, or, in the long mode (`FORMATS_TEST_LONG=1`), a hundred times as many.

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Changes of thread that the second kind of schedule makes.
const CHANGES: usize = 3;

fn config() -> Config {
    let mut config = Config::new();
    config.max_steps = MaxSteps::FailAfter(100_000);
    config
}

fn long() -> bool {
    std::env::var_os("FORMATS_TEST_LONG").is_some_and(|v| v != "0")
}

/// Runs a model under `schedules` schedules of each kind; the one that fails is printed, to be run again.
pub fn holds(schedules: usize, model: fn()) {
    let schedules = if long() { schedules * 100 } else { schedules };
    Runner::new(RandomScheduler::new(schedules), config()).run(model);
    Runner::new(PctScheduler::new(CHANGES, schedules), config()).run(model);
}

/// The model finds what is wrong with a mutant.
pub fn finds(schedules: usize, model: fn()) {
    let quiet = || {
        let mut config = config();
        config.failure_persistence = FailurePersistence::None;
        config
    };
    let run = |run: &dyn Fn()| catch_unwind(AssertUnwindSafe(run)).is_err();
    let found = run(&|| {
        Runner::new(RandomScheduler::new(schedules), quiet()).run(model);
    }) || run(&|| {
        Runner::new(PctScheduler::new(CHANGES, schedules), quiet()).run(model);
    });
    assert!(found, "the mutant passes the model: the model could not fail");
}
