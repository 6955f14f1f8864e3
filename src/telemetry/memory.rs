//! How much memory a run takes: `memory.jsonl` (schema `podium.memory/1`), a line an event and a
//! line a sampling tick.
//!
//! The kernel splits the process's resident memory into anonymous and file-backed; the backend
//! counts what it allocated by class. Plan and measurement are compared at the end: growth of the
//! anonymous part from before loading to its peak, against the planned bytes. On a GPU the classes
//! lie there, beside what its driver says that this process takes. A tick that shows nothing new
//! is not written, so that a long run's log stays small.

use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::device::{DeviceMeter, DeviceSample};
use super::{JsonLines, TelemetryError, utc_now};
use crate::engine::BackendMemory;

pub const MEMORY_SCHEMA: &str = "podium.memory/1";
pub const MEMORY_FILE: &str = "memory.jsonl";

/// The usual time between two samples.
pub const SAMPLE_PERIOD: Duration = Duration::from_millis(250);

/// Measured growth may exceed the plan by the larger of this and [`SLACK_SHARE`] of it: the
/// allocator's own pages, thread stacks and the output rows are not in the plan.
pub const SLACK_BYTES: u64 = 64 << 20;
/// See [`SLACK_BYTES`].
pub const SLACK_SHARE: f64 = 0.02;

/// A tick is written when the anonymous part moved by this much since the last line, …
const TICK_MOVED_BYTES: u64 = 4 << 20;
/// … or when the last line is this old.
const TICK_AT_LEAST: Duration = Duration::from_secs(30);

/// Why a line was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryEvent {
    /// The log was opened, before anything was loaded: the baseline.
    Start,
    /// The weights are in place.
    Load,
    /// The KV arena and the workspace are allocated.
    Arena,
    /// The first batch has run.
    FirstBatch,
    /// The run is over; the line carries the peaks.
    Peak,
}

/// Resident memory of this process, as the kernel counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessMemory {
    pub anonymous_bytes: Option<u64>,
    /// File-backed and shared pages.
    pub file_bytes: Option<u64>,
    /// The highest total since the process started.
    pub peak_bytes: Option<u64>,
}

impl ProcessMemory {
    /// Reads `/proc/self/status`; every field is absent where the system has no such file.
    pub fn read() -> Self {
        std::fs::read_to_string("/proc/self/status")
            .map(|status| Self::parse(&status))
            .unwrap_or_default()
    }

    fn parse(status: &str) -> Self {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
            kib.checked_mul(1024)
        };
        Self {
            anonymous_bytes: field("RssAnon:"),
            file_bytes: field("RssFile:")
                .map(|file| file.saturating_add(field("RssShmem:").unwrap_or(0))),
            peak_bytes: field("VmHWM:"),
        }
    }
}

/// A line of `memory.jsonl`. Absent values were not measured.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct MemoryLine {
    pub schema: String,
    pub session: usize,
    pub time: String,
    pub elapsed_seconds: f64,
    /// Absent on a tick.
    pub event: Option<MemoryEvent>,
    pub process_anonymous_bytes: Option<u64>,
    pub process_file_bytes: Option<u64>,
    /// Highest resident total since the process started.
    pub process_peak_bytes: Option<u64>,
    /// What the backend allocated, by class; absent before it is open.
    pub weights_bytes: Option<u64>,
    pub kv_bytes: Option<u64>,
    pub workspace_bytes: Option<u64>,
    /// Anonymous memory, or this process's on the device, beyond the backend's classes.
    pub other_bytes: Option<u64>,
    pub planned_weights_bytes: Option<u64>,
    pub planned_kv_bytes: Option<u64>,
    pub planned_workspace_bytes: Option<u64>,
    /// Memory in use on the device, by whomever; absent where the device is the host.
    pub device_used_bytes: Option<u64>,
    /// Of it this process's, as the driver counts it.
    pub device_process_bytes: Option<u64>,
}

/// Plan and measurement side by side, for the summary and `run.json`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MemorySummary {
    pub planned: Option<BackendMemory>,
    /// What the backend allocated; must equal the plan.
    pub allocated: Option<BackendMemory>,
    /// Highest anonymous memory seen at a tick or an event.
    pub peak_anonymous_bytes: Option<u64>,
    /// From the baseline to that peak.
    pub growth_bytes: Option<u64>,
    /// Highest resident total, file-backed pages included, over the process's life.
    pub process_peak_bytes: Option<u64>,
    /// Whether plan and allocation are of a device's memory, not the host's.
    #[serde(default)]
    pub on_device: bool,
    /// What the device's driver keeps beside the classes, by estimate.
    #[serde(default)]
    pub planned_driver_bytes: u64,
    /// Highest memory of this process on the device that was sampled.
    #[serde(default)]
    pub peak_device_bytes: Option<u64>,
}

