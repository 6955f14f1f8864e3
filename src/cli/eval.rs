//! Arguments of `eval`, `inspect` and `plan`, and the configuration file that repeats a run.
//!
//! Every option is absent unless it was typed or stands in the `--config` file; [`Options::or`]
//! lays one over the other. Defaults are applied where the value is used, so that `run.json`
//! can say where each effective value came from.

use std::path::{Path, PathBuf};

use super::values::{self, AutoOr, Bytes, Device, Seconds, Shard};
use crate::prompt::Reasoning;
use crate::submission::identity::MAX_SAMPLES;

/// Arguments of `podium eval`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    podium eval datasets/nano/mixed.jsonl\n  \
    podium eval a.jsonl b.csv --model openai/gpt-oss-20b --batch 32 --max-new-tokens 4096\n  \
    podium eval val.jsonl --samples 4 --temperature 1 --seed 7\n  \
    podium eval val.jsonl --shard 1/3            then: podium merge RUN RUN RUN\n  \
    podium eval --config submissions/RUN/run.json\n\n\
    The same command again resumes an interrupted run; a finished run prints its summary.")]
pub struct EvalArgs {
    /// Prompt files (.jsonl .json .csv, each also .gz), globs or folders
    #[arg(value_name = "DATASET")]
    pub datasets: Vec<PathBuf>,
    #[command(flatten)]
    pub options: Options,
    /// Repeat a run: its run.json, or a TOML file with option names as keys; flags win
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder of the run (one data set and one precision only) [default: submissions/RUN, named by data set, precision and a hash]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Start over: an existing folder is renamed aside, nothing is deleted
    #[arg(long)]
    pub fresh: bool,
    /// Go on in a folder of other numerics; each row then names its own
    #[arg(long)]
    pub allow_mixed: bool,
    /// Read, render and plan, print what would run, and stop before the model runs
    #[arg(long)]
    pub dry_run: bool,
    /// No progress, no ledger; errors and the summary only
    #[arg(short, long)]
    pub quiet: bool,
    /// One summary object on stdout instead of the table
    #[arg(long)]
    pub json: bool,
    /// Fill memory that holds nothing with NaN first, so that a wrong read shows in the output
    #[arg(long, hide = true)]
    pub poison: bool,
    /// Lose the device after so many calls of decode steps: in a run of the first attempt, of the
    /// second
    #[arg(long, hide = true, value_delimiter = ',', value_name = "N")]
    pub lose_device: Vec<usize>,
}

