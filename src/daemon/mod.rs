//! The daemon, `img-tcmu serve`: start-up and end, and what connects kernel, D-Bus, signals and devices.
//!
//! # Start-up order
//! 1. The lock: one daemon a machine.
//! 2. Netlink events of the kernel are stopped, operations that wait for the answer of a dead predecessor are ended (they fail with
//!    EINTR), our socket is opened, existing devices are found, events go on. While events are stopped, removals happen without
//!    a word, so nothing slow is done in between: images are opened in the background, and a second look finds what went.
//! 3. The name on D-Bus, before any image is open: whoever activated us waits for it.
//! 4. READY.
//!
//! # End
//! Netlink events are stopped and pending operations ended (a creation without a daemon then fails at once, where it would wait
//! for ever otherwise), devices are blocked, drained, flushed and closed. The successor unblocks both.

pub mod check;
pub mod control;
pub mod dbus;
mod device;
pub mod devices;
mod errno;
pub mod lock;
pub mod log;
mod notify;
mod rings;
mod serial;
mod space;
mod surroundings;
mod upgrade;

use crate::config::Configuration;
use crate::serve::Pool;
use crate::tcmu::configfs::Configfs;
use crate::tcmu::netlink::{DeviceEvent, EVENT_BUFFER, Event, Netlink};
use control::{Errand, Order, Reporter};
use dbus::{Role, SharedEnvironment};
use devices::{Devices, Means, Question};
use formats::open::RedoLogs;
use formats::redo::file::RedoDirectory;
use lock::InstanceLock;
use parking_lot::RwLock;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::cell::Cell;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// Lock, control socket and logs of redo live here.
pub const RUN_DIRECTORY: &str = "/run/img-tcmu";

/// How long devices may take to drain when we are told to end.
const DRAIN: Duration = Duration::from_secs(45);

/// Between attempts to serve what could not be served.
const RETRY: Duration = Duration::from_secs(5);

/// How long READY waits for the bus.
const BUS: Duration = Duration::from_secs(3);

/// What the daemon is told on its command line.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The configuration file, if not the default one.
    pub config: Option<PathBuf>,
    /// See [`RUN_DIRECTORY`].
    pub run_directory: PathBuf,
    /// Threads that do I/O, over the configuration file's word.
    pub workers: Option<usize>,
    /// Further directories in which files that images name may lie.
    pub allow: Vec<PathBuf>,
    /// Bytes of kernel events that may wait, if not [`EVENT_BUFFER`].
    pub event_buffer: Option<usize>,
    /// The bus.
    pub bus: dbus::Options,
}

