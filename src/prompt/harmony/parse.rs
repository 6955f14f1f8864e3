//! A reply's token ids to messages.
//!
//! The reply begins after `<|start|>assistant`. Models leave the format in many ways (a doubled
//! start, an invented channel, a missing message token, text after the end, a cut-off header):
//! each is named in [`Reply::issues`], none is an error, and every finished message is kept.
//!
//! Here is the state machine over the tokens; `header` takes a message's header apart.

mod header;
#[cfg(test)]
mod tests;

use super::reply::{ASSISTANT, Channel, Close, Reply, ReplyMessage};
use crate::engine::TokenId;
use crate::tokenizer::{SpecialIds, Tokenizer};
use header::{Header, HeaderRole, split_channel};

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
