//! Replies as models write them, and what must be read from them.

use super::*;
use crate::dataset::{Defect, Location};

use super::extract::{Extraction, Rule, extract};

const ALL: [Rule; 7] = [
    Rule::Boxed,
    Rule::AnswerIs,
    Rule::Hash,
    Rule::OptionLetter,
    Rule::OptionText,
    Rule::LastNumber,
    Rule::Whole,
];

fn read(text: &str, options: &[&str], scorer: Scorer) -> Extraction {
    let options: Vec<String> = options.iter().map(|it| (*it).to_owned()).collect();
    extract(text, &options, scorer, &ALL)
}

/// The answer and its rule; `!` in front when it is not an option, `-` for nothing.
fn shown(extraction: &Extraction) -> (String, String) {
    match extraction {
        Extraction::Found(answer) => (answer.text.clone(), answer.rule.clone()),
        Extraction::NotAnOption(answer) => (format!("!{}", answer.text), answer.rule.clone()),
        Extraction::Nothing => ("-".into(), "-".into()),
    }
}

const CITIES: [&str; 4] = ["Paris", "Rome", "New York", "York"];

#[test]
fn choices() {
    for (text, answer, rule) in [
        ("B", "B", "option_letter"),
        ("b", "B", "option_letter"),
        ("(B)", "B", "option_letter"),
        ("[C]", "C", "option_letter"),
        ("B.", "B", "option_letter"),
        ("B)", "B", "option_letter"),
        ("**B**", "B", "option_letter"),
        ("`B`", "B", "option_letter"),
        ("$B$", "B", "option_letter"),
        ("B. Rome", "B", "option_letter"),
        ("B) Rome", "B", "option_letter"),
        ("(B) Rome", "B", "option_letter"),
        ("**B. Rome**", "B", "option_letter"),
        ("Answer: B", "B", "answer_is"),
        ("answer: b", "B", "answer_is"),
        ("Answer: (B)", "B", "answer_is"),
        ("Answer: B. Rome", "B", "answer_is"),
        ("Answer: Rome", "B", "answer_is"),
        ("Answer: rome.", "B", "answer_is"),
        ("**Answer:** B", "B", "answer_is"),
        ("**Answer: B**", "B", "answer_is"),
        ("**Answer**: B", "B", "answer_is"),
        ("Answer:\n\nB", "B", "answer_is"),
        ("Final answer: **C**", "C", "answer_is"),
        ("The answer is B.", "B", "answer_is"),
        (
            "The correct answer is (B) because Rome is old.",
            "B",
            "answer_is",
        ),
        ("The correct option is B", "B", "answer_is"),
        ("The answer is option B.", "B", "answer_is"),
        ("The answer to the question is: B", "B", "answer_is"),
        ("The answer is $\\boxed{B}$.", "B", "boxed"),
        ("\\boxed{\\text{B}}", "B", "boxed"),
        ("\\boxed{\\text{(B) Rome}}", "B", "boxed"),
        ("\\boxed{B. Rome}", "B", "boxed"),
        ("So it is \\boxed{A}. Wait, no: \\boxed{D}", "D", "boxed"),
        ("#### B", "B", "hash"),
        // The last one counts.
        ("Answer: A? No.\nAnswer: B", "B", "answer_is"),
        ("I first thought (A), but it is (B)", "B", "option_letter"),
        // Letters inside words, and words of one letter, are no options.
        ("A city in Italy: Rome", "B", "option_text"),
        ("I think Rome is best", "B", "option_text"),
        ("Answer: A city called Rome", "B", "answer_is"),
        ("Because of Caesar's birth, Rome", "B", "option_text"),
        ("Answer: A because it is large", "A", "answer_is"),
        ("Answer: A, Paris", "A", "answer_is"),
        // An option inside a longer one.
        ("It must be New York", "C", "option_text"),
        ("It must be York", "D", "option_text"),
        ("It is Yorkshire", "!It is Yorkshire", "whole"),
        ("Rome or Paris", "!Rome or Paris", "whole"),
        // Not an option.
        ("Answer: F", "!F", "answer_is"),
        ("F", "!F", "option_letter"),
        ("Answer: Berlin", "!Berlin", "answer_is"),
        ("Answer: A and C", "!A and C", "answer_is"),
        ("Answer: A, C", "!A, C", "answer_is"),
        ("\\boxed{E}", "!E", "boxed"),
        ("none of the above", "!none of the above", "whole"),
        // The answer is what it is said to be, not what it is said not to be.
        ("The answer is not A.\nAnswer: B", "B", "answer_is"),
        ("Answer: B\nThe answer is not A.", "B", "answer_is"),
        // Nothing.
        ("", "-", "-"),
        ("   \n", "-", "-"),
        (
            "I am not able to decide this with what is given here",
            "-",
            "-",
        ),
        (
            "Unanswerable: I would need to see the picture for this one",
            "-",
            "-",
        ),
        ("\\boxed{", "!\\boxed{", "whole"),
    ] {
        let found = shown(&read(text, &CITIES, Scorer::Choice));
        assert_eq!(found, (answer.to_owned(), rule.to_owned()), "{text:?}");
    }
}