impl MemorySummary {
    /// The measured bytes beyond plan and slack; absent when all is well or nothing is known.
    pub fn excess_bytes(&self) -> Option<u64> {
        let planned = self.planned_bytes()?;
        let slack = SLACK_BYTES.max((planned as f64 * SLACK_SHARE) as u64);
        let allowed = planned.saturating_add(slack);
        self.measured_bytes()?
            .checked_sub(allowed)
            .filter(|&bytes| bytes > 0)
    }

    /// The planned classes and what a device's driver keeps beside them.
    pub fn planned_bytes(&self) -> Option<u64> {
        let classes = total_bytes(&self.planned?);
        Some(classes.saturating_add(self.planned_driver_bytes))
    }

    /// What was measured where the plan is: growth of the host's memory, or the device's peak.
    pub fn measured_bytes(&self) -> Option<u64> {
        match self.on_device {
            true => self.peak_device_bytes,
            false => self.growth_bytes,
        }
    }
}

/// The sum over the classes.
pub fn total_bytes(memory: &BackendMemory) -> u64 {
    memory
        .weights_bytes
        .saturating_add(memory.kv_bytes)
        .saturating_add(memory.workspace_bytes)
}

/// The log of one session: samples on a thread of its own until finished or dropped.
pub struct MemoryLog {
    shared: Arc<Mutex<State>>,
    stop: Option<Sender<()>>,
    ticker: Option<JoinHandle<()>>,
}

struct State {
    lines: JsonLines,
    session: usize,
    started: Instant,
    /// When, anonymous and device bytes.
    last_line: Option<(Instant, [u64; 2])>,
    meter: Option<DeviceMeter>,
    baseline_bytes: Option<u64>,
    summary: MemorySummary,
}

impl MemoryLog {
    /// Opens the log before anything is loaded: this moment is the baseline for growth.
    /// `period` is the time between two samples.
    pub fn start(
        run_dir: &Path,
        session: usize,
        period: Duration,
        planned: Option<BackendMemory>,
    ) -> Self {
        let summary = MemorySummary {
            planned,
            ..MemorySummary::default()
        };
        Self::start_with(run_dir, session, period, summary, None)
    }

    /// As [`MemoryLog::start`], for a plan of a device's memory, of which the driver is thought to
    /// keep `driver_bytes` besides; the meter is sampled at every tick.
    pub fn start_on_device(
        run_dir: &Path,
        session: usize,
        period: Duration,
        planned: BackendMemory,
        driver_bytes: u64,
        meter: Option<DeviceMeter>,
    ) -> Self {
        let summary = MemorySummary {
            planned: Some(planned),
            planned_driver_bytes: driver_bytes,
            on_device: true,
            ..MemorySummary::default()
        };
        Self::start_with(run_dir, session, period, summary, meter)
    }

    fn start_with(
        run_dir: &Path,
        session: usize,
        period: Duration,
        summary: MemorySummary,
        meter: Option<DeviceMeter>,
    ) -> Self {
        let mut state = State {
            lines: JsonLines::open(run_dir.join(MEMORY_FILE)),
            session,
            started: Instant::now(),
            last_line: None,
            meter,
            baseline_bytes: ProcessMemory::read().anonymous_bytes,
            summary,
        };
        state.write(Some(MemoryEvent::Start));
        let shared = Arc::new(Mutex::new(state));
        let (stop, stopped) = mpsc::channel::<()>();
        let ticking = Arc::clone(&shared);
        let ticker = std::thread::Builder::new()
            .name("podium-memory".to_owned())
            .spawn(move || {
                while stopped.recv_timeout(period) == Err(RecvTimeoutError::Timeout) {
                    lock(&ticking).tick();
                }
            });
        // Without the thread the events are still there; only the ticks between them are missing.
        Self {
            shared,
            stop: Some(stop),
            ticker: ticker.ok(),
        }
    }

    /// Writes an event's line. `allocated` is what the backend holds by now.
    pub fn event(&self, event: MemoryEvent, allocated: Option<BackendMemory>) {
        let mut state = lock(&self.shared);
        if allocated.is_some() {
            state.summary.allocated = allocated;
        }
        state.write(Some(event));
    }

    /// What has been seen so far.
    pub fn summary(&self) -> MemorySummary {
        lock(&self.shared).summary
    }

    /// Stops sampling and writes the line of the peaks.
    pub fn finish(mut self) -> (MemorySummary, Result<(), TelemetryError>) {
        self.stop_ticker();
        let mut state = lock(&self.shared);
        state.write(Some(MemoryEvent::Peak));
        (state.summary, state.lines.finish())
    }

