//! `podium eval`: every data set in every precision asked for.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::JobError;
use super::attempt::Attempt;
use super::datasets;
use super::device;
use super::folder::{Opening, SUBMISSIONS};
use super::model::{self, OpenModel};
use super::prepare::{Prepared, prepare};
use super::report::page_after;
use super::run::{Run, Weights, second_budget};
use super::settings::{Effective, Layers, Settings};
use super::submit::{lint_after, with_meta};
use super::{precisions, signal};
use crate::cli::eval::{ConfigFile, EvalArgs};
use crate::cli::print;
use crate::cli::values::AutoOr;
use crate::dataset;
use crate::engine::checkpoint::Precision;
use crate::engine::cpu::CpuOptions;
use crate::hub::Part;
use crate::profile::Profile;
use crate::prompt::harmony;
use crate::report::inspection::indent;
use crate::report::summary::Summary;
use crate::report::table::color_wanted;
use crate::score::Aggregate;
use crate::submission::log::{self, RESULTS_FILE};
use crate::submission::manifest::{Outcome, RunManifest};
use crate::submission::questions::QUESTIONS_FILE;
use crate::submission::{Results, RowError};
use crate::telemetry::process_start;
use crate::tokenizer::Tokenizer;

/// Runs the command and gives its exit code.
///
/// # Errors
/// Something that keeps a run from being done; rows in error are no such thing.
pub fn eval(args: &EvalArgs, config: ConfigFile) -> Result<u8, JobError> {
    let layers = Layers {
        flags: args.options.clone(),
        config: config.options,
    };
    for options in [&layers.flags, &layers.config] {
        options
            .check()
            .map_err(|message| JobError::Option { message })?;
    }
    let named = if args.datasets.is_empty() {
        &config.datasets
    } else {
        &args.datasets
    };
    let paths = datasets::find(named)?;
    let precision = layers.precision();
    let wanted = precisions(&precision.value)?;
    let n_runs = paths.len() * wanted.len();
    if args.out.is_some() && n_runs > 1 {
        return Err(JobError::OneFolder { n_runs });
    }
    let model_word = layers.model();
    // A signal during a download ends the process at once: nothing is lost, the download goes on.
    // From there on signals are noted.
    model::resolve(&model_word.value, Part::Whole, args.quiet)?;
    signal::install();
    let model = OpenModel::open(&model_word.value, args.quiet)?;
    let mut weights: Weights = None;
    let mut begun = process_start();
    let mut attempt = Attempt::current();
    // Precision outside, so that each is loaded once.
    let runs = wanted
        .iter()
        .flat_map(|&value| paths.iter().map(move |path| (value, path)));
    for (value, path) in runs.skip(attempt.done.len()) {
        let precision = Effective {
            value,
            origin: precision.origin,
        };
        let mut run = assemble(&layers, &model, &model_word, precision, path, args.poison)?;
        run.begun = begun;
        run.fault = args.lose_device.get(attempt.n_lost_devices).copied();
        if let Some(engine) = attempt.broken_off.take() {
            run.engine = engine;
            run.goes_on = true;
        }
        let (code, folder) = eval_one(args, &run, &mut weights, &attempt)?;
        attempt.code = attempt.code.max(code);
        attempt.done.push(folder);
        begun = Instant::now();
        if let Some(signal) = signal::received() {
            return Ok(128 + signal as u8);
        }
    }
    if wanted.len() > 1 && !args.json && !args.dry_run {
        for index in 0..paths.len() {
            let of_path = attempt.done.iter().skip(index).step_by(paths.len());
            let names: Vec<String> = of_path.map(|folder| run_word(folder)).collect();
            print::result(&format!(
                "\nside by side: podium compare {}",
                names.join(" ")
            ));
        }
    }
    Ok(attempt.code)
}

