//! A record becomes messages, messages become the chat format's segments.
//!
//! A prompt is a list of segments, not one string: special tokens and ordinary text stay apart,
//! so that a literal `<|end|>` in a question is encoded as text.

pub mod harmony;

use crate::dataset::Message;

/// A piece of a rendered prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// A special token by its name, such as `<|start|>`.
    Special(&'static str),
    /// Ordinary text, whatever it looks like.
    Text(String),
}

/// How long the model should think: gpt-oss's `Reasoning:` line.
#[derive(
    clap::ValueEnum,
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    Default,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Reasoning {
    Low,
    #[default]
    Medium,
    High,
}

/// What is rendered for one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    pub reasoning: Reasoning,
    /// The system message's date line; absent unless asked for, because a moving date breaks
    /// prefix reuse and repeats.
    pub date: Option<String>,
    /// The developer message; absent when empty.
    pub instructions: Option<String>,
    /// User (and earlier assistant) turns, in order.
    pub turns: Vec<Message>,
}
