//! What a command costs from ring to answer: the real ring, SCSI layer and engine on a raw image, against the fake kernel side.
//!
//! Each size and depth is measured three times: `inline` fetches, executes and completes in the thread that also plays the kernel (no
//! thread is woken: the cost of the code), `pool` has a thread of the pool do it (with the wake-ups), and `empty` is `inline`
//! with a service that does nothing (the cost of the ring and of the fake kernel itself). `bare` is preadv or pwritev on the
//! same file and memory of the same size: what nobody can beat. The image is in the page cache.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use img_tcmu::scsi::{self, Identity, Lun};
use img_tcmu::serve::{Pool, Service};
use img_tcmu::tcmu::fake::{FakeKernel, Options, Request};
use img_tcmu::tcmu::{Command, Completion, Fetched, Ring};
use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

const IMAGE: u64 = 64 << 20;
const SECTOR: usize = 512;

struct Nothing;

impl Service for Nothing {
    fn try_execute(&self, _: &mut Command) -> Option<Completion> {
        Some(Completion::good())
    }

    fn execute(&self, _: &mut Command) -> Completion {
        Completion::good()
    }
}

/// READ(10) or WRITE(10) commands of `len` bytes at places spread over the image.
fn requests(writes: bool, len: usize, depth: usize) -> Vec<Request> {
    let places = IMAGE as usize / len;
    let request = |index: usize| {
        let lba = ((index * 2_654_435_761) % places * len / SECTOR) as u32;
        let mut cdb = vec![if writes { 0x2a } else { 0x28 }, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        cdb[2..6].copy_from_slice(&lba.to_be_bytes());
        cdb[7..9].copy_from_slice(&((len / SECTOR) as u16).to_be_bytes());
        if writes { Request::write(&cdb, vec![index as u8; len]) } else { Request::read(&cdb, len) }
    };
    (0..depth).map(request).collect()
}

fn ring(kernel: &FakeKernel) -> Ring {
    let region = kernel.map().expect("the memory maps");
    Ring::attach(region, kernel.doorbell(), "bench", Completion::check_condition(&[0x70])).expect("the ring is sound")
}

fn kernel() -> FakeKernel {
    let kernel = FakeKernel::new(Options { ring_size: (8 << 20) - 128, blocks: 2048, ..Options::default() }).expect("a memfd");
    kernel.keep_data(false);
    kernel
}

/// One thread is the kernel and the daemon in turn.
fn inline(kernel: &FakeKernel, ring: &Ring, service: &dyn Service, requests: &[Request]) {
    kernel.submit_silently(requests);
    while let Ok(Some(Fetched::Command(mut command))) = ring.fetch() {
        let completion = match service.try_execute(&mut command) {
            Some(completion) => completion,
            None => service.execute(&mut command),
        };
        command.complete(completion);
    }
    ring.kick().expect("the kick is taken");
    assert!(kernel.answers().iter().all(|answer| answer.status == 0), "every command succeeds");
}

/// The pool serves, this thread is the kernel.
fn pooled(kernel: &FakeKernel, requests: &[Request]) {
    let mut waiting = kernel.submit(requests).len();
    while waiting > 0 {
        let answer = kernel.answer(Duration::from_secs(10)).expect("an answer");
        assert_eq!(answer.status, 0, "every command succeeds");
        waiting -= 1;
    }
}

fn bench(criterion: &mut Criterion) {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    let block = vec![0x5a; 1 << 20];
    for at in (0..IMAGE).step_by(block.len()) {
        file.as_file().write_all_at(&block, at).expect("space for the image");
    }
    let options = formats::OpenOptions::new(file.path()).format("raw");
    let image = formats::open(&options).expect("a raw image");
    let lun = Arc::new(Lun::new(image, Identity::with_serial("bench"), scsi::Config::default()).expect("a unit"));
    let bare = File::options().read(true).write(true).open(file.path()).expect("the image opens");

    for writes in [false, true] {
        let mut group = criterion.benchmark_group(if writes { "write" } else { "read" });
        group.sample_size(20).measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_millis(500));
        for len in [4 << 10, 64 << 10] {
            for depth in [1, 32] {
                let requests = requests(writes, len, depth);
                let parameter = format!("{}K/q{depth}", len >> 10);
                group.throughput(Throughput::Elements(depth as u64));
                let mut buffer = vec![1; len];
                group.bench_function(BenchmarkId::new("bare", &parameter), |bencher| {
                    bencher.iter(|| {
                        for request in &requests {
                            let lba = u32::from_be_bytes([request.cdb[2], request.cdb[3], request.cdb[4], request.cdb[5]]);
                            let at = u64::from(lba) * SECTOR as u64;
                            if writes {
                                bare.write_all_at(black_box(&buffer), at).expect("a write");
                            } else {
                                bare.read_exact_at(black_box(&mut buffer), at).expect("a read");
                            }
                        }
                    });
                });
                let fake = kernel();
                let own = ring(&fake);
                group.bench_function(BenchmarkId::new("empty", &parameter), |bencher| {
                    bencher.iter(|| inline(&fake, &own, &Nothing, &requests));
                });
                group.bench_function(BenchmarkId::new("inline", &parameter), |bencher| {
                    bencher.iter(|| inline(&fake, &own, &*lun, &requests));
                });
                let fake = kernel();
                let pool = Pool::new(Some(1)).expect("threads");
                let _served = pool.serve(ring(&fake), Arc::clone(&lun)).expect("the ring is served");
                group.bench_function(BenchmarkId::new("pool", &parameter), |bencher| {
                    bencher.iter(|| pooled(&fake, &requests));
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