/// How `compare` is told of a run: its name where it lies in the usual place, else its path.
fn run_word(folder: &Path) -> String {
    let usual = folder.parent() == Some(Path::new(SUBMISSIONS));
    match folder.file_name() {
        Some(name) if usual => name.to_string_lossy().into_owned(),
        _ => folder.to_string_lossy().into_owned(),
    }
}

/// Reads and renders one data set under the settings in force.
///
/// # Errors
/// A data set, profile or precision that cannot be used; with `--strict`, a row that cannot.
pub fn assemble<'a>(
    layers: &Layers,
    model: &'a OpenModel,
    model_word: &'a Effective<String>,
    precision: Effective<Precision>,
    path: &Path,
    poison: bool,
) -> Result<Run<'a>, JobError> {
    let profile_word = layers.profile();
    let (dataset, mut profile) = read_dataset(path, profile_word.as_deref(), model.is_nano)?;
    let settings = Settings::resolve(layers, &profile, model.is_nano);
    with_meta(
        &mut profile,
        settings.meta.value.as_deref().unwrap_or_default(),
    )?;
    if settings.early_stop.value
        && matches!(
            profile.scoring.aggregate,
            Aggregate::First | Aggregate::Pass
        )
    {
        let message = "`--early-stop` leaves out samples that cannot change a vote, and this \
                       profile's `aggregate` does not vote";
        return Err(JobError::Option {
            message: message.to_owned(),
        });
    }
    check_headroom(&settings, &model.tokenizer)?;
    let engine = device::choose(
        settings.device.value,
        settings.exact.value,
        model.checkpoint.config(),
        model.checkpoint.weight_format(precision.value),
    )?;
    let date = settings.date.value.as_deref();
    let mut prepared = prepare(
        dataset,
        profile,
        &model.tokenizer,
        settings.reasoning.value,
        date,
    );
    let max_context = choose_context(&settings, model, &prepared);
    prepared.refuse_too_long(max_context, model.checkpoint.config().max_context);
    if settings.strict.value
        && let Some((record, error)) = prepared.first_error()
    {
        return Err(JobError::BadRow {
            key: record.key.clone(),
            message: error.message.clone(),
            file: record.location.file.to_string_lossy().into_owned(),
            line: error.line,
            field: error.field.clone(),
            hint: error.hint.clone(),
        });
    }
    let options = CpuOptions {
        n_threads: settings.threads.value,
        exact: settings.exact.value,
        trace_hash: settings.trace_hash.value,
        poison,
    };
    Ok(Run {
        model,
        model_word,
        precision,
        profile_word,
        settings,
        prepared,
        max_context,
        options,
        engine,
        begun: Instant::now(),
        fault: None,
        goes_on: false,
    })
}

/// Reads a data set with the profile named for it, or with the one that fits it.
///
/// # Errors
/// A file or a profile that cannot be used.
pub fn read_dataset(
    path: &Path,
    profile: Option<&str>,
    is_nano: bool,
) -> Result<(dataset::Dataset, Profile), JobError> {
    let (mut dataset, profile) = match profile {
        Some(word) => {
            let profile = Profile::find(word)?;
            (dataset::read_with(path, &profile.mapping)?, profile)
        }
        None => {
            let dataset = dataset::read(path)?;
            let profile = Profile::for_dataset(&dataset, is_nano)?;
            (dataset, profile)
        }
    };
    let profile = profile.resolved(&mut dataset.records)?;
    Ok((dataset, profile))
}

/// `--context`, else what the longest prompt that fits the model needs with its whole budget.
fn choose_context(settings: &Settings, model: &OpenModel, prepared: &Prepared) -> usize {
    let most = model.checkpoint.config().max_context;
    match settings.context.value {
        AutoOr::Exactly(n) => n.min(most),
        AutoOr::Auto => {
            let budget = settings.max_new_tokens.value;
            let second = second_budget(&prepared.profile, settings);
            prepared.longest_row(most, budget, second).min(most)
        }
    }
}