/// Arguments of `podium inspect`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
        podium inspect val.jsonl --model ./gpt-oss-20b --reasoning high\n  \
        podium inspect data/*.parquet --context 4096 --json")]
pub struct InspectArgs {
    /// Prompt files, globs or folders
    #[arg(required = true, value_name = "DATASET")]
    pub datasets: Vec<PathBuf>,
    /// Whose tokenizer counts the tokens: a checkpoint folder, `nano` or a hub id (no weights are
    /// downloaded)
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// Profile: a built-in name or a TOML file
    #[arg(long, value_name = "NAME|FILE")]
    pub profile: Option<String>,
    /// Reasoning effort of the rendered prompt
    #[arg(long, value_enum)]
    pub reasoning: Option<Reasoning>,
    /// Date line of the system message
    #[arg(long, value_name = "YYYY-MM-DD", value_parser = values::date)]
    pub date: Option<String>,
    /// Count the prompts that leave no room in so many positions [default: the model's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub context: Option<u32>,
    /// One object for each data set on stdout
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `podium plan`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    podium plan ./gpt-oss-20b --batch 64 --context 4096 --host-memory 32GiB\n  \
    podium plan --shape gpt-oss-20b --card a100-40\n  \
    podium plan --shape gpt-oss-120b --card 80GiB --precision 4bit\n\n\
    A card is planned for as it is when idle: its memory less what the CUDA context takes.")]
pub struct PlanArgs {
    /// Checkpoint folder, `nano`, `synthetic:SHAPE[:layers=N][:SEED]` or a hub id (no weights are downloaded)
    /// [default: nano]
    #[arg(conflicts_with = "shape")]
    pub model: Option<String>,
    /// Plan for a published shape without its weights: gpt-oss-20b or gpt-oss-120b
    #[arg(long, value_name = "SHAPE")]
    pub shape: Option<String>,
    /// Plan for a GPU that need not be here: t4-16, l4-24, 4090-24, a100-40, a100-80, h100-80,
    /// h200-141, or the bytes that it leaves, such as 22GiB
    #[arg(long, value_name = "NAME|BYTES", conflicts_with = "host_memory")]
    pub card: Option<String>,
    /// Precision of the weights, a policy of `eval` [default: as stored]
    #[arg(long, value_name = "PRECISION")]
    pub precision: Option<String>,
    /// Slots
    #[arg(long, value_name = "auto|N", default_value = "auto")]
    pub batch: AutoOr,
    /// Positions a row may reach
    #[arg(long, value_name = "auto|N", default_value = "auto")]
    pub context: AutoOr,
    /// Memory to plan for [default: what is available; an automatic batch takes a quarter of it]
    #[arg(long, value_name = "BYTES")]
    pub host_memory: Option<Bytes>,
    /// f32 activations and KV
    #[arg(long)]
    pub exact: bool,
    /// One object on stdout instead of the tables
    #[arg(long)]
    pub json: bool,
}

/// Arguments shared by the commands that run the engine on token sequences.
#[derive(Clone, Debug, clap::Args)]
pub struct NumericsArgs {
    /// auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Device,
    /// Precision of the weights, a policy of `eval` [default: as stored]
    #[arg(long, value_name = "PRECISION")]
    pub precision: Option<String>,
    /// f32 activations and KV
    #[arg(long)]
    pub exact: bool,
    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = values::threads)]
    pub threads: Option<usize>,
}

/// The options that make a run what it is; each may also stand in a `--config` file.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Options {
    /// Checkpoint folder, `nano`, `synthetic:SHAPE[:layers=N][:SEED]` (random weights of gpt-oss-20b, gpt-oss-120b
    /// or a config.json), or a hub id such as openai/gpt-oss-20b or OWNER/NAME@REVISION, out
    /// of the hub cache or downloaded into it [default: nano]
    #[arg(long, value_name = "MODEL", help_heading = "Model")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// 4bit, 8bit, 16bit, experts8, 4bit-dense8 or 4bit-dense4, or several with commas
    /// [default: as stored]
    #[arg(long, value_name = "PRECISION", help_heading = "Model")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<String>,
    /// auto, cpu, cuda or cuda:N [default: auto]
    #[arg(long, value_name = "DEVICE", help_heading = "Model")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<Device>,
    /// f32 activations and KV: slower, nearest to float32 arithmetic
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Model", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exact: Option<bool>,

    /// Profile: a TOML file or a built-in name (qa, choice, nano, aime, aimo, arc, bbh, curebench,
    /// gpqa, gsm8k, humaneval, medqa, mmlu, mmlu_pro, reasoning_gym) [default: nano for the nano model,
    /// else choice or qa by the rows]
    #[arg(long, value_name = "NAME|FILE", help_heading = "Prompt")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
    /// Reasoning effort [default: medium]
    #[arg(long, value_enum, help_heading = "Prompt")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<Reasoning>,
    /// Date line of the system message [default: none, so that runs repeat]
    #[arg(long, value_name = "YYYY-MM-DD", value_parser = values::date, help_heading = "Prompt")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub date: Option<String>,
    /// A field of the package's meta data; wins over the profile's. May be given several times
    #[arg(long, value_name = "KEY=VALUE", help_heading = "Prompt")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub meta: Option<Vec<String>>,
    /// Only the first N rows
    #[arg(long, value_name = "N", value_parser = values::positive, help_heading = "Prompt")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// Only shard I of N; `podium merge` joins them
    #[arg(long, value_name = "I/N", help_heading = "Prompt")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shard: Option<Shard>,
    /// Stop at the first bad row instead of writing it with status `error`
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Prompt", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strict: Option<bool>,

    /// Longest reply in tokens [default: the profile's, else 512 for nano, 32768 for others]
    #[arg(long, value_name = "N", value_parser = values::positive, help_heading = "Sampling")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_new_tokens: Option<usize>,
    /// With N tokens of that left in the analysis, close it and let the model answer; such rows are
    /// marked and also scored apart [default: 0, off]
    #[arg(long, value_name = "N", help_heading = "Sampling")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer_headroom: Option<usize>,
    /// 0 is greedy [default: the profile's, else 0]
    #[arg(
        long,
        value_name = "T",
        help_heading = "Sampling",
        allow_negative_numbers = true
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Keep the likeliest tokens that hold this share [default: the profile's, else 1]
    #[arg(
        long,
        value_name = "P",
        help_heading = "Sampling",
        allow_negative_numbers = true
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Keep the K likeliest tokens; 0 keeps all [default: the profile's, else 0]
    #[arg(long, value_name = "K", help_heading = "Sampling")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Samples a row [default: the profile's, else 1]
    #[arg(long, value_name = "K", value_parser = values::positive, help_heading = "Sampling")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub samples: Option<usize>,
    /// Leave out samples that can change neither the winner of a row's vote nor a tie; they are
    /// `not_run`
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Sampling", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stop: Option<bool>,
    /// Seed of the run [default: 0]
    #[arg(long, value_name = "S", help_heading = "Sampling")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,

    /// Slots that decode together [default: auto]
    #[arg(long, value_name = "auto|N", help_heading = "Machine")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<AutoOr>,
    /// Positions a row may reach [default: longest prompt + max-new-tokens, capped by the model]
    #[arg(long, value_name = "auto|N", help_heading = "Machine")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<AutoOr>,
    /// Memory for weights, KV and workspace, such as 4GiB [default: what is available; an
    /// automatic batch takes at most a quarter of it for KV and workspace]
    #[arg(long, value_name = "BYTES", help_heading = "Machine")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_memory: Option<Bytes>,
    /// Device memory for weights, KV and workspace on CUDA [default: what is free]
    #[arg(long, value_name = "BYTES", help_heading = "Machine")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_memory: Option<Bytes>,
    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = values::threads, help_heading = "Machine")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Stop after this time with what is done, such as 20m or 4h; the rest is `not_run`
    #[arg(long, value_name = "TIME", help_heading = "Machine")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_limit: Option<Seconds>,
    /// Plain static batches: a stopped slot waits for the batch's longest row
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Machine", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_refill: Option<bool>,
    /// Compute every prompt whole
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Machine", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_prefix_reuse: Option<bool>,
    /// Keep a hash of every step's logits with each row
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Machine", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_hash: Option<bool>,
}

impl Options {
    /// These options, with `under`'s where these are silent.
    pub fn or(self, under: Options) -> Options {
        macro_rules! lay {
            ($($field:ident)*) => {
                Options { $($field: self.$field.or(under.$field)),* }
            };
        }
        lay!(model precision device exact profile reasoning date meta limit shard strict
             max_new_tokens answer_headroom temperature top_p top_k samples early_stop seed batch context host_memory
             gpu_memory threads time_limit no_refill no_prefix_reuse trace_hash)
    }

    /// Whether numbers are in range, also those that a file gives, which clap has not seen; the
    /// message names the flag and the range.
    pub fn check(&self) -> Result<(), String> {
        for (flag, value, most) in [
            ("limit", self.limit, usize::MAX),
            ("max-new-tokens", self.max_new_tokens, usize::MAX),
            ("samples", self.samples, MAX_SAMPLES as usize),
            ("threads", self.threads, values::MAX_THREADS),
        ] {
            let Some(n) = value else { continue };
            if n == 0 {
                return Err(format!("`--{flag} 0` is not at least 1"));
            }
            if n > most {
                return Err(format!("`--{flag} {n}` is more than {most}"));
            }
        }
        if let Some(t) = self.temperature
            && !values::TEMPERATURES.contains(&t)
        {
            return Err(format!("`--temperature {t}` is not between 0 and 100"));
        }
        if let Some(p) = self.top_p
            && !(p > 0.0 && p <= 1.0)
        {
            return Err(format!("`--top-p {p}` is not above 0 and at most 1"));
        }
        Ok(())
    }
}

/// What a `--config` file holds: options, and for a run.json its data set.
#[derive(Debug, Default, PartialEq)]
pub struct ConfigFile {
    pub options: Options,
    pub datasets: Vec<PathBuf>,
}

/// Why a `--config` file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigFileError {
    #[error("cannot read the configuration `{path}`: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("`{path}` is not a podium configuration: {reason}")]
    Parse { path: PathBuf, reason: String },
}

impl ConfigFileError {
    /// How to mend it.
    pub fn hint(&self) -> String {
        match self {
            Self::Read { .. } => "give a run's run.json, or a TOML file".to_owned(),
            Self::Parse { .. } => {
                "keys are the option names without dashes in front, such as `max-new-tokens = 512`"
                    .to_owned()
            }
        }
    }
}

/// Reads a TOML file of options (with an optional `datasets` list), or a run's `run.json`.
///
/// # Errors
/// The file cannot be read, is neither, or names an option that does not exist.
pub fn read_config(path: &Path) -> Result<ConfigFile, ConfigFileError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigFileError::Read {
        path: path.to_owned(),
        source,
    })?;
    let parse = |reason: String| ConfigFileError::Parse {
        path: path.to_owned(),
        reason,
    };
    if path.extension().is_some_and(|e| e == "json") {
        let run: serde_json::Value =
            serde_json::from_str(&text).map_err(|e| parse(e.to_string()))?;
        let config = run
            .get("config")
            .and_then(|config| config.as_object())
            .ok_or_else(|| parse("it has no `config`".to_owned()))?;
        let set: serde_json::Map<String, serde_json::Value> = config
            .iter()
            .filter_map(|(name, setting)| Some((name.clone(), setting.get("value")?.clone())))
            .filter(|(_, value)| !value.is_null())
            .collect();
        let options = serde_json::from_value(set.into()).map_err(|e| parse(e.to_string()))?;
        let datasets = run
            .get("dataset_path")
            .and_then(|path| path.as_str())
            .map(unredacted)
            .into_iter()
            .collect();
        return Ok(ConfigFile { options, datasets });
    }
    let mut table: toml::Table = toml::from_str(&text).map_err(|e| parse(e.to_string()))?;
    let datasets = match table.remove("datasets") {
        None => Vec::new(),
        Some(value) => value
            .try_into()
            .map_err(|e: toml::de::Error| parse(e.to_string()))?,
    };
    let options = toml::Value::Table(table)
        .try_into()
        .map_err(|e: toml::de::Error| parse(e.message().to_owned()))?;
    Ok(ConfigFile { options, datasets })
}

/// A path as run.json keeps it, with the home folder back in place of `~`.
pub fn unredacted(path: &str) -> PathBuf {
    match (path.strip_prefix("~/"), std::env::var_os("HOME")) {
        (Some(rest), Some(home)) => PathBuf::from(home).join(rest),
        _ => PathBuf::from(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_a_file_has_the_range_of_its_flag() {
        let check = |text: &str| {
            let options: Options = toml::from_str(text).expect("it is TOML");
            options.check()
        };
        for good in ["samples = 1000000", "threads = 4096", "limit = 1"] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for (bad, message) in [
            ("samples = 0", "`--samples 0` is not at least 1"),
            (
                "samples = 1000001",
                "`--samples 1000001` is more than 1000000",
            ),
            ("threads = 0", "`--threads 0` is not at least 1"),
            ("threads = 4097", "`--threads 4097` is more than 4096"),
            ("limit = 0", "`--limit 0` is not at least 1"),
            (
                "max-new-tokens = 0",
                "`--max-new-tokens 0` is not at least 1",
            ),
            (
                "temperature = nan",
                "`--temperature NaN` is not between 0 and 100",
            ),
            ("top-p = inf", "`--top-p inf` is not above 0 and at most 1"),
        ] {
            assert_eq!(check(bad), Err(message.to_owned()), "{bad}");
        }
    }
}
