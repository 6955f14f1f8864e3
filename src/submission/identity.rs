//! What a run's tokens depend on, and the hash over it. Two runs of one `generation_hash` give the
//! same tokens for the same row and sample; whatever changes speed or place alone (batch, threads,
//! memory, limits, shards, paths) is not in it.

use std::path::Path;

use sha2::{Digest, Sha256};

use crate::engine::SamplingParams;

/// The most samples a row: all (row, sample) pairs of a run are listed before it starts.
pub const MAX_SAMPLES: u32 = 1_000_000;

/// The parts of a generation's identity. Hashes are SHA-256 in hex.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct GenerationIdentity {
    /// Hash of the data set's content.
    pub dataset: String,
    /// [`super::prompts::prompts_hash`] of all rows, whatever the limit or shard.
    pub prompts: String,
    /// Hash of the checkpoint.
    pub model: String,
    pub tokenizer: String,
    /// The effective precision, such as `4bit`.
    pub precision: String,
    pub temperature: f32,
    pub top_p: f32,
    pub top_k: u32,
    pub seed: u64,
    pub max_new_tokens: usize,
    /// `--context` where it cuts a row's budget short; absent where it does not.
    #[serde(default)]
    pub context: Option<usize>,
    /// Samples a row.
    pub samples: u32,
    /// `--answer-headroom`; 0 is off.
    pub answer_headroom: usize,
    /// The backend's numerics: `cpu/avx512/exact`, …
    pub numerics: String,
    /// The budget of second stages; absent, and not in the hash, where the profile has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_max_new_tokens: Option<usize>,
}

const SECOND: &str = "second_max_new_tokens";

/// A part in which two identities differ, each side as canonical JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    pub key: &'static str,
    pub ours: String,
    pub theirs: String,
}

impl GenerationIdentity {
    pub fn set_sampling(&mut self, sampling: &SamplingParams) {
        self.temperature = sampling.temperature;
        self.top_p = sampling.top_p;
        self.top_k = sampling.top_k;
        self.seed = sampling.seed;
    }

    /// SHA-256 over one JSON object: the parts by name in alphabetical order, no spaces, floats
    /// in their shortest spelling.
    pub fn hash(&self) -> String {
        sha256_hex(self.canonical().as_bytes())
    }

    fn canonical(&self) -> String {
        let mut parts = self.parts();
        if self.second_max_new_tokens.is_none() {
            parts.retain(|(key, _)| *key != SECOND);
        }
        parts.sort_unstable();
        let members: Vec<String> = parts
            .iter()
            .map(|(key, value)| format!("\"{key}\":{value}"))
            .collect();
        format!("{{{}}}", members.join(","))
    }

    /// The parts in which `other` differs, in the order of the fields.
    pub fn differences(&self, other: &Self) -> Vec<Difference> {
        self.parts()
            .into_iter()
            .zip(other.parts())
            .filter(|((_, ours), (_, theirs))| ours != theirs)
            .map(|((key, ours), (_, theirs))| Difference { key, ours, theirs })
            .collect()
    }

    /// Names and JSON spellings. Destructured, so that a new field cannot be forgotten.
    fn parts(&self) -> Vec<(&'static str, String)> {
        let Self {
            dataset,
            prompts,
            model,
            tokenizer,
            precision,
            temperature,
            top_p,
            top_k,
            seed,
            max_new_tokens,
            context,
            samples,
            answer_headroom,
            numerics,
            second_max_new_tokens,
        } = self;
        let count = |n: &Option<usize>| n.map_or("null".to_owned(), |n| n.to_string());
        let text = |text: &String| serde_json::Value::from(text.as_str()).to_string();
        vec![
            ("dataset", text(dataset)),
            ("prompts", text(prompts)),
            ("model", text(model)),
            ("tokenizer", text(tokenizer)),
            ("precision", text(precision)),
            ("temperature", format!("{temperature:?}")),
            ("top_p", format!("{top_p:?}")),
            ("top_k", top_k.to_string()),
            ("seed", seed.to_string()),
            ("max_new_tokens", max_new_tokens.to_string()),
            ("context", count(context)),
            ("samples", samples.to_string()),
            ("answer_headroom", answer_headroom.to_string()),
            ("numerics", text(numerics)),
            (SECOND, count(second_max_new_tokens)),
        ]
    }
}

