//! Devices made of devices.

pub mod partition;
pub mod window;
pub mod zeroes;
