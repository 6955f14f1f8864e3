//! Teacher forcing: given tokens through the model, one sequence at a time, in slot 0.

use crate::engine::kv::pages_for;
use crate::engine::sample::log_softmax_at;
use crate::engine::{Backend, PageId, SequenceId, Span, TokenId};

use super::{GenerateError, JobError};

/// Why a text could not be scored.
#[derive(Debug, thiserror::Error)]
pub enum ForcedError {
    #[error(transparent)]
    Job(#[from] JobError),
    #[error(transparent)]
    Generate(#[from] GenerateError),
}

/// Gives the logits `[n_vocab]` of each position from `first` on to `visit` as (position,
/// logits), in order: those at position p predict token p + 1.
///
/// # Errors
/// When the tokens exceed context or arena, or the backend fails.
pub fn score_tokens(
    backend: &mut dyn Backend,
    tokens: &[TokenId],
    first: usize,
    visit: &mut dyn FnMut(usize, &[f32]),
) -> Result<(), ForcedError> {
    let shape = backend.info().shape;
    let needed = pages_for(tokens.len());
    if tokens.len() > shape.max_context {
        return Err(JobError::TooLong {
            needed: tokens.len(),
            holds: shape.max_context,
        }
        .into());
    }
    if needed > shape.n_pages {
        return Err(GenerateError::ArenaTooSmall {
            row: 0,
            needed,
            n_pages: shape.n_pages,
        }
        .into());
    }
    let sequence = SequenceId(0);
    for index in 0..needed {
        backend.map_page(sequence, index, PageId(index as u32));
    }
    let (head, rest) = tokens.split_at(first.min(tokens.len()));
    let span = |start, tokens: &[TokenId]| Span {
        sequence,
        start,
        tokens: tokens.into(),
    };
    let mut result = Ok(());
    if !head.is_empty() {
        result = backend.prefill(&[span(0, head)]);
    }
    if result.is_ok() && !rest.is_empty() {
        result = backend.score(&span(head.len(), rest), visit);
    }
    backend.clear(&[sequence]);
    result.map_err(|error| GenerateError::from(error).into())
}

/// Log-probability of each token of `output` after `prompt`: bit for bit those that generation
/// gave for the same tokens on the same backend. An empty prompt gives none for the first token.
///
/// # Errors
/// As [`score_tokens`].
pub fn forced_logprobs(
    backend: &mut dyn Backend,
    prompt: &[TokenId],
    output: &[TokenId],
) -> Result<Vec<f32>, ForcedError> {
    let tokens: Vec<TokenId> = prompt.iter().chain(output).copied().collect();
    let Some((_, fed)) = tokens.split_last() else {
        return Ok(Vec::new());
    };
    let mut logprobs = Vec::with_capacity(output.len());
    let first = prompt.len().saturating_sub(1);
    score_tokens(backend, fed, first, &mut |position, logits| {
        if let Some(&next) = tokens.get(position + 1) {
            logprobs.push(log_softmax_at(logits, next));
        }
    })?;
    Ok(logprobs)
}
