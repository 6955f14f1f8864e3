//! The summary of a run: printed at its end, and again when a finished run is called once more.
//! Everything in it comes from the manifest. Two faces: [`Summary::render`] for a terminal, and
//! the struct itself as one JSON object (schema `podium.summary/1`).

use std::path::Path;

use super::lint::LintBrief;
use super::over_samples;
use super::table::{Align, Table, bold, bytes, duration, grouped, percent, printable, rate};
use crate::score::Status;
use crate::submission::lint::Lint;
use crate::submission::manifest::{Accuracy, LenientAccuracy, Outcome, RunManifest, Tally};
use crate::submission::write::status_name;
use crate::telemetry::device::DeviceLoad;
use crate::telemetry::memory::{MemorySummary, total_bytes};
use crate::telemetry::throughput::ThroughputTotals;

pub const SUMMARY_SCHEMA: &str = "podium.summary/1";

/// A run's figures. Absent ones were not measured.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Summary {
    pub schema: String,
    pub run: String,
    pub run_dir: String,
    pub dataset: String,
    pub model: String,
    pub precision: String,
    pub device: String,
    pub numerics_id: String,
    pub n_slots: usize,
    pub n_sessions: usize,
    /// How the newest session ended.
    pub outcome: Option<Outcome>,
    pub tally: Option<Tally>,
    /// Samples cut off by the token budget, over samples run.
    pub truncated_share: Option<f64>,
    /// Samples that ended by themselves without an answer, over samples run.
    pub unanswered_share: Option<f64>,
    /// Sums over all sessions; the rates below are over them.
    pub totals: ThroughputTotals,
    pub prefill_tokens_per_s: Option<f64>,
    /// Generated tokens of live rows over decode time.
    pub decode_tokens_per_s: Option<f64>,
    pub rows_per_s: Option<f64>,
    pub occupancy: Option<f64>,
    /// Share of the wall time spent outside the engine.
    pub outside_engine_share: Option<f64>,
    /// Of the newest session that made a token: from the start to it.
    pub first_token_seconds: Option<f64>,
    /// Of the newest session that measured it.
    pub memory: Option<MemorySummary>,
    pub memory_excess_bytes: Option<u64>,
    /// Of the newest session that sampled a device.
    #[serde(default)]
    pub device_load: Option<DeviceLoad>,
    /// What else the reader should know, a sentence each.
    pub notes: Vec<String>,
    /// Files written, by name in `run_dir`.
    pub files: Vec<String>,
    /// What reading the submission back found; absent when it could not be read.
    #[serde(default)]
    pub lint: Option<LintBrief>,
}

impl Summary {
    /// `files` are the names of the files in `run_dir` that the reader may want.
    pub fn new(
        manifest: &RunManifest,
        run_dir: &Path,
        files: Vec<String>,
        notes: Vec<String>,
    ) -> Self {
        let last = manifest.sessions.last();
        let memory = manifest
            .sessions
            .iter()
            .rev()
            .find_map(|session| session.memory);
        let totals = manifest.totals;
        let tally = manifest.tally.clone();
        Self {
            schema: SUMMARY_SCHEMA.to_owned(),
            run: manifest.name.clone(),
            run_dir: run_dir.to_string_lossy().into_owned(),
            dataset: manifest.dataset_path.clone(),
            model: manifest.model_path.clone(),
            precision: manifest.generation.precision.clone(),
            device: last.map_or_else(String::new, |session| session.device.clone()),
            numerics_id: last.map_or_else(String::new, |session| session.numerics_id.clone()),
            n_slots: last.map_or(0, |session| session.n_slots),
            n_sessions: manifest.sessions.len(),
            outcome: last.and_then(|session| session.outcome),
            truncated_share: tally.as_ref().and_then(|tally| {
                share(tally, &[Status::TruncatedAnalysis, Status::TruncatedFinal])
            }),
            unanswered_share: tally.as_ref().and_then(|tally| {
                share(
                    tally,
                    &[
                        Status::NoFinal,
                        Status::ToolCall,
                        Status::Malformed,
                        Status::NoAnswer,
                        Status::NotAnOption,
                    ],
                )
            }),
            tally,
            totals,
            prefill_tokens_per_s: totals.prefill_tokens_per_s(),
            decode_tokens_per_s: totals.decode_tokens_per_s(),
            rows_per_s: totals.rows_per_s(),
            occupancy: totals.occupancy(),
            outside_engine_share: totals.outside_share(),
            first_token_seconds: manifest
                .sessions
                .iter()
                .rev()
                .find_map(|session| session.first_token_seconds),
            memory_excess_bytes: memory.and_then(|memory| memory.excess_bytes()),
            memory,
            device_load: manifest
                .sessions
                .iter()
                .rev()
                .find_map(|session| session.device_load),
            notes: lost_note(manifest).into_iter().chain(notes).collect(),
            files,
            lint: None,
        }
    }

