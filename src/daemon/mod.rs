//! The daemon: `img-tcmu serve`.

pub mod check;
pub mod dbus;
pub mod lock;
pub mod log;
pub mod notify;
pub mod serial;
