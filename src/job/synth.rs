//! `podium synth`: a full-size checkpoint of lively random weights.

use super::JobError;
use super::quantize::{make_empty, progress_bar, write_file};
use super::synthetic::{check_vocabulary, find_shape};
use crate::cli::SynthArgs;
use crate::cli::print;
use crate::engine::EngineError;
use crate::engine::checkpoint::synthetic::{companions, tensor_bytes, write_tensors};
use crate::engine::plan::bytes_text;

/// Runs the command.
///
/// # Errors
/// No such shape, a folder that is in use, or a file that cannot be written.
pub fn synth_command(args: &SynthArgs) -> Result<u8, JobError> {
    let config = find_shape(&args.shape)?.ok_or_else(|| JobError::Shape {
        word: args.shape.clone(),
    })?;
    check_vocabulary(&config)?;
    let out = &args.output;
    make_empty(out)?;
    let bar = progress_bar(args.quiet);
    let written = write_tensors(
        &config,
        args.seed,
        out,
        args.shard_size.0,
        &mut |done, all| {
            bar.set_length(all);
            bar.set_position(done);
        },
    );
    bar.finish_and_clear();
    let written = written.map_err(EngineError::from)?;
    // The configuration comes last: without it a folder is no checkpoint.
    for (name, value) in companions(&config) {
        write_file(&out.join(name), format!("{value:#}\n").as_bytes())?;
    }
    let (n_bytes, n_files) = (tensor_bytes(&config), written.files.len());
    if args.json {
        let files: Vec<String> = written
            .files
            .iter()
            .map(|file| file.to_string_lossy().into_owned())
            .collect();
        let document = serde_json::json!({
            "schema": "podium.synth/1",
            "shape": args.shape,
            "seed": args.seed,
            "tensor_bytes": n_bytes,
            "files": files,
        });
        print::result(&document.to_string());
    } else {
        print::result(&format!(
            "{}: {} of random weights of {}, seed {}, in {n_files} file{}",
            out.display(),
            bytes_text(n_bytes),
            args.shape,
            args.seed,
            if n_files == 1 { "" } else { "s" },
        ));
    }
    Ok(0)
}
