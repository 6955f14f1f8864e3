//! The vote of maj@k: which of a question's samples speaks for it, and when no further sample
//! can change that.
//!
//! Samples vote with the normal form of their answer, so that `0.5` and `1/2`, or `The cat.` and
//! `cat`, are one. A sample without an answer does not vote. Of tied answers the one that was
//! given by the lowest sample wins.

use super::Scorer;
use super::metric::normalize;
use super::number::{self, Number};

/// Whole numbers below this have their own f64.
const EXACT_WHOLE: f64 = 9_007_199_254_740_992.0;

/// A counted vote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vote {
    /// Where the winner's first sample stands among the ballots.
    pub winner: usize,
    /// Of the winner.
    pub n_votes: usize,
    /// Samples that voted.
    pub n_voters: usize,
    /// Whether another answer has as many.
    pub is_tied: bool,
}

/// An answer in the normal form of its metric: two answers that stand for one are equal.
pub fn ballot(scorer: Scorer, answer: &str) -> String {
    let as_number = |text: &str, spell: fn(&Number) -> String| {
        let text = normalize(text);
        number::parse(&text).map_or(text, |number| spell(&number))
    };
    match scorer {
        Scorer::Exact => answer.trim().to_owned(),
        // The extractor gives an option as its letter, whichever way the reply named it.
        Scorer::Choice => answer.trim().to_ascii_uppercase(),
        Scorer::Integer | Scorer::Decimal => as_number(answer, by_value),
        Scorer::Normalized | Scorer::Auto => as_number(answer, |number| number.text.clone()),
    }
}

/// A number's value as text: `1/2` is `0.5`, `4/2` is `2`; a whole number keeps all its digits.
fn by_value(number: &Number) -> String {
    if number.is_whole() {
        number.text.clone()
    } else if number.value.fract() == 0.0 && number.value.abs() < EXACT_WHOLE {
        format!("{:.0}", number.value)
    } else {
        number.value.to_string()
    }
}

/// Counts the ballots of a question's samples, in the order of their numbers. `None` is a sample
/// that does not vote; absent where none does.
pub fn count(ballots: &[Option<String>]) -> Option<Vote> {
    let tally = tally(ballots);
    let &(winner, n_votes) = tally.first()?;
    Some(Vote {
        winner,
        n_votes,
        n_voters: ballots.iter().flatten().count(),
        is_tied: tally.get(1).is_some_and(|&(_, n)| n == n_votes),
    })
}

/// How many more samples must run before the vote can be decided: 0 when the rest of `n_samples`
/// can change neither the winner nor whether there is a tie.
///
/// `ballots` are those of the samples from the first on, without a gap. Running as many as this
/// says and asking again never runs a sample past the decision: the leader gains on the others by
/// one a sample at most, so no shorter run decides. What is asked for is a function of the
/// ballots alone, not of the order in which they came in.
pub fn n_until_decided(ballots: &[Option<String>], n_samples: usize) -> usize {
    let n_left = n_samples.saturating_sub(ballots.len());
    let tally = tally(ballots);
    let votes_at = |place: usize| tally.get(place).map_or(0, |&(_, n)| n);
    // An answer that nobody gave yet may still come: it counts as a second one with no votes.
    let (leader, second) = (votes_at(0), votes_at(1));
    if leader > second + n_left {
        return 0;
    }
    // The least m with leader + m > second + (n_left - m).
    ((second + n_left - leader) / 2 + 1).min(n_left)
}

