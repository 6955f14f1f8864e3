//! A reply's token ids to messages.
//!
//! The reply begins after `<|start|>assistant`. Models leave the format in many ways (a doubled
//! start, an invented channel, a missing message token, text after the end, a cut-off header):
//! each is named in [`Reply::issues`], none is an error, and every finished message is kept.

use serde::{Deserialize, Serialize};

use crate::engine::TokenId;
use crate::tokenizer::{SpecialIds, Tokenizer};

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
    fn from_name(name: &str) -> Self {
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

    fn finals(&self) -> impl DoubleEndedIterator<Item = &ReplyMessage> {
        self.messages
            .iter()
            .filter(|message| message.role == ASSISTANT && message.channel == Channel::Final)
    }
}

const ASSISTANT: &str = "assistant";

/// Parses what the model wrote after `<|start|>assistant`, special ids and the stop id included.
pub fn parse(ids: &[TokenId], tokenizer: &Tokenizer) -> Reply {
    parse_with(ids, tokenizer, *tokenizer.special_ids())
}

/// What ids stand for.
pub(super) trait Vocabulary {
    /// Special tokens spelled out.
    fn decode(&self, ids: &[TokenId]) -> String;
    fn is_special(&self, id: TokenId) -> bool;
}

impl Vocabulary for Tokenizer {
    fn decode(&self, ids: &[TokenId]) -> String {
        Tokenizer::decode(self, ids)
    }

    fn is_special(&self, id: TokenId) -> bool {
        Tokenizer::is_special(self, id)
    }
}

pub(super) fn parse_with(
    ids: &[TokenId],
    vocabulary: &dyn Vocabulary,
    special: SpecialIds,
) -> Reply {
    let mut parser = Parser {
        ids,
        vocabulary,
        special,
        reply: Reply::default(),
        measured: (0, 0),
    };
    parser.run();
    parser.finish()
}

struct Parser<'a> {
    ids: &'a [TokenId],
    vocabulary: &'a dyn Vocabulary,
    special: SpecialIds,
    reply: Reply,
    /// So many ids are so many bytes.
    measured: (usize, usize),
}

/// Where the parser stands; `from` is the index of the part's first token.
enum State {
    /// After a message: a `<|start|>` should follow.
    Between,
    Header {
        from: usize,
        role: HeaderRole,
    },
    Content {
        header: Header,
        from: usize,
    },
}

/// Where a header's role comes from.
#[derive(Clone, Copy, PartialEq)]
enum HeaderRole {
    /// The prompt gave it: the reply's first header.
    Given,
    /// The header's first word.
    FirstWord,
    /// The header began without `<|start|>`; a role word may be there or not.
    Unsure,
}

struct Header {
    role: String,
    channel: Channel,
    recipient: Option<String>,
    content_type: Option<String>,
    /// Text that belongs to no part of the header, and where its tokens begin.
    rest: String,
}

