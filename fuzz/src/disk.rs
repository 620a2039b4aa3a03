//! What is done with an image once it is open, and what must be true then.
//!
//! Of a damaged image nothing is asked but that nothing breaks: no panic, no hang, no memory out of proportion. An image that its own check finds in order, however
//! odd, keeps every promise: what is written is read back, what is not stays; zeros are zeros, maps are true; after a close and a new open all is still there, and
//! the check still finds nothing.

use super::input::Input;
use super::sparse::Sparse;
use formats::drivers::{self, Opened, Request};
use formats::image::Parts;
use formats::store::Store;
use formats::{BlockDevice, Cache, CheckReport, Error, Image, Result, ZeroMode, redo};
use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// Devices up to this size are compared with plain bytes.
const MAX_MODEL: u64 = 4 << 20;
const SECTOR: usize = 512;
const MAX_OPERATIONS: usize = 40;

/// Opens an image that lies in a store; if it names a parent, that is a raw disk of 300 kB.
pub fn open(store: Arc<dyn Store>, format: &str, writable: bool) -> Result<Arc<Image>> {
    open_for(store, format, writable, false)
}

/// The same, perhaps to be repaired.
fn open_for(store: Arc<dyn Store>, format: &str, writable: bool, repair: bool) -> Result<Arc<Image>> {
    let path = Path::new("/nowhere/image");
    let mut open_file = |name: &Path, _writable: bool| -> Result<Arc<dyn Store>> {
        Err(Error::unsupported(format!("there is no file {}", name.display())))
    };
    let request = Request { store, path, writable, repair, redo: Box::new(redo::None), open_file: &mut open_file, snapshot_name: None };
    let Opened { format, writeback, parent } = (drivers::by_name(format)?.open)(request)?;
    let parent = parent.map(|_| parent_disk()).transpose()?;
    // As `formats::open` does.
    if parent.as_ref().is_some_and(|below| below.limits().sector > format.limits().sector) {
        return Err(Error::unsupported("the parent has larger sectors"));
    }
    let cache = Arc::new(Cache::new(8 << 20));
    let parts = Parts { format, writeback, parent, cache, path: path.into(), discard: true, guard: None };
    Ok(Arc::new(Image::new(parts)?))
}

fn parent_disk() -> Result<Arc<Image>> {
    static BYTES: OnceLock<Sparse> = OnceLock::new();
    let bytes = BYTES.get_or_init(|| Sparse::new(&(0..300_000u32).map(|i| (i / 512 % 250 + 1) as u8).collect::<Vec<u8>>()));
    open(bytes.copy(), "raw", false)
}

/// Opens the image as `input` says and uses it as `input` says. `valid`: it must be one in order.
pub fn exercise(store: &Arc<Sparse>, format: &'static str, valid: bool, input: &mut Input<'_>) {
    let how = input.u8() % 8;
    let (writable, repair) = (how != 7, how == 6);
    let image = match open_for(store.clone(), format, writable, repair) {
        Ok(image) => image,
        Err(error) => return assert!(!valid, "a valid image does not open: {}", error.chain()),
    };
    let _ = image.format().describe();
    let _ = image.format().identity();
    let mut session = Session { store: store.clone(), format, writable, repair, model: None, failed: false, stamp: 0, leaks: None, image };
    session.begin();
    trace(|| format!("{format} of {} bytes, in order: {}, {:?}", session.size(), session.model.is_some(), session.image.check(false)));
    assert!(!valid || session.model.is_some(), "a valid image is found damaged: {:?}", session.image.check(false));
    if !valid {
        // Space that is marked as taken beyond the end of the file is no leak yet.
        session.leaks = None;
    }
    for _ in 0..MAX_OPERATIONS {
        if input.is_empty() || !session.step(input) {
            break;
        }
        if std::env::var_os("FUZZ_TRACE").is_some() {
            session.look_at_all();
        }
    }
    session.end();
}

/// Says what is being done, when `FUZZ_TRACE` is set.
fn trace(text: impl FnOnce() -> String) {
    if std::env::var_os("FUZZ_TRACE").is_some() {
        eprintln!("{}", text());
    }
}

/// The plain bytes that an image in order must hold.
struct Model {
    bytes: Vec<u8>,
    /// By sector: the bytes are known, and no error has made them doubtful.
    known: Vec<bool>,
}

struct Session {
    store: Arc<Sparse>,
    format: &'static str,
    writable: bool,
    repair: bool,
    image: Arc<Image>,
    /// Only while the image is known to be in order.
    model: Option<Model>,
    /// A change has failed, so that leaks are nobody's fault.
    failed: bool,
    stamp: u64,
    /// What the first check found.
    leaks: Option<u64>,
}

