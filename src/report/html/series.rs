//! The run's own measurements as points over time, few enough to draw.

use std::io::BufRead;
use std::path::Path;

use crate::telemetry::memory::{MEMORY_FILE, MemoryEvent, MemoryLine};
use crate::telemetry::throughput::{
    BatchTiming, THROUGHPUT_FILE, ThroughputLine, ThroughputTotals,
};

/// Points a curve has at most.
const MAX_POINTS: usize = 300;

/// Memory over the running time of all sessions; absent values are gaps.
#[derive(Debug, Default, PartialEq, serde::Serialize)]
pub struct MemorySeries {
    pub seconds: Vec<f64>,
    pub anonymous_bytes: Vec<Option<u64>>,
    pub file_bytes: Vec<Option<u64>>,
    pub device_bytes: Vec<Option<u64>>,
    pub events: Vec<MemoryMark>,
}

/// A moment worth a line in the chart.
#[derive(Debug, PartialEq, serde::Serialize)]
pub struct MemoryMark {
    pub seconds: f64,
    pub event: MemoryEvent,
}

/// Speed over the running time of all sessions; absent values are gaps.
#[derive(Debug, Default, PartialEq, serde::Serialize)]
pub struct SpeedSeries {
    pub seconds: Vec<f64>,
    pub prefill_tokens_per_s: Vec<Option<f64>>,
    pub decode_tokens_per_s: Vec<Option<f64>>,
    pub occupancy: Vec<Option<f64>>,
    pub n_batches: usize,
}

/// Reads `memory.jsonl`. Time between sessions is left out: each begins where the last ended.
pub fn memory(run_dir: &Path) -> MemorySeries {
    let mut series = MemorySeries::default();
    let mut clock = Clock::default();
    let lines: Vec<MemoryLine> = read(&run_dir.join(MEMORY_FILE));
    let stride = lines.len().div_ceil(MAX_POINTS).max(1);
    for (index, line) in lines.iter().enumerate() {
        if clock.begins(line.session) {
            series.push(clock.offset, None);
        }
        let seconds = clock.at(line.session, line.elapsed_seconds);
        match line.event {
            // This line holds the session's highest values, not those of its moment; but until it
            // memory stayed as the last line had it, or a tick would have been written.
            Some(MemoryEvent::Peak) => {
                series.repeat_last(seconds);
                continue;
            }
            Some(event) => series.events.push(MemoryMark { seconds, event }),
            None if index % stride != 0 => continue,
            None => {}
        }
        series.push(seconds, Some(line));
    }
    series
}

impl MemorySeries {
    fn repeat_last(&mut self, seconds: f64) {
        let last = |values: &[Option<u64>]| values.last().copied().flatten();
        self.seconds.push(seconds);
        self.anonymous_bytes.push(last(&self.anonymous_bytes));
        self.file_bytes.push(last(&self.file_bytes));
        self.device_bytes.push(last(&self.device_bytes));
    }

    fn push(&mut self, seconds: f64, line: Option<&MemoryLine>) {
        self.seconds.push(seconds);
        self.anonymous_bytes
            .push(line.and_then(|line| line.process_anonymous_bytes));
        self.file_bytes
            .push(line.and_then(|line| line.process_file_bytes));
        self.device_bytes
            .push(line.and_then(|line| line.device_process_bytes.or(line.device_used_bytes)));
    }
}

/// Reads `throughput.jsonl`; a line of impossible counts is passed over. Neighbouring batches become one
/// point where there are too many; a point's rate is its tokens over its seconds.
pub fn speed(run_dir: &Path) -> SpeedSeries {
    let mut lines: Vec<ThroughputLine> = read(&run_dir.join(THROUGHPUT_FILE));
    lines.retain(|line| {
        let mut alone = ThroughputTotals::default();
        alone.add_batch(&timing(line));
        alone.is_possible()
    });
    let mut series = SpeedSeries {
        n_batches: lines.len(),
        ..SpeedSeries::default()
    };
    let mut clock = Clock::default();
    let stride = lines.len().div_ceil(MAX_POINTS).max(1);
    for lines in lines.chunk_by(|a, b| a.session == b.session) {
        for chunk in lines.chunks(stride) {
            let mut sum = ThroughputTotals::default();
            for line in chunk {
                if clock.begins(line.session) {
                    series.push(clock.offset, &ThroughputTotals::default());
                }
                clock.at(line.session, line.elapsed_seconds);
                sum.add_batch(&timing(line));
            }
            series.push(clock.now, &sum);
        }
    }
    series
}

impl SpeedSeries {
    fn push(&mut self, seconds: f64, sum: &ThroughputTotals) {
        self.seconds.push(seconds);
        self.prefill_tokens_per_s.push(sum.prefill_tokens_per_s());
        self.decode_tokens_per_s.push(sum.decode_tokens_per_s());
        self.occupancy.push(sum.occupancy());
    }
}

