//! The SCSI layer by byte scripts: a CDB and a buffer in, status, sense and bytes out, over a disk in memory. No kernel.

mod conformance;
mod copy;
mod harness;
mod hostile;
mod inquiry;
mod iscsi_target;
mod mode;
mod ports;
mod provisioning;
mod table;
mod transfer;
mod whole;
