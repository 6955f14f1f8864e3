//! Progress on stderr: a bar on a terminal, a plain line every few seconds elsewhere.

use std::cell::RefCell;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::engine::generate::{StepKind, StepReport};
use crate::submission::ResultRow;

/// Time between two plain lines.
const LINE_PERIOD: Duration = Duration::from_secs(10);

/// Progress of one run.
pub struct Progress {
    bar: ProgressBar,
    /// Lines instead of a bar.
    plain: bool,
    state: RefCell<State>,
}

struct State {
    last_line: Instant,
    started: Instant,
    n_correct: usize,
    n_gold: usize,
    n_live: usize,
    decode_tokens: usize,
    decode_seconds: f64,
}

impl Progress {
    /// So many more samples have turned out to be needed.
    pub fn more(&self, n_jobs: usize) {
        self.bar.inc_length(n_jobs as u64);
    }

    /// Progress over `n_jobs` samples, `n_done` of them already in the log.
    pub fn new(n_jobs: usize, n_done: usize, quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let target = if quiet || !terminal {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        let bar = ProgressBar::with_draw_target(Some((n_jobs + n_done) as u64), target)
            .with_position(n_done as u64);
        let template = "{bar:20} {pos}/{len} rows, {elapsed}, {eta} left, {wide_msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.reset_eta();
        let now = Instant::now();
        Self {
            bar,
            plain: !quiet && !terminal,
            state: RefCell::new(State {
                last_line: now,
                started: now,
                n_correct: 0,
                n_gold: 0,
                n_live: 0,
                decode_tokens: 0,
                decode_seconds: 0.0,
            }),
        }
    }

    /// A sample is done.
    pub fn finished(&self, row: &ResultRow) {
        let mut state = self.state.borrow_mut();
        state.n_gold += usize::from(row.correct.is_some());
        state.n_correct += usize::from(row.correct == Some(true));
        drop(state);
        self.bar.inc(1);
    }

    /// A pass of the engine is done.
    #[allow(
        clippy::print_stderr,
        reason = "progress where there is no terminal for a bar"
    )]
    pub fn step(&self, report: &StepReport) {
        let mut state = self.state.borrow_mut();
        state.n_live = report.n_live;
        if report.kind == StepKind::Decode {
            state.decode_tokens += report.tokens;
            state.decode_seconds += report.seconds;
        }
        let mut message = format!("{} live", state.n_live);
        if state.decode_seconds > 0.0 {
            let rate = state.decode_tokens as f64 / state.decode_seconds;
            message += &format!(", decode {rate:.0} tok/s");
        }
        if state.n_gold > 0 {
            message += &format!(", correct {}/{}", state.n_correct, state.n_gold);
        }
        if self.plain && state.last_line.elapsed() >= LINE_PERIOD {
            state.last_line = Instant::now();
            let seconds = state.started.elapsed().as_secs();
            let (done, all) = (self.bar.position(), self.bar.length().unwrap_or_default());
            eprintln!("{done}/{all} rows after {seconds} s, {message}");
        }
        self.bar.set_message(message);
    }

    /// Takes the bar away; what follows is the summary.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }
}