    #[must_use]
    pub fn with_lint(mut self, lint: Option<&Lint>) -> Self {
        self.lint = lint.map(LintBrief::of);
        self
    }

    /// One JSON object on one line.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a summary has only text keys")
    }

    /// A table of at most 80 columns, unless a path is longer.
    pub fn render(&self, color: bool) -> String {
        let mut sections = vec![self.heading(color)];
        if let Some(tally) = &self.tally {
            let found = tally.lenient.as_ref().and_then(lenient_words);
            let table = accuracy_table(tally).render(color);
            sections.push(table + &found.unwrap_or_default());
            if let Some(figures) = &tally.over_samples {
                sections.push(over_samples::render(figures, color));
            }
            sections.push(status_table(tally).render(color));
        }
        sections.push(self.speed_table().render(color));
        if !self.files.is_empty() {
            let files = self.files.join("  ");
            sections.push(format!("written to {}\n{}", self.run_dir, wrapped(&files)));
        }
        if let Some(lint) = &self.lint {
            sections.push(lint.render());
        }
        for note in &self.notes {
            sections.push(wrapped(&format!("note: {}", printable(note))));
        }
        sections.join("\n")
    }

    fn heading(&self, color: bool) -> String {
        let run = printable(&self.run);
        let title = if color { bold(&run) } else { run };
        let mut table = Table::new(&[Align::Left, Align::Left]);
        table.push(vec!["dataset".to_owned(), self.dataset.clone()]);
        let model = format!("{}, {}", self.model, self.precision);
        table.push(vec!["model".to_owned(), model]);
        let place = format!(
            "{}, {}, {} slots",
            self.device, self.numerics_id, self.n_slots
        );
        table.push(vec!["ran on".to_owned(), place]);
        let sessions = match self.n_sessions {
            1 => String::new(),
            n => format!(" after {n} sessions"),
        };
        if let Some(outcome) = self.outcome {
            let state = format!("{}{sessions}", outcome_text(outcome));
            table.push(vec!["state".to_owned(), state]);
        }
        format!("{title}\n{}", table.render(color))
    }

    fn speed_table(&self) -> Table {
        let mut table = Table::new(&[Align::Left, Align::Right, Align::Left]);
        let mut line = |label: &str, value: Option<String>, unit: &str| {
            if let Some(value) = value {
                table.push(vec![label.to_owned(), value, unit.to_owned()]);
            }
        };
        let totals = &self.totals;
        line(
            "prefill",
            self.prefill_tokens_per_s.map(rate),
            &format!(
                "tokens/s ({} tokens, {} more reused)",
                grouped(totals.prefill_tokens),
                grouped(totals.reused_prefix_tokens)
            ),
        );
        line(
            "decode",
            self.decode_tokens_per_s.map(rate),
            &format!(
                "tokens/s of live rows ({} tokens)",
                grouped(totals.live_row_steps)
            ),
        );
        line(
            "rows",
            self.rows_per_s.map(rate),
            &format!("rows/s ({})", duration(totals.wall_seconds)),
        );
        line(
            "occupancy",
            self.occupancy.map(percent),
            "of row-steps were live",
        );
        line(
            "outside the engine",
            self.outside_engine_share.map(percent),
            &self
                .first_token_seconds
                .map_or("of the time".to_owned(), |seconds| {
                    format!("of the time; first token after {}", duration(seconds))
                }),
        );
        if let Some(memory) = &self.memory {
            line(
                "memory planned",
                memory.planned.map(|memory| bytes(total_bytes(&memory))),
                "weights, KV and workspace",
            );
            line(
                "memory allocated",
                memory.allocated.map(|memory| bytes(total_bytes(&memory))),
                "by the backend, counted",
            );
            let host = match memory.on_device {
                true => "host memory",
                false => "memory measured",
            };
            if memory.on_device {
                line(
                    "with the driver",
                    memory.planned_bytes().map(bytes),
                    "planned; context, code, graphs by estimate",
                );
                line(
                    "memory measured",
                    memory.peak_device_bytes.map(bytes),
                    "of this process on the GPU at most, by its driver",
                );
            }
            line(
                host,
                memory.growth_bytes.map(bytes),
                "growth of the process from before loading",
            );
        }
        if let Some(load) = &self.device_load {
            let clock = load
                .sm_clock_mhz
                .map(|mhz| format!(", {} MHz", grouped(mhz.round() as u64)));
            let busy = load
                .utilization
                .map(|share| format!(", busy {} of the time", percent(share)));
            let watts = load.power_watts.map(|watts| watts.round().to_string());
            let rest = [clock, busy].map(Option::unwrap_or_default).concat();
            line("GPU power", watts, &format!("W{rest}: means"));
        }
        line(
            "memory warning",
            self.memory_excess_bytes.map(bytes),
            "more than plan and slack",
        );
        table
    }
}

