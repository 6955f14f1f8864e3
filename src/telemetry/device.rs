//! What a device tells of itself while a run goes on: power, clocks, how busy it is, memory.
//!
//! A probe is asked on the memory log's thread; the means between two lines go to the throughput
//! log, those of the whole generation to the manifest. What a device does not tell is absent.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One look at a device.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DeviceSample {
    pub power_watts: Option<f64>,
    pub sm_clock_mhz: Option<u32>,
    pub memory_clock_mhz: Option<u32>,
    /// Share of the time in which some kernel ran, 0 to 1, over the device's own last period.
    pub utilization: Option<f64>,
    /// In use on the device, by whomever.
    pub used_bytes: Option<u64>,
    /// Of this process.
    pub process_bytes: Option<u64>,
}

/// Something that can be asked.
pub trait DeviceProbe: Send + Sync {
    fn sample(&self) -> DeviceSample;
}

/// Means over samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct DeviceLoad {
    pub n_samples: u64,
    pub power_watts: Option<f64>,
    pub sm_clock_mhz: Option<f64>,
    pub memory_clock_mhz: Option<f64>,
    pub utilization: Option<f64>,
}

/// Sums of values that may be absent: of power, both clocks and utilization, in this order.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    n_samples: u64,
    sums: [(f64, u64); 4],
}

impl Sums {
    fn add(&mut self, sample: &DeviceSample) {
        self.n_samples += 1;
        let values = [
            sample.power_watts,
            sample.sm_clock_mhz.map(f64::from),
            sample.memory_clock_mhz.map(f64::from),
            sample.utilization,
        ];
        for ((sum, n), value) in self.sums.iter_mut().zip(values) {
            if let Some(value) = value {
                *sum += value;
                *n += 1;
            }
        }
    }

    fn means(&self) -> DeviceLoad {
        let [power_watts, sm_clock_mhz, memory_clock_mhz, utilization] =
            self.sums.map(|(sum, n)| (n > 0).then(|| sum / n as f64));
        DeviceLoad {
            n_samples: self.n_samples,
            power_watts,
            sm_clock_mhz,
            memory_clock_mhz,
            utilization,
        }
    }
}

/// A probe and the sums of what it told; clones share both.
#[derive(Clone)]
pub struct DeviceMeter {
    probe: Arc<dyn DeviceProbe>,
    /// Since the last line, and since [`DeviceMeter::begin`].
    sums: Arc<Mutex<[Sums; 2]>>,
}

impl DeviceMeter {
    pub fn new(probe: impl DeviceProbe + 'static) -> Self {
        Self {
            probe: Arc::new(probe),
            sums: Arc::default(),
        }
    }

    /// Asks the device.
    pub fn sample(&self) -> DeviceSample {
        // The probe may take its time: not under the lock.
        let sample = self.probe.sample();
        self.lock().iter_mut().for_each(|sums| sums.add(&sample));
        sample
    }

    /// Forgets what was before: loading is in no mean.
    pub fn begin(&self) {
        *self.lock() = Default::default();
    }

    /// Means since the last call.
    pub fn take(&self) -> DeviceLoad {
        std::mem::take(&mut self.lock()[0]).means()
    }

    /// Means since [`DeviceMeter::begin`]; nothing when no sample fell into that time.
    pub fn load(&self) -> Option<DeviceLoad> {
        let load = self.lock()[1].means();
        (load.n_samples > 0).then_some(load)
    }

    fn lock(&self) -> MutexGuard<'_, [Sums; 2]> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// Tells 100, 200, … watts and that much memory in MiB; has no utilization, and clocks in
    /// every second sample.
    #[derive(Default)]
    pub(crate) struct Scripted(AtomicU32);

    impl DeviceProbe for Scripted {
        fn sample(&self) -> DeviceSample {
            let n = self.0.fetch_add(1, Ordering::Relaxed) + 1;
            DeviceSample {
                power_watts: Some(100.0 * f64::from(n)),
                sm_clock_mhz: n.is_multiple_of(2).then_some(1000 + n),
                used_bytes: Some(u64::from(n) * (200 << 20)),
                process_bytes: Some(u64::from(n) * (100 << 20)),
                ..DeviceSample::default()
            }
        }
    }

    #[test]
    fn means_leave_out_what_was_not_told() {
        let meter = DeviceMeter::new(Scripted::default());
        meter.sample();
        meter.begin();
        assert_eq!(meter.load(), None);
        assert_eq!(meter.take(), DeviceLoad::default());
        meter.sample();
        meter.sample();
        let window = meter.take();
        assert_eq!(window.n_samples, 2);
        assert_eq!(window.power_watts, Some(250.0));
        assert_eq!(window.sm_clock_mhz, Some(1002.0));
        assert_eq!(window.utilization, None);
        meter.sample();
        assert_eq!(meter.take().power_watts, Some(400.0));
        let load = meter.load().expect("three samples");
        assert_eq!((load.n_samples, load.power_watts), (3, Some(300.0)));
        assert_eq!(load.sm_clock_mhz, Some(1003.0));
    }
}
