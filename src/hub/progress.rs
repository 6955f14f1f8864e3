//! Progress of a download on stderr: a bar on a terminal, a plain line every few seconds elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{BinaryBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Time between two plain lines.
const LINE_PERIOD: Duration = Duration::from_secs(10);

/// Bytes that have come, of those that are wanted.
pub struct Progress {
    bar: ProgressBar,
    quiet: bool,
    /// Lines instead of a bar.
    plain: bool,
    begun: Instant,
    last_line: Instant,
    /// Bytes that were there before.
    n_before: u64,
}

impl Progress {
    pub fn new(quiet: bool) -> Self {
        let now = Instant::now();
        Self {
            bar: ProgressBar::hidden(),
            quiet,
            plain: !std::io::stderr().is_terminal(),
            begun: now,
            last_line: now,
            n_before: 0,
        }
    }

    /// From now on `n_bytes` are counted, of which `n_before` are there.
    pub fn begin(&mut self, n_bytes: u64, n_before: u64) {
        let target = match self.quiet || self.plain {
            true => ProgressDrawTarget::hidden(),
            false => ProgressDrawTarget::stderr(),
        };
        self.bar = ProgressBar::with_draw_target(Some(n_bytes), target).with_position(n_before);
        let template = "{bar:20} {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec}, {eta} left, {wide_msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
        self.bar.reset_eta();
        self.n_before = n_before;
        self.begun = Instant::now();
        self.last_line = self.begun;
    }

    /// The file that is next.
    pub fn file(&self, name: &str) {
        self.bar.set_message(name.to_owned());
    }

    /// Bytes have come.
    pub fn add(&mut self, n_bytes: usize) {
        self.bar.inc(n_bytes as u64);
        if self.plain && self.last_line.elapsed() >= LINE_PERIOD {
            self.last_line = Instant::now();
            let (done, all) = (self.bar.position(), self.bar.length().unwrap_or_default());
            let new = done.saturating_sub(self.n_before) as f64;
            let rate = (new / self.begun.elapsed().as_secs_f64()) as u64;
            self.say(&format!(
                "{} of {}, {}/s",
                BinaryBytes(done),
                BinaryBytes(all),
                BinaryBytes(rate)
            ));
        }
    }

    /// Bytes that were counted are to come again.
    pub fn take_back(&mut self, n_bytes: u64) {
        self.bar.dec(n_bytes);
        self.n_before = self.n_before.saturating_sub(n_bytes);
    }

    /// A line beside the bar.
    #[allow(clippy::print_stderr, reason = "progress goes to stderr")]
    pub fn say(&self, line: &str) {
        if !self.quiet {
            self.bar.suspend(|| eprintln!("{line}"));
        }
    }

    /// Takes the bar away.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}