impl Session {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn can_check(&self) -> bool {
        drivers::by_name(self.format).is_ok_and(|d| d.can.check)
    }

    fn check(&self, repair: bool) -> Option<CheckReport> {
        self.image.check(repair).ok()
    }

    fn begin(&mut self) {
        let size = self.size();
        if self.can_check() {
            let Some(report) = self.check(false) else { return self.look_around() };
            if report.corruptions > 0 {
                return self.look_around();
            }
            self.leaks = Some(report.leaks);
        }
        if size > MAX_MODEL {
            return self.look_around();
        }
        let mut model = Model { bytes: vec![0; size as usize], known: vec![true; (size as usize).div_ceil(SECTOR)] };
        // All at once if that goes, otherwise in pieces.
        if self.image.read(&mut [IoSliceMut::new(&mut model.bytes)], 0).is_err() {
            for (number, part) in model.bytes.chunks_mut(SECTOR).enumerate() {
                let at = (number * SECTOR) as u64;
                if let Err(error) = self.image.read(&mut [IoSliceMut::new(part)], at) {
                    trace(|| format!("{at} cannot be read: {}", error.chain()));
                    part.fill(0);
                    model.known[number] = false;
                }
            }
        }
        self.model = Some(model);
    }

    /// Reads and maps here and there.
    fn look_around(&self) {
        let size = self.size();
        let mut buffer = vec![0; 64 << 10];
        for part in 0..8 {
            let at = size / 8 * part;
            let len = (size - at).min(buffer.len() as u64) as usize;
            let _ = self.image.read(&mut [IoSliceMut::new(&mut buffer[..len])], at);
        }
        let mut at = 0;
        for _ in 0..64 {
            if at >= size {
                break;
            }
            match self.image.map(at, size - at) {
                Ok(extent) => {
                    assert!(extent.len > 0 && extent.len <= size - at, "an extent of {} bytes at {at} of {size}", extent.len);
                    at += extent.len;
                }
                Err(_) => at += 1 << 16,
            }
        }
    }

    /// One operation. `false`: nothing more can be done with the image.
    fn step(&mut self, input: &mut Input<'_>) -> bool {
        match input.u8() % 16 {
            0..5 => self.write(input),
            5 | 6 => self.zero(input),
            7 | 8 => self.discard(input),
            9 => {
                if self.image.flush().is_err() {
                    self.model = None;
                }
            }
            10 => return self.reopen(),
            11 => self.grow(input),
            12 => self.map(input),
            13 if self.can_check() => {
                let report = self.check(false);
                if self.model.is_some() && !self.failed {
                    self.expect_clean(report);
                }
            }
            14 if self.can_check() && self.writable => self.repair(),
            _ => self.read(input),
        }
        true
    }

    /// A range: mostly small, mostly inside.
    fn range(&self, input: &mut Input<'_>) -> (u64, u64) {
        let size = self.size();
        let at = match input.u8() % 4 {
            0 => input.below(size.saturating_add(600)),
            1 => input.below(size) & !511,
            2 => size.saturating_sub(u64::from(input.u16())),
            _ => u64::from(input.u8()) * 4096 % size.max(1),
        };
        let len = match input.u8() % 4 {
            0 => u64::from(input.u8()),
            1 => u64::from(input.u8()) * 512,
            2 => u64::from(input.u16()) * 8,
            _ => input.below((2 << 20) + 1).min(size.saturating_sub(at)),
        };
        if input.u8().is_multiple_of(8) { (at, len) } else { (at, len.min(size.saturating_sub(at))) }
    }

    fn write(&mut self, input: &mut Input<'_>) {
        let (at, len) = self.range(input);
        let len = len.min(256 << 10) as usize;
        self.stamp += 1;
        let stamp = self.stamp.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        let mut data = stamp.repeat(len.div_ceil(8));
        data.truncate(len);
        let cut = len / 3;
        trace(|| format!("write {len} at {at}"));
        let result = self.image.write(&[IoSlice::new(&data[..cut]), IoSlice::new(&data[cut..])], at);
        self.settle(at, len as u64, result, |bytes, from| bytes.copy_from_slice(&data[from..from + bytes.len()]));
    }

    fn zero(&mut self, input: &mut Input<'_>) {
        let (at, len) = self.range(input);
        let mode = input.choose(&[ZeroMode::MayUnmap, ZeroMode::KeepAllocated, ZeroMode::OnlyIfCheap]);
        trace(|| format!("zero {len} at {at}, {mode:?}"));
        let result = self.image.zero(at, len, mode);
        if mode == ZeroMode::OnlyIfCheap && result.as_ref().is_err_and(|e| e.kind() == formats::Kind::Unsupported) {
            return;
        }
        self.settle(at, len, result, |bytes, _| bytes.fill(0));
    }

