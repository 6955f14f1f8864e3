//! Flags and help. Turns what was typed into a checked configuration; opens no model.

pub mod eval;
pub mod print;
pub mod values;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Competition prompt files in, scored submissions out, on a GPT-OSS engine that keeps 4-bit
/// weights in 4 bits.
#[derive(Debug, Parser)]
#[command(
    name = "podium",
    version,
    propagate_version = true,
    arg_required_else_help = true,
    max_term_width = 100,
    after_help = "Examples:\n  \
        podium eval datasets/nano/mixed.jsonl\n  \
        podium eval val.jsonl --model ./gpt-oss-20b --reasoning high --samples 4 --temperature 1\n  \
        podium inspect val.jsonl\n  \
        podium plan --batch 64\n\n\
        Exit codes: 0 done, 1 done with rows in error, 2 could not run, 130/143 stopped by a signal."
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

/// What podium can be asked to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run prompt files through the model and write a scored submission for each
    Eval(Box<eval::EvalArgs>),
    /// Show how a prompt file is read: mapping, one rendered prompt, counts, baselines; no model runs
    Inspect(Box<eval::InspectArgs>),
    /// Show the bytes of a model by class and how many slots and positions fit
    Plan(Box<eval::PlanArgs>),
    /// Set runs of the same questions side by side; the first is the base
    Compare(CompareArgs),
    /// Judge a run's saved replies again, without the model
    Score(ScoreArgs),
    /// Read a written submission back as the competition would
    Lint(LintArgs),
    /// Write the page of a run: one HTML file that needs no network
    Report(ReportArgs),
    /// Join the runs of several shards into one complete run
    Merge(MergeArgs),
    /// Write a checkpoint in another precision
    Quantize(QuantizeArgs),
    /// Write a full-size checkpoint of lively random weights
    Synth(SynthArgs),
    /// Write teacher-forced logits and greedy continuations of token sequences as JSONL
    Logits(LogitsArgs),
    /// Prove on this machine that a row's bits depend neither on its batch nor on the instruction
    /// set
    Selfcheck(SelfcheckArgs),
    /// Measure the engine on fixed workloads, beside what the device could give
    Bench(BenchArgs),
}

/// Arguments of `podium compare`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  podium compare val-4bit val-8bit\n  \
        podium compare submissions/val-4bit-1a2b3c4d submissions/val-8bit-5e6f7a8b --json")]
pub struct CompareArgs {
    /// Runs to compare, the base first: paths, unique prefixes or `latest`
    #[arg(required = true, num_args = 2.., value_name = "RUN")]
    pub runs: Vec<String>,
    /// Compare although more than the precision differs; the heading names what
    #[arg(long)]
    pub force: bool,
    /// Also score the base's outputs under the other runs' precisions, teacher-forced: divergence,
    /// agreement and perplexity by position; loads the model in both
    #[arg(long)]
    pub divergence: bool,
    /// Folder of the comparison [default: submissions/compare-A-vs-B]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// The whole comparison as one object on stdout instead of the tables
    #[arg(long)]
    pub json: bool,
    /// Seed of the bootstrap and the permutation test
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
}

