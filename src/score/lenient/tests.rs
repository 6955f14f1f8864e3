//! Hand-written replies that come to no answer by the strict rule, and what they say all the same.

use super::*;
use crate::dataset::Gold;
use crate::prompt::harmony::parse_spelled;
use crate::score::tests::{record, scoring};
use crate::score::{Status, Verdict, judge};
use StopReason::{Length, Stop};

const ANALYSIS: &str = "<|channel|>analysis<|message|>";
const FINAL: &str = "<|channel|>final<|message|>";
const NEXT: &str = "<|end|><|start|>assistant";

fn judged(raw: &str, stop: StopReason, is_closed: bool, record: &Record) -> Verdict {
    let ended = Ended {
        reply: &parse_spelled(raw),
        stop,
        is_closed,
    };
    judge(record, &scoring(), ended)
}

fn number() -> Record {
    record(&[], Some(Gold::Text("42".into())))
}

fn choice() -> Record {
    record(&["Paris", "Rome", "Bonn"], Some(Gold::Option(1)))
}

fn words() -> Record {
    record(&[], Some(Gold::Text("New York".into())))
}

/// The lenient answer of a reply that must have none by the strict rule.
fn found(raw: &str, stop: StopReason, record: &Record) -> Option<Answer> {
    let verdict = judged(raw, stop, false, record);
    assert_eq!(
        (&verdict.answer, verdict.correct),
        (&None, Some(false)),
        "{raw}"
    );
    let lenient = verdict.lenient.expect("it is unanswered");
    assert_eq!(
        lenient.correct == Some(true),
        lenient.answer.is_some(),
        "{raw}"
    );
    lenient.answer
}

#[test]
fn an_answer_is_found_where_it_was_stated() {
    let a = ANALYSIS;
    let f = FINAL;
    let call = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>";
    for (raw, stop, status, rule, channel) in [
        (
            format!("{a}6 * 7.{NEXT}{f}The answer is 42. To see why, take"),
            Length,
            Status::TruncatedFinal,
            "answer_is",
            Some("final"),
        ),
        // The final message first, though the analysis says something, too.
        (
            format!("{a}So the answer is 41.{NEXT}{f}**Answer: 42**\n\nIndeed, 6"),
            Length,
            Status::TruncatedFinal,
            "answer_is",
            Some("final"),
        ),
        (
            format!("{a}So the answer is 42.{NEXT}{f}We multiply 6 by"),
            Length,
            Status::TruncatedFinal,
            "answer_is",
            Some("analysis"),
        ),
        (
            format!("{a}6 * 7 = 42, so the answer is 42. Check: 6 * 5 = 30 and"),
            Length,
            Status::TruncatedAnalysis,
            "answer_is",
            Some("analysis"),
        ),
        // The cut goes through the second statement.
        (
            format!("{a}So the answer is 42. Let me see. Yes, the answer is 4"),
            Length,
            Status::TruncatedAnalysis,
            "answer_is",
            Some("analysis"),
        ),
        (
            format!("{a}The answer is 41. Wait, it is 42. Now"),
            Length,
            Status::TruncatedAnalysis,
            "correction",
            Some("analysis"),
        ),
        (
            format!("{a}which makes \\boxed{{42}} as the"),
            Length,
            Status::TruncatedAnalysis,
            "boxed",
            Some("analysis"),
        ),
        // The newest of two.
        (
            format!("{a}The answer is 41.{NEXT}{a}No: the answer is 42.<|end|>"),
            Stop,
            Status::NoFinal,
            "answer_is",
            Some("analysis"),
        ),
        // Ended by the model, so its last word is whole.
        (
            format!("{a}So the answer is 42<|end|>"),
            Stop,
            Status::NoFinal,
            "answer_is",
            Some("analysis"),
        ),
        (
            format!("{a}The answer is 42.{NEXT}{call}{{\"answer\": 7}}<|call|>"),
            Stop,
            Status::ToolCall,
            "answer_is",
            Some("analysis"),
        ),
        (
            format!("{a}#### 42{NEXT}{f}See above.<|return|>"),
            Stop,
            Status::NoAnswer,
            "hash",
            Some("analysis"),
        ),
        (
            "<|message|>It is 42<|return|>".to_owned(),
            Stop,
            Status::Malformed,
            "last_number",
            None,
        ),
        (
            "<|channel|>thoughts<|message|>The answer is 42.<|return|>".to_owned(),
            Stop,
            Status::Malformed,
            "answer_is",
            Some("thoughts"),
        ),
    ] {
        let answer = found(&raw, stop, &number()).unwrap_or_else(|| panic!("{raw}"));
        let said = (answer.text.as_str(), answer.rule.as_str());
        assert_eq!(
            (said, answer.channel.as_deref()),
            (("42", rule), channel),
            "{raw}"
        );
        assert_eq!(&raw[answer.span[0]..answer.span[1]], "42", "{raw}");
        assert_eq!(judged(&raw, stop, false, &number()).status, status, "{raw}");
    }
}

