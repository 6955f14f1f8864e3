//! The rendered prompts, `prompts.jsonl` (schema `podium.prompt/1`): a line a row, in input order.
//! With it a run folder stands for itself: keys, ids, groups and order need no data set.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::identity::hex;
use super::write::{WriteError, replace, write_json_line};
use crate::dataset::Message;
use crate::score::option_letter;

pub const PROMPTS_FILE: &str = "prompts.jsonl";
pub const PROMPT_SCHEMA: &str = "podium.prompt/1";

/// A line of `prompts.jsonl`: a row of the data set as it was rendered, in input order. The shards
/// of a run all list all rows, so that a merge knows what must be there and in which order.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PromptRow {
    pub schema: String,
    pub key: String,
    pub id: Option<Value>,
    pub group: Option<String>,
    /// The rendered prompt, special tokens spelled out; absent when the row cannot be rendered.
    pub text: Option<String>,
    pub n_tokens: Option<usize>,
    /// SHA-256 over the token ids as little-endian `u32`: unlike the text it tells a special
    /// token from a literal `<|end|>` in a question.
    pub hash: Option<String>,
    /// The row's options as they were shown, so that a choice can be checked without the data
    /// set; absent in runs of older versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub options: Option<Vec<String>>,
    /// The turns asked, instructions first, where the submission tells the conversation.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub messages: Vec<Message>,
    /// The file's index of the option shown at each place, where a profile shuffles them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub option_order: Option<Vec<usize>>,
    /// The user's turn of the second stage, for a row that has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_turn: Option<String>,
}

impl PromptRow {
    /// `rendered` is the text and its token ids; absent for a row that cannot be rendered.
    pub fn new(
        key: &str,
        id: Option<Value>,
        group: Option<String>,
        rendered: Option<(&str, &[u32])>,
    ) -> Self {
        Self {
            schema: PROMPT_SCHEMA.to_owned(),
            key: key.to_owned(),
            id,
            group,
            text: rendered.map(|(text, _)| text.to_owned()),
            n_tokens: rendered.map(|(_, ids)| ids.len()),
            hash: rendered.map(|(_, ids)| {
                let mut hasher = Sha256::new();
                for id in ids {
                    hasher.update(id.to_le_bytes());
                }
                hex(&hasher.finalize())
            }),
            options: None,
            messages: Vec::new(),
            option_order: None,
            next_turn: None,
        }
    }

    /// An answer as the data set's own file would have it: where the options were shuffled, the
    /// letter that the shown option has there.
    pub fn in_file_order<'a>(&self, answer: &'a str) -> Cow<'a, str> {
        let in_file = self.option_order.as_ref().and_then(|order| {
            let place = (0..order.len()).find(|&place| option_letter(place) == answer)?;
            order.get(place)
        });
        match in_file {
            Some(&index) => Cow::Owned(option_letter(index)),
            None => Cow::Borrowed(answer),
        }
    }

    /// The turns that the model was asked with. Where they were not kept, the rendered prompt as
    /// one turn.
    pub fn asked(&self) -> Vec<Message> {
        if !self.messages.is_empty() {
            return self.messages.clone();
        }
        let whole = self.text.iter().map(|text| Message {
            role: "user".to_owned(),
            content: text.clone(),
        });
        whole.collect()
    }
}

/// One hash over all prompts, keys and order included: a part of the generation's identity.
pub fn prompts_hash(prompts: &[PromptRow]) -> String {
    let mut hasher = Sha256::new();
    for prompt in prompts {
        // Keys may hold any character; their length makes the framing unambiguous.
        hasher.update((prompt.key.len() as u64).to_le_bytes());
        hasher.update(prompt.key.as_bytes());
        hasher.update(prompt.hash.as_deref().unwrap_or("none").as_bytes());
        if let Some(turn) = &prompt.next_turn {
            hasher.update(b"\0");
            hasher.update((turn.len() as u64).to_le_bytes());
            hasher.update(turn.as_bytes());
        }
        hasher.update(b"\n");
    }
    hex(&hasher.finalize())
}

/// Writes `prompts.jsonl`.
pub fn write_prompts(run_dir: &Path, prompts: &[PromptRow]) -> Result<PathBuf, WriteError> {
    let path = run_dir.join(PROMPTS_FILE);
    replace(&path, |out| {
        prompts
            .iter()
            .try_for_each(|prompt| write_json_line(out, prompt))
    })?;
    Ok(path)
}

/// Reads `prompts.jsonl` back.
pub fn read_prompts(run_dir: &Path) -> Result<Vec<PromptRow>, PromptsError> {
    let path = run_dir.join(PROMPTS_FILE);
    let text = std::fs::read_to_string(&path).map_err(|source| PromptsError::Read {
        path: path.clone(),
        source,
    })?;
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.is_empty())
        .map(|(index, line)| {
            serde_json::from_str(line).map_err(|error| PromptsError::InvalidLine {
                path: path.clone(),
                line: index + 1,
                reason: error.to_string(),
            })
        })
        .collect()
}

/// Why prompts cannot be read back.
#[derive(Debug, thiserror::Error)]
pub enum PromptsError {
    #[error("cannot read `{path}`: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("line {line} of `{path}` is not a prompt: {reason}")]
    InvalidLine {
        path: PathBuf,
        line: usize,
        reason: String,
    },
}

impl PromptsError {
    pub fn hint(&self) -> String {
        match self {
            Self::Read { .. } => "name a folder that a run has written".to_owned(),
            Self::InvalidLine { .. } => {
                "give the run's own `eval` command again: it writes the file anew".to_owned()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::test_dir::TestDir;

    #[test]
    fn a_shown_letter_becomes_the_files() {
        let mut prompt = PromptRow::new("a", None, None, None);
        assert_eq!(prompt.in_file_order("B"), "B");
        // Shown first is the file's third.
        prompt.option_order = Some(vec![2, 0, 1]);
        for (shown, in_file) in [
            ("A", "C"),
            ("B", "A"),
            ("C", "B"),
            ("E", "E"),
            ("Rome", "Rome"),
        ] {
            assert_eq!(prompt.in_file_order(shown), in_file);
        }
    }

    #[test]
    fn prompts_come_back_and_their_hash_sees_keys_tokens_and_order() {
        let dir = TestDir::new("prompts");
        let ids: &[u32] = &[1, 2];
        let prompts = [
            PromptRow::new("007", Some("007".into()), None, Some(("2+2?", ids))),
            PromptRow::new("f00d-1", None, Some("sums".to_owned()), None),
        ];
        write_prompts(dir.path(), &prompts).expect("the test folder is writable");
        assert_eq!(read_prompts(dir.path()).expect("our own file"), prompts);
        // printf '\1\0\0\0\2\0\0\0' | sha256sum
        assert_eq!(
            prompts[0].hash.as_deref(),
            Some("34fb5c825de7ca4aea6e712f19d439c1da0c92c37b423936c5f618545ca4fa1f")
        );
        let hash = prompts_hash(&prompts);
        let mut swapped = prompts.clone();
        swapped.swap(0, 1);
        assert_ne!(prompts_hash(&swapped), hash);
        let mut other = prompts.clone();
        other[0].hash = None;
        assert_ne!(prompts_hash(&other), hash);
        let mut other = prompts;
        other[0].next_turn = Some("Which?".to_owned());
        assert_ne!(prompts_hash(&other), hash);
    }
}
