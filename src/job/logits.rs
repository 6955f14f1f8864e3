//! `podium logits`: teacher-forced logits and greedy continuations of token sequences.

use std::io::{BufRead, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use super::JobError;
use super::device::{self, AnyBackend};
use super::model;
use super::precision;
use crate::cli::LogitsArgs;
use crate::engine::cpu::CpuOptions;
use crate::engine::kv::pages_for;
use crate::engine::{Backend, EngineShape, PageId, SequenceId, Span, TokenId};
use crate::hub::Part;

/// Logits of a position that are written unless all are asked for.
const N_TOP: usize = 20;

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Input {
    prompt: String,
    tokens: Vec<TokenId>,
    #[serde(default)]
    n_greedy: usize,
}

/// Runs the command. A checkpoint without a tokenizer will do: input and output are ids.
///
/// # Errors
/// An input line that is none, ids past the vocabulary, or a sequence past the model's context.
pub fn logits(args: &LogitsArgs) -> Result<u8, JobError> {
    let precision = precision(args.numerics.precision.as_deref())?;
    let checkpoint = model::resolve(&args.model, Part::Whole, false)?.checkpoint()?;
    let inputs = read(&args.input, checkpoint.config().max_context)?;
    let longest = inputs
        .iter()
        .map(|input| input.tokens.len() + input.n_greedy)
        .max()
        .unwrap_or(1);
    let shape = EngineShape {
        n_slots: 1,
        n_forks: 0,
        n_pages: pages_for(longest),
        max_context: longest,
        prefill_rows: args.prefill_rows,
    };
    let options = CpuOptions {
        n_threads: args
            .numerics
            .threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get())),
        exact: args.numerics.exact,
        trace_hash: false,
        poison: false,
    };
    let format = checkpoint.weight_format(precision);
    let engine = device::choose(
        args.numerics.device,
        options.exact,
        checkpoint.config(),
        format,
    )?;
    let held = engine.load(&checkpoint, precision, options.n_threads)?;
    let mut backend = AnyBackend::new(held, shape, options)?;
    let mut out = BufWriter::new(std::io::stdout().lock());
    for input in &inputs {
        match write_one(backend.get(), input, args.full, &mut out) {
            Ok(()) => {}
            Err(WriteOne::Job(error)) => return Err(error),
            // The reader went away.
            Err(WriteOne::Stdout) => return Ok(0),
        }
    }
    let _ = out.flush();
    Ok(0)
}

enum WriteOne {
    Job(JobError),
    Stdout,
}

fn write_one(
    backend: &mut dyn Backend,
    input: &Input,
    full: bool,
    out: &mut impl Write,
) -> Result<(), WriteOne> {
    let sequence = SequenceId(0);
    let longest = input.tokens.len() + input.n_greedy;
    for index in 0..pages_for(longest) {
        backend.map_page(sequence, index, PageId(index as u32));
    }
    let mut greedy = Vec::with_capacity(input.n_greedy);
    let mut start = 0;
    let mut tokens: Arc<[TokenId]> = input.tokens.as_slice().into();
    // The prompt at once, then the continuation a token at a time.
    loop {
        let mut next = None;
        let mut written = Ok(());
        let span = Span {
            sequence,
            start,
            tokens: Arc::clone(&tokens),
        };
        backend
            .score(&span, &mut |position, logits: &[f32]| {
                next = Some(argmax(logits));
                let line = line(&input.prompt, position, logits, full);
                written =
                    std::mem::replace(&mut written, Ok(())).and_then(|()| writeln!(out, "{line}"));
            })
            .map_err(|error| WriteOne::Job(error.into()))?;
        written.map_err(|_| WriteOne::Stdout)?;
        start += tokens.len();
        match next {
            Some(token) if greedy.len() < input.n_greedy => {
                greedy.push(token);
                tokens = Arc::from([token]);
            }
            _ => break,
        }
        if greedy.len() == input.n_greedy {
            break;
        }
    }
    backend.clear(&[sequence]);
    let line = serde_json::json!({"prompt": input.prompt, "greedy": greedy});
    writeln!(out, "{line}").map_err(|_| WriteOne::Stdout)
}

fn argmax(logits: &[f32]) -> TokenId {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, &logit) in logits.iter().enumerate() {
        if logit > best.1 {
            best = (id as TokenId, logit);
        }
    }
    best.0
}

fn line(prompt: &str, position: usize, logits: &[f32], full: bool) -> serde_json::Value {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits
        .iter()
        .map(|&logit| f64::from(logit - max).exp())
        .sum();
    let logsumexp = f64::from(max) + sum.ln();
    if full {
        return serde_json::json!({
            "prompt": prompt, "position": position, "logits": logits, "logsumexp": logsumexp,
        });
    }
    let mut ids: Vec<usize> = (0..logits.len()).collect();
    ids.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let top: Vec<(usize, f32)> = ids
        .into_iter()
        .take(N_TOP)
        .map(|id| (id, logits[id]))
        .collect();
    serde_json::json!({
        "prompt": prompt, "position": position, "top": top, "logsumexp": logsumexp,
    })
}

fn read(path: &Path, max_context: usize) -> Result<Vec<Input>, JobError> {
    let failed = |source| JobError::Read {
        path: path.to_owned(),
        source,
    };
    let reader: Box<dyn BufRead> = if path == Path::new("-") {
        Box::new(std::io::stdin().lock())
    } else {
        Box::new(std::io::BufReader::new(
            std::fs::File::open(path).map_err(failed)?,
        ))
    };
    let mut inputs = Vec::new();
    for (index, line) in reader.lines().enumerate() {
        let line = line.map_err(failed)?;
        if line.trim().is_empty() {
            continue;
        }
        let bad = |reason: String| JobError::Input {
            path: path.to_owned(),
            line: index + 1,
            reason,
        };
        let input: Input = serde_json::from_str(&line).map_err(|e| bad(e.to_string()))?;
        let length = input.tokens.len().saturating_add(input.n_greedy);
        if input.tokens.is_empty() {
            return Err(bad("`tokens` is empty".to_owned()));
        }
        if length > max_context {
            return Err(bad(format!(
                "`tokens` and `n_greedy` come to {length} positions, the model has {max_context}"
            )));
        }
        inputs.push(input);
    }
    Ok(inputs)
}