/// The name of a run's folder: `<data set>-<precision>-<first 8 of the generation hash>`.
pub fn run_name(dataset: &Path, identity: &GenerationIdentity) -> String {
    let mut stem = dataset
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    // `a.jsonl.gz` is `a`, `v1.2.jsonl` is `v1.2`.
    for extension in [".gz", ".jsonl", ".json", ".csv", ".parquet"] {
        if let Some(short) = stem
            .strip_suffix(extension)
            .filter(|short| !short.is_empty())
        {
            stem.truncate(short.len());
        }
    }
    let hash = identity.hash();
    let short = hash.get(..8).unwrap_or(&hash);
    format!("{stem}-{}-{short}", identity.precision)
}

/// SHA-256 in hex.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Bytes in lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
pub(crate) fn test_identity() -> GenerationIdentity {
    GenerationIdentity {
        dataset: "d0".to_owned(),
        prompts: "e1".to_owned(),
        model: "f2".to_owned(),
        tokenizer: "a3".to_owned(),
        precision: "4bit".to_owned(),
        temperature: 0.6,
        top_p: 1.0,
        top_k: 0,
        seed: 0,
        max_new_tokens: 512,
        context: None,
        samples: 1,
        answer_headroom: 0,
        numerics: "cpu/avx512".to_owned(),
        second_max_new_tokens: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected hash is `printf '%s' '<the object>' | sha256sum`.
    #[test]
    fn the_hash_is_over_canonical_json() {
        let identity = test_identity();
        let object = r#"{"answer_headroom":0,"context":null,"dataset":"d0","max_new_tokens":512,"model":"f2","numerics":"cpu/avx512","precision":"4bit","prompts":"e1","samples":1,"seed":0,"temperature":0.6,"tokenizer":"a3","top_k":0,"top_p":1.0}"#;
        assert_eq!(identity.canonical(), object);
        assert_eq!(
            identity.hash(),
            "887744cef8f331b4ddbb2dce73c1d4714952e4b18e54f2f97789f78012946c43"
        );
        let parsed: serde_json::Value = serde_json::from_str(object).expect("it is JSON");
        assert!(parsed.is_object());
        let two_stages = GenerationIdentity {
            second_max_new_tokens: Some(64),
            ..identity.clone()
        };
        assert_ne!(two_stages.hash(), identity.hash());
        assert_eq!(identity.differences(&two_stages)[0].theirs, "64");
    }

    #[test]
    fn differences_name_the_keys_with_both_values() {
        let ours = test_identity();
        let theirs = GenerationIdentity {
            temperature: 1.0,
            numerics: "cpu/avx2".to_owned(),
            ..ours.clone()
        };
        assert_ne!(ours.hash(), theirs.hash());
        let differences = ours.differences(&theirs);
        let keys: Vec<_> = differences
            .iter()
            .map(|difference| difference.key)
            .collect();
        assert_eq!(keys, ["temperature", "numerics"]);
        assert_eq!(differences[0].ours, "0.6");
        assert_eq!(differences[0].theirs, "1.0");
        assert!(ours.differences(&ours).is_empty());
    }

    #[test]
    fn the_run_is_named_after_file_precision_and_hash() {
        let identity = test_identity();
        let short = &identity.hash()[..8];
        for (file, stem) in [
            ("data/mixed.jsonl", "mixed"),
            ("mixed.csv.gz", "mixed"),
            ("v1.2.jsonl", "v1.2"),
            (".jsonl", ".jsonl"),
        ] {
            assert_eq!(
                run_name(Path::new(file), &identity),
                format!("{stem}-4bit-{short}")
            );
        }
    }
}
