//! A row's conversation as messages: what a competition that wants the reasoning is given.
//!
//! It is read from the spelled texts of prompt and replies, where a literal `<|end|>` in a
//! question looks like the special token: no verdict comes from here.

use super::ResultRow;
use super::prompts::PromptRow;

/// A message; a reply's analysis is one of its own.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ChatMessage {
    /// `system`, `developer`, `user`, `assistant`.
    pub role: String,
    /// `analysis` or `final` of the assistant's messages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channel: Option<String>,
    pub content: String,
}

/// All messages of a row, both stages, in order; without a row the prompt's alone.
pub fn conversation(prompt: &PromptRow, row: Option<&ResultRow>) -> Vec<ChatMessage> {
    let mut messages = Vec::new();
    // The prompt ends with the reply's beginning, so that prompt and reply are one text.
    let mut text = prompt.text.clone().unwrap_or_default();
    if let Some(row) = row {
        text += &row.raw_text;
    }
    push_messages(&text, &mut messages);
    if let Some(second) = row.and_then(|row| row.second.as_ref()) {
        messages.push(ChatMessage {
            role: "user".to_owned(),
            channel: None,
            content: second.user_turn.clone(),
        });
        push_messages(
            &format!("<|start|>assistant{}", second.raw_text),
            &mut messages,
        );
    }
    messages
}

const ENDS: [&str; 3] = ["<|end|>", "<|return|>", "<|call|>"];

/// The messages of a spelled text; one that is cut off has what is there of it.
fn push_messages(text: &str, messages: &mut Vec<ChatMessage>) {
    let mut rest = text;
    while let Some((_, begun)) = rest.split_once("<|start|>") {
        let Some((header, body)) = begun.split_once("<|message|>") else {
            return;
        };
        let end = ENDS.iter().filter_map(|end| body.find(end)).min();
        let (content, after) = body.split_at(end.unwrap_or(body.len()));
        rest = after;
        let mut words = header.split("<|channel|>");
        messages.push(ChatMessage {
            role: first_word(words.next()).unwrap_or("assistant").to_owned(),
            channel: first_word(words.next()).map(str::to_owned),
            content: content.to_owned(),
        });
    }
}

fn first_word(part: Option<&str>) -> Option<&str> {
    part?.split_whitespace().next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::submission::test_rows::{row, two_stages};

    fn spelled(messages: &[ChatMessage]) -> Vec<(&str, Option<&str>, &str)> {
        messages
            .iter()
            .map(|it| (it.role.as_str(), it.channel.as_deref(), it.content.as_str()))
            .collect()
    }

    #[test]
    fn both_stages_are_told_with_their_analysis() {
        let text = "<|start|>system<|message|>S<|end|><|start|>user<|message|>2+2?<|end|>\
                    <|start|>assistant";
        let ids: &[u32] = &[1, 2];
        let prompt = PromptRow::new("q", None, None, Some((text, ids)));
        let open = row("q", 0).final_text.expect("it has one");
        let expected = [
            ("system", None, "S"),
            ("user", None, "2+2?"),
            ("assistant", Some("analysis"), "sum\n"),
            ("assistant", Some("final"), open.as_str()),
            ("user", None, "Which?\nA. 42\nB. 4200"),
            ("assistant", Some("final"), "Answer: B"),
        ];
        let both = conversation(&prompt, Some(&two_stages("q", 0)));
        assert_eq!(spelled(&both), expected);
        let first = conversation(&prompt, Some(&row("q", 0)));
        assert_eq!(spelled(&first), expected[..4]);
        assert_eq!(spelled(&conversation(&prompt, None)), expected[..2]);
    }

    #[test]
    fn a_reply_cut_off_keeps_what_is_there() {
        let mut messages = Vec::new();
        push_messages(
            "<|start|>assistant<|channel|>analysis<|message|>1 + ",
            &mut messages,
        );
        push_messages("<|start|>assistant<|channel|>fin", &mut messages);
        assert_eq!(
            spelled(&messages),
            [("assistant", Some("analysis"), "1 + ")]
        );
    }
}
