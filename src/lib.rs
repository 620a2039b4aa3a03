//! Serves VM disk images as SCSI disks through the Linux SCSI target's TCMU ring.
