//! The verdict on a row, whose last stage decides.

use crate::dataset::Record;
use crate::engine::StopReason;
use crate::profile::Profile;
use crate::prompt::harmony::{self, Reply};
use crate::score::{self, Status, Verdict};
use crate::submission::ResultRow;
use crate::tokenizer::Tokenizer;

/// The verdict on a row's replies. A row of two stages whose first reply has no final message to
/// go on from has that reply's status.
pub fn judge(
    record: &Record,
    profile: &Profile,
    first: (&Reply, StopReason),
    second: Option<(&Reply, StopReason)>,
) -> Verdict {
    match (profile.second_stage_of(record), second) {
        (None, _) => score::judge(record, &profile.scoring, first.0, first.1),
        (Some(_), Some((reply, stop))) => {
            score::judge(record, profile.second_scoring(), reply, stop)
        }
        (Some(_), None) => {
            let status = score::status(first.0, first.1).unwrap_or(Status::NoAnswer);
            score::without_answer(record, status)
        }
    }
}

/// Judges a logged row again from its tokens; one that never ran, or is in error, stays as it is.
pub fn judge_again(row: &mut ResultRow, record: &Record, profile: &Profile, tokenizer: &Tokenizer) {
    let (Some(stop), None) = (row.stop_reason, &row.error) else {
        return;
    };
    let first = harmony::parse(&row.output_ids, tokenizer);
    let second = row.second.as_ref().map(|second| {
        let reply = harmony::parse(&second.output_ids, tokenizer);
        (reply, second.stop_reason)
    });
    let second = second.as_ref().map(|(reply, stop)| (reply, *stop));
    let verdict = judge(record, profile, (&first, stop), second);
    row.status = verdict.status;
    row.correct = verdict.correct;
    row.answer = verdict.answer;
    row.gold = record.gold.clone();
}

/// Judges a logged row again from its texts, where there is no tokenizer. A reply that came to a
/// final message is read again; any other keeps the status that the chat format gave it.
pub fn judge_text_again(record: &Record, profile: &Profile, row: &ResultRow) -> ResultRow {
    let has_final = matches!(
        row.status,
        Status::Answered | Status::NoAnswer | Status::NotAnOption
    );
    let (text, scoring) = match (&row.second, profile.second_stage_of(record)) {
        (Some(second), Some(_)) => (&second.final_text, profile.second_scoring()),
        // Without its second stage such a row has no answer.
        (None, Some(_)) => (&None, &profile.scoring),
        (_, None) => (&row.final_text, &profile.scoring),
    };
    let verdict = match text {
        Some(text) if has_final && record.defect.is_none() => {
            score::judge_text(record, scoring, text)
        }
        _ => score::without_answer(record, row.status),
    };
    ResultRow {
        status: verdict.status,
        correct: verdict.correct,
        answer: verdict.answer,
        gold: record.gold.clone(),
        ..row.clone()
    }
}
