//! What the host asked of a device, counted where it asks: so that a run can say which kernels it
//! ran, and a test that a decode step neither allocates nor waits nor copies logits.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use super::device::Function;

/// Running counts of a device.
#[derive(Debug, Default)]
pub struct Counters {
    pub(super) allocations: AtomicU64,
    pub(super) waits: AtomicU64,
    pub(super) bytes_to_host: AtomicU64,
    pub(super) bytes_to_device: AtomicU64,
    pub(super) launches: AtomicU64,
    pub(super) graph_launches: AtomicU64,
}

/// Counts so far, or between two looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// Of device memory and of page-locked memory.
    pub allocations: u64,
    /// Times the host stood still for the device.
    pub waits: u64,
    pub bytes_to_host: u64,
    pub bytes_to_device: u64,
    /// Kernels launched one by one, or into a capture.
    pub launches: u64,
    pub graph_launches: u64,
}

impl Counters {
    pub fn read(&self) -> Counts {
        Counts {
            allocations: self.allocations.load(Relaxed),
            waits: self.waits.load(Relaxed),
            bytes_to_host: self.bytes_to_host.load(Relaxed),
            bytes_to_device: self.bytes_to_device.load(Relaxed),
            launches: self.launches.load(Relaxed),
            graph_launches: self.graph_launches.load(Relaxed),
        }
    }
}

/// Adds to a counter.
pub(super) fn add(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Relaxed);
}

impl std::ops::Sub for Counts {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            allocations: self.allocations - before.allocations,
            waits: self.waits - before.waits,
            bytes_to_host: self.bytes_to_host - before.bytes_to_host,
            bytes_to_device: self.bytes_to_device - before.bytes_to_device,
            launches: self.launches - before.launches,
            graph_launches: self.graph_launches - before.graph_launches,
        }
    }
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, more: Self) {
        self.allocations += more.allocations;
        self.waits += more.waits;
        self.bytes_to_host += more.bytes_to_host;
        self.bytes_to_device += more.bytes_to_device;
        self.launches += more.launches;
        self.graph_launches += more.graph_launches;
    }
}

/// Runs of each kernel.
#[derive(Default)]
pub struct Calls(Mutex<Recorded>);

/// Kernels and how often each ran, or runs at each replay of a graph.
pub type Recorded = Vec<(Function, u64)>;

impl Calls {
    fn lock(&self) -> std::sync::MutexGuard<'_, Recorded> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts kernels that are run.
    pub(super) fn add(&self, more: &[(Function, u64)]) {
        let mut calls = self.lock();
        for &(function, n) in more {
            match calls.iter_mut().find(|(known, _)| *known == function) {
                Some((_, sum)) => *sum += n,
                None => calls.push((function, n)),
            }
        }
    }

    /// What `capture` launches, which is recorded and does not run.
    pub(super) fn recorded<T>(&self, capture: impl FnOnce() -> T) -> (T, Recorded) {
        let before = std::mem::take(&mut *self.lock());
        let captured = capture();
        let recorded = std::mem::replace(&mut *self.lock(), before);
        (captured, recorded)
    }

    pub(super) fn read(&self) -> Recorded {
        self.lock().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(i: usize) -> Function {
        Function(std::ptr::without_provenance_mut(i))
    }

    #[test]
    fn captured_launches_count_when_they_are_replayed() {
        let calls = Calls::default();
        calls.add(&[(function(1), 2)]);
        let ((), recorded) = calls.recorded(|| {
            calls.add(&[(function(1), 1)]);
            calls.add(&[(function(2), 1)]);
            calls.add(&[(function(2), 1)]);
        });
        assert!(recorded == [(function(1), 1), (function(2), 2)]);
        assert!(calls.read() == [(function(1), 2)]);
        calls.add(&recorded);
        calls.add(&recorded);
        assert!(calls.read() == [(function(1), 4), (function(2), 4)]);
    }
}