    /// Takes the outcome of a change into the model.
    fn settle(&mut self, at: u64, len: u64, result: Result<()>, change: impl FnOnce(&mut [u8], usize)) {
        let outside = at.checked_add(len).is_none_or(|end| end > self.size());
        trace(|| format!("  {:?}", result.as_ref().map_err(Error::chain)));
        assert!(result.is_err() || !outside, "a change of {len} bytes at {at} beyond the end succeeded");
        assert!(result.is_err() || self.writable || len == 0, "a read-only image was changed");
        if outside || !self.writable {
            return;
        }
        self.failed |= result.is_err();
        let Some(model) = &mut self.model else { return };
        if len == 0 {
            return;
        }
        let (start, end) = (at as usize, (at + len) as usize);
        match result {
            Ok(()) => {
                change(&mut model.bytes[start..end], 0);
                // Sectors that were doubtful and are changed only in part stay so.
                for sector in start.div_ceil(SECTOR)..end / SECTOR {
                    model.known[sector] = true;
                }
            }
            Err(_) => model.known[start / SECTOR..end.div_ceil(SECTOR)].fill(false),
        }
    }

    fn discard(&mut self, input: &mut Input<'_>) {
        let (at, len) = self.range(input);
        let inside = at.checked_add(len).filter(|end| *end <= self.size());
        let before = self.model.as_ref().zip(inside).map(|(m, end)| m.bytes[at as usize..end as usize].to_vec());
        trace(|| format!("discard {len} at {at}"));
        let result = self.image.discard(at, len);
        let done = result.is_ok();
        // What was not known is not known better now.
        let known = self.model.as_ref().map(|m| m.known.clone());
        self.settle(at, len, result, |_, _| {});
        if let (Some(model), Some(known), true) = (&mut self.model, known, done) {
            model.known = known;
        }
        let (Some(before), true, true) = (before, done && self.writable, len > 0) else { return };
        // Every sector is as it was, or zeros.
        let (at, len) = (at as usize, len as usize);
        let mut now = vec![0xA5; len];
        let Some(model) = &mut self.model else { return };
        if self.image.read(&mut [IoSliceMut::new(&mut now)], at as u64).is_err() {
            model.known[at / SECTOR..(at + len).div_ceil(SECTOR)].fill(false);
            return;
        }
        for sector in at / SECTOR..(at + len).div_ceil(SECTOR) {
            let (from, to) = ((sector * SECTOR).max(at), ((sector + 1) * SECTOR).min(at + len));
            let part = &now[from - at..to - at];
            let same = part == &before[from - at..to - at];
            let zeros = part.iter().all(|byte| *byte == 0);
            assert!(same || zeros || !model.known[sector], "a discard left other bytes at {from}");
            model.bytes[from..to].copy_from_slice(part);
        }
    }

    fn read(&self, input: &mut Input<'_>) {
        let (at, len) = self.range(input);
        let len = len.min(1 << 20) as usize;
        let mut buffer = vec![0xA5; len];
        let (a, b) = buffer.split_at_mut(len / 2);
        let outside = at.checked_add(len as u64).is_none_or(|end| end > self.size());
        let result = match input.flag() {
            true => self.image.read(&mut [IoSliceMut::new(a), IoSliceMut::new(b)], at).map(|()| true),
            false => self.image.try_read(&mut [IoSliceMut::new(a), IoSliceMut::new(b)], at),
        };
        assert!(!outside || result.is_err(), "a read of {len} bytes at {at} beyond the end succeeded");
        match result {
            Ok(true) => self.expect_bytes(at, &buffer, "a read"),
            Ok(false) => {}
            Err(error) => self.expect_error(at, len as u64, &error),
        }
    }

    fn expect_bytes(&self, at: u64, got: &[u8], what: &str) {
        let Some(model) = &self.model else { return };
        let at = at as usize;
        if model.bytes[at..at + got.len()] == *got {
            return;
        }
        for (index, byte) in got.iter().enumerate() {
            let place = at + index;
            assert!(
                *byte == model.bytes[place] || !model.known[place / SECTOR],
                "{what}: byte {place} is {byte:#04x} and was written as {:#04x}",
                model.bytes[place]
            );
        }
    }

    /// What could once be read can still be read.
    fn expect_error(&self, at: u64, len: u64, error: &Error) {
        let Some(model) = &self.model else { return };
        let Some(end) = at.checked_add(len).filter(|end| *end <= self.size() && len > 0) else { return };
        let known = &model.known[at as usize / SECTOR..(end as usize).div_ceil(SECTOR)];
        assert!(known.contains(&false), "{len} bytes at {at} cannot be read any more: {}", error.chain());
    }