impl Parser<'_> {
    fn run(&mut self) {
        let mut state = State::Header {
            from: 0,
            role: HeaderRole::Given,
        };
        for (index, &id) in self.ids.iter().enumerate() {
            state = match state {
                State::Between => self.between(index, id),
                State::Header { from, role } => self.header(index, id, from, role),
                State::Content { header, from } => self.content(index, id, header, from),
            };
        }
        match state {
            State::Between => {}
            State::Header { from, role } => self.cut_header(from, role),
            State::Content { header, from } => {
                self.reply.truncated_in = Some(header.channel.clone());
                self.push(header, from, self.ids.len(), None);
            }
        }
    }

    fn between(&mut self, index: usize, id: TokenId) -> State {
        if Some(id) == self.special.start {
            return State::Header {
                from: index + 1,
                role: HeaderRole::FirstWord,
            };
        }
        self.issue("stray-token", "something after the end of a message");
        if Some(id) == self.special.channel {
            // A header all the same: a final message may follow.
            State::Header {
                from: index,
                role: HeaderRole::Unsure,
            }
        } else {
            State::Between
        }
    }

    fn header(&mut self, index: usize, id: TokenId, from: usize, role: HeaderRole) -> State {
        if Some(id) == self.special.message {
            let header = self.parse_header(from, index, role);
            self.check_header(&header);
            State::Content {
                header,
                from: index + 1,
            }
        } else if Some(id) == self.special.start {
            if self.has_unframed_text(from, index, role) {
                self.push_unframed(from, index, role, Close::NextMessage);
            } else {
                self.issue("doubled-start", "a second `<|start|>` in one header");
            }
            State::Header {
                from: index + 1,
                role: HeaderRole::FirstWord,
            }
        } else if let Some(close) = self.close_of(id) {
            self.push_unframed(from, index, role, close);
            State::Between
        } else {
            State::Header { from, role }
        }
    }

    fn content(&mut self, index: usize, id: TokenId, header: Header, from: usize) -> State {
        if let Some(close) = self.close_of(id) {
            self.push(header, from, index, Some(close));
            State::Between
        } else if Some(id) == self.special.start {
            self.issue("missing-end", "a message without an end token");
            self.push(header, from, index, Some(Close::NextMessage));
            State::Header {
                from: index + 1,
                role: HeaderRole::FirstWord,
            }
        } else if Some(id) == self.special.channel {
            self.issue("missing-end", "a message without an end token");
            self.push(header, from, index, Some(Close::NextMessage));
            State::Header {
                from: index,
                role: HeaderRole::Unsure,
            }
        } else {
            if self.vocabulary.is_special(id) {
                let name = self.vocabulary.decode(&[id]);
                self.issue("stray-special", &format!("`{name}` inside a message"));
            }
            State::Content { header, from }
        }
    }

    fn close_of(&self, id: TokenId) -> Option<Close> {
        let special = &self.special;
        [
            (special.end, Close::End),
            (special.return_, Close::Return),
            (special.call, Close::Call),
            (special.end_of_text, Close::EndOfText),
        ]
        .into_iter()
        .find_map(|(of, close)| (of == Some(id)).then_some(close))
    }

    fn ids(&self, from: usize, to: usize) -> &[TokenId] {
        self.ids.get(from..to).unwrap_or_default()
    }

    fn issue(&mut self, code: &str, what: &str) {
        let text = format!("{code}: {what}");
        if !self.reply.issues.contains(&text) {
            self.reply.issues.push(text);
        }
    }

    /// Bytes of the ids before `index`, which never goes back.
    fn bytes_before(&mut self, index: usize) -> usize {
        let (n_ids, n_bytes) = self.measured;
        let more = self.vocabulary.decode(self.ids(n_ids, index)).len();
        self.measured = (index, n_bytes + more);
        self.measured.1
    }

    fn push(&mut self, header: Header, from: usize, to: usize, close: Option<Close>) {
        let at = self.bytes_before(from);
        let text = self.vocabulary.decode(self.ids(from, to));
        self.push_text(header, text, at, [from, to], close);
    }

    fn push_text(
        &mut self,
        header: Header,
        text: String,
        at: usize,
        span: [usize; 2],
        close: Option<Close>,
    ) {
        self.reply.messages.push(ReplyMessage {
            role: header.role,
            channel: header.channel,
            recipient: header.recipient,
            content_type: header.content_type,
            text,
            span,
            at,
            close,
        });
    }

    /// Whether a header without `<|message|>` holds more than its role.
    fn has_unframed_text(&self, from: usize, to: usize, role: HeaderRole) -> bool {
        let header = self.parse_header(from, to, role);
        header.channel != Channel::Absent || !header.rest.is_empty()
    }

    /// A message that ended before its `<|message|>`: what follows the channel is its text.
    fn push_unframed(&mut self, from: usize, to: usize, role: HeaderRole, close: Close) {
        let mut header = self.parse_header(from, to, role);
        header.recipient = None;
        header.content_type = None;
        let ids = self.ids(from, to);
        let channel_at = ids.iter().rposition(|&id| Some(id) == self.special.channel);
        let begin = channel_at.map_or(from, |at| from + at + 1);
        let whole = self.vocabulary.decode(self.ids(begin, to));
        let text = match channel_at {
            Some(_) => {
                let (name, content) = split_channel(&whole);
                header.channel = Channel::from_name(name);
                content.trim()
            }
            None => {
                let text = whole.trim();
                text.strip_prefix(header.role.as_str())
                    .unwrap_or(text)
                    .trim()
            }
        };
        self.issue("missing-message", "a header without `<|message|>`");
        if !text.is_empty() {
            // `text` is a part of `whole`: its distance is what stands before it.
            let skipped = text.as_ptr() as usize - whole.as_ptr() as usize;
            let at = self.bytes_before(begin) + skipped;
            self.push_text(header, text.to_owned(), at, [from, to], Some(close));
        }
    }

    /// The reply ends inside a header: nothing of it is a message yet.
    fn cut_header(&mut self, from: usize, role: HeaderRole) {
        let header = self.parse_header(from, self.ids.len(), role);
        self.issue("truncated-header", "the reply ends inside a message header");
        self.reply.truncated_in = Some(header.channel);
    }

    /// Takes a header's tokens apart: role, recipient, channel, content type, in any order that
    /// models use.
    fn parse_header(&self, from: usize, to: usize, role: HeaderRole) -> Header {
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

    fn check_header(&mut self, header: &Header) {
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

    fn finish(mut self) -> Reply {
        let count = |messages: &[ReplyMessage], channel: &Channel| {
            let n_tokens: usize = messages
                .iter()
                .filter(|message| message.role == ASSISTANT && message.channel == *channel)
                .map(|message| message.span[1] - message.span[0])
                .sum();
            u32::try_from(n_tokens).unwrap_or(u32::MAX)
        };
        self.reply.analysis_tokens = count(&self.reply.messages, &Channel::Analysis);
        self.reply.final_tokens = count(&self.reply.messages, &Channel::Final);
        self.reply.final_text = self
            .reply
            .finished_final()
            .or_else(|| self.reply.finals().next_back())
            .map(|message| message.text.clone());
        self.reply
    }
}

/// The channel's name and the text after it, where no `<|message|>` parts the two: models then
/// write `finalThe answer …` as well as `final The answer …`.
fn split_channel(text: &str) -> (&str, &str) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::tiny;
    use proptest::prelude::*;

    /// Ids of a reply written as text; special tokens are those spelled in it.
    fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<TokenId> {
        let mut ids = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let next = rest.match_indices("<|").find_map(|(at, _)| {
                let end = at + rest[at..].find("|>")? + 2;
                let id = tokenizer.special_id(&rest[at..end])?;
                Some((at, end, id))
            });
            match next {
                Some((at, end, id)) => {
                    ids.extend(tokenizer.encode_ordinary(&rest[..at]).expect("it encodes"));
                    ids.push(id);
                    rest = &rest[end..];
                }
                None => {
                    ids.extend(tokenizer.encode_ordinary(rest).expect("it encodes"));
                    rest = "";
                }
            }
        }
        ids
    }

    fn reply(text: &str) -> Reply {
        let tokenizer = tiny();
        parse(&ids(&tokenizer, text), &tokenizer)
    }

    #[test]
    fn analysis_and_final() {
        let reply = reply(
            "<|channel|>analysis<|message|>think<|end|>\
             <|start|>assistant<|channel|>final<|message|>42<|return|>",
        );
        assert_eq!(reply.final_text.as_deref(), Some("42"));
        assert!(reply.is_well_formed(), "{:?}", reply.issues);
        assert_eq!((reply.analysis_tokens, reply.final_tokens), (5, 2));
        assert_eq!(reply.truncated_in, None);
        assert_eq!(reply.messages[1].close, Some(Close::Return));
    }

    #[test]
    fn each_way_to_leave_the_format_keeps_the_final_message() {
        let cases = [
            (
                "<|start|>assistant<|channel|>final<|message|>4<|return|>",
                "doubled-start",
            ),
            (
                "<|channel|>analysis<|message|>a<|end|>assistant<|channel|>final<|message|>4<|return|>",
                "stray-token",
            ),
            (
                "<|channel|>analysis<|message|>a<|channel|>final<|message|>4<|return|>",
                "missing-end",
            ),
            (
                "<|channel|>analysis<|message|>a<|start|>assistant<|channel|>final<|message|>4<|return|>",
                "missing-end",
            ),
            ("<|channel|>final<|message|>4<|end|>stray", "after the end"),
            ("<|channel|>final<|message|>4<|end|><|end|>", "stray-token"),
            (
                "<|channel|>thoughts<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>4<|end|>",
                "unknown-channel",
            ),
            (
                "<|channel|><|message|>a<|end|><|start|>assistant<|channel|>final<|message|>4<|end|>",
                "empty-channel",
            ),
            (
                "<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>4<|end|>",
                "empty-channel",
            ),
            (
                "<|channel|>final<|message|>4<|end|><|start|>user<|channel|>final<|message|>thanks<|end|>",
                "other-role",
            ),
            (
                "<|channel|>final<|message|>4<|end|><|start|>assistant<|chann",
                "truncated-header",
            ),
            ("<|channel|>final<|message|>4<|endoftext|>", ""),
            ("<|channel|>final4<|return|>", "without `<|message|>`"),
            ("<|channel|>final 4<|return|>", "without `<|message|>`"),
            (
                "<|channel|>final<|message|>4<|end|><|start|>assistant<|channel|>final<|message|>5",
                "",
            ),
        ];
        for (text, issue) in cases {
            let reply = reply(text);
            assert_eq!(reply.final_text.as_deref(), Some("4"), "{text}");
            assert!(
                issue.is_empty() || reply.issues.iter().any(|it| it.contains(issue)),
                "{text}: {:?}",
                reply.issues
            );
        }
    }

    #[test]
    fn truncation_names_its_channel() {
        for (text, channel) in [
            ("<|channel|>analysis<|message|>th", Channel::Analysis),
            ("<|channel|>final<|message|>4", Channel::Final),
            (
                "<|channel|>analysis<|message|>a<|end|><|start|>assi",
                Channel::Absent,
            ),
            (
                "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>fi",
                Channel::Other("fi".into()),
            ),
            ("", Channel::Absent),
        ] {
            assert_eq!(reply(text).truncated_in, Some(channel), "{text}");
        }
    }

    #[test]
    fn tool_calls_have_recipient_and_content_type() {
        for text in [
            "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
            "<|channel|>commentary to=functions.f<|constrain|>json<|message|>{}<|call|>",
            " to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
        ] {
            let reply = reply(text);
            let message = &reply.messages[0];
            assert_eq!(message.recipient.as_deref(), Some("functions.f"), "{text}");
            assert_eq!(message.content_type.as_deref(), Some("<|constrain|>json"));
            assert_eq!(message.channel, Channel::Commentary);
            assert!(reply.calls_tool() && reply.is_well_formed(), "{reply:?}");
        }
    }

    #[test]
    fn plain_text_is_a_message_without_a_channel() {
        let reply = reply("The answer is 4.<|return|>");
        assert_eq!(reply.messages[0].channel, Channel::Absent);
        assert_eq!(reply.messages[0].text, "The answer is 4.");
        assert_eq!(reply.final_text, None);
    }

    #[test]
    fn a_message_says_where_its_text_stands() {
        for text in [
            "<|channel|>analysis<|message|>größer<|end|>\
             <|start|>assistant<|channel|>final<|message|>4",
            "<|channel|>analysis<|message|>a<|end|>\
             <|start|>assistant<|channel|>final  4 or so <|return|>",
            "assistant The answer is 4.<|return|>",
        ] {
            let reply = reply(text);
            assert!(!reply.messages.is_empty());
            for message in reply.messages {
                assert!(text[message.at..].starts_with(&message.text), "{message:?}");
            }
        }
    }

    proptest! {
        /// No sequence of ids fails, and a finished final message before it is never lost.
        #[test]
        fn any_ids_parse(tail in prop::collection::vec(
            prop_oneof![300u32..310, 0u32..260, 97u32..100], 0..40)) {
            let tokenizer = tiny();
            let _ = parse(&tail, &tokenizer);
            let mut all = ids(&tokenizer, "<|channel|>final<|message|>kept<|end|>");
            all.extend(&tail);
            let reply = parse(&all, &tokenizer);
            prop_assert_eq!(reply.messages[0].text.as_str(), "kept");
            prop_assert!(reply.final_text.is_some());
        }
    }
}
