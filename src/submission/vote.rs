//! The vote over a question's result rows, by the scoring that a run's manifest keeps.

use super::ResultRow;
use crate::dataset::Gold;
use crate::score::vote::{self, Vote};
use crate::score::{Aggregate, Scorer, Scoring, Status, number};

/// A sample's ballot; absent where it has no answer that counts.
pub fn ballot(scoring: &Scoring, row: &ResultRow) -> Option<String> {
    let answer = row
        .answer
        .as_ref()
        .filter(|_| row.status == Status::Answered)?;
    Some(vote::ballot(scorer(scoring, row), &answer.text))
}

/// The vote of a question's samples, in the order of their numbers.
pub fn count(scoring: &Scoring, samples: &[&ResultRow]) -> Option<Vote> {
    let ballots: Vec<Option<String>> = samples.iter().map(|row| ballot(scoring, row)).collect();
    vote::count(&ballots)
}

/// Chooses the sample that speaks for a question: the first of the majority, and the first that
/// was run where none has an answer.
pub fn pick(scoring: &Scoring) -> impl Fn(&[&ResultRow]) -> usize + '_ {
    |samples| {
        let first_run = || {
            let was_run = |row: &&ResultRow| row.status != Status::NotRun;
            samples.iter().position(was_run).unwrap_or(0)
        };
        match scoring.aggregate {
            Aggregate::First => 0,
            Aggregate::Majority | Aggregate::Pass | Aggregate::Mean => {
                count(scoring, samples).map_or_else(first_run, |vote| vote.winner)
            }
        }
    }
}

/// As [`Scoring::scorer_for`], from what a log line tells of its record. Without a gold an answer
/// to options is a letter, which the normal form of text keeps apart as well.
fn scorer(scoring: &Scoring, row: &ResultRow) -> Scorer {
    match (scoring.scorer, &row.gold) {
        (Scorer::Auto, Some(Gold::Option(_))) => Scorer::Choice,
        (Scorer::Auto, Some(Gold::Text(text))) if number::parse(text).is_some() => Scorer::Decimal,
        (Scorer::Auto, _) => Scorer::Normalized,
        (scorer, _) => scorer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::score::Rule;
    use crate::submission::test_rows::{row, unanswered, wrong};

    fn scoring(aggregate: Aggregate) -> Scoring {
        Scoring {
            scorer: Scorer::Auto,
            rules: vec![Rule::Whole],
            tolerance: 1e-6,
            aggregate,
        }
    }

    #[test]
    fn the_first_of_the_majority_speaks() {
        let outside = ResultRow {
            status: Status::NotAnOption,
            ..wrong("a", 4, "9")
        };
        let rows = [
            unanswered("a", 0, Status::NoAnswer),
            wrong("a", 1, "9"),
            // `4200` in two spellings.
            row("a", 2),
            wrong("a", 3, "4,200.0"),
            outside,
            wrong("a", 5, "9"),
            row("a", 6),
        ];
        let samples: Vec<&ResultRow> = rows.iter().collect();
        let majority = scoring(Aggregate::Majority);
        assert_eq!(pick(&majority)(&samples), 2);
        let vote = count(&majority, &samples).expect("five have answers");
        assert_eq!((vote.n_votes, vote.n_voters, vote.is_tied), (3, 5, false));
        // Two against two: the lower sample's.
        assert_eq!(pick(&majority)(&samples[..6]), 1);
        assert_eq!(pick(&scoring(Aggregate::Mean))(&samples), 2);
        assert_eq!(pick(&scoring(Aggregate::First))(&samples), 0);
    }

    #[test]
    fn without_an_answer_the_first_that_ran_speaks() {
        let rows = [
            unanswered("a", 0, Status::NotRun),
            unanswered("a", 1, Status::TruncatedAnalysis),
        ];
        let samples: Vec<&ResultRow> = rows.iter().collect();
        assert_eq!(pick(&scoring(Aggregate::Majority))(&samples), 1);
        assert_eq!(pick(&scoring(Aggregate::Majority))(&samples[..1]), 0);
    }
}
