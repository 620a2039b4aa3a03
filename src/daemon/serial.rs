//! Jobs in order per device, at once across devices: the threads behind slow opens.
//!
//! A device's thread exists only while it has jobs, so that a hung file system holds up its own device alone and idle devices
//! cost nothing.

use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::thread;

type Job = Box<dyn FnOnce() + Send>;

/// The queues. Clones are the same set.
#[derive(Clone, Default)]
pub struct Serial {
    /// A device with an entry has a thread.
    queues: Arc<Mutex<HashMap<String, VecDeque<Job>>>>,
}

impl Serial {
    /// Runs `job` after all earlier jobs of `device`. A job that panics is logged and over. When no thread can be started the job is
    /// dropped, with whatever its drop does, and so are those that wait behind it.
    pub fn run(&self, device: &str, job: impl FnOnce() + Send + 'static) {
        let mut queues = self.queues.lock();
        if let Some(queue) = queues.get_mut(device) {
            queue.push_back(Box::new(job));
            return;
        }
        queues.insert(device.to_owned(), VecDeque::from([Box::new(job) as Job]));
        drop(queues);
        let worker = self.clone();
        let name = device.to_owned();
        if let Err(error) = thread::Builder::new().name("device-job".into()).spawn(move || worker.drain(&name)) {
            tracing::error!("device {device}: cannot start a thread: {error}");
            let abandoned = self.queues.lock().remove(device);
            drop(abandoned);
        }
    }

    fn drain(&self, device: &str) {
        loop {
            let job = {
                let mut queues = self.queues.lock();
                match queues.get_mut(device).and_then(VecDeque::pop_front) {
                    Some(job) => job,
                    None => {
                        queues.remove(device);
                        return;
                    }
                }
            };
            if panic::catch_unwind(AssertUnwindSafe(job)).is_err() {
                tracing::error!("device {device}: a job panicked; only this device is affected");
            }
        }
    }

    /// Whether `device` has jobs.
    pub fn is_busy(&self, device: &str) -> bool {
        self.queues.lock().contains_key(device)
    }

    /// How many devices have jobs.
    pub fn busy(&self) -> usize {
        self.queues.lock().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn jobs_of_one_device_run_in_order_and_others_do_not_wait() {
        let serial = Serial::default();
        let (sender, receiver) = mpsc::channel();
        let (release, gate) = mpsc::channel::<()>();
        serial.run("stuck", move || gate.recv().expect("release"));
        for number in 0..100 {
            let sender = sender.clone();
            serial.run("stuck", move || sender.send(number).expect("send"));
        }
        let other = sender.clone();
        serial.run("free", move || other.send(1000).expect("send"));
        assert_eq!(receiver.recv_timeout(Duration::from_secs(20)), Ok(1000));
        release.send(()).expect("stuck job");
        let order: Vec<i32> = (0..100).map(|_| receiver.recv_timeout(Duration::from_secs(20)).expect("job")).collect();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn a_panic_ends_one_job() {
        let serial = Serial::default();
        let (sender, receiver) = mpsc::channel();
        serial.run("a", || panic!("on purpose"));
        serial.run("a", move || sender.send(()).expect("send"));
        assert_eq!(receiver.recv_timeout(Duration::from_secs(20)), Ok(()));
    }
}
