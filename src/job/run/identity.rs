//! What a run's tokens and verdicts depend on, as hashes: what a log must agree with to be gone on
//! with, and what keys a row's draws.

use super::Run;
use crate::job::JobError;
use crate::profile::Profile;
use crate::submission::identity::{GenerationIdentity, sha256_hex};
use crate::submission::prompts::prompts_hash;

impl Run<'_> {
    /// What the tokens depend on.
    ///
    /// # Errors
    /// `PODIUM_CPU` names a path that this machine does not have.
    pub fn identity(&self) -> Result<GenerationIdentity, JobError> {
        let settings = &self.settings;
        let budget = settings.max_new_tokens.value;
        // `--context` is part of the identity only where it takes a row's tokens away.
        let longest = self
            .prepared
            .longest_row(usize::MAX, budget, self.second_budget());
        let whole = self.model.checkpoint.config().max_context.min(longest);
        let mut identity = GenerationIdentity {
            dataset: self.prepared.dataset.content_hash.clone(),
            prompts: prompts_hash(&self.prepared.prompts),
            model: self.model.hash.clone(),
            tokenizer: self.model.tokenizer_hash.clone(),
            precision: self
                .model
                .effective_precision(self.precision.value)
                .name()
                .to_owned(),
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            seed: 0,
            max_new_tokens: budget,
            context: (self.max_context < whole).then_some(self.max_context),
            samples: self.n_samples(),
            answer_headroom: settings.answer_headroom.value,
            numerics: self.engine.numerics_id(
                self.model.checkpoint.config(),
                self.model.checkpoint.weight_format(self.precision.value),
                self.options.exact,
            )?,
            second_max_new_tokens: self
                .prepared
                .profile
                .second_stage
                .as_ref()
                .map(|_| self.second_budget()),
        };
        identity.set_sampling(&settings.sampling());
        Ok(identity)
    }

    /// Hash over what turns replies into verdicts and columns.
    pub fn scoring_hash(&self) -> String {
        scoring_hash(&self.prepared.profile)
    }
}

/// Keys the generator: the first 8 bytes of the key's SHA-256.
pub(super) fn row_hash(key: &str) -> u64 {
    first_8_bytes(key.as_bytes())
}

/// The same for a row's second stage, which would draw the first one's numbers again at the
/// positions that both have. 0xFF is in no key: keys are UTF-8.
pub fn second_row_hash(key: &str) -> u64 {
    first_8_bytes(&[key.as_bytes(), b"\xFFstage 2"].concat())
}

fn first_8_bytes(bytes: &[u8]) -> u64 {
    let hex = sha256_hex(bytes);
    hex.get(..16)
        .and_then(|hex| u64::from_str_radix(hex, 16).ok())
        .unwrap_or_default()
}

/// Hash over what turns replies into verdicts and columns.
pub fn scoring_hash(profile: &Profile) -> String {
    let parts = match profile.second_stage {
        None => serde_json::json!([profile.scoring, profile.submission]),
        Some(_) => {
            serde_json::json!([
                profile.scoring,
                profile.submission,
                profile.second_scoring()
            ])
        }
    };
    sha256_hex(parts.to_string().as_bytes())
}