/// Arguments of `podium score`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The log is never rewritten: scores.csv, the submission, run.json's tally and the page are made\n\
    anew from it.\n\nExample:\n  podium score latest --profile mine.toml"
)]
pub struct ScoreArgs {
    /// A run: its folder, a unique prefix of its name, or `latest`
    pub run: String,
    /// Profile whose rules judge, and whose columns are written [default: the run's own]
    #[arg(long, value_name = "NAME|FILE")]
    pub profile: Option<String>,
    /// The run's data set, where it is no longer at the path it was read from
    #[arg(long, value_name = "FILE")]
    pub dataset: Option<PathBuf>,
    /// A field of the package's meta data; it wins over the run's own. May be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub meta: Vec<String>,
    /// One object on stdout instead of the table
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `podium lint`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit codes: 0 nothing wrong, 1 something is wrong, 2 it could not be read.\n\n\
    Examples:\n  podium lint latest\n  \
    podium lint submission.zip --profile curebench --dataset curebench_testset.jsonl"
)]
pub struct LintArgs {
    /// A .csv, .jsonl or .zip, or a run: its folder, a unique prefix of its name, or `latest`
    pub submission: String,
    /// Profile whose columns and rules it should have [default: the run's own]
    #[arg(long, value_name = "NAME|FILE")]
    pub profile: Option<String>,
    /// Data set whose ids and options it should have [default: the run's own]
    #[arg(long, value_name = "FILE")]
    pub dataset: Option<PathBuf>,
    /// One object on stdout instead of the text
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `podium report`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  podium report latest")]
pub struct ReportArgs {
    /// A run: its folder, a unique prefix of its name, or `latest`
    #[arg(default_value = "latest")]
    pub run: String,
}

/// Arguments of `podium merge`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  podium merge submissions/val-1of2 submissions/val-2of2 --out submissions/val"
)]
pub struct MergeArgs {
    /// Runs of one evaluation's shards: paths, unique prefixes or `latest`
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<String>,
    /// Folder of the joined run [default: the runs' common name under submissions/]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Join runs of different numerics; each row then names its own
    #[arg(long)]
    pub allow_mixed: bool,
    /// One summary object on stdout instead of the table
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `podium quantize`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The output has the released Hugging Face layout: MXFP4 experts with 4bit, bf16 experts with 16bit,\n\
    all other tensors byte for byte as they were. The other precisions have no file layout; `eval\n\
    --precision` makes them while loading.\n\n\
    Examples:\n  podium quantize ./gpt-oss-20b-bf16 ./gpt-oss-20b-mxfp4 --precision 4bit\n  \
    podium quantize nano ./nano-bf16 --precision 16bit"
)]
pub struct QuantizeArgs {
    /// Checkpoint folder, `nano`, `synthetic:SHAPE[:layers=N][:SEED]` or a hub id
    #[arg(value_name = "IN")]
    pub input: String,
    /// Folder to write; it must not exist yet or be empty
    #[arg(value_name = "OUT")]
    pub output: PathBuf,
    /// 4bit or 16bit
    #[arg(long, value_name = "PRECISION")]
    pub precision: String,
    /// Largest file, such as 5GB; a tensor is never cut
    #[arg(long, value_name = "BYTES", default_value = "5GB")]
    pub shard_size: values::Bytes,
    /// No progress
    #[arg(short, long)]
    pub quiet: bool,
    /// One object on stdout instead of the text
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `podium synth`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The checkpoint has the released Hugging Face layout with MXFP4 experts, and a byte-level tokenizer\n\
    with gpt-oss's special tokens under their ids: what it takes to load, run and time a model of\n\
    that size where no released weights are at hand. Its replies mean nothing.\n\n\
    Example:\n  podium synth ./random-20b --shape gpt-oss-20b        writes 13.8 GB"
)]
pub struct SynthArgs {
    /// Folder to write; it must not exist yet or be empty
    #[arg(value_name = "OUT")]
    pub output: PathBuf,
    /// gpt-oss-20b, gpt-oss-120b, or a config.json
    #[arg(long, value_name = "SHAPE")]
    pub shape: String,
    /// Seed of the weights
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Largest file, such as 5GB; a tensor is never cut
    #[arg(long, value_name = "BYTES", default_value = "5GB")]
    pub shard_size: values::Bytes,
    /// No progress
    #[arg(short, long)]
    pub quiet: bool,
    /// One object on stdout instead of the text
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `podium logits`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Each input line is {\"prompt\": NAME, \"tokens\": [...], \"n_greedy\": N}. For every position of\n\
    the prompt and its greedy continuation a line {\"prompt\", \"position\", \"top\", \"logsumexp\"} is\n\
    written, then one line {\"prompt\", \"greedy\"}.\n\n\
    Example:\n  podium logits ./gpt-oss-20b input.jsonl --exact > logits.jsonl"
)]
pub struct LogitsArgs {
    /// Checkpoint folder, `nano`, `synthetic:SHAPE[:layers=N][:SEED]` or a hub id
    pub model: String,
    /// JSONL file of token sequences, or `-` for standard input
    pub input: PathBuf,
    /// All logits of a position (`logits`), not only the 20 highest
    #[arg(long)]
    pub full: bool,
    /// Rows of one prefill pass
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = values::positive)]
    pub prefill_rows: usize,
    #[command(flatten)]
    pub numerics: eval::NumericsArgs,
}

