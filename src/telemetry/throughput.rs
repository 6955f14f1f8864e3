//! How fast a run is: `throughput.jsonl` (schema `podium.throughput/1`), a line a batch or
//! refill, and the totals that the summary prints.
//!
//! Prefill and decode are counted apart, live row-steps apart from padding. A live row-step gives
//! one token, so decoded tokens and live row-steps are the same count. Loading and warm-up are in
//! neither clock.

use std::io::BufRead;
use std::path::Path;
use std::time::Instant;

use super::device::{DeviceLoad, DeviceMeter};
use super::{JsonLines, TelemetryError};

pub const THROUGHPUT_SCHEMA: &str = "podium.throughput/1";
pub const THROUGHPUT_FILE: &str = "throughput.jsonl";

/// More bytes, tokens or rows than any run has: a greater count in a file is damage, and sums of
/// such would overflow.
pub const MAX_COUNT: u64 = 1 << 48;

/// What the engine did between two refills, as it counted it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BatchTiming {
    /// Rows put into slots before these steps.
    pub rows_started: u64,
    /// Rows that ended in these steps.
    pub rows_finished: u64,
    /// Prompt tokens run through the model; tokens of a shared prefix count once.
    pub prefill_tokens: u64,
    pub prefill_seconds: f64,
    /// Prompt tokens not run, because a shared prefix held their KV.
    pub reused_prefix_tokens: u64,
    pub decode_steps: u64,
    /// Steps of slots that were generating: the tokens produced.
    pub live_row_steps: u64,
    /// Steps of slots that were empty or had stopped.
    pub padded_row_steps: u64,
    pub decode_seconds: f64,
    /// Bytes read from memory, where the backend counts them.
    pub bytes_moved: Option<u64>,
}

/// Sums over batches. Adding two gives the totals of both.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ThroughputTotals {
    pub rows_finished: u64,
    pub prefill_tokens: u64,
    pub prefill_seconds: f64,
    pub reused_prefix_tokens: u64,
    pub decode_steps: u64,
    pub live_row_steps: u64,
    pub padded_row_steps: u64,
    pub decode_seconds: f64,
    /// From the first batch's begin: what is not in prefill or decode is spent outside the engine.
    pub wall_seconds: f64,
}

impl ThroughputTotals {
    /// Adds one batch; the wall clock is the log's business.
    pub fn add_batch(&mut self, batch: &BatchTiming) {
        self.rows_finished += batch.rows_finished;
        self.prefill_tokens += batch.prefill_tokens;
        self.prefill_seconds += batch.prefill_seconds;
        self.reused_prefix_tokens += batch.reused_prefix_tokens;
        self.decode_steps += batch.decode_steps;
        self.live_row_steps += batch.live_row_steps;
        self.padded_row_steps += batch.padded_row_steps;
        self.decode_seconds += batch.decode_seconds;
    }

    /// Adds another session's totals.
    pub fn add(&mut self, other: &Self) {
        self.rows_finished += other.rows_finished;
        self.prefill_tokens += other.prefill_tokens;
        self.prefill_seconds += other.prefill_seconds;
        self.reused_prefix_tokens += other.reused_prefix_tokens;
        self.decode_steps += other.decode_steps;
        self.live_row_steps += other.live_row_steps;
        self.padded_row_steps += other.padded_row_steps;
        self.decode_seconds += other.decode_seconds;
        self.wall_seconds += other.wall_seconds;
    }

    /// Whether a run can have counted so far: a damaged log may hold any number.
    pub fn is_possible(&self) -> bool {
        [
            self.rows_finished,
            self.prefill_tokens,
            self.reused_prefix_tokens,
            self.decode_steps,
            self.live_row_steps,
            self.padded_row_steps,
        ]
        .into_iter()
        .all(|n| n <= MAX_COUNT)
    }

    pub fn prefill_tokens_per_s(&self) -> Option<f64> {
        rate(self.prefill_tokens, self.prefill_seconds)
    }

    /// Generated tokens of live rows over decode time.
    pub fn decode_tokens_per_s(&self) -> Option<f64> {
        rate(self.live_row_steps, self.decode_seconds)
    }

