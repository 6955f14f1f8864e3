//! Workloads, those that have a name and others by their shape: how many rows, how long, and their prompts.

use std::borrow::Cow;
use std::sync::Arc;

use crate::batch::Job;
use crate::engine::kv::pages_for;
use crate::engine::sample::philox4x32;
use crate::engine::{EngineShape, PAGE_POSITIONS, TokenId};

/// How long the rows are in one respect.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lengths {
    Equal(usize),
    /// Both ends among them.
    Uniform {
        least: usize,
        most: usize,
    },
    /// Log-normal with this mean; what is longer than `most` is cut to it.
    LogNormal {
        mean: usize,
        most: usize,
    },
}

/// Standard deviation of the logarithm of a log-normal length: half of the lengths are then below
/// two thirds of the mean, and one in 350 is over eight times the mean.
const LOG_DEVIATION: f64 = 0.9;

/// Which length of a row a random number is for.
const OF_PROMPT: u32 = 1;
const OF_OUTPUT: u32 = 2;

impl Lengths {
    /// The length of a row, the same in every repeat.
    fn of(self, row: usize, which: u32) -> usize {
        let words = philox4x32([row as u32, which, 0, 0], [0x1E46, 0x7452]);
        // In (0, 1), so that its logarithm is finite.
        let unit = |word: u32| (f64::from(word) + 0.5) / 4_294_967_296.0;
        match self {
            Self::Equal(n) => n,
            Self::Uniform { least, most } => {
                least + (unit(words[0]) * (most - least + 1) as f64) as usize
            }
            Self::LogNormal { mean, most } => {
                // Box and Muller's normal.
                let radius = (-2.0 * unit(words[0]).ln()).sqrt();
                let normal = radius * (std::f64::consts::TAU * unit(words[1])).cos();
                let middle = (mean as f64).ln() - LOG_DEVIATION * LOG_DEVIATION / 2.0;
                let length = (middle + LOG_DEVIATION * normal).exp().round();
                (length as usize).clamp(1, most)
            }
        }
    }

    pub fn most(self) -> usize {
        match self {
            Self::Equal(n) => n,
            Self::Uniform { most, .. } | Self::LogNormal { most, .. } => most,
        }
    }
}

impl std::fmt::Display for Lengths {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Equal(n) => write!(f, "{n}"),
            Self::Uniform { least, most } => write!(f, "({least} to {most})"),
            Self::LogNormal { mean, most } => write!(f, "(about {mean}, up to {most})"),
        }
    }
}

/// Rows with a shared beginning, an own rest of the prompt, and a reply.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    pub name: Cow<'static, str>,
    pub n_rows: usize,
    /// Rows at once.
    pub n_slots: usize,
    pub shared: usize,
    pub prompt: Lengths,
    pub output: Lengths,
}

const fn equal(
    name: &'static str,
    [n_rows, n_slots]: [usize; 2],
    [shared, prompt, output]: [usize; 3],
) -> Workload {
    Workload {
        name: Cow::Borrowed(name),
        n_rows,
        n_slots,
        shared,
        prompt: Lengths::Equal(prompt),
        output: Lengths::Equal(output),
    }
}

/// All workloads by name.
pub const WORKLOADS: [Workload; 13] = [
    equal("smoke", [4, 4], [0, 64, 16]),
    equal("single", [1, 1], [0, 128, 256]),
    equal("b64", [64, 64], [0, 512, 512]),
    equal("b256", [256, 256], [0, 512, 512]),
    equal("prefill", [64, 64], [0, 2048, 1]),
    equal("prefix", [512, 256], [1024, 64, 128]),
    equal("prefix-long", [256, 256], [8192, 64, 128]),
    equal("prefill-512", [1, 1], [0, 513, 1]),
    equal("decode-1", [1, 1], [0, 16, 32]),
    equal("decode-8", [8, 8], [0, 16, 32]),
    equal("decode-32", [32, 32], [0, 16, 16]),
    equal("decode-64", [64, 64], [0, 16, 16]),
    Workload {
        name: Cow::Borrowed("mixed"),
        n_rows: 1024,
        n_slots: 256,
        shared: 0,
        prompt: Lengths::Uniform {
            least: 100,
            most: 1000,
        },
        output: Lengths::LogNormal {
            mean: 512,
            most: 4096,
        },
    },
];

/// Most rows, and most tokens of a row in one respect, of a workload that is told by its shape.
const MOST: usize = 1 << 20;

/// The workload that others are set beside.
pub const YARDSTICK: &str = "b256";

impl Workload {
    pub fn named(name: &str) -> Option<Self> {
        WORKLOADS.into_iter().find(|known| known.name == name)
    }

