//! An answer against the gold.

use super::Scorer;
use super::choice::{self, Resolved};
use super::number::{self, Number};
use crate::dataset::Gold;

/// Whether an answer is right. `Auto` is resolved by the caller; left here it is `Normalized`.
pub fn is_correct(
    scorer: Scorer,
    answer: &str,
    gold: &Gold,
    options: &[String],
    tolerance: f64,
) -> bool {
    let expected = match gold {
        Gold::Option(index) if scorer == Scorer::Choice => {
            return choice::resolve(answer, options) == Resolved::Option(*index);
        }
        Gold::Option(index) => match options.get(*index) {
            Some(option) => option,
            None => return false,
        },
        Gold::Text(text) => text,
    };
    match scorer {
        Scorer::Exact => answer.trim() == expected.trim(),
        Scorer::Normalized | Scorer::Auto => normalized_equal(answer, expected),
        Scorer::Integer => match (number::parse(answer), number::parse(expected)) {
            (Some(a), Some(b)) => a.is_whole() && a.text == b.text,
            _ => false,
        },
        Scorer::Decimal => match (number::parse(answer), number::parse(expected)) {
            (Some(a), Some(b)) => numbers_equal(&a, &b, tolerance),
            _ => normalized_equal(answer, expected),
        },
        // A gold letter in a file that keeps its options inside the question.
        Scorer::Choice => {
            let (answer, expected) = (choice::resolve(answer, &[]), choice::resolve(expected, &[]));
            matches!(answer, Resolved::Option(_)) && answer == expected
        }
    }
}

/// Two whole numbers are equal or not, however large; others may differ by the tolerance, which
/// is relative above 1 and absolute below.
fn numbers_equal(answer: &Number, gold: &Number, tolerance: f64) -> bool {
    if answer.text == gold.text {
        return true;
    }
    if answer.is_whole() && gold.is_whole() {
        return false;
    }
    (answer.value - gold.value).abs() <= tolerance * gold.value.abs().max(1.0)
}

fn normalized_equal(answer: &str, gold: &str) -> bool {
    let (answer, gold) = (normalize(answer), normalize(gold));
    answer == gold
        || match (number::parse(&answer), number::parse(&gold)) {
            (Some(a), Some(b)) => a.text == b.text,
            _ => false,
        }
}

/// Lower case, one blank between words, no article at the start, no punctuation at the ends.
/// Signs and currency stay: `-5` is not `5`. A text of nothing else is kept.
pub fn normalize(text: &str) -> String {
    let lower = text.to_lowercase();
    let joined = lower.split_whitespace().collect::<Vec<_>>().join(" ");
    let is_wrapping = |c: char| {
        c.is_whitespace()
            || matches!(
                c,
                '.' | ','
                    | ';'
                    | ':'
                    | '!'
                    | '?'
                    | '"'
                    | '\''
                    | '`'
                    | '*'
                    | '_'
                    | '“'
                    | '”'
                    | '‘'
                    | '’'
                    | '('
                    | ')'
                    | '['
                    | ']'
            )
    };
    let mut bare = joined.trim_matches(is_wrapping);
    // `.5` keeps its point, and `f(x)` or `(a) b` lose no bracket that has a partner inside.
    if bare.starts_with(|c: char| c.is_ascii_digit()) && joined.starts_with('.') {
        bare = joined.trim_end_matches(is_wrapping);
    }
    if is_unbalanced(bare) {
        let no_brackets = |c: char| is_wrapping(c) && !matches!(c, '(' | ')' | '[' | ']');
        bare = joined.trim_matches(no_brackets);
    }
    for article in ["the ", "an ", "a "] {
        if let Some(rest) = bare.strip_prefix(article) {
            bare = rest;
            break;
        }
    }
    if bare.is_empty() {
        return joined;
    }
    bare.to_owned()
}

fn is_unbalanced(text: &str) -> bool {
    let count = |c: char| text.matches(c).count();
    count('(') != count(')') || count('[') != count(']')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Gold {
        Gold::Text(text.into())
    }

    #[test]
    fn each_scorer_on_near_misses() {
        let cases = [
            (Scorer::Exact, " Paris ", "Paris", true),
            (Scorer::Exact, "paris", "Paris", false),
            (
                Scorer::Normalized,
                "The  Eiffel tower.",
                "eiffel Tower",
                true,
            ),
            (Scorer::Normalized, "an apple", "apple", true),
            (Scorer::Normalized, "Paris, France", "Paris", false),
            (Scorer::Normalized, "(B)", "B", true),
            (Scorer::Normalized, "f(x)", "f(x", false),
            (Scorer::Normalized, "f(x)", "f(x)", true),
            (Scorer::Normalized, "-5", "5", false),
            (Scorer::Normalized, "1,450", "1450", true),
            (Scorer::Normalized, "35, 22, 42", "35,  22, 42.", true),
            (Scorer::Normalized, "35, 22", "22, 35", false),
            (Scorer::Normalized, "False", "false", true),
            (Scorer::Normalized, "a", "the", false),
            (Scorer::Normalized, "?", "!", false),
            (Scorer::Normalized, "", "x", false),
            (Scorer::Integer, "18", "18", true),
            (Scorer::Integer, "018", "18", true),
            (Scorer::Integer, "18.0", "18", true),
            (Scorer::Integer, "18.5", "18", false),
            (Scorer::Integer, "1,450", "1450", true),
            (
                Scorer::Integer,
                "12345678901234567891",
                "12345678901234567890",
                false,
            ),
            (Scorer::Decimal, "0.3333333", "1/3", true),
            (Scorer::Decimal, "0.33", "1/3", false),
            (Scorer::Decimal, "$18.00", "18", true),
            (Scorer::Decimal, "1000001", "1000000", false),
            (Scorer::Decimal, "1000000.5", "1000000", true),
            (Scorer::Decimal, "x + 1", "x + 1", true),
            (Scorer::Choice, "B", "(B)", true),
            (Scorer::Choice, "C", "(B)", false),
        ];
        for (scorer, answer, gold, correct) in cases {
            assert_eq!(
                is_correct(scorer, answer, &text(gold), &[], 1e-6),
                correct,
                "{scorer:?}: {answer} against {gold}"
            );
        }
    }

    #[test]
    fn a_gold_option_counts_by_letter_or_by_text() {
        let options = ["Paris".to_owned(), "Rome".to_owned()];
        let gold = Gold::Option(1);
        assert!(is_correct(Scorer::Choice, "B", &gold, &options, 0.0));
        assert!(!is_correct(Scorer::Choice, "A", &gold, &options, 0.0));
        assert!(is_correct(Scorer::Normalized, "rome", &gold, &options, 0.0));
        assert!(!is_correct(
            Scorer::Exact,
            "x",
            &Gold::Option(9),
            &options,
            0.0
        ));
    }
}
