//! Replies in the format, in every known way out of it, and of any ids.

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