/// The first place and the votes of each answer, most votes first, ties by place.
fn tally(ballots: &[Option<String>]) -> Vec<(usize, usize)> {
    let mut counts: Vec<(usize, usize)> = Vec::new();
    for (place, ballot) in ballots.iter().enumerate() {
        if ballot.is_none() {
            continue;
        }
        match counts
            .iter_mut()
            .find(|(first, _)| ballots.get(*first) == Some(ballot))
        {
            Some((_, n)) => *n += 1,
            None => counts.push((place, 1)),
        }
    }
    counts.sort_by_key(|&(place, n)| (std::cmp::Reverse(n), place));
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A letter a sample, `-` for one that does not vote.
    fn ballots(text: &str) -> Vec<Option<String>> {
        text.chars()
            .map(|c| (c != '-').then(|| c.to_string()))
            .collect()
    }

    #[test]
    fn most_votes_win_and_ties_go_to_the_lowest_sample() {
        // Ballots; winner's place, votes, voters, tied: counted by hand.
        for (text, expected) in [
            ("a", Some((0, 1, 1, false))),
            ("abb", Some((1, 2, 3, false))),
            ("abba", Some((0, 2, 4, true))),
            ("baab", Some((0, 2, 4, true))),
            ("--ab", Some((2, 1, 2, true))),
            ("a-b-b-", Some((2, 2, 3, false))),
            ("abc", Some((0, 1, 3, true))),
            ("cabab", Some((1, 2, 5, true))),
            ("----", None),
            ("", None),
        ] {
            let vote = count(&ballots(text));
            let found = vote.map(|it| (it.winner, it.n_votes, it.n_voters, it.is_tied));
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn answers_that_stand_for_one_vote_together() {
        for (scorer, answers, is_one) in [
            (Scorer::Decimal, &["0.5", "1/2", ".50", "$0.50"][..], true),
            (Scorer::Decimal, &["2", "4/2", "2.0", " 2. "], true),
            (Scorer::Decimal, &["1,450", "1450"], true),
            (
                Scorer::Integer,
                &["12345678901234567890", "12345678901234567891"],
                false,
            ),
            (Scorer::Integer, &["-3", "3"], false),
            (Scorer::Choice, &["B", "b"], true),
            (Scorer::Choice, &["A", "B"], false),
            (Scorer::Normalized, &["The cat.", "cat", " CAT"], true),
            (Scorer::Normalized, &["1,000", "1000"], true),
            (Scorer::Normalized, &["0.5", "1/2"], false),
            (Scorer::Exact, &["cat", " cat "], true),
            (Scorer::Exact, &["Cat", "cat"], false),
        ] {
            let forms: Vec<String> = answers.iter().map(|it| ballot(scorer, it)).collect();
            let same = forms.iter().all(|form| *form == forms[0]);
            assert_eq!(same, is_one, "{scorer:?} {answers:?}: {forms:?}");
        }
    }

    #[test]
    fn a_vote_is_decided_when_the_rest_can_change_nothing() {
        for (text, n_samples, n_more) in [
            // Three of five is more than the two others can make.
            ("aaa", 5, 0),
            ("aa", 5, 1),
            // Two of four can still be tied.
            ("aa", 4, 1),
            ("aaa", 4, 0),
            ("", 8, 5),
            ("", 1, 1),
            ("", 2, 2),
            ("ab", 4, 2),
            ("aab", 5, 1),
            ("aaab", 5, 0),
            ("aaab", 6, 1),
            ("--", 5, 2),
            ("-----", 5, 0),
            ("abab", 4, 0),
        ] {
            assert_eq!(n_until_decided(&ballots(text), n_samples), n_more, "{text}");
        }
    }

    /// Every sequence of up to seven ballots over two answers and a blank: stepping as
    /// [`n_until_decided`] says ends at the shortest prefix that decides, which every way to go on
    /// from there confirms and some way to go on from one sample less does not.
    #[test]
    fn no_sample_runs_past_the_decision_and_none_is_missing() {
        let symbols = [None, Some("a".to_owned()), Some("b".to_owned())];
        for n in 1..=7_u32 {
            let all: Vec<Vec<Option<String>>> = (0..3_usize.pow(n))
                .map(|code| {
                    (0..n)
                        .map(|at| symbols[code / 3_usize.pow(at) % 3].clone())
                        .collect()
                })
                .collect();
            let n = n as usize;
            for whole in &all {
                let mut n_run = 0;
                loop {
                    match n_until_decided(&whole[..n_run], n) {
                        0 => break,
                        more => n_run += more,
                    }
                }
                let outcomes = |n_run: usize| {
                    let mut outcomes: Vec<Option<(usize, bool)>> = all
                        .iter()
                        .filter(|other| other[..n_run] == whole[..n_run])
                        .map(|other| count(other).map(|vote| (vote.winner, vote.is_tied)))
                        .collect();
                    outcomes.dedup();
                    outcomes.len()
                };
                assert_eq!(outcomes(n_run), 1, "{whole:?} decided after {n_run}");
                let decided_before = n_run > 0 && n_run < n && outcomes(n_run - 1) == 1;
                assert!(!decided_before, "{whole:?} was decided before {n_run}");
                let early = count(&whole[..n_run]).map(|vote| vote.winner);
                assert_eq!(early, count(whole).map(|vote| vote.winner));
            }
        }
    }
}