/// Why the daemon could not start or ended badly.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What the main thread waits for.
#[derive(Debug)]
enum Message {
    Signal(i32),
    Role(Role),
    /// Somebody at the control socket wants something done.
    Errand(Errand),
    /// The netlink thread is at its end, which is never good.
    Deaf(String),
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// What is missing, and how to get it; or that some devices did not end in time.
pub fn run(options: &Options, configuration: &Configuration) -> Result<(), Failure> {
    DirBuilder::new().recursive(true).mode(0o755).create(&options.run_directory)?;
    let _lock = InstanceLock::take(&options.run_directory)?;
    let (messages, inbox) = mpsc::channel();
    // Before any thread that could take a signal by itself.
    watch_signals(messages.clone())?;
    if let Some(bytes) = configuration.cache_size {
        formats::Cache::shared().set_budget(usize::try_from(bytes).unwrap_or(usize::MAX));
    }
    let redo: Arc<dyn RedoLogs> = Arc::new(RedoDirectory::new(options.run_directory.join("redo"))?);
    let environment: SharedEnvironment = Arc::new(RwLock::new(Arc::new(environment(options, configuration, &redo))));
    let configfs = Configfs::default();
    prepare_kernel(&configfs)?;
    let pool = Pool::new(options.workers.or(configuration.workers))?;
    let devices = Devices::new(Means {
        configfs: configfs.clone(),
        rings: Box::new(rings::Kernel::default()),
        pool,
        environment: Arc::clone(&environment),
    });
    listen(&configfs, &devices, options.event_buffer.unwrap_or(EVENT_BUFFER), messages.clone())?;
    space::watch(devices.clone())?;
    let reporter = Reporter::new(devices.clone());
    be_asked(options, configuration, &reporter, messages.clone())?;
    join_bus(options, &environment, messages)?;
    let daemon = Daemon { options, environment, redo, devices: &devices, inbox: &inbox, guest: Cell::new(false) };
    daemon.ready();
    upgrade::measure(devices.clone(), reporter);
    let successor = daemon.main_loop();
    let begun = SystemTime::now();
    let ended = daemon.end(&configfs);
    match successor {
        // Even if some devices did not end in time: initiators wait for somebody to serve them.
        Some(binary) => Err(upgrade::become_program(&binary, begun).into()),
        None => ended,
    }
}

/// Control socket, and metrics where they are wanted. Disks are served without them.
fn be_asked(options: &Options, configuration: &Configuration, reporter: &Reporter, messages: Sender<Message>) -> Result<(), Failure> {
    control::listen(&options.run_directory, reporter.clone(), move |errand| messages.send(Message::Errand(errand)).is_ok())?;
    if let Some(endpoint) = &configuration.metrics
        && let Err(error) = control::metrics::listen(endpoint, reporter.clone())
    {
        tracing::error!("there are no metrics: {endpoint}: {error}");
    }
    Ok(())
}

fn environment(options: &Options, configuration: &Configuration, redo: &Arc<dyn RedoLogs>) -> crate::image::Environment {
    let mut environment = configuration.environment();
    environment.redo = Some(Arc::clone(redo));
    environment.allowed.extend(options.allow.iter().cloned());
    environment
}

/// Modules and configfs, as far as we can help.
fn prepare_kernel(configfs: &Configfs) -> Result<(), Failure> {
    if configfs.check().is_err() {
        crate::cli::load_module("target_core_user");
    }
    Ok(configfs.check()?)
}

fn watch_signals(messages: Sender<Message>) -> Result<(), Failure> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            if messages.send(Message::Signal(signal)).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

/// Opens the kernel's ear for us: step 2 of the start-up.
fn listen(configfs: &Configfs, devices: &Devices, event_buffer: usize, messages: Sender<Message>) -> Result<(), Failure> {
    configfs.block_netlink(true)?;
    let netlink = configfs.reset_netlink().and_then(|()| Netlink::open(cfgstring::SUBTYPE, event_buffer)).and_then(|netlink| {
        netlink.announce()?;
        Ok(Arc::new(netlink))
    });
    devices.rescan();
    // Whatever happened: nobody else may be left waiting.
    configfs.block_netlink(false)?;
    let netlink = netlink?;
    // What went or came while events were stopped.
    devices.rescan();
    let devices = devices.clone();
    thread::Builder::new().name("netlink".into()).spawn(move || {
        let reason = hear(&netlink, &devices);
        // The main thread is at its end too if it does not listen.
        let _ = messages.send(Message::Deaf(reason));
    })?;
    Ok(())
}

/// Hands events on for as long as there are any; returns why there are no more.
fn hear(netlink: &Arc<Netlink>, devices: &Devices) -> String {
    let mut failures = 0;
    loop {
        match netlink.next(None) {
            Ok(Some(Event::Device(event))) => {
                failures = 0;
                tracing::debug!("event: {event:?}");
                let (name, minor, action) = (event.name.clone(), event.minor, event.action.clone());
                devices.event(&name, minor, action, Box::new(KernelQuestion { netlink: Arc::clone(netlink), event }));
            }
            Ok(Some(Event::Overrun)) => {
                tracing::warn!("the kernel's events came faster than they could be read; looks for devices");
                devices.rescan();
            }
            Ok(None) => {}
            Err(error) => {
                failures += 1;
                tracing::error!("{error}");
                if failures == 10 {
                    return error.to_string();
                }
                thread::sleep(Duration::from_millis(200));
            }
        }
    }
}

struct KernelQuestion {
    netlink: Arc<Netlink>,
    event: DeviceEvent,
}

impl Question for KernelQuestion {
    fn answer(self: Box<Self>, errno: i32) {
        if let Err(error) = self.netlink.answer(&self.event, errno) {
            tracing::error!("cannot answer the kernel about {}: {error}", self.event.name.short());
        }
    }
}

/// Takes our place on D-Bus, and waits a moment for it.
fn join_bus(options: &Options, environment: &SharedEnvironment, messages: Sender<Message>) -> Result<(), Failure> {
    let roles = dbus::start(options.bus.clone(), Arc::clone(environment))?;
    match roles.recv_timeout(BUS) {
        Ok(role) => messages.send(Message::Role(role))?,
        Err(_) => tracing::warn!("the bus does not answer yet; disks are served all the same"),
    }
    thread::Builder::new().name("dbus-roles".into()).spawn(move || {
        for role in roles {
            if messages.send(Message::Role(role)).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

struct Daemon<'a> {
    options: &'a Options,
    environment: SharedEnvironment,
    redo: Arc<dyn RedoLogs>,
    devices: &'a Devices,
    inbox: &'a Receiver<Message>,
    /// Another daemon shares the kernel's events with us.
    guest: Cell<bool>,
}

impl Daemon<'_> {
    fn ready(&self) {
        let status = format!("serving {} devices", self.devices.list().len());
        notify::ready(&status);
        tracing::info!("ready, {status}");
    }

    /// Until a signal says to end, or somebody that another program is to take over.
    fn main_loop(&self) -> Option<PathBuf> {
        let watchdog = notify::watchdog_interval();
        let tick = watchdog.unwrap_or(RETRY).min(RETRY);
        let mut last_retry = Instant::now();
        loop {
            match self.inbox.recv_timeout(tick) {
                Ok(Message::Signal(SIGHUP)) => {
                    // The log has the outcome.
                    let _ = self.reload();
                }
                Ok(Message::Signal(signal)) => {
                    tracing::info!("ends on signal {signal}");
                    return None;
                }
                Ok(Message::Role(role)) => self.guest.set(matches!(role, Role::Registered | Role::Refused)),
                Ok(Message::Errand(Errand { order: Order::Reload, outcome })) => {
                    // Whoever asked may have gone.
                    let _ = outcome.try_send(self.reload());
                }
                Ok(Message::Errand(Errand { order: Order::Upgrade(binary), outcome })) => {
                    let verdict = upgrade::check(&binary);
                    let good = verdict.is_ok();
                    let _ = outcome.try_send(verdict);
                    if good {
                        tracing::info!("{} takes over", binary.display());
                        return Some(binary);
                    }
                }
                Ok(Message::Deaf(reason)) => {
                    tracing::error!("cannot hear the kernel any more ({reason}): ends, to be started anew");
                    return None;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
            if watchdog.is_some() {
                notify::alive();
            }
            if last_retry.elapsed() >= RETRY {
                last_retry = Instant::now();
                self.devices.retry();
            }
        }
    }

    /// Reads the configuration file again. One with errors changes nothing.
    fn reload(&self) -> Result<String, String> {
        match Configuration::load(self.options.config.as_deref()) {
            Ok(configuration) => {
                *self.environment.write() = Arc::new(environment(self.options, &configuration, &self.redo));
                if let Some(bytes) = configuration.cache_size {
                    formats::Cache::shared().set_budget(usize::try_from(bytes).unwrap_or(usize::MAX));
                }
                let done = format!("configuration read again: {} exports", configuration.exports.len());
                tracing::info!("{done}");
                self.devices.retry();
                Ok(done)
            }
            Err(error) => {
                let failed = format!("the configuration stays as it was: {error}");
                tracing::error!("{failed}");
                Err(failed)
            }
        }
    }

    fn end(&self, configfs: &Configfs) -> Result<(), Failure> {
        notify::stopping(DRAIN);
        // Not when another daemon needs the events.
        if !self.guest.get()
            && let Err(error) = configfs.block_netlink(true).and_then(|()| configfs.reset_netlink())
        {
            tracing::warn!("cannot stop the kernel's events: {error}");
        }
        if self.devices.stop(DRAIN) {
            tracing::info!("all devices are flushed and closed");
            Ok(())
        } else {
            Err("some devices did not come to an end in time".into())
        }
    }
}
