//! The object that targetcli talks to: `ConfigDesc` and `CheckConfig`.

use crate::daemon::check;
use crate::image::Environment;
use parking_lot::RwLock;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use zbus::fdo::DBusProxy;
use zbus::message::Header;
use zbus::names::BusName;

/// targetcli gives up after 25 s: we answer before, however stuck a file system is.
const PATIENCE: Duration = Duration::from_secs(15);

/// Checks that may run, or hang, at once.
const MAX_CHECKS: NonZeroUsize = NonZeroUsize::new(8).expect("8 is not 0");

/// `org.kernel.TCMUService1` on the object of one subtype. Clones share their count of running checks.
#[derive(Clone, Default)]
pub struct Handler {
    running: Arc<AtomicUsize>,
    environment: Shared,
}

/// What images are opened with; changes when the configuration is read again.
pub type Shared = Arc<RwLock<Arc<Environment>>>;

#[zbus::interface(name = "org.kernel.TCMUService1")]
impl Handler {
    /// What targetcli's help shows as the format of the configuration string.
    #[zbus(property(emits_changed_signal = "const"))]
    fn config_desc(&self) -> &'static str {
        cfgstring::DESCRIPTION
    }

    /// Whether `configstr` ("img/…") would do, and the reason if not. Root learns whether the image opens; everybody else only
    /// whether the string is well-formed, so that nobody finds out about files through us. Never a D-Bus error: targetcli would
    /// show a stack trace.
    #[zbus(out_args("ok", "message"))]
    async fn check_config(
        &self,
        configstr: String,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &zbus::Connection,
    ) -> (bool, String) {
        let trusted = caller_is_root(&header, connection).await;
        let handler = self.clone();
        blocking::unblock(move || handler.answer(configstr, trusted)).await
    }
}

impl Handler {
    /// A handler that opens images with `environment`.
    pub fn new(environment: Shared) -> Self {
        Self { running: Arc::default(), environment }
    }

    fn answer(&self, configstr: String, trusted: bool) -> (bool, String) {
        let verdict = match check::dev_config_syntax(configstr.as_bytes()) {
            Ok(config) if trusted => self.open(config),
            Ok(_) => Ok(()),
            Err(reason) => Err(reason),
        };
        match verdict {
            Ok(()) => (true, "success".to_owned()),
            Err(reason) => {
                tracing::info!(target: "img_tcmu::dbus", "CheckConfig refused '{}': {reason}", configstr.escape_debug());
                (false, reason)
            }
        }
    }

    /// Opens the image on a thread of its own, which may hang without harm to anybody else.
    fn open(&self, config: cfgstring::Config) -> Result<(), String> {
        if self.running.fetch_add(1, Ordering::Relaxed) >= MAX_CHECKS.get() {
            self.running.fetch_sub(1, Ordering::Relaxed);
            return Err(format!("{MAX_CHECKS} other checks are waiting for their files; try again later"));
        }
        let (sender, receiver) = mpsc::channel();
        let running = Running(Arc::clone(&self.running));
        let environment = Arc::clone(&self.environment.read());
        let spawned = thread::Builder::new().name("check-config".into()).spawn(move || {
            let running = running;
            let verdict = check::open(&environment, &config).map_err(|error| error.chain());
            drop(running);
            // When nobody waits any more the verdict is of no use.
            let _ = sender.send(verdict);
        });
        if let Err(error) = spawned {
            return Err(format!("cannot start a thread: {error}"));
        }
        match receiver.recv_timeout(PATIENCE) {
            Ok(verdict) => verdict,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                Err(format!("the image did not open within {} s: is its file system reachable?", PATIENCE.as_secs()))
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => Err("the check failed unexpectedly: see the daemon's log".to_owned()),
        }
    }
}

/// One of [`Handler::running`].
struct Running(Arc<AtomicUsize>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// As the bus says; anything unclear is not root.
async fn caller_is_root(header: &Header<'_>, connection: &zbus::Connection) -> bool {
    let Some(sender) = header.sender() else { return false };
    let Ok(bus) = DBusProxy::new(connection).await else { return false };
    bus.get_connection_unix_user(BusName::Unique(sender.to_owned())).await == Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unprivileged_callers_learn_nothing_about_files() {
        let handler = Handler::default();
        let (ok, _) = handler.answer("img/@file=/no/such/file".into(), false);
        assert!(ok);
        let (ok, reason) = handler.answer("img/@file=/no/such/file".into(), true);
        assert!(!ok);
        assert!(reason.contains("/no/such/file"), "{reason}");
        let (ok, reason) = handler.answer("img/@file=/a,b".into(), false);
        assert!(!ok);
        assert!(reason.contains("%2C"), "{reason}");
        assert_eq!(handler.running.load(Ordering::Relaxed), 0);
    }
}