#[test]
fn what_is_no_statement_or_not_whole_is_no_answer() {
    let a = ANALYSIS;
    let f = FINAL;
    for (raw, stop) in [
        // Numbers that pass by.
        (format!("{a}6 * 7 = 42 and then"), Length),
        (format!("{a}6 * 7 = 42<|end|>"), Stop),
        (
            "<|channel|>thoughts<|message|>It is 42<|return|>".to_owned(),
            Stop,
        ),
        (format!("{f}First, 6 * 7 = 42 and then"), Length),
        // On the way to 420, 42,000, 42.5.
        (format!("{a}The answer is 42"), Length),
        (format!("{a}The answer is 42,"), Length),
        (format!("{f}The answer is 42."), Length),
        (format!("{a}which makes \\boxed{{42"), Length),
        (format!("{a}The answer is 42 * 3 which is"), Length),
        // Not the model's own word, or not meant for a reader.
        (
            format!("{a}Hm.{NEXT}<|end|><|start|>user<|message|>The answer is 42.<|end|>"),
            Stop,
        ),
        (
            "<|channel|>commentary to=functions.f<|message|>The answer is 42.<|call|>".to_owned(),
            Stop,
        ),
        (String::new(), Stop),
    ] {
        assert_eq!(found(&raw, stop, &number()), None, "{raw}");
    }
}

#[test]
fn options_and_words_are_read_with_the_same_care() {
    let a = ANALYSIS;
    let read = |raw: String, record: &Record| {
        let answer = found(&raw, Length, record);
        answer.map(|answer| answer.text)
    };
    let b = Some("B".to_owned());
    assert_eq!(read(format!("{a}So the answer is B. A is"), &choice()), b);
    assert_eq!(read(format!("{a}The answer is Rome. Bonn"), &choice()), b);
    for undecided in [
        "A) is wrong, (B) may be",
        "The answer is B",
        "So it is Rome and",
        // No option, and then the search goes on, here to nothing.
        "Answer: F. Now",
    ] {
        assert_eq!(
            read(format!("{a}{undecided}"), &choice()),
            None,
            "{undecided}"
        );
    }
    let new_york = Some("New York".to_owned());
    assert_eq!(
        read(format!("{a}The answer is New York. It"), &words()),
        new_york
    );
    for cut in ["The answer is New York", "The answer is New York C"] {
        assert_eq!(read(format!("{FINAL}{cut}"), &words()), None, "{cut}");
    }
    assert_eq!(read(format!("{FINAL}New York"), &words()), None);
}

#[test]
fn an_analysis_that_podium_closed_was_cut_off() {
    let raw = format!("{ANALYSIS}So the answer is 42{NEXT}{FINAL}");
    let lenient = |is_closed| {
        let verdict = judged(&raw, Length, is_closed, &number());
        assert_eq!(verdict.status, Status::TruncatedFinal);
        verdict.lenient.expect("it is unanswered").answer
    };
    assert_eq!(lenient(true), None);
    assert!(lenient(false).is_some());
    // What stood before its last word counts.
    let raw = format!("{ANALYSIS}The answer is 42. Then 6{NEXT}{FINAL}");
    let verdict = judged(&raw, Length, true, &number());
    assert_eq!(verdict.lenient.and_then(|it| it.correct), Some(true));
}

/// Every reply of up to five of these parts: the strict verdict is the same with and without the
/// lenient one, which never takes anything away from it.
#[test]
fn the_lenient_score_is_never_below_the_strict_one() {
    let parts = [
        ANALYSIS,
        FINAL,
        NEXT,
        "<|return|>",
        "The answer is 42. ",
        "The answer is 7. ",
        "42",
    ];
    let (mut n_strict, mut n_lenient, mut n_replies) = (0, 0, 0);
    for index in 0..parts.len().pow(5) {
        let raw: String = (0..5)
            .map(|place| parts[index / parts.len().pow(place) % parts.len()])
            .collect();
        for stop in [Stop, Length] {
            let verdict = judged(&raw, stop, false, &number());
            n_replies += 1;
            assert_eq!(
                verdict.lenient.is_some(),
                verdict.status.is_unanswered(),
                "{raw}"
            );
            if verdict.status.is_unanswered() {
                assert_eq!(
                    (&verdict.answer, verdict.correct),
                    (&None, Some(false)),
                    "{raw}"
                );
            }
            let is_right = verdict.correct == Some(true);
            n_strict += u32::from(is_right);
            n_lenient += u32::from(match &verdict.lenient {
                None => is_right,
                Some(lenient) => lenient.correct == Some(true),
            });
            if let Some(answer) = verdict.lenient.and_then(|lenient| lenient.answer) {
                assert_eq!(&raw[answer.span[0]..answer.span[1]], answer.text, "{raw}");
            }
        }
    }
    assert!(0 < n_strict && n_strict < n_lenient && n_lenient < n_replies);
}
