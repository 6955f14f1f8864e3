//! podium runs a competition's prompt file through its own static-batched GPT-OSS engine and
//! writes a scored submission.
//!
//! Data goes one way; each arrow is a plain owned type:
//!
//! ```text
//! dataset -> prompt -> tokens -> batch -> engine -> text -> score -> submission
//! Record     Prompt    TokenIds  Batch    Generation String Score   Row
//! ```
//!
//! Telemetry and report stand at the side: the engine returns counts and times as values, the
//! job records them, the report reads finished files.

pub mod batch;
pub mod cli;
pub mod dataset;
pub mod engine;
pub mod error;
pub mod hub;
pub mod job;
pub mod profile;
pub mod prompt;
pub mod quant;
pub mod report;
pub mod score;
pub mod stats;
pub mod submission;
pub mod telemetry;
pub mod tokenizer;

/// Runs a command and gives the process's exit code.
///
/// # Errors
/// Why the command could not be done.
pub fn run(cli: cli::Cli) -> Result<u8, error::Error> {
    use cli::Command;
    let code = match cli.command {
        Command::Eval(args) => {
            let config = match &args.config {
                Some(path) => cli::eval::read_config(path)?,
                None => cli::eval::ConfigFile::default(),
            };
            job::eval::eval(&args, config)?
        }
        Command::Inspect(args) => job::inspect::inspect(&args)?,
        Command::Plan(args) => job::plan::plan_command(&args)?,
        Command::Compare(args) => job::compare::compare_command(&args)?,
        Command::Score(args) => job::score::score_command(&args)?,
        Command::Lint(args) => job::lint::lint_command(&args)?,
        Command::Report(args) => job::report::report_command(&args)?,
        Command::Merge(args) => job::merge::merge_command(&args)?,
        Command::Quantize(args) => job::quantize::quantize_command(&args)?,
        Command::Synth(args) => job::synth::synth_command(&args)?,
        Command::Logits(args) => job::logits::logits(&args)?,
        Command::Selfcheck(args) => job::selfcheck::selfcheck(&args)?,
        Command::Bench(args) => job::bench::bench(&args)?,
    };
    Ok(code)
}