/// Whether the headroom leaves room to think before it, and to answer in it.
fn check_headroom(settings: &Settings, tokenizer: &Tokenizer) -> Result<(), JobError> {
    let (headroom, budget) = (
        settings.answer_headroom.value,
        settings.max_new_tokens.value,
    );
    if headroom == 0 {
        return Ok(());
    }
    let cut_header = harmony::parse(&[], tokenizer);
    let closing = tokenizer.encode(&harmony::closing(&cut_header));
    let n_closing = closing.map_or(0, |ids| ids.len());
    let message = if headroom >= budget {
        format!("`--answer-headroom {headroom}` is not below the budget of {budget} tokens")
    } else if headroom <= n_closing {
        format!(
            "`--answer-headroom {headroom}` has no room for an answer: opening it takes \
             {n_closing} tokens"
        )
    } else {
        return Ok(());
    };
    Err(JobError::Option { message })
}

/// Runs one data set in one precision; gives the exit code and the run's folder.
fn eval_one(
    args: &EvalArgs,
    run: &Run,
    weights: &mut Weights,
    attempt: &Attempt,
) -> Result<(u8, PathBuf), JobError> {
    let identity = run.identity()?;
    let opening = Opening {
        dataset: &run.prepared.dataset.path,
        identity: &identity,
        out: args.out.as_deref(),
        fresh: args.fresh && !run.goes_on,
        allow_mixed: args.allow_mixed,
    };
    let path = opening.path();
    let tell = |text: &str| {
        if !args.quiet {
            print::tell(text);
        }
    };
    let existing = opening.existing()?;
    let results = match &existing {
        Some(_) => Results::new(log::read(&path)?.rows),
        None => Results::default(),
    };
    let missing = run.missing(&results);
    tell(&heading(run, &path, missing.len(), results.len()));
    let plan = run.plan(missing.len())?;
    if args.dry_run {
        print::result(&format!(
            "{plan}\nwould run {} samples into {}",
            missing.len(),
            path.display()
        ));
        return Ok((0, path));
    }
    if !missing.is_empty() {
        tell(&format!("\n{plan}"));
    } else if let Some(manifest) = existing
        && manifest.scoring_hash == run.scoring_hash()
        && manifest
            .sessions
            .last()
            .is_some_and(|s| s.outcome == Some(Outcome::Complete))
    {
        let note = "this run was complete already; `--fresh` runs it again".to_owned();
        let code = finish(args, run, &manifest, &path, vec![note]);
        return Ok((code, path));
    }
    let finished = run
        .execute(&opening, &plan, weights, args.quiet)
        .map_err(|error| attempt.begin_anew_after(error, run.engine))?;
    page_after(&path, None);
    let mut notes = Vec::new();
    if finished.repaired_bytes > 0 {
        notes.push(format!(
            "{} bytes of a torn last line of {RESULTS_FILE} were cut off",
            finished.repaired_bytes
        ));
    }
    let last = finished
        .manifest
        .sessions
        .last()
        .and_then(|session| session.outcome);
    if let Some(signal) = signal::received() {
        let name = if signal == libc::SIGINT {
            "Ctrl-C"
        } else {
            "SIGTERM"
        };
        print::tell(&format!(
            "stopped by {name}; the same command goes on from here"
        ));
    } else if last == Some(Outcome::TimeLimit) {
        notes.push("the time limit was reached; the same command goes on from here".to_owned());
    }
    let code = finish(args, run, &finished.manifest, &path, notes);
    Ok((code, path))
}

