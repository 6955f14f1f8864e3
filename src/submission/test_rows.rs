//! Result rows for tests.

use super::{RESULT_SCHEMA, ResultRow, SecondStage};
use crate::dataset::Gold;
use crate::engine::StopReason;
use crate::score::{Answer, Lenient, Status};

/// A right answer to row `key`, with every optional field that a usual row has.
pub(crate) fn row(key: &str, sample: u32) -> ResultRow {
    let final_text = "The answer is 4\u{202f}200.".to_owned();
    ResultRow {
        schema: RESULT_SCHEMA.to_owned(),
        key: key.to_owned(),
        id: Some(serde_json::Value::from(key)),
        sample,
        status: Status::Answered,
        correct: Some(true),
        gold: Some(Gold::Text("4200".to_owned())),
        answer: Some(Answer {
            text: "4200".to_owned(),
            rule: "answer_is".to_owned(),
            span: [14, 21],
            rules_agree: true,
            channel: Some("final".to_owned()),
        }),
        lenient: None,
        raw_text: format!(
            "<|channel|>analysis<|message|>sum\n<|end|><|start|>assistant\
             <|channel|>final<|message|>{final_text}<|return|>"
        ),
        final_text: Some(final_text),
        output_ids: vec![200_005, 35_644, 200_008, 200_002],
        logprob_sum: Some(-0.1),
        logprob_sum_bits: Some(format!("{:08x}", (-0.1_f32).to_bits())),
        prompt_tokens: 77,
        reused_tokens: 64,
        analysis_tokens: 1,
        final_tokens: 1,
        stop_reason: Some(StopReason::Stop),
        group: Some("sums".to_owned()),
        cluster: None,
        seconds: Some(0.25),
        format_issues: Vec::new(),
        error: None,
        trace_hash: None,
        numerics_id: None,
        forced: None,
        second: None,
    }
}

/// A row of two stages: an open answer, then the right option.
pub(crate) fn two_stages(key: &str, sample: u32) -> ResultRow {
    let mut row = row(key, sample);
    row.gold = Some(Gold::Option(1));
    if let Some(answer) = &mut row.answer {
        answer.text = "B".to_owned();
        answer.span = [8, 9];
    }
    row.second = Some(SecondStage {
        user_turn: "Which?\nA. 42\nB. 4200".to_owned(),
        raw_text: "<|channel|>final<|message|>Answer: B<|return|>".to_owned(),
        final_text: Some("Answer: B".to_owned()),
        output_ids: vec![200_005, 200_008, 33, 200_002],
        logprob_sum: -0.2,
        logprob_sum_bits: format!("{:08x}", (-0.2_f32).to_bits()),
        prompt_tokens: 101,
        reused_tokens: 76,
        analysis_tokens: 0,
        final_tokens: 2,
        stop_reason: StopReason::Stop,
        seconds: 0.125,
        format_issues: Vec::new(),
        trace_hash: None,
        forced: None,
    });
    row
}

/// A wrong answer.
pub(crate) fn wrong(key: &str, sample: u32, text: &str) -> ResultRow {
    let mut row = row(key, sample);
    row.correct = Some(false);
    if let Some(answer) = &mut row.answer {
        text.clone_into(&mut answer.text);
    }
    row
}

/// A sample without an answer.
pub(crate) fn unanswered(key: &str, sample: u32, status: Status) -> ResultRow {
    let nothing = Lenient {
        answer: None,
        correct: Some(false),
    };
    ResultRow {
        status,
        correct: Some(false),
        answer: None,
        lenient: status.is_unanswered().then_some(nothing),
        final_text: None,
        ..row(key, sample)
    }
}

/// A sample cut off in its analysis, where it had stated the right answer.
pub(crate) fn cut_off(key: &str, sample: u32) -> ResultRow {
    let raw_text = "<|channel|>analysis<|message|>So the answer is 4200. Then".to_owned();
    let at = raw_text.find("4200").expect("it stands there");
    ResultRow {
        lenient: Some(Lenient {
            answer: Some(Answer {
                text: "4200".to_owned(),
                rule: "answer_is".to_owned(),
                span: [at, at + 4],
                rules_agree: true,
                channel: Some("analysis".to_owned()),
            }),
            correct: Some(true),
        }),
        raw_text,
        stop_reason: Some(StopReason::Length),
        ..unanswered(key, sample, Status::TruncatedAnalysis)
    }
}