/// What the figures of a run cover whose device was lost.
fn lost_note(manifest: &RunManifest) -> Option<String> {
    let sessions = &manifest.sessions;
    let times = match sessions.iter().map(|session| session.n_lost_devices).sum() {
        0u32 => return None,
        1 => "once".to_owned(),
        n => format!("{n} times"),
    };
    Some(format!(
        "the device was lost {times}; rates and their time are over all {} sessions, loading \
         left out, and count what was in flight then as often as it was done; memory and first \
         token are the newest session's",
        sessions.len()
    ))
}

/// Samples of these statuses over samples run.
fn share(tally: &Tally, statuses: &[Status]) -> Option<f64> {
    let count = |status: &Status| {
        tally
            .statuses
            .get(status_name(*status))
            .copied()
            .unwrap_or(0)
    };
    let n_run = tally.n_samples.checked_sub(count(&Status::NotRun))?;
    let n_of: u64 = statuses.iter().map(count).sum();
    (n_run > 0).then(|| n_of as f64 / n_run as f64)
}

fn accuracy_table(tally: &Tally) -> Table {
    let mut table = Table::with_header(
        &[
            Align::Left,
            Align::Right,
            Align::Right,
            Align::Right,
            Align::Left,
        ],
        &["accuracy", "n", "correct", "share", "95 % interval"],
    );
    let mut line = |label: &str, accuracy: &Accuracy| {
        let interval = match (accuracy.low, accuracy.high) {
            (Some(low), Some(high)) => format!("{} to {}", percent(low), percent(high)),
            _ => String::new(),
        };
        table.push(vec![
            label.to_owned(),
            grouped(accuracy.n),
            grouped(accuracy.n_correct),
            accuracy.accuracy.map_or_else(String::new, percent),
            interval,
        ]);
    };
    let speaker = tally.over_samples.as_ref().map(over_samples::speaker);
    let all = speaker.map_or("all".to_owned(), |it| format!("all, {it}"));
    match &tally.lenient {
        None => line(&all, &tally.accuracy),
        Some(lenient) => {
            line(&format!("{all}, strict"), &tally.accuracy);
            line(&format!("{all}, lenient"), &lenient.accuracy);
        }
    }
    for group in &tally.by_group {
        line(&format!("  {}", group.group), &group.accuracy);
    }
    if let Some(closed) = &tally.closed {
        line("analysis closed at the headroom", closed);
    }
    for (label, baseline) in [
        ("baseline: most frequent", tally.majority_baseline),
        ("baseline: by chance", tally.random_baseline),
    ] {
        if let Some(baseline) = baseline {
            table.push(vec![
                label.to_owned(),
                String::new(),
                String::new(),
                percent(baseline),
            ]);
        }
    }
    table
}