    pub fn rows_per_s(&self) -> Option<f64> {
        rate(self.rows_finished, self.wall_seconds)
    }

    /// Live row-steps over all row-steps, 0 to 1.
    pub fn occupancy(&self) -> Option<f64> {
        let all = self.live_row_steps + self.padded_row_steps;
        (all > 0).then(|| self.live_row_steps as f64 / all as f64)
    }

    pub fn engine_seconds(&self) -> f64 {
        self.prefill_seconds + self.decode_seconds
    }

    /// Share of the wall time spent outside the engine, 0 to 1.
    pub fn outside_share(&self) -> Option<f64> {
        (self.wall_seconds > 0.0)
            .then(|| (1.0 - self.engine_seconds() / self.wall_seconds).max(0.0))
    }
}

/// Count over time; absent when nothing was counted or no time was measured.
fn rate(count: u64, seconds: f64) -> Option<f64> {
    (count > 0 && seconds > 0.0).then(|| count as f64 / seconds)
}

/// A line of `throughput.jsonl`.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ThroughputLine {
    pub schema: String,
    /// Which session of the run, counted from 0.
    pub session: usize,
    /// Batches of the session, counted from 0.
    pub batch: u64,
    pub elapsed_seconds: f64,
    pub rows_started: u64,
    pub rows_finished: u64,
    pub prefill_tokens: u64,
    pub prefill_seconds: f64,
    pub prefill_tokens_per_s: Option<f64>,
    pub reused_prefix_tokens: u64,
    pub decode_steps: u64,
    pub live_row_steps: u64,
    pub padded_row_steps: u64,
    pub decode_seconds: f64,
    pub decode_tokens_per_s: Option<f64>,
    pub occupancy: Option<f64>,
    pub bytes_moved: Option<u64>,
    /// Means of the device's samples since the last line.
    pub device_power_watts: Option<f64>,
    pub device_sm_clock_mhz: Option<f64>,
    pub device_memory_clock_mhz: Option<f64>,
    /// Share of the time in which some kernel ran.
    pub device_utilization: Option<f64>,
    /// Sums over the session up to and with this batch.
    pub totals: ThroughputTotals,
}

/// The log of one session. The clock starts with the log: open it after loading and warm-up.
pub struct ThroughputLog {
    lines: JsonLines,
    session: usize,
    started: Instant,
    n_batches: u64,
    totals: ThroughputTotals,
    meter: Option<DeviceMeter>,
}

impl ThroughputLog {
    pub fn open(run_dir: &Path, session: usize) -> Self {
        Self {
            lines: JsonLines::open(run_dir.join(THROUGHPUT_FILE)),
            session,
            started: Instant::now(),
            n_batches: 0,
            totals: ThroughputTotals::default(),
            meter: None,
        }
    }

    /// Puts a device's figures into the lines: those from now on.
    pub fn watch(&mut self, meter: Option<DeviceMeter>) {
        if let Some(meter) = &meter {
            meter.begin();
        }
        self.meter = meter;
    }

    /// Writes a batch's line and adds it to the totals.
    pub fn record(&mut self, batch: &BatchTiming) {
        self.totals.add_batch(batch);
        self.totals.wall_seconds = self.started.elapsed().as_secs_f64();
        let mut alone = ThroughputTotals::default();
        alone.add_batch(batch);
        let meter = self.meter.as_ref();
        let device: DeviceLoad = meter.map(DeviceMeter::take).unwrap_or_default();
        self.lines.append(&ThroughputLine {
            schema: THROUGHPUT_SCHEMA.to_owned(),
            session: self.session,
            batch: self.n_batches,
            elapsed_seconds: self.totals.wall_seconds,
            rows_started: batch.rows_started,
            rows_finished: batch.rows_finished,
            prefill_tokens: batch.prefill_tokens,
            prefill_seconds: batch.prefill_seconds,
            prefill_tokens_per_s: alone.prefill_tokens_per_s(),
            reused_prefix_tokens: batch.reused_prefix_tokens,
            decode_steps: batch.decode_steps,
            live_row_steps: batch.live_row_steps,
            padded_row_steps: batch.padded_row_steps,
            decode_seconds: batch.decode_seconds,
            decode_tokens_per_s: alone.decode_tokens_per_s(),
            occupancy: alone.occupancy(),
            bytes_moved: batch.bytes_moved,
            device_power_watts: device.power_watts,
            device_sm_clock_mhz: device.sm_clock_mhz,
            device_memory_clock_mhz: device.memory_clock_mhz,
            device_utilization: device.utilization,
            totals: self.totals,
        });
        self.n_batches += 1;
    }

