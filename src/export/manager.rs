//! The service manager (systemd), for servers in the foreground: readiness (sd_notify(3)). Nothing at all without one.

use sd_notify::NotifyState;

/// The disk can be used.
pub fn ready(status: &str) {
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(status)]) {
        tracing::warn!("cannot notify the service manager: {error}");
    }
}
