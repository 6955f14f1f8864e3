//! `podium quantize`: a checkpoint in another precision, ready for podium and for transformers.

use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::JobError;
use super::model::{ModelError, ModelSource, resolve};
use super::{nano, precision};
use crate::cli::QuantizeArgs;
use crate::cli::print;
use crate::engine::checkpoint::synthetic::companions;
use crate::engine::checkpoint::write::{self, Written};
use crate::engine::checkpoint::{Checkpoint, MatrixFormat, Precision};
use crate::engine::plan::bytes_text;
use crate::hub::Part;

/// Files beside the weights that go with them, where they are there.
const COMPANIONS: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// Runs the command.
///
/// # Errors
/// No such checkpoint, a precision without a file layout, a folder that is in use, values that
/// cannot be held, or a file that cannot be written.
pub fn quantize_command(args: &QuantizeArgs) -> Result<u8, JobError> {
    let asked = precision(Some(&args.precision))?;
    let source = resolve(&args.input, Part::Whole, args.quiet)?;
    let (checkpoint, config, companions) = read(&source)?;
    let format = checkpoint.weight_format(asked);
    if format.attention != MatrixFormat::Bf16 {
        return Err(JobError::NoFileLayout {
            precision: asked.name(),
        });
    }
    let out = &args.output;
    make_empty(out)?;
    let bar = progress_bar(args.quiet);
    let written = write::write(
        &checkpoint,
        format.experts,
        out,
        args.shard_size.0,
        &mut |done, all| {
            bar.set_length(all);
            bar.set_position(done);
        },
    );
    bar.finish_and_clear();
    let written = written.map_err(crate::engine::EngineError::from)?;
    // The configuration comes last: without it a folder is no checkpoint.
    for (name, bytes) in companions {
        write_file(&out.join(name), &bytes)?;
    }
    let config = write::config_json(&checkpoint, &config, format.experts);
    write_file(&out.join("config.json"), format!("{config:#}\n").as_bytes())?;
    tell(args, asked, &checkpoint, format.experts, &written);
    Ok(0)
}

/// Checkpoint, raw configuration and companion files of a model.
type Opened = (Checkpoint, serde_json::Value, Vec<(&'static str, Vec<u8>)>);

fn read(source: &ModelSource) -> Result<Opened, JobError> {
    let parse = |bytes: &[u8]| serde_json::from_slice(bytes).unwrap_or_default();
    let checkpoint = source.checkpoint()?;
    match source {
        ModelSource::Nano => Ok((
            checkpoint,
            parse(nano::CONFIG),
            vec![
                ("tokenizer.json", nano::TOKENIZER.to_vec()),
                ("tokenizer_config.json", nano::TOKENIZER_CONFIG.to_vec()),
                ("generation_config.json", nano::GENERATION_CONFIG.to_vec()),
            ],
        )),
        ModelSource::Folder { path, .. } => {
            let read = |name: &str| {
                let path = path.join(name);
                std::fs::read(&path).map_err(|source| ModelError::Read { path, source })
            };
            let companions = COMPANIONS
                .into_iter()
                .filter(|name| path.join(name).is_file())
                .map(|name| Ok((name, read(name)?)))
                .collect::<Result<_, ModelError>>()?;
            // The checkpoint has read it: it is an object.
            Ok((checkpoint, parse(&read("config.json")?), companions))
        }
        ModelSource::Synthetic(synthetic) => {
            let mut files = companions(&synthetic.config).into_iter();
            let config = files.find(|(name, _)| *name == "config.json");
            let files = companions(&synthetic.config)
                .into_iter()
                .filter(|(name, _)| COMPANIONS.contains(name))
                .map(|(name, value)| (name, format!("{value:#}\n").into_bytes()))
                .collect();
            Ok((checkpoint, config.map(|c| c.1).unwrap_or_default(), files))
        }
    }
}

/// A bar over bytes, on a terminal.
pub(super) fn progress_bar(quiet: bool) -> ProgressBar {
    let target = match quiet {
        true => ProgressDrawTarget::hidden(),
        false => ProgressDrawTarget::stderr(),
    };
    let bar = ProgressBar::with_draw_target(Some(0), target);
    if let Ok(style) = ProgressStyle::with_template("{bar:20} {bytes}/{total_bytes}, {eta} left") {
        bar.set_style(style);
    }
    bar
}

/// Makes the folder, which must hold nothing.
pub(super) fn make_empty(folder: &Path) -> Result<(), JobError> {
    let failed = |source| write_failed(folder, source);
    std::fs::create_dir_all(folder).map_err(failed)?;
    if std::fs::read_dir(folder).map_err(failed)?.next().is_some() {
        return Err(JobError::NotEmpty {
            path: folder.to_owned(),
        });
    }
    Ok(())
}

pub(super) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), JobError> {
    std::fs::write(path, bytes).map_err(|source| write_failed(path, source))
}

fn write_failed(path: &Path, source: std::io::Error) -> JobError {
    let path: PathBuf = path.to_owned();
    let error = crate::engine::checkpoint::CheckpointError::Write { path, source };
    crate::engine::EngineError::from(error).into()
}

/// Says what was written, and what became of the values.
fn tell(
    args: &QuantizeArgs,
    asked: Precision,
    checkpoint: &Checkpoint,
    format: MatrixFormat,
    written: &Written,
) {
    let stored = checkpoint.expert_format();
    let relative = written.experts.relative();
    if args.json {
        let files: Vec<String> = written
            .files
            .iter()
            .map(|file| file.to_string_lossy().into_owned())
            .collect();
        let document = serde_json::json!({
            "schema": "podium.quantize/1",
            "precision": asked.name(),
            "experts": {
                "stored": stored.name(),
                "written": format.name(),
                "lossless": written.experts.error == 0.0,
                "relative_error": relative,
            },
            "tensor_bytes": written.n_bytes,
            "files": files,
        });
        print::result(&document.to_string());
        return;
    }
    let values = match written.experts.error == 0.0 {
        true => "every value as it was".to_owned(),
        false => format!("relative error {:.2} %", 100.0 * relative),
    };
    print::result(&format!(
        "{} in {}: {} of tensors in {} {}\nexperts from {} to {}, {values}",
        args.output.display(),
        asked.name(),
        bytes_text(written.n_bytes),
        written.files.len(),
        match written.files.len() {
            1 => "file",
            _ => "files",
        },
        stored.name(),
        format.name(),
    ));
}