/// Prints the summary and gives the run's exit code.
fn finish(
    args: &EvalArgs,
    run: &Run,
    manifest: &RunManifest,
    path: &Path,
    mut notes: Vec<String>,
) -> u8 {
    if run.model.is_nano && !is_nanos_own(&run.prepared.dataset.path) {
        notes.push(
            "nano is a demonstration model for its own questions; `--model FOLDER` runs a \
             checkpoint of yours"
                .to_owned(),
        );
    }
    let (shown, more) = error_notes(run);
    notes.extend(shown);
    if more > 0 {
        notes.push(format!(
            "and {more} more rows cannot run; scores.csv has them all"
        ));
    }
    let mut files = vec![
        "submission.csv",
        "submission.jsonl",
        "scores.csv",
        "results.jsonl",
        "prompts.jsonl",
        "run.json",
        "memory.jsonl",
        "throughput.jsonl",
        "report.html",
    ];
    if manifest.generation.samples > 1 {
        files.insert(3, QUESTIONS_FILE);
    }
    let package = manifest.submission_format.package.as_ref();
    let files = package
        .map(|package| package.zip.clone())
        .into_iter()
        .chain(files.into_iter().map(str::to_owned));
    let summary = Summary::new(manifest, path, files.collect(), notes)
        .with_lint(lint_after(path, manifest).as_ref());
    if args.json {
        print::result(&summary.to_json());
    } else {
        print::result(&summary.render(color_wanted()));
    }
    let n_errors = manifest
        .tally
        .as_ref()
        .and_then(|tally| tally.statuses.get("error").copied())
        .unwrap_or(0);
    u8::from(n_errors > 0)
}

/// Rows in error that the summary names.
const MAX_NAMED_ERRORS: usize = 5;

/// A note for each of the first rows that cannot run, and how many more there are.
fn error_notes(run: &Run) -> (Vec<String>, usize) {
    let mut errors = run
        .prepared
        .pairs()
        .filter_map(|(record, row)| Some((record, row.error.as_ref()?)));
    let shown = errors
        .by_ref()
        .take(MAX_NAMED_ERRORS)
        .map(|(record, error)| describe(record, error))
        .collect();
    (shown, errors.count())
}

/// A row that cannot run: what, where, and how to mend it.
fn describe(record: &dataset::Record, error: &RowError) -> String {
    let field = error.field.as_ref();
    format!(
        "row `{}` cannot run: {} (in {}, line {}{}); {}",
        record.key,
        error.message,
        error.file,
        error.line,
        field.map_or(String::new(), |field| format!(", field `{field}`")),
        error.hint
    )
}

/// Whether a data set is one of `datasets/nano`.
fn is_nanos_own(path: &Path) -> bool {
    path.canonicalize()
        .unwrap_or_else(|_| PathBuf::from(path))
        .parent()
        .is_some_and(|parent| parent.ends_with("datasets/nano"))
}

/// What is about to run: the data set as it was understood, and one rendered prompt.
fn heading(run: &Run, path: &Path, n_missing: usize, n_done: usize) -> String {
    let prepared = &run.prepared;
    let n_errors = prepared
        .rows
        .iter()
        .filter(|row| row.error.is_some())
        .count();
    let mut text = format!(
        "{}: {} rows{}\n{}\nprofile {}, model {} in {}\n",
        prepared.dataset.path.display(),
        prepared.rows.len(),
        match n_errors {
            0 => String::new(),
            n => format!(", {n} of them cannot run"),
        },
        indent(&prepared.dataset.mapping.to_string()),
        prepared.profile.name,
        run.model.name,
        run.model.effective_precision(run.precision.value).name(),
    );
    if let Some(prompt) = prepared
        .prompts
        .iter()
        .find_map(|prompt| prompt.text.as_deref())
    {
        text += &format!("first prompt:\n{}\n", indent(prompt));
    }
    text += &match n_done {
        0 => format!("{n_missing} samples to run, into {}", path.display()),
        done => format!(
            "{n_missing} samples to run, {done} are done, in {}",
            path.display()
        ),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_nanos_own_files_are_nanos() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        assert!(is_nanos_own(&root.join("datasets/nano/mixed.jsonl")));
        assert!(!is_nanos_own(&root.join("README.md")));
    }
}