    fn stop_ticker(&mut self) {
        drop(self.stop.take());
        if let Some(ticker) = self.ticker.take() {
            ticker.join().ok();
        }
    }
}

impl Drop for MemoryLog {
    fn drop(&mut self) {
        self.stop_ticker();
    }
}

/// A panic elsewhere leaves the counts valid, so a poisoned lock is taken as it is.
fn lock(shared: &Mutex<State>) -> MutexGuard<'_, State> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn tick(&mut self) {
        let (process, device) = self.sample();
        let now = moving_bytes(&process, &device);
        let news = self.last_line.is_none_or(|(at, then)| {
            let moved = now.iter().zip(then).map(|(now, then)| now.abs_diff(then));
            at.elapsed() >= TICK_AT_LEAST || moved.max() >= Some(TICK_MOVED_BYTES)
        });
        if news {
            self.write_sample(None, process, device);
        }
    }

    /// Reads the process, asks the device, and raises the peaks.
    fn sample(&mut self) -> (ProcessMemory, DeviceSample) {
        let process = ProcessMemory::read();
        let meter = self.meter.as_ref();
        let device = meter.map(DeviceMeter::sample).unwrap_or_default();
        let summary = &mut self.summary;
        summary.peak_anonymous_bytes = summary.peak_anonymous_bytes.max(process.anonymous_bytes);
        summary.process_peak_bytes = summary.process_peak_bytes.max(process.peak_bytes);
        if let (Some(peak), Some(baseline)) = (summary.peak_anonymous_bytes, self.baseline_bytes) {
            summary.growth_bytes = Some(peak.saturating_sub(baseline));
        }
        summary.peak_device_bytes = summary.peak_device_bytes.max(device.process_bytes);
        (process, device)
    }

    fn write(&mut self, event: Option<MemoryEvent>) {
        let (process, device) = self.sample();
        self.write_sample(event, process, device);
    }

    fn write_sample(
        &mut self,
        event: Option<MemoryEvent>,
        process: ProcessMemory,
        device: DeviceSample,
    ) {
        self.last_line = Some((Instant::now(), moving_bytes(&process, &device)));
        let (allocated, planned) = (self.summary.allocated, self.summary.planned);
        // The line of the peaks shows the highest memory, not the present one.
        let (anonymous_bytes, device_process_bytes) = match event {
            Some(MemoryEvent::Peak) => (
                self.summary.peak_anonymous_bytes,
                self.summary.peak_device_bytes,
            ),
            _ => (process.anonymous_bytes, device.process_bytes),
        };
        let holder_bytes = match self.summary.on_device {
            true => device_process_bytes,
            false => anonymous_bytes,
        };
        self.lines.append(&MemoryLine {
            schema: MEMORY_SCHEMA.to_owned(),
            session: self.session,
            time: utc_now(),
            elapsed_seconds: self.started.elapsed().as_secs_f64(),
            event,
            process_anonymous_bytes: anonymous_bytes,
            process_file_bytes: process.file_bytes,
            process_peak_bytes: process.peak_bytes,
            weights_bytes: allocated.map(|memory| memory.weights_bytes),
            kv_bytes: allocated.map(|memory| memory.kv_bytes),
            workspace_bytes: allocated.map(|memory| memory.workspace_bytes),
            other_bytes: allocated
                .and_then(|memory| holder_bytes?.checked_sub(total_bytes(&memory))),
            planned_weights_bytes: planned.map(|memory| memory.weights_bytes),
            planned_kv_bytes: planned.map(|memory| memory.kv_bytes),
            planned_workspace_bytes: planned.map(|memory| memory.workspace_bytes),
            device_used_bytes: device.used_bytes,
            device_process_bytes,
        });
    }
}