    /// The workload of a shape `ROWSxPROMPT/OUTPUT` or `ROWSxSHARED+PROMPT/OUTPUT`, all rows at once.
    pub fn of_shape(shape: &str) -> Option<Self> {
        let (n_rows, lengths) = shape.split_once('x')?;
        let (prompt, output) = lengths.split_once('/')?;
        let (shared, prompt) = prompt.split_once('+').unwrap_or(("0", prompt));
        let number = |text: &str, least| text.parse().ok().filter(|n| (least..=MOST).contains(n));
        let n_rows = number(n_rows, 1)?;
        Some(Self {
            name: Cow::Owned(shape.to_owned()),
            n_rows,
            n_slots: n_rows,
            shared: number(shared, 0)?,
            prompt: Lengths::Equal(number(prompt, 1)?),
            output: Lengths::Equal(number(output, 1)?),
        })
    }

    /// Tokens of a row's reply.
    pub fn output_of(&self, row: usize) -> usize {
        self.output.of(row, OF_OUTPUT)
    }

    pub fn n_output(&self) -> usize {
        (0..self.n_rows).map(|row| self.output_of(row)).sum()
    }

    /// Whether rows differ in length.
    pub fn is_mixed(&self) -> bool {
        !matches!(
            (self.prompt, self.output),
            (Lengths::Equal(_), Lengths::Equal(_))
        )
    }

    /// What the engine holds: every slot's longest row.
    pub fn shape(&self, prefill_rows: usize) -> EngineShape {
        let longest = self.shared + self.prompt.most() + self.output.most();
        let own = pages_for(longest) - self.shared / PAGE_POSITIONS;
        // A refill keeps a quarter as many pages free as there are rows.
        let n_pages = self.n_slots * own + pages_for(self.shared) + self.n_slots / 4 + 8;
        EngineShape {
            n_slots: self.n_slots,
            n_forks: if self.shared > 0 { 4 } else { 0 },
            n_pages,
            max_context: longest,
            prefill_rows,
        }
    }

    /// The rows of a repeat; their tokens are new in every one.
    pub fn jobs(&self, n_vocab: usize, repeat: u32) -> Vec<Job> {
        let token = |row: usize, i: usize| {
            let [word, ..] = philox4x32([row as u32, i as u32, repeat, 0], [0x70D1, 0xBE7C]);
            ((u64::from(word) * n_vocab as u64) >> 32) as TokenId
        };
        let shared: Vec<TokenId> = (0..self.shared).map(|i| token(usize::MAX, i)).collect();
        (0..self.n_rows)
            .map(|row| {
                let n_own = self.prompt.of(row, OF_PROMPT);
                let own = (0..n_own).map(|i| token(row, self.shared + i));
                let prompt: Arc<[TokenId]> = shared.iter().copied().chain(own).collect();
                Job {
                    row,
                    sample: 0,
                    prompt,
                    max_new_tokens: self.output_of(row),
                    row_hash: row as u64,
                    may_go_on: false,
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixed_rows_are_as_long_as_is_said() {
        let mixed = Workload::named("mixed").expect("it is listed");
        let jobs = mixed.jobs(1000, 0);
        let prompts: Vec<usize> = jobs.iter().map(|job| job.prompt.len()).collect();
        let outputs: Vec<usize> = jobs.iter().map(|job| job.max_new_tokens).collect();
        let ends =
            |lengths: &[usize]| (lengths.iter().min().copied(), lengths.iter().max().copied());
        let mean = |lengths: &[usize]| lengths.iter().sum::<usize>() / lengths.len();
        assert_eq!(jobs.len(), 1024);
        assert!(matches!(ends(&prompts), (Some(100..105), Some(995..=1000))));
        assert!((530..570).contains(&mean(&prompts)), "{}", mean(&prompts));
        assert_eq!(ends(&outputs).1, Some(4096));
        assert!((490..535).contains(&mean(&outputs)), "{}", mean(&outputs));
        // Lengths stay, tokens are new.
        let again = mixed.jobs(1000, 1);
        assert_ne!(again[0].prompt, jobs[0].prompt);
        assert!(again.iter().zip(&jobs).all(|(a, b)| {
            a.prompt.len() == b.prompt.len() && a.max_new_tokens == b.max_new_tokens
        }));
    }

    #[test]
    fn shapes_are_those_of_the_names() {
        for (name, shape) in [("b64", "64x512/512"), ("prefix-long", "256x8192+64/128")] {
            let named = Workload::named(name).expect("it is listed");
            let shaped = Workload::of_shape(shape).expect("it is a shape");
            assert_eq!(shaped.name, shape);
            assert_eq!(
                Workload {
                    name: named.name.clone(),
                    ..shaped
                },
                named
            );
        }
        for wrong in [
            "b64",
            "64",
            "64x",
            "64x512",
            "x512/1",
            "0x1/1",
            "1x0/1",
            "1x1/0",
            "1x1/1/1",
            "1x1+2+3/1",
            "-1x1/1",
            "1x1/2000000",
        ] {
            assert_eq!(Workload::of_shape(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_shared_beginning_is_shared_by_all() {
        let workload = Workload::named("prefix").expect("it is listed");
        let jobs = workload.jobs(1000, 3);
        let (first, last) = (&jobs[0].prompt, &jobs[511].prompt);
        assert_eq!(first[..1024], last[..1024]);
        assert_ne!(first[1024..], last[1024..]);
    }
}
