//! Serves VM disk images as SCSI disks through the Linux SCSI target's TCMU ring.

pub mod cli;
pub mod config;
pub mod daemon;
pub mod export;
pub mod image;
pub mod scsi;
pub mod serve;
pub mod tcmu;