/// What the lenient accuracy found; nothing where every reply has a strict answer.
pub(super) fn lenient_words(lenient: &LenientAccuracy) -> Option<String> {
    let words = format!(
        "Without a strict answer: {}; stating one elsewhere: {}; the right one: {}.",
        grouped(lenient.n_unanswered),
        grouped(lenient.n_found),
        grouped(lenient.n_gained),
    );
    (lenient.n_unanswered > 0).then(|| wrapped(&words))
}

fn status_table(tally: &Tally) -> Table {
    let mut table = Table::with_header(
        &[Align::Left, Align::Right, Align::Right],
        &["status", "samples", "share"],
    );
    let mut counted: Vec<(&String, &u64)> = tally.statuses.iter().collect();
    counted.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
    for (status, n) in counted {
        let share = percent(*n as f64 / tally.n_samples.max(1) as f64);
        table.push(vec![status.clone(), grouped(*n), share]);
    }
    table
}

fn outcome_text(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Complete => "complete",
        Outcome::Stopped => "stopped; the same command resumes",
        Outcome::TimeLimit => "time limit reached; the same command resumes",
        Outcome::Failed => "failed; the same command resumes",
        Outcome::Killed => "killed; the same command resumes",
    }
}

/// Words on lines of at most 80 characters.
pub(crate) fn wrapped(text: &str) -> String {
    const MAX_CHARS: usize = 80;
    let mut lines = String::new();
    let mut used = 0;
    for word in text.split_whitespace() {
        let n_chars = word.chars().count();
        if used > 0 && used + 1 + n_chars > MAX_CHARS {
            lines.push('\n');
            used = 0;
        } else if used > 0 {
            lines.push(' ');
            used += 1;
        }
        lines.push_str(word);
        used += n_chars;
    }
    lines.push('\n');
    lines
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::engine::BackendMemory;
    use crate::report::tally::tally;
    use crate::submission::ResultRow;
    use crate::submission::manifest::Session;
    use crate::submission::manifest::tests::manifest;
    use crate::submission::test_rows::{cut_off, row, unanswered, wrong};

    /// A finished run's manifest with every figure.
    pub(crate) fn finished() -> RunManifest {
        let mut manifest = manifest();
        let rows = [
            row("a", 0),
            wrong("b", 0, "1"),
            row("c", 0),
            cut_off("d", 0),
            unanswered("e", 0, Status::NoAnswer),
            unanswered("f", 0, Status::NotRun),
        ];
        let rows: Vec<&ResultRow> = rows.iter().collect();
        manifest.begin_session(
            Path::new("/nonexistent"),
            Session::start("cpu", "cpu/avx512", 8),
        );
        let planned = BackendMemory {
            weights_bytes: 100 << 20,
            kv_bytes: 20 << 20,
            workspace_bytes: 3 << 20,
        };
        let memory = MemorySummary {
            planned: Some(planned),
            allocated: Some(planned),
            peak_anonymous_bytes: Some(140 << 20),
            growth_bytes: Some(130 << 20),
            process_peak_bytes: Some(200 << 20),
            ..MemorySummary::default()
        };
        let totals = ThroughputTotals {
            rows_finished: 5,
            prefill_tokens: 4000,
            prefill_seconds: 2.0,
            reused_prefix_tokens: 1000,
            decode_steps: 100,
            live_row_steps: 600,
            padded_row_steps: 200,
            decode_seconds: 2.0,
            wall_seconds: 4.1,
        };
        manifest.end_session(Outcome::Complete, totals, Some(memory), Default::default());
        manifest.tally = Some(tally(&rows, &rows, Some(0.25)));
        manifest
    }

    fn summary() -> Summary {
        Summary::new(
            &finished(),
            Path::new("submissions/mixed-4bit-01234567"),
            vec!["submission.csv".to_owned(), "scores.csv".to_owned()],
            vec!["this is a demonstration model".to_owned()],
        )
    }

    #[test]
    fn the_table_is_aligned_and_narrow() {
        let text = summary().render(false);
        let expected = "\
mixed-4bit-01234567
dataset  datasets/nano/mixed.jsonl
model    nano, 4bit
ran on   cpu, cpu/avx512, 8 slots
state    complete

accuracy                 n  correct    share  95 % interval
all, strict              5        2   40.0 %  11.8 % to 76.9 %
all, lenient             5        3   60.0 %  23.1 % to 88.2 %
  sums                   5        2   40.0 %  11.8 % to 76.9 %
baseline: most frequent              100.0 %
baseline: by chance                   25.0 %
Without a strict answer: 2; stating one elsewhere: 1; the right one: 1.

status              samples   share
answered                  3  50.0 %
no_answer                 1  16.7 %
not_run                   1  16.7 %
truncated_analysis        1  16.7 %

prefill                 2,000  tokens/s (4,000 tokens, 1,000 more reused)
decode                    300  tokens/s of live rows (600 tokens)
rows                     1.22  rows/s (4.10 s)
occupancy              75.0 %  of row-steps were live
outside the engine      2.4 %  of the time
memory planned      123.0 MiB  weights, KV and workspace
memory allocated    123.0 MiB  by the backend, counted
memory measured     130.0 MiB  growth of the process from before loading

written to submissions/mixed-4bit-01234567
submission.csv scores.csv

note: this is a demonstration model
";
        assert_eq!(text, expected);
        assert!(text.lines().all(|line| line.chars().count() <= 80));
    }

    #[test]
    fn a_gpu_has_its_own_lines() {
        let mut summary = summary();
        summary.memory = summary.memory.map(|memory| MemorySummary {
            on_device: true,
            planned_driver_bytes: 2 << 20,
            peak_device_bytes: Some(124 << 20),
            ..memory
        });
        summary.device_load = Some(DeviceLoad {
            n_samples: 9,
            power_watts: Some(511.6),
            sm_clock_mhz: Some(1754.5),
            memory_clock_mhz: None,
            utilization: Some(0.97),
        });
        let text = summary.render(false);
        for line in [
            "with the driver     125.0 MiB  planned; context, code, graphs by estimate",
            "memory measured     124.0 MiB  of this process on the GPU at most, by its driver",
            "host memory         130.0 MiB  growth of the process from before loading",
            "GPU power                 512  W, 1,755 MHz, busy 97.0 % of the time: means",
        ] {
            assert!(text.contains(line), "{text}");
        }
        assert!(text.lines().all(|line| line.chars().count() <= 80));
    }

    #[test]
    fn shares_are_over_samples_run() {
        let summary = summary();
        assert_eq!(summary.truncated_share, Some(0.2));
        assert_eq!(summary.unanswered_share, Some(0.2));
        // serde_json may read a float one unit off, so the text is compared in its fields.
        let back: Summary = serde_json::from_str(&summary.to_json()).expect("our own object");
        assert_eq!((&back.run, back.totals), (&summary.run, summary.totals));
        assert_eq!(back.memory, summary.memory);
    }

    #[test]
    fn a_run_that_measured_nothing_prints_no_zeros() {
        let manifest = manifest();
        let text = Summary::new(&manifest, Path::new("x"), Vec::new(), Vec::new()).render(false);
        assert!(
            !text.contains("tokens/s") && !text.contains("memory"),
            "{text}"
        );
    }
}