/// What a tick is written for when it moves.
fn moving_bytes(process: &ProcessMemory, device: &DeviceSample) -> [u64; 2] {
    let device_bytes = device.process_bytes.or(device.used_bytes);
    [process.anonymous_bytes, device_bytes].map(Option::unwrap_or_default)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::device::tests::Scripted;
    use crate::telemetry::test_dir::TestDir;

    const STATUS: &str = "Name:\tpodium\nVmHWM:\t   20480 kB\nVmRSS:\t   16384 kB\n\
                          RssAnon:\t   10240 kB\nRssFile:\t    4096 kB\nRssShmem:\t    2048 kB\n";

    #[test]
    fn anonymous_and_file_backed_memory_are_kept_apart() {
        assert_eq!(
            ProcessMemory::parse(STATUS),
            ProcessMemory {
                anonymous_bytes: Some(10 << 20),
                file_bytes: Some(6 << 20),
                peak_bytes: Some(20 << 20),
            }
        );
        assert_eq!(
            ProcessMemory::parse("RssAnon: many kB\n"),
            ProcessMemory::default()
        );
    }

    #[test]
    fn growth_beyond_plan_and_slack_is_excess() {
        let planned = BackendMemory {
            weights_bytes: 10 << 30,
            kv_bytes: 0,
            workspace_bytes: 0,
        };
        let mut summary = MemorySummary {
            planned: Some(planned),
            growth_bytes: Some((10 << 30) + (200 << 20)),
            ..MemorySummary::default()
        };
        assert_eq!(summary.excess_bytes(), None, "2 % of 10 GiB is 204.8 MiB");
        summary.growth_bytes = Some((10 << 30) + (206 << 20));
        assert!(summary.excess_bytes().is_some());
        summary.planned = Some(BackendMemory::default());
        summary.growth_bytes = Some(SLACK_BYTES + 1);
        assert_eq!(summary.excess_bytes(), Some(1));
        summary.growth_bytes = None;
        assert_eq!(summary.excess_bytes(), None);
    }

    #[test]
    fn events_and_ticks_are_lines() {
        let dir = TestDir::new("memory");
        let log = MemoryLog::start(dir.path(), 0, Duration::from_millis(5), None);
        let allocated = BackendMemory {
            weights_bytes: 16 << 20,
            kv_bytes: 1,
            workspace_bytes: 2,
        };
        let weights = vec![1_u8; 16 << 20];
        log.event(MemoryEvent::Load, Some(allocated));
        std::thread::sleep(Duration::from_millis(40));
        drop(std::hint::black_box(weights));
        std::thread::sleep(Duration::from_millis(40));
        let (summary, written) = log.finish();
        written.expect("the test folder is writable");
        assert!(summary.growth_bytes.expect("Linux counts it") >= 15 << 20);
        assert_eq!(summary.allocated, Some(allocated));

        let text = std::fs::read_to_string(dir.path().join(MEMORY_FILE))
            .expect("the log was just written");
        let lines: Vec<MemoryLine> = text
            .lines()
            .map(|line| serde_json::from_str(line).expect("our own line"))
            .collect();
        let events: Vec<_> = lines.iter().filter_map(|line| line.event).collect();
        assert_eq!(
            events,
            [MemoryEvent::Start, MemoryEvent::Load, MemoryEvent::Peak]
        );
        assert!(
            lines.iter().any(|line| line.event.is_none()),
            "the free is a tick"
        );
    }

    #[test]
    fn a_device_tells_its_own_memory() {
        let dir = TestDir::new("memory-device");
        let meter = DeviceMeter::new(Scripted::default());
        let planned = BackendMemory {
            weights_bytes: 90 << 20,
            kv_bytes: 5 << 20,
            workspace_bytes: 5 << 20,
        };
        let period = Duration::from_secs(9);
        let driver_bytes = 50 << 20;
        let log =
            MemoryLog::start_on_device(dir.path(), 0, period, planned, driver_bytes, Some(meter));
        log.event(MemoryEvent::Arena, Some(planned));
        let (summary, written) = log.finish();
        written.expect("the test folder is writable");
        assert_eq!(summary.measured_bytes(), Some(300 << 20));
        assert_eq!(summary.planned_bytes(), Some(150 << 20));
        assert_eq!(summary.excess_bytes(), Some((150 << 20) - SLACK_BYTES));

        let text = std::fs::read_to_string(dir.path().join(MEMORY_FILE))
            .expect("the log was just written");
        let lines: Vec<MemoryLine> = text
            .lines()
            .map(|line| serde_json::from_str(line).expect("our own line"))
            .collect();
        let of = |line: usize| {
            let line = &lines[line];
            (
                line.device_used_bytes,
                line.device_process_bytes,
                line.other_bytes,
            )
        };
        assert_eq!(of(0), (Some(200 << 20), Some(100 << 20), None));
        assert_eq!(
            of(1),
            (Some(400 << 20), Some(200 << 20), Some(100 << 20)),
            "beyond the classes"
        );
        assert_eq!(lines[1].weights_bytes, Some(90 << 20));
    }

    #[test]
    fn a_log_that_cannot_be_written_says_so_at_the_end() {
        let missing = Path::new("/nonexistent-podium-folder");
        let log = MemoryLog::start(missing, 0, Duration::from_secs(1), None);
        log.event(MemoryEvent::Load, None);
        let (_, written) = log.finish();
        assert!(written.is_err());
    }
}