#[test]
fn numeric_options_are_no_parts_of_numbers() {
    let options = ["7", "17", "1.7", "-7"];
    for (text, answer) in [
        ("It is 17", "B"),
        ("It is 7", "A"),
        ("It is 1.7", "C"),
        ("It is -7", "D"),
        ("It is 7.", "A"),
        ("It is 177 or so, I would say after all", "-"),
        ("17", "B"),
    ] {
        assert_eq!(
            shown(&read(text, &options, Scorer::Choice)).0,
            answer,
            "{text:?}"
        );
    }
}

#[test]
fn letters_without_options() {
    for (text, answer) in [
        ("Answer: (B)", "B"),
        ("(F)", "F"),
        ("The answer is (D).", "D"),
    ] {
        assert_eq!(
            shown(&read(text, &[], Scorer::Choice)).0,
            answer,
            "{text:?}"
        );
    }
}

#[test]
fn numbers() {
    for (text, answer, rule) in [
        ("18", "18", "last_number"),
        ("Answer: 18", "18", "answer_is"),
        ("Answer: $1,450.00", "1450", "answer_is"),
        ("**Answer:** 18 eggs", "18", "answer_is"),
        ("The answer is 3 * 6 = 18 dollars.", "18", "answer_is"),
        ("The answer is -5.", "-5", "answer_is"),
        ("The answer is −5 °C", "-5", "answer_is"),
        ("#### 18", "18", "hash"),
        ("work\n#### 1,450\n", "1450", "hash"),
        ("\\boxed{18}", "18", "boxed"),
        ("\\boxed{x = 18}", "18", "boxed"),
        ("$\\boxed{\\frac{1}{2}}$ or \\boxed{0.5}", "0.5", "boxed"),
        ("\\[ \\boxed{\\text{18 eggs}} \\]", "18", "boxed"),
        (
            "She sells 9 eggs at $2, so 18 dollars.",
            "18",
            "last_number",
        ),
        ("It takes 3.5 hours.", "3.5", "last_number"),
        ("From 1990 to 2024", "2024", "last_number"),
        (
            "The answer is unknown.\nAbout 7 I guess",
            "7",
            "last_number",
        ),
        ("\\boxed{\\frac{1}{2}}", "1/2", "boxed"),
        ("\\boxed{-\\dfrac{3}{4}}", "-3/4", "boxed"),
        ("3/4", "3/4", "last_number"),
        ("none", "-", "-"),
        ("", "-", "-"),
    ] {
        let found = shown(&read(text, &[], Scorer::Decimal));
        assert_eq!(found, (answer.to_owned(), rule.to_owned()), "{text:?}");
    }
}