/// Arguments of `podium selfcheck`.
#[derive(Debug, clap::Args)]
pub struct SelfcheckArgs {
    /// Checkpoint folder, `nano`, `synthetic:SHAPE[:layers=N][:SEED]` or a hub id
    #[arg(long, default_value = crate::job::nano::NANO)]
    pub model: String,
    /// Rows to run, each in every way
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = values::up_to::<4096>)]
    pub rows: usize,
    #[command(flatten)]
    pub numerics: eval::NumericsArgs,
}

/// Arguments of `podium bench`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Workloads (rows x shared+prompt/output tokens): single 1 x 128/256, b64 64 x 512/512, b256\n\
    256 x 512/512, prefill 64 x 2048/1, prefix 512 x 1024+64/128, prefix-long 256 x 8192+64/128,\n\
    smoke 4 x 64/16; mixed 1024 x 100..1000/about 512, up to 4096, 256 at once. For a CPU:\n\
    prefill-512 1 x 513/1, decode-1 1 x 16/32, decode-8 8 x 16/32, decode-32 32 x 16/16,\n\
    decode-64 64 x 16/16. Others by their shape: ROWSxPROMPT/OUTPUT or ROWSxSHARED+PROMPT/OUTPUT, all rows\n\
    at once. No token ends a row.\n\n\
    Examples:\n  podium bench --workload b64,b256 --json\n  \
    podium bench --workload 8x512/64,8x4096+64/64\n  \
    podium bench --device cpu --model synthetic:gpt-oss-20b:layers=6 --workload decode-8"
)]
pub struct BenchArgs {
    /// `synthetic:SHAPE[:layers=N][:SEED]` with gpt-oss-20b, gpt-oss-120b or a config.json
    #[arg(long, default_value = "synthetic:gpt-oss-20b")]
    pub model: String,
    /// cpu, cuda, cuda:N, or auto: a GPU that podium can use, else the CPU
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: values::Device,
    /// Workloads or their shapes, with commas between [default: b64; on the CPU its five]
    #[arg(long, value_name = "NAME|SHAPE")]
    pub workload: Option<String>,
    /// Precision of the weights [default: 4bit]
    #[arg(long, value_name = "PRECISION")]
    pub precision: Option<String>,
    /// Runs that are measured, after one that warms up
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = values::positive)]
    pub repeats: usize,
    /// Rows of one prefill pass [default: 16384; on the CPU 512]
    #[arg(long, value_name = "N", value_parser = values::positive)]
    pub prefill_rows: Option<usize>,
    /// CPU threads [default: all the process may use]
    #[arg(long, value_name = "N", value_parser = values::threads)]
    pub threads: Option<usize>,
    /// f32 activations and KV cache; the CPU alone
    #[arg(long)]
    pub exact: bool,
    /// Decode steps enqueued at a time
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = values::positive)]
    pub steps_per_call: usize,
    /// 0 is greedy
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = values::temperature)]
    pub temperature: f32,
    /// Put rows of unequal lengths into an order that does not know their lengths, as where stop
    /// tokens end them
    #[arg(long)]
    pub hide_lengths: bool,
    /// Also time each kernel
    #[arg(long)]
    pub kernels: bool,
    /// In place of workloads: time every block shape of each product at these numbers of rows
    #[arg(long, value_name = "ROWS", value_delimiter = ',', value_parser = values::positive)]
    pub variants: Vec<usize>,
    /// One object a workload on stdout instead of the table
    #[arg(long)]
    pub json: bool,
}
