//! The verdict on a row, whose last stage decides.

use crate::dataset::Record;
use crate::engine::StopReason;
use crate::profile::Profile;
use crate::prompt::harmony;
use crate::score::lenient::lenient;
use crate::score::{self, Ended, Scoring, Status, Verdict};
use crate::submission::ResultRow;
use crate::tokenizer::Tokenizer;

/// The verdict on a row's replies. A row of two stages whose first reply has no final message to
/// go on from has that reply's status, and no answer, lenient or not: it was never asked to choose.
pub fn judge(record: &Record, profile: &Profile, first: Ended, second: Option<Ended>) -> Verdict {
    match (profile.second_stage_of(record), second) {
        (None, _) => score::judge(record, &profile.scoring, first),
        (Some(_), Some(second)) => score::judge(record, profile.second_scoring(), second),
        (Some(_), None) => {
            let status = score::status(first.reply, first.stop).unwrap_or(Status::NoAnswer);
            score::without_answer(record, status)
        }
    }
}

/// Puts a verdict into a row.
pub fn put(row: &mut ResultRow, verdict: Verdict) {
    row.status = verdict.status;
    row.correct = verdict.correct;
    row.answer = verdict.answer;
    row.lenient = verdict.lenient;
}

/// Judges a logged row again from its tokens; one that never ran, or is in error, stays as it is.
pub fn judge_again(row: &mut ResultRow, record: &Record, profile: &Profile, tokenizer: &Tokenizer) {
    let (Some(stop), None) = (row.stop_reason, &row.error) else {
        return;
    };
    let first_reply = harmony::parse(&row.output_ids, tokenizer);
    let first = Ended {
        reply: &first_reply,
        stop,
        is_closed: row.forced.is_some(),
    };
    let second = row.second.as_ref();
    let second = second.map(|second| (second, harmony::parse(&second.output_ids, tokenizer)));
    let second = second.as_ref().map(|(second, reply)| Ended {
        reply,
        stop: second.stop_reason,
        is_closed: second.forced.is_some(),
    });
    let verdict = judge(record, profile, first, second);
    put(row, verdict);
    row.gold = record.gold.clone();
}

/// Judges a logged row again from its texts, where there is no tokenizer. A reply that came to a
/// final message is read again; any other keeps the status that the chat format gave it, and is
/// read leniently from its raw text.
pub fn judge_text_again(record: &Record, profile: &Profile, row: &ResultRow) -> ResultRow {
    let has_final = matches!(
        row.status,
        Status::Answered | Status::NoAnswer | Status::NotAnOption
    );
    let stage = Stage::decisive(record, profile, row);
    let final_text = stage.as_ref().and_then(|stage| stage.final_text);
    let mut verdict = match (final_text, &stage) {
        (Some(text), Some(stage)) if has_final && record.defect.is_none() => {
            score::judge_text(record, stage.scoring, text)
        }
        _ => score::without_answer(record, row.status),
    };
    if let (true, Some(stage)) = (verdict.status.is_unanswered(), &stage) {
        let ended = Ended {
            reply: &harmony::parse_spelled(stage.raw_text),
            stop: stage.stop,
            is_closed: stage.is_closed,
        };
        verdict.lenient = Some(lenient(record, stage.scoring, ended));
    }
    let mut row = row.clone();
    put(&mut row, verdict);
    row.gold = record.gold.clone();
    row
}

/// The part of a row that its verdict is about.
struct Stage<'a> {
    final_text: Option<&'a str>,
    raw_text: &'a str,
    stop: StopReason,
    is_closed: bool,
    scoring: &'a Scoring,
}

impl<'a> Stage<'a> {
    /// Absent for a row that never ran, and where the second stage should decide and there is none.
    fn decisive(record: &Record, profile: &'a Profile, row: &'a ResultRow) -> Option<Self> {
        match (&row.second, profile.second_stage_of(record)) {
            (Some(second), Some(_)) => Some(Self {
                final_text: second.final_text.as_deref(),
                raw_text: &second.raw_text,
                stop: second.stop_reason,
                is_closed: second.forced.is_some(),
                scoring: profile.second_scoring(),
            }),
            (None, Some(_)) => None,
            (_, None) => Some(Self {
                final_text: row.final_text.as_deref(),
                raw_text: &row.raw_text,
                stop: row.stop_reason?,
                is_closed: row.forced.is_some(),
                scoring: &profile.scoring,
            }),
        }
    }
}
