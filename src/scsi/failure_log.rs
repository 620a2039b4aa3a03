//! Puts the failures of an image into the log, where the initiator gets only sense data: the whole chain of causes, but at
//! most once a second, since an initiator tries again and again.

use parking_lot::Mutex;
use std::time::{Duration, Instant};

/// The failures of one logical unit.
#[derive(Default)]
pub struct FailureLog(Mutex<State>);

#[derive(Default)]
struct State {
    last: Option<Instant>,
    /// Failures since, that were not logged.
    suppressed: u64,
}

/// Time between two lines.
const PAUSE: Duration = Duration::from_secs(1);

impl FailureLog {
    /// `doing` failed.
    pub fn log(&self, doing: &str, error: &formats::Error) {
        let suppressed = {
            let mut state = self.0.lock();
            if state.last.is_some_and(|last| last.elapsed() < PAUSE) {
                state.suppressed += 1;
                return;
            }
            state.last = Some(Instant::now());
            std::mem::take(&mut state.suppressed)
        };
        let chain = error.chain();
        if suppressed > 0 {
            tracing::error!("{doing} failed: {chain} (and {suppressed} failures before it)");
        } else {
            tracing::error!("{doing} failed: {chain}");
        }
    }
}