    /// The session's sums so far.
    pub fn totals(&self) -> ThroughputTotals {
        ThroughputTotals {
            wall_seconds: self.started.elapsed().as_secs_f64(),
            ..self.totals
        }
    }

    /// Closes the log. The totals are valid whether or not the file could be written.
    pub fn finish(mut self) -> (ThroughputTotals, Result<(), TelemetryError>) {
        let totals = self.totals();
        (totals, self.lines.finish())
    }
}

/// The sums of a session as far as its log goes: what a killed session had reached. Absent when
/// the log has no readable line of it.
pub fn read_totals(run_dir: &Path, session: usize) -> Option<ThroughputTotals> {
    let file = std::fs::File::open(run_dir.join(THROUGHPUT_FILE)).ok()?;
    std::io::BufReader::new(file)
        .lines()
        .map_while(Result::ok)
        .filter_map(|line| serde_json::from_str::<ThroughputLine>(&line).ok())
        .filter(|line| line.session == session)
        .last()
        .map(|line| line.totals)
        .filter(ThroughputTotals::is_possible)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::test_dir::TestDir;

    fn batch() -> BatchTiming {
        BatchTiming {
            rows_started: 4,
            rows_finished: 3,
            prefill_tokens: 400,
            prefill_seconds: 0.5,
            reused_prefix_tokens: 96,
            decode_steps: 10,
            live_row_steps: 30,
            padded_row_steps: 10,
            decode_seconds: 2.0,
            bytes_moved: None,
        }
    }

    #[test]
    fn rates_keep_prefill_decode_and_padding_apart() {
        let mut totals = ThroughputTotals::default();
        assert_eq!(totals.decode_tokens_per_s(), None);
        assert_eq!(totals.occupancy(), None);
        totals.add_batch(&batch());
        totals.wall_seconds = 5.0;
        assert_eq!(totals.prefill_tokens_per_s(), Some(800.0));
        assert_eq!(totals.decode_tokens_per_s(), Some(15.0));
        assert_eq!(totals.occupancy(), Some(0.75));
        assert_eq!(totals.outside_share(), Some(0.5));
        let mut both = totals;
        both.add(&totals);
        assert_eq!(both.live_row_steps, 60);
        assert_eq!(both.decode_tokens_per_s(), Some(15.0));
    }

    #[test]
    fn a_killed_session_is_read_back_up_to_its_last_line() {
        let dir = TestDir::new("throughput");
        let mut log = ThroughputLog::open(dir.path(), 0);
        log.record(&batch());
        log.record(&batch());
        drop(log);
        let path = dir.path().join(THROUGHPUT_FILE);
        let mut bytes = std::fs::read(&path).expect("the log was just written");
        bytes.extend_from_slice(b"{\"schema\":\"podium.thr");
        std::fs::write(&path, bytes).expect("the test folder is writable");

        let mut log = ThroughputLog::open(dir.path(), 1);
        log.record(&batch());
        let (totals, written) = log.finish();
        written.expect("the test folder is writable");
        assert_eq!(totals.live_row_steps, 30);
        let killed = read_totals(dir.path(), 0).expect("session 0 has lines");
        assert_eq!(killed.live_row_steps, 60);
        assert_eq!(read_totals(dir.path(), 2), None);
        let text = std::fs::read_to_string(&path).expect("the log was just written");
        assert_eq!(text.lines().count(), 3);
    }
}
