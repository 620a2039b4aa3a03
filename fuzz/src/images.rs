//! Image files: any bytes as an image, and valid images with a few fields changed.

use super::disk;
use super::input::Input;
use super::sparse::Sparse;
use super::{qcow2 as qcow2_image, vhd as vhd_image, vhdx as vhdx_image, vmdk as vmdk_image};
use std::sync::Arc;

/// How many bytes of an input say what is done with the image; the rest is the image.
const SCRIPT: usize = 64;

fn any_bytes(format: &'static str, data: &[u8]) {
    let mut input = Input::new(data);
    let mut script = Input::new(input.take(SCRIPT));
    disk::exercise(&Arc::new(Sparse::new(input.rest())), format, false, &mut script);
}

pub fn qcow2(data: &[u8]) {
    any_bytes("qcow2", data);
}

/// VHDX files are mostly holes of many MiB: the input is what lies between them, each run with its place in sectors (three bytes), and its length (two).
pub fn vhdx(data: &[u8]) {
    let mut input = Input::new(data);
    let mut script = Input::new(input.take(SCRIPT));
    let store = Sparse::default();
    while !input.is_empty() {
        let (low, high) = (u64::from(input.u16()), u64::from(input.u8()));
        let len = usize::from(input.u16());
        store.put((high << 16 | low) * 512, input.take(len));
    }
    disk::exercise(&Arc::new(store), "vhdx", false, &mut script);
}

pub fn vhd(data: &[u8]) {
    any_bytes("vpc", data);
}

pub fn vmdk(data: &[u8]) {
    any_bytes("vmdk", data);
}

pub fn ova(data: &[u8]) {
    any_bytes("ova", data);
}

/// A valid image, damaged; then used.
fn structured(format: &'static str, damaged: fn(&mut Input<'_>) -> (Arc<Sparse>, bool), data: &[u8]) {
    let mut input = Input::new(data);
    let (store, valid) = damaged(&mut input);
    disk::exercise(&store, format, valid, &mut input);
}

pub fn qcow2_structured(data: &[u8]) {
    structured("qcow2", qcow2_image::damaged, data);
}

pub fn vhdx_structured(data: &[u8]) {
    structured("vhdx", vhdx_image::damaged, data);
}

pub fn vhd_structured(data: &[u8]) {
    structured("vpc", vhd_image::damaged, data);
}

pub fn vmdk_structured(data: &[u8]) {
    structured("vmdk", vmdk_image::damaged, data);
}