fn timing(line: &ThroughputLine) -> BatchTiming {
    BatchTiming {
        rows_started: line.rows_started,
        rows_finished: line.rows_finished,
        prefill_tokens: line.prefill_tokens,
        prefill_seconds: line.prefill_seconds,
        reused_prefix_tokens: line.reused_prefix_tokens,
        decode_steps: line.decode_steps,
        live_row_steps: line.live_row_steps,
        padded_row_steps: line.padded_row_steps,
        decode_seconds: line.decode_seconds,
        bytes_moved: line.bytes_moved,
    }
}

/// Running time over sessions, whose own clocks each begin at 0.
#[derive(Default)]
struct Clock {
    session: Option<usize>,
    offset: f64,
    now: f64,
}

impl Clock {
    /// Whether this session follows another one; then its time begins at the other's end.
    fn begins(&mut self, session: usize) -> bool {
        let follows = self.session.is_some_and(|before| before != session);
        if follows {
            self.offset = self.now;
        }
        self.session = Some(session);
        follows
    }

    fn at(&mut self, session: usize, elapsed_seconds: f64) -> f64 {
        self.session = Some(session);
        self.now = self.now.max(self.offset + elapsed_seconds);
        self.now
    }
}

/// The readable lines of a log; a torn one, or one of another version, is a missing measurement.
fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Vec<T> {
    let Ok(file) = std::fs::File::open(path) else {
        return Vec::new();
    };
    std::io::BufReader::new(file)
        .lines()
        .map_while(Result::ok)
        .filter_map(|line| serde_json::from_str(&line).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::memory::MemoryLog;
    use crate::telemetry::test_dir::TestDir;
    use crate::telemetry::throughput::ThroughputLog;
    use std::time::Duration;

    #[test]
    fn sessions_follow_each_other_with_a_gap_between() {
        let dir = TestDir::new("series");
        for session in 0..2 {
            let memory = MemoryLog::start(dir.path(), session, Duration::from_secs(9), None);
            memory.event(MemoryEvent::Load, None);
            memory.finish().1.expect("the folder is writable");
            let mut log = ThroughputLog::open(dir.path(), session);
            log.record(&BatchTiming {
                prefill_tokens: 10,
                prefill_seconds: 0.5,
                live_row_steps: 30,
                padded_row_steps: 10,
                decode_seconds: 0.25,
                ..BatchTiming::default()
            });
            log.finish().1.expect("the folder is writable");
        }
        let memory = memory(dir.path());
        assert_eq!(memory.seconds.len(), 7);
        assert!(memory.seconds.is_sorted());
        assert_eq!(memory.anonymous_bytes[3], None, "the gap");
        assert!(memory.anonymous_bytes[4].is_some());
        assert_eq!(memory.events.len(), 4, "start and load, twice");
        let speed = speed(dir.path());
        assert_eq!(speed.decode_tokens_per_s, [Some(120.0), None, Some(120.0)]);
        assert_eq!(speed.prefill_tokens_per_s[0], Some(20.0));
        assert_eq!(speed.occupancy[0], Some(0.75));
        assert_eq!(speed.n_batches, 2);
    }

    #[test]
    fn many_batches_become_few_points_of_the_same_totals() {
        let dir = TestDir::new("series-many");
        let mut log = ThroughputLog::open(dir.path(), 0);
        for index in 0..1000 {
            log.record(&BatchTiming {
                live_row_steps: if index % 2 == 0 { 10 } else { 30 },
                decode_seconds: 0.5,
                ..BatchTiming::default()
            });
        }
        log.finish().1.expect("the folder is writable");
        let speed = speed(dir.path());
        assert_eq!(speed.n_batches, 1000);
        assert_eq!(speed.seconds.len(), 250);
        assert!(
            speed
                .decode_tokens_per_s
                .iter()
                .all(|rate| *rate == Some(40.0))
        );
        assert!(speed.prefill_tokens_per_s.iter().all(Option::is_none));
        assert_eq!(self::memory(dir.path()), MemorySeries::default(), "no file");
    }
    #[test]
    fn a_line_of_impossible_counts_is_passed_over() {
        let dir = TestDir::new("series-damaged");
        for live_row_steps in [10, u64::MAX - 5, 10] {
            // A log of its own for each, whose sums then hold.
            let mut log = ThroughputLog::open(dir.path(), 0);
            log.record(&BatchTiming {
                live_row_steps,
                padded_row_steps: 5,
                decode_seconds: 0.5,
                ..BatchTiming::default()
            });
            log.finish().1.expect("the folder is writable");
        }
        let speed = speed(dir.path());
        assert_eq!(speed.decode_tokens_per_s, [Some(20.0), Some(20.0)]);
    }
}
