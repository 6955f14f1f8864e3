//! A parsed reply: its messages, what was wrong with their format, and what is asked of them.

use serde::{Deserialize, Serialize};

/// The role of the model's own messages.
pub(super) const ASSISTANT: &str = "assistant";

/// A message's channel.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Channel {
    Analysis,
    Commentary,
    Final,
    /// A name the format does not have; empty when the name is.
    Other(String),
    /// The header has no channel.
    Absent,
}

impl Channel {
    pub(super) fn from_name(name: &str) -> Self {
        match name {
            "analysis" => Self::Analysis,
            "commentary" => Self::Commentary,
            "final" => Self::Final,
            other => Self::Other(other.to_owned()),
        }
    }

    /// The channel's name as the model wrote it; absent without one.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Analysis => Some("analysis"),
            Self::Commentary => Some("commentary"),
            Self::Final => Some("final"),
            Self::Other(name) => Some(name),
            Self::Absent => None,
        }
    }
}

/// What ended a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Close {
    End,
    Return,
    Call,
    EndOfText,
    /// Nothing: the next message began.
    NextMessage,
}

/// A message of a reply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplyMessage {
    /// `assistant`, unless the model spoke for somebody else.
    pub role: String,
    pub channel: Channel,
    /// The tool a call is for.
    pub recipient: Option<String>,
    /// The header's content type, such as `<|constrain|>json`.
    pub content_type: Option<String>,
    pub text: String,
    /// The content's token ids, as a range of the reply's.
    pub span: [usize; 2],
    /// Where `text` begins in the reply with its special tokens spelled out, in bytes.
    pub at: usize,
    /// Absent when the reply ends inside the message.
    pub close: Option<Close>,
}

/// A parsed reply.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    pub messages: Vec<ReplyMessage>,
    /// The text of the last finished final message; of the unfinished one when no other is there.
    pub final_text: Option<String>,
    /// Content tokens of the analysis.
    pub analysis_tokens: u32,
    /// Content tokens of the final messages.
    pub final_tokens: u32,
    /// What was wrong with the format: a code, a colon, the words (`missing-end: a message …`).
    pub issues: Vec<String>,
    /// The channel of the message that the reply ends inside of; absent when it ends after one.
    pub truncated_in: Option<Channel>,
}

impl Reply {
    /// The finished final message, if there is one.
    pub fn finished_final(&self) -> Option<&ReplyMessage> {
        self.finals().rfind(|message| message.close.is_some())
    }

    /// Whether the model called a tool and gave no final message after it.
    pub fn calls_tool(&self) -> bool {
        self.messages
            .iter()
            .rev()
            .filter(|message| message.role == ASSISTANT)
            .take_while(|message| message.channel != Channel::Final)
            .any(|message| {
                message.close == Some(Close::Call)
                    || message.recipient.as_deref().is_some_and(|to| to != "all")
            })
    }

    /// Whether every message has a channel of the format and a token that closes it.
    pub fn is_well_formed(&self) -> bool {
        self.issues.is_empty()
    }

    /// The model's own messages that are no tool calls, the newest first.
    pub fn said(&self) -> impl Iterator<Item = &ReplyMessage> {
        self.messages.iter().rev().filter(|message| {
            message.role == ASSISTANT
                && message.close != Some(Close::Call)
                && message.recipient.as_deref().is_none_or(|to| to == "all")
        })
    }

    pub(super) fn finals(&self) -> impl DoubleEndedIterator<Item = &ReplyMessage> {
        self.messages
            .iter()
            .filter(|message| message.role == ASSISTANT && message.channel == Channel::Final)
    }
}
