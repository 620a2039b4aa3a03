//! The SCSI layer by byte scripts: a CDB and a buffer in, status, sense and bytes out, over a disk in memory. No kernel.

mod harness;
mod hostile;
mod inquiry;
mod mode;
mod provisioning;
mod table;
mod transfer;
