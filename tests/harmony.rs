//! Prompts and replies against independent references: nano's golden prompts (rendered and
//! tokenized by `models/nano/tokenizer.py` with the Python `tokenizers`) and openai-harmony's own
//! renderings and parses under `tests/golden/harmony/`.

use std::path::{Path, PathBuf};

use podium::dataset::{Location, Message, Record};
use podium::profile::Profile;
use podium::prompt::harmony::{Channel, Reply};
use podium::prompt::{Prompt, Reasoning, Segment, harmony};
use podium::tokenizer::Tokenizer;
use serde_json::Value;

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn json_lines(path: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(repository(path)).expect(path);
    text.lines()
        .map(|line| serde_json::from_str(line).expect("the golden file is JSON lines"))
        .collect()
}

fn nano_tokenizer() -> Tokenizer {
    Tokenizer::from_file(&repository("models/nano/tokenizer.json")).expect("it is checked in")
}

fn reasoning(name: &Value) -> Reasoning {
    serde_json::from_value(name.clone()).expect("low, medium or high")
}

fn text(value: &Value) -> String {
    value.as_str().expect("a text").to_owned()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("a list of ids")
}

#[test]
fn nano_prompts_equal_the_golden_ones() {
    let tokenizer = nano_tokenizer();
    let profile = Profile::builtin("nano").expect("it is built in");
    let golden = json_lines("models/nano/prompts.golden.jsonl");
    assert!(golden.len() > 10);
    for line in golden {
        let record = Record {
            key: text(&line["id"]),
            id: None,
            location: Location {
                file: "golden".into(),
                line: 1,
            },
            question: text(&line["question"]),
            messages: Vec::new(),
            options: serde_json::from_value(line["options"].clone()).unwrap_or_default(),
            gold: None,
            group: None,
            cluster: None,
            fields: serde_json::Map::new(),
            defect: None,
        };
        let prompt = profile
            .render(&record, reasoning(&line["effort"]), None)
            .expect("it renders");
        let segments = harmony::render(&prompt);
        assert_eq!(harmony::to_text(&segments), text(&line["text"]));
        let encoded = tokenizer.encode(&segments).expect("it encodes");
        assert_eq!(encoded, ids(&line["ids"]), "{}", line["text"]);
        assert_eq!(tokenizer.decode(&encoded), text(&line["text"]));
    }
}

#[test]
fn prompts_are_rendered_as_openai_harmony_renders_them() {
    let golden = json_lines("tests/golden/harmony/render.jsonl");
    assert!(golden.len() > 40);
    for line in golden {
        let messages: Vec<(String, Option<String>, String)> = line["messages"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|message| {
                let channel = message.get("channel").map(text);
                (text(&message["role"]), channel, text(&message["content"]))
            })
            .collect();
        let conversation = harmony::Conversation {
            reasoning: reasoning(&line["effort"]),
            knowledge_cutoff: line
                .get("knowledge_cutoff")
                .map_or(Some("2024-06"), Value::as_str),
            date: line["date"].as_str(),
            instructions: line["instructions"].as_str(),
            turns: messages
                .iter()
                .map(|(role, channel, text)| harmony::Turn {
                    role,
                    channel: channel.as_deref(),
                    text,
                })
                .collect(),
        };
        let rendered = harmony::render_conversation(&conversation);
        assert_eq!(harmony::to_text(&rendered), text(&line["expected"]));
        assert_eq!(rendered, segments(&line["expected_segments"]));
        // What podium asks with is the same where it can say the same.
        let is_plain = messages.iter().all(|(role, channel, _)| {
            (role == "assistant") == (channel.as_deref() == Some("final"))
        });
        if is_plain && line.get("knowledge_cutoff").is_none() && line["instructions"] != "" {
            let prompt = Prompt {
                reasoning: conversation.reasoning,
                date: conversation.date.map(str::to_owned),
                instructions: conversation.instructions.map(str::to_owned),
                turns: messages
                    .iter()
                    .map(|(role, _, content)| Message {
                        role: role.clone(),
                        content: content.clone(),
                    })
                    .collect(),
            };
            assert_eq!(harmony::render(&prompt), rendered, "{}", line["name"]);
        }
    }
}

/// The golden's segments; nothing is between two special tokens, so an empty text is none.
fn segments(value: &Value) -> Vec<Segment> {
    const NAMES: [&str; 8] = [
        "<|start|>",
        "<|message|>",
        "<|channel|>",
        "<|constrain|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|endoftext|>",
    ];
    let pairs: Vec<(String, String)> =
        serde_json::from_value(value.clone()).expect("a list of pairs");
    pairs
        .into_iter()
        .map(|(kind, text)| match kind.as_str() {
            "special" => {
                let name = NAMES.into_iter().find(|name| *name == text);
                Segment::Special(name.expect("a token of the format"))
            }
            _ => Segment::Text(text),
        })
        .collect()
}

fn parsed(line: &Value) -> Reply {
    let tokenizer = nano_tokenizer();
    let ids = tokenizer
        .encode(&segments(&line["segments"]))
        .expect("nano has the format's tokens");
    harmony::parse(&ids, &tokenizer)
}

#[test]
fn replies_are_parsed_as_openai_harmony_parses_them() {
    let golden = json_lines("tests/golden/harmony/parse.jsonl");
    let followed: Vec<&Value> = golden
        .iter()
        .filter(|line| line["follow"] == true)
        .collect();
    assert!(followed.len() > 15);
    for line in followed {
        let messages: Vec<Value> = parsed(line)
            .messages
            .into_iter()
            .map(|message| {
                serde_json::json!({
                    "role": message.role, "channel": message.channel.name(),
                    "recipient": message.recipient, "content_type": message.content_type,
                    "content": message.text,
                })
            })
            .collect();
        assert_eq!(Value::from(messages), line["messages"], "{}", line["name"]);
    }
}

#[test]
fn malformed_replies_keep_what_is_whole() {
    let golden = json_lines("tests/golden/harmony/parse_malformed.jsonl");
    assert!(golden.len() > 15);
    for line in golden {
        let reply = parsed(&line);
        let texts_of = |channel: &Channel| -> Vec<&str> {
            let of = reply.messages.iter().filter(|it| it.channel == *channel);
            of.map(|it| it.text.as_str()).collect()
        };
        let other: Vec<Value> = reply
            .messages
            .iter()
            .filter(|it| matches!(it.channel, Channel::Other(_) | Channel::Absent))
            .map(|it| {
                let channel = it.channel.name().filter(|name| !name.is_empty());
                serde_json::json!({"channel": channel, "content": it.text})
            })
            .collect();
        let codes: Vec<&str> = reply
            .issues
            .iter()
            .filter_map(|issue| Some(issue.split_once(':')?.0))
            .collect();
        let found = serde_json::json!({
            "analysis": texts_of(&Channel::Analysis), "final": reply.final_text,
            "other": other, "issues": codes,
        });
        assert_eq!(found, line["expected"], "{}", line["name"]);
    }
}
