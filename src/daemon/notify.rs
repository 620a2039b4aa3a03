//! What we tell the service manager (sd_notify(3)); nothing at all without one.

use sd_notify::NotifyState;
use std::time::Duration;

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!("cannot notify the service manager: {error}");
    }
}

/// Start-up is finished.
pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// We are on our way out, and it may take `patience`.
pub fn stopping(patience: Duration) {
    let usec = u32::try_from(patience.as_micros()).unwrap_or(u32::MAX);
    send(&[NotifyState::Stopping, NotifyState::Status("draining"), NotifyState::ExtendTimeoutUsec(usec)]);
}

/// We are alive.
pub fn alive() {
    send(&[NotifyState::Watchdog]);
}

/// How often [`alive`] is due, half of what the manager allows; `None` when it does not watch.
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|limit| limit / 2)
}