    fn map(&self, input: &mut Input<'_>) {
        let (at, len) = self.range(input);
        let Ok(extent) = self.image.map(at, len) else { return };
        assert!(extent.len > 0 && extent.len <= len, "an extent of {} bytes of {len}", extent.len);
        if extent.zero && self.model.is_some() {
            self.expect_bytes(at, &vec![0; extent.len.min(1 << 20) as usize], "a map of zeros");
        }
    }

    fn grow(&mut self, input: &mut Input<'_>) {
        let old = self.size();
        let more = u64::from(input.u16()) * 512;
        if self.model.is_none() && input.u8().is_multiple_of(4) {
            // Far away, where no model is watching.
            let _ = self.image.grow(input.u64());
            return;
        }
        trace(|| format!("grow {old} by {more}"));
        let result = self.image.grow(old.saturating_add(more));
        self.failed |= result.is_err();
        let new = self.size();
        assert!(new >= old && (result.is_err() || new >= old + more), "growing {old} by {more} gave {new}");
        assert!(self.writable || new == old, "a read-only image was grown");
        match &mut self.model {
            Some(_) if new > 2 * MAX_MODEL => self.model = None,
            Some(model) => {
                model.bytes.resize(new as usize, 0);
                let first = (old as usize).div_ceil(SECTOR);
                model.known.resize((new as usize).div_ceil(SECTOR), result.is_ok());
                if result.is_err() && first > 0 && !old.is_multiple_of(SECTOR as u64) {
                    model.known[first - 1] = false;
                }
            }
            None => {}
        }
    }

    fn repair(&mut self) {
        trace(|| "repair".into());
        let Some(report) = self.check(true) else { return };
        let left = report.corruptions.saturating_sub(report.corruptions_fixed);
        if self.model.is_some() {
            // Flags that were right as long as there was a leak may have to be mended with it.
            assert!(left == 0 || self.failed, "an image that was in order is not: {:?}", report.notes);
            return;
        }
        // What the report says is left is what is left.
        if let Some(again) = self.check(false).filter(|again| again.corruptions != left) {
            panic!("repaired {report:?} and then {again:?}");
        }
    }

    fn expect_clean(&self, report: Option<CheckReport>) {
        let Some(report) = report else { panic!("an image in order cannot be checked any more: {:?}", self.image.check(false)) };
        assert!(report.corruptions == 0, "an image that was in order is not: {:?}", report.notes);
        if let (Some(leaks), false) = (self.leaks, self.failed) {
            assert!(report.leaks <= leaks, "space leaked, {leaks} before: {:?}", report.notes);
        }
    }

    /// Closes and opens again. `false`: it cannot be.
    fn reopen(&mut self) -> bool {
        trace(|| format!("check: {:?}", self.image.check(false)));
        trace(|| "close and open".into());
        if self.image.close().is_err() {
            self.model = None;
            return false;
        }
        match open_for(self.store.clone(), self.format, self.writable, self.repair) {
            Ok(image) => {
                assert!(self.model.is_none() || image.size() == self.size(), "the size was {} and is {}", self.size(), image.size());
                self.image = image;
                true
            }
            Err(error) => {
                assert!(self.model.is_none(), "an image in order cannot be opened again: {}", error.chain());
                false
            }
        }
    }

    fn end(&mut self) {
        self.writable &= self.model.is_none() || !self.failed;
        if !self.reopen() || self.model.is_none() {
            return;
        }
        if self.can_check() {
            self.expect_clean(self.check(false));
        }
        self.look_at_all();
    }

    /// All that is known of the disk is what can be read.
    fn look_at_all(&self) {
        if self.model.is_none() {
            return;
        }
        let size = self.size();
        let mut buffer = vec![0xA5; 64 << 10];
        for at in (0..size).step_by(buffer.len()) {
            let part = &mut buffer[..(size - at).min(64 << 10) as usize];
            if self.image.read(&mut [IoSliceMut::new(part)], at).is_ok() {
                self.expect_bytes(at, part, "all of it");
                continue;
            }
            // What cannot be read must not hide what can.
            for (at, sector) in (at..).step_by(SECTOR).zip(part.chunks_mut(SECTOR)) {
                match self.image.read(&mut [IoSliceMut::new(sector)], at) {
                    Ok(()) => self.expect_bytes(at, sector, "all of it"),
                    Err(error) => self.expect_error(at, sector.len() as u64, &error),
                }
            }
        }
    }
}
