//! One sample in two runs: whether its outcome changed, why, and from which token on.

use super::{Cause, ChangeSide, Direction};
use crate::score::Status;
use crate::submission::ResultRow;

/// Characters kept of what a sample without a final text wrote.
const RAW_TAIL_CHARS: usize = 400;

/// The cause and direction of a change; absent when status, answer and correctness are the same.
pub fn change(base: &ResultRow, other: &ResultRow) -> Option<(Cause, Direction)> {
    let same_answer = answer(base) == answer(other);
    if base.status == other.status && same_answer && base.correct == other.correct {
        return None;
    }
    let cause = if is_truncated(base) != is_truncated(other) {
        Cause::TruncatedInOne
    } else if base.status == other.status && same_answer {
        Cause::ScoringChanged
    } else if base.final_text.is_some() && base.final_text == other.final_text {
        Cause::ExtractionChanged
    } else if base.status == other.status {
        Cause::AnswerChanged
    } else {
        Cause::StatusChanged
    };
    let direction = match (base.correct, other.correct) {
        (Some(true), Some(false)) => Direction::Lost,
        (Some(false), Some(true)) => Direction::Gained,
        _ => Direction::Neither,
    };
    Some((cause, direction))
}

/// The first token in which the outputs differ, counted from 0: where one is the other's
/// beginning, the first one after it. Absent when they are the same.
pub fn first_difference(base: &[u32], other: &[u32]) -> Option<usize> {
    let n_same = base.iter().zip(other).take_while(|(a, b)| a == b).count();
    (n_same < base.len().max(other.len())).then_some(n_same)
}

/// One side of a change, for reading.
pub fn side(row: &ResultRow) -> ChangeSide {
    let raw_tail = row.final_text.is_none().then(|| {
        let skipped = row.raw_text.chars().count().saturating_sub(RAW_TAIL_CHARS);
        row.raw_text.chars().skip(skipped).collect()
    });
    ChangeSide {
        status: row.status,
        correct: row.correct,
        answer: answer(row).map(str::to_owned),
        rule: row.answer.as_ref().map(|answer| answer.rule.clone()),
        span: row.answer.as_ref().map(|answer| answer.span),
        final_text: row.final_text.clone(),
        raw_tail,
        output_tokens: row.all_output_ids().len() as u64,
    }
}

fn answer(row: &ResultRow) -> Option<&str> {
    row.answer.as_ref().map(|answer| answer.text.as_str())
}

fn is_truncated(row: &ResultRow) -> bool {
    matches!(
        row.status,
        Status::TruncatedAnalysis | Status::TruncatedFinal
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::submission::test_rows::{row, unanswered, wrong};

    #[test]
    fn every_change_has_its_cause_and_direction() {
        let right = || row("q", 0);
        let mut other_text = wrong("q", 0, "7");
        other_text.final_text = Some("The answer is 7.".to_owned());
        let mut rescored = right();
        rescored.correct = Some(false);
        let mut no_gold = wrong("q", 0, "7");
        (no_gold.correct, no_gold.final_text) = (None, Some("7".to_owned()));
        let mut no_gold_base = right();
        no_gold_base.correct = None;
        let cut = unanswered("q", 0, Status::TruncatedAnalysis);
        let cases = [
            (right(), right(), None),
            (
                right(),
                other_text.clone(),
                Some((Cause::AnswerChanged, Direction::Lost)),
            ),
            (
                other_text,
                right(),
                Some((Cause::AnswerChanged, Direction::Gained)),
            ),
            (
                right(),
                wrong("q", 0, "200"),
                Some((Cause::ExtractionChanged, Direction::Lost)),
            ),
            (
                right(),
                cut.clone(),
                Some((Cause::TruncatedInOne, Direction::Lost)),
            ),
            (
                cut.clone(),
                right(),
                Some((Cause::TruncatedInOne, Direction::Gained)),
            ),
            (
                cut.clone(),
                unanswered("q", 0, Status::TruncatedFinal),
                Some((Cause::StatusChanged, Direction::Neither)),
            ),
            (
                right(),
                unanswered("q", 0, Status::NoFinal),
                Some((Cause::StatusChanged, Direction::Lost)),
            ),
            (
                right(),
                rescored,
                Some((Cause::ScoringChanged, Direction::Lost)),
            ),
            (
                no_gold_base,
                no_gold,
                Some((Cause::AnswerChanged, Direction::Neither)),
            ),
        ];
        for (base, other, expected) in cases {
            assert_eq!(change(&base, &other), expected, "{base:?}\n{other:?}");
        }
        let tail = side(&cut).raw_tail.expect("there is no final text");
        assert!(tail.ends_with("<|return|>"));
        assert_eq!(side(&right()).raw_tail, None);
    }

    #[test]
    fn the_first_differing_token_is_counted_from_0() {
        assert_eq!(first_difference(&[1, 2], &[1, 2]), None);
        assert_eq!(first_difference(&[1, 2], &[3, 2]), Some(0));
        assert_eq!(first_difference(&[1, 2], &[1, 2, 3]), Some(2));
        assert_eq!(first_difference(&[], &[]), None);
    }
}
