//! A reply out of its spelled text, where the tokenizer is not at hand.
//!
//! The same state machine as over token ids, with the text between two special tokens as one id.
//! A special token that a model spelled in ordinary tokens cannot be told from a real one here;
//! it is the one thing in which the messages may not be those of the ids.

use super::Reply;
use super::parse::{Vocabulary, parse_with};
use crate::engine::TokenId;
use crate::tokenizer::SpecialIds;

/// The place of each is its id.
const SPECIAL: [&str; 8] = SpecialIds::NAMES;

/// The special tokens, then the texts between them, in order.
struct Parts<'a>(Vec<&'a str>);

impl Vocabulary for Parts<'_> {
    fn decode(&self, ids: &[TokenId]) -> String {
        let parts = ids.iter().filter_map(|&id| self.0.get(id as usize));
        parts.copied().collect()
    }

    fn is_special(&self, id: TokenId) -> bool {
        (id as usize) < SPECIAL.len()
    }
}

/// Parses a reply's raw text. All is as [`super::parse()`] gives it but what counts tokens: the
/// messages' `span` and the reply's token counts mean nothing.
pub fn parse_spelled(raw: &str) -> Reply {
    let mut parts = Parts(SPECIAL.to_vec());
    let mut ids: Vec<TokenId> = Vec::new();
    let mut text_from = 0;
    let mut search_from = 0;
    while let Some(found) = raw.get(search_from..).and_then(|rest| rest.find("<|")) {
        let at = search_from + found;
        let rest = &raw[at..];
        match SPECIAL.iter().position(|name| rest.starts_with(name)) {
            Some(special) => {
                parts.push_text(&raw[text_from..at], &mut ids);
                ids.push(special as TokenId);
                text_from = at + SPECIAL[special].len();
                search_from = text_from;
            }
            None => search_from = at + 1,
        }
    }
    parts.push_text(&raw[text_from..], &mut ids);
    parse_with(&ids, &parts, SpecialIds::of(place))
}

fn place(name: &str) -> Option<TokenId> {
    let place = SPECIAL.iter().position(|special| *special == name);
    place.map(|place| place as TokenId)
}

impl<'a> Parts<'a> {
    fn push_text(&mut self, text: &'a str, ids: &mut Vec<TokenId>) {
        if !text.is_empty() {
            ids.push(self.0.len() as TokenId);
            self.0.push(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::harmony::{ReplyMessage, parse};
    use crate::tokenizer::tests::tiny;
    use proptest::prelude::*;

    /// Without what counts tokens.
    fn messages(reply: Reply) -> Vec<ReplyMessage> {
        let uncounted = |message| ReplyMessage {
            span: [0, 0],
            ..message
        };
        reply.messages.into_iter().map(uncounted).collect()
    }

    #[test]
    fn what_only_looks_like_a_special_token_is_text() {
        let raw = "<|channel|>final<|message|>a <| b <|x|> <|end|><|start|>user<|message|>c";
        let texts: Vec<String> = messages(parse_spelled(raw))
            .into_iter()
            .map(|message| message.text)
            .collect();
        assert_eq!(texts, ["a <| b <|x|> ", "c"]);
        assert_eq!(parse_spelled(""), parse(&[], &tiny()));
    }

    proptest! {
        /// Text and ids of any reply have the same messages. Byte pieces of `<`, `|` and `>` are
        /// left out: they could spell a special token.
        #[test]
        fn the_spelled_text_has_the_messages_of_the_ids(ids in prop::collection::vec(
            prop_oneof![300u32..308, 0u32..60, 97u32..100, 192u32..256], 0..40)) {
            let tokenizer = tiny();
            let expected = messages(parse(&ids, &tokenizer));
            let raw = tokenizer.decode(&ids);
            let found = messages(parse_spelled(&raw));
            for message in &found {
                prop_assert!(raw[message.at..].starts_with(&message.text));
            }
            prop_assert_eq!(found, expected);
        }
    }
}
