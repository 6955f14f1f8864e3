//! A message's header: role, recipient, channel and content type out of its tokens.

use super::Parser;
use crate::engine::TokenId;
use crate::prompt::harmony::reply::{ASSISTANT, Channel};

/// Where a header's role comes from.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum HeaderRole {
    /// The prompt gave it: the reply's first header.
    Given,
    /// The header's first word.
    FirstWord,
    /// The header began without `<|start|>`; a role word may be there or not.
    Unsure,
}

pub(super) struct Header {
    pub(super) role: String,
    pub(super) channel: Channel,
    pub(super) recipient: Option<String>,
    pub(super) content_type: Option<String>,
    /// Text that belongs to no part of the header, and where its tokens begin.
    pub(super) rest: String,
}

impl Parser<'_> {
    /// Takes a header's tokens apart: role, recipient, channel, content type, in any order that
    /// models use.
    pub(super) fn parse_header(&self, from: usize, to: usize, role: HeaderRole) -> Header {
        let ids = self.ids(from, to);
        let mut channel = Channel::Absent;
        let mut words: Vec<String> = Vec::new();
        for (part, ids) in ids
            .split(|&id| Some(id) == self.special.channel)
            .enumerate()
        {
            let text = self.spaced(ids);
            let mut rest = text.as_str();
            if part > 0 {
                let end = rest
                    .find(|c: char| c.is_whitespace() || c == '<')
                    .unwrap_or(rest.len());
                let (name, after) = rest.split_at(end);
                channel = Channel::from_name(name);
                rest = after;
            }
            words.extend(rest.split_whitespace().map(str::to_owned));
        }
        let first_is_role = match role {
            HeaderRole::FirstWord => words.first().is_some_and(|word| !word.starts_with("to=")),
            HeaderRole::Given | HeaderRole::Unsure => {
                words.first().is_some_and(|word| word == ASSISTANT)
            }
        };
        let role = if first_is_role {
            words.remove(0)
        } else {
            ASSISTANT.to_owned()
        };
        let mut header = Header {
            role,
            channel,
            recipient: None,
            content_type: None,
            rest: String::new(),
        };
        let n_words = words.len();
        let mut rest = Vec::new();
        for (index, word) in words.into_iter().enumerate() {
            if let Some(recipient) = word.strip_prefix("to=") {
                header.recipient = Some(recipient.to_owned());
            } else if word.starts_with("<|constrain|>")
                || (index + 1 == n_words && header.recipient.is_some())
            {
                header.content_type = Some(word);
            } else {
                rest.push(word);
            }
        }
        header.rest = rest.join(" ");
        header
    }

    /// A header part's text, with a space before each `<|constrain|>` so that it is a word.
    fn spaced(&self, ids: &[TokenId]) -> String {
        let mut text = String::new();
        for (part, ids) in ids
            .split(|&id| Some(id) == self.special.constrain)
            .enumerate()
        {
            if part > 0 {
                text.push_str(" <|constrain|>");
            }
            text.push_str(&self.vocabulary.decode(ids));
        }
        text
    }

    pub(super) fn check_header(&mut self, header: &Header) {
        match &header.channel {
            Channel::Absent => self.issue("empty-channel", "a message without a channel"),
            Channel::Other(name) if name.is_empty() => {
                self.issue("empty-channel", "a channel without a name");
            }
            Channel::Other(name) => {
                self.issue("unknown-channel", &format!("a channel named `{name}`"));
            }
            _ => {}
        }
        if !header.rest.is_empty() {
            self.issue("header-words", &format!("`{}` in a header", header.rest));
        }
        if header.role != ASSISTANT {
            self.issue(
                "other-role",
                &format!("the model spoke as `{}`", header.role),
            );
        }
    }
}

/// The channel's name and the text after it, where no `<|message|>` parts the two: models then
/// write `finalThe answer …` as well as `final The answer …`.
pub(super) fn split_channel(text: &str) -> (&str, &str) {
    for name in ["analysis", "commentary", "final"] {
        if let Some(rest) = text.strip_prefix(name)
            && !rest.starts_with(|c: char| c.is_lowercase() || c == '_')
        {
            return (name, rest);
        }
    }
    let end = text.find(char::is_whitespace).unwrap_or(text.len());
    text.split_at(end)
}