#[test]
fn texts() {
    for (text, answer, rule) in [
        ("Paris", "Paris", "whole"),
        (" **Paris** \n", "Paris", "whole"),
        ("35, 22, 42", "35, 22, 42", "whole"),
        ("Answer: Paris", "Paris", "answer_is"),
        (
            "The answer is Paris. It lies on the Seine.",
            "Paris",
            "answer_is",
        ),
        ("The answer is the U.S. Army.", "the U.S. Army", "answer_is"),
        ("Answer: Dr. No", "Dr. No", "answer_is"),
        (
            "The capital is Paris, founded in 52 BC",
            "The capital is Paris, founded in 52 BC",
            "whole",
        ),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", "boxed"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}", "boxed"),
        ("Answer: \\(x + 1\\)", "x + 1", "answer_is"),
        ("Answer: $x$", "x", "answer_is"),
        ("The answer is:\nParis", "Paris", "answer_is"),
        ("No answers here", "No answers here", "whole"),
        ("", "-", "-"),
        ("**", "-", "-"),
    ] {
        let found = shown(&read(text, &[], Scorer::Normalized));
        assert_eq!(found, (answer.to_owned(), rule.to_owned()), "{text:?}");
    }
}

#[test]
fn spans_point_at_the_answer() {
    for (text, scorer, spanned) in [
        ("é Answer: **Paris**.", Scorer::Normalized, "Paris"),
        ("So: 3 * 6 = 1,450 eggs", Scorer::Decimal, "1,450"),
        ("Die Lösung ist (B)", Scorer::Choice, "B"),
        ("x\n#### 18 \n", Scorer::Decimal, "18"),
    ] {
        match read(text, &["a", "b"], scorer) {
            Extraction::Found(answer) => {
                assert_eq!(&text[answer.span[0]..answer.span[1]], spanned, "{text}");
            }
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[test]
fn disagreement_of_rules_is_told() {
    let agree = |text| match read(text, &[], Scorer::Decimal) {
        Extraction::Found(answer) => answer.rules_agree,
        other => panic!("{other:?}"),
    };
    assert!(agree("The answer is 18.\n#### 18"));
    assert!(!agree("The answer is 18.\n#### 19"));
}

pub(super) fn record(options: &[&str], gold: Option<Gold>) -> Record {
    Record {
        key: "k".into(),
        id: None,
        location: Location {
            file: "a.jsonl".into(),
            line: 1,
        },
        question: "q".into(),
        messages: Vec::new(),
        options: options.iter().map(|it| (*it).to_owned()).collect(),
        gold,
        group: None,
        cluster: None,
        fields: serde_json::Map::new(),
        defect: None,
    }
}

pub(super) fn scoring() -> Scoring {
    Scoring {
        scorer: Scorer::Auto,
        rules: ALL.to_vec(),
        tolerance: 1e-6,
        aggregate: Default::default(),
    }
}

#[test]
fn every_status_comes_from_its_reply() {
    use crate::prompt::harmony::{Close, ReplyMessage};
    let message = |channel: Channel, text: &str, close: Option<Close>| ReplyMessage {
        role: "assistant".into(),
        channel,
        recipient: None,
        content_type: None,
        text: text.into(),
        span: [0, 1],
        at: 0,
        close,
    };
    let reply = |messages: Vec<ReplyMessage>, issues: &[&str]| {
        let finals = messages.iter().rfind(|it| it.channel == Channel::Final);
        Reply {
            final_text: finals.map(|it| it.text.clone()),
            truncated_in: messages
                .last()
                .filter(|it| it.close.is_none())
                .map(|it| it.channel.clone()),
            issues: issues.iter().map(|it| (*it).to_owned()).collect(),
            messages,
            ..Reply::default()
        }
    };
    let analysis = || message(Channel::Analysis, "t", Some(Close::End));
    let record = record(&["x", "y"], Some(Gold::Option(0)));
    let cases = [
        (
            reply(
                vec![
                    analysis(),
                    message(Channel::Final, "A", Some(Close::Return)),
                ],
                &[],
            ),
            StopReason::Stop,
            Status::Answered,
            true,
        ),
        (
            reply(
                vec![
                    analysis(),
                    message(Channel::Final, "B", Some(Close::Return)),
                ],
                &["x"],
            ),
            StopReason::Stop,
            Status::Answered,
            false,
        ),
        (
            reply(vec![message(Channel::Analysis, "t", None)], &[]),
            StopReason::Length,
            Status::TruncatedAnalysis,
            false,
        ),
        (
            reply(vec![analysis(), message(Channel::Final, "A", None)], &[]),
            StopReason::Length,
            Status::TruncatedFinal,
            false,
        ),
        (
            reply(
                vec![
                    message(Channel::Final, "A", Some(Close::End)),
                    message(Channel::Analysis, "t", None),
                ],
                &[],
            ),
            StopReason::Length,
            Status::Answered,
            true,
        ),
        (
            reply(vec![analysis()], &[]),
            StopReason::Stop,
            Status::NoFinal,
            false,
        ),
        (
            reply(
                vec![
                    analysis(),
                    message(Channel::Commentary, "{}", Some(Close::Call)),
                ],
                &[],
            ),
            StopReason::Stop,
            Status::ToolCall,
            false,
        ),
        (
            reply(
                vec![message(Channel::Absent, "A", Some(Close::Return))],
                &["no channel"],
            ),
            StopReason::Stop,
            Status::Malformed,
            false,
        ),
        (
            reply(vec![message(Channel::Final, " ", Some(Close::Return))], &[]),
            StopReason::Stop,
            Status::NoAnswer,
            false,
        ),
        (
            reply(vec![message(Channel::Final, "E", Some(Close::Return))], &[]),
            StopReason::Stop,
            Status::NotAnOption,
            false,
        ),
    ];
    for (reply, stop, status, correct) in cases {
        let ended = Ended {
            reply: &reply,
            stop,
            is_closed: false,
        };
        let verdict = judge(&record, &scoring(), ended);
        assert_eq!(
            (verdict.status, verdict.correct),
            (status, Some(correct)),
            "{reply:?}"
        );
    }
}

#[test]
fn rows_without_gold_and_bad_rows() {
    let mut row = record(&[], None);
    let verdict = judge_text(&row, &scoring(), "Paris");
    assert_eq!((verdict.status, verdict.correct), (Status::Answered, None));
    row.gold = Some(Gold::Text("x".into()));
    assert_eq!(without_answer(&row, Status::NotRun).correct, None);
    row.defect = Some(Defect {
        field: None,
        message: "bad".into(),
        hint: "mend".into(),
    });
    let ended = Ended {
        reply: &Reply::default(),
        stop: StopReason::Stop,
        is_closed: false,
    };
    let verdict = judge(&row, &scoring(), ended);
    assert_eq!(
        (verdict.status, verdict.correct),
        (Status::Error, Some(false))
    );
}

#[test]
fn auto_follows_the_data() {
    let text = |gold: &str| record(&[], Some(Gold::Text(gold.into())));
    let choice = || record(&["x", "y"], Some(Gold::Option(0)));
    let resolve = |records: &[Record]| scoring().resolve(records).scorer;
    assert_eq!(resolve(&[choice(), choice()]), Scorer::Choice);
    assert_eq!(
        resolve(&[text("1"), text("1,450"), record(&[], None)]),
        Scorer::Decimal
    );
    assert_eq!(resolve(&[text("1"), text("x")]), Scorer::Auto);
    assert_eq!(resolve(&[text("1"), choice()]), Scorer::Auto);
    assert_eq!(resolve(&[record(&[], None)]), Scorer::Auto);
    assert_eq!(scoring().scorer_for(&choice()), Scorer::Choice);
    assert_eq!(scoring().scorer_for(&text("35, 22")), Scorer::Normalized);
    assert_eq!(scoring().scorer_for(&text("3.5")), Scorer::Decimal);
}

#[test]
fn baselines() {
    let rows = [
        record(&["x", "y"], Some(Gold::Option(1))),
        record(&["x", "y", "z", "w"], Some(Gold::Option(1))),
        record(&["x", "y"], Some(Gold::Option(0))),
        record(&[], None),
    ];
    let majority = baseline::majority(&rows).expect("there is gold");
    assert_eq!((majority.label.as_str(), majority.n), ("B", 2));
    assert!((majority.share - 2.0 / 3.0).abs() < 1e-12);
    let random = baseline::random(&rows).expect("there are options");
    assert!((random - (0.5 + 0.25 + 0.5) / 3.0).abs() < 1e-12);
    assert_eq!(baseline::majority(&rows[3..]), None);
    assert_eq!(
        baseline::random(&[record(&[], Some(Gold::Text("x".into())))]),
        None
    );
}
