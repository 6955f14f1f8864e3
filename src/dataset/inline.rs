//! Options inside the question's own text, as BIG-Bench Hard has them:
//!
//! ```text
//! Which of them is a fruit?
//! Options:
//! (A) the stone
//! (B) the pear
//! ```
//!
//! Where every row ends like this and every gold is one of its letters, the lines are options
//! and the question is what stands before them, so that no template shows them twice.

use super::cell::{Cell, Row};
use super::gold;

/// Lines before the options that only announce them.
const HEADINGS: [&str; 5] = [
    "options",
    "choices",
    "answer choices",
    "answer options",
    "options are",
];

/// The text before its options, and the options' texts; absent where it does not end in at least
/// two lines lettered from A.
pub fn split(text: &str) -> Option<(&str, Vec<String>)> {
    // The letters are met last to first: the lines' places and marks decide, not the texts.
    let mut options: Vec<(char, Mark, &str)> = Vec::new();
    let mut end = text.trim_end().len();
    loop {
        let before = text.get(..end)?;
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let line = before.get(line_start..)?.trim();
        if !line.is_empty() {
            options.push(lettered(line)?);
        }
        end = line_start.checked_sub(1)?;
        if matches!(options.last(), Some(('A', ..))) {
            break;
        }
    }
    options.reverse();
    let (_, mark, _) = *options.first()?;
    let in_order = options
        .iter()
        .zip('A'..='Z')
        .all(|(option, letter)| option.0 == letter && option.1 == mark);
    if options.len() < 2 || !in_order {
        return None;
    }
    let stem = without_heading(text.get(..end)?.trim_end());
    let texts = options.iter().map(|it| it.2.to_owned()).collect();
    (!stem.trim().is_empty()).then_some((stem, texts))
}

/// Whether the options of these rows stand in their questions: in every row, with a gold that is
/// one of the row's letters wherever there is one. `golds` are the fields that may hold it.
pub fn applies(rows: &[Row], question: &str, golds: &[String]) -> bool {
    let mut n_rows = 0;
    for row in rows {
        let Some(text) = row.get(question).and_then(Cell::text) else {
            continue;
        };
        let Some((_, options)) = split(text) else {
            return false;
        };
        let is_letter = |field: &String| match row.get(field).filter(|cell| !cell.is_blank()) {
            Some(cell) => cell
                .scalar()
                .and_then(|text| gold::letter(&text))
                .is_some_and(|index| index < options.len()),
            None => true,
        };
        if !golds.is_empty() && !golds.iter().any(is_letter) {
            return false;
        }
        n_rows += 1;
    }
    n_rows > 0
}

/// How an option is marked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// `(A) text`
    Brackets,
    /// `A) text`
    Bracket,
    /// `A. text`
    Stop,
    /// `A: text`
    Colon,
}

fn lettered(line: &str) -> Option<(char, Mark, &str)> {
    let (in_brackets, rest) = match line.strip_prefix('(') {
        Some(rest) => (true, rest),
        None => (false, line),
    };
    let mut chars = rest.chars();
    let letter = chars.next().filter(char::is_ascii_uppercase)?;
    let mark = match (in_brackets, chars.next()?) {
        (true, ')') => Mark::Brackets,
        (false, ')') => Mark::Bracket,
        (false, '.') => Mark::Stop,
        (false, ':') => Mark::Colon,
        _ => return None,
    };
    let text = chars.as_str();
    // `A.B` is no option.
    (text.starts_with(char::is_whitespace) && !text.trim().is_empty())
        .then(|| (letter, mark, text.trim()))
}

fn without_heading(stem: &str) -> &str {
    let (before, last) = stem.rsplit_once('\n').unwrap_or(("", stem));
    let plain = last.trim().trim_end_matches(':').to_lowercase();
    if HEADINGS.contains(&plain.as_str()) {
        before.trim_end()
    } else {
        stem
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lettered_lines_at_the_end_are_options() {
        for (text, stem, options) in [
            ("Q?\nOptions:\n(A) x\n(B) y z", "Q?", vec!["x", "y z"]),
            ("Q?\n\nA. x\nB. y\n\n", "Q?", vec!["x", "y"]),
            (
                "a\nb\nChoices\nA) x\n\nB) y\nC) z",
                "a\nb",
                vec!["x", "y", "z"],
            ),
            (
                "Let (A) be.\nA: x\r\nB: y\r\n",
                "Let (A) be.",
                vec!["x", "y"],
            ),
        ] {
            let options = options.into_iter().map(String::from).collect();
            assert_eq!(split(text), Some((stem, options)), "{text}");
        }
    }

    #[test]
    fn other_texts_have_none() {
        for text in [
            "",
            "Q?",
            "Q?\n(A) x",
            "(A) x\n(B) y",
            "Options:\n(A) x\n(B) y",
            "Q?\n(A) x\n(C) y",
            "Q?\n(B) x\n(C) y",
            "Q?\n(A) x\nB. y",
            "Q?\n(A) x\n(B) y\nChoose.",
            "Q?\nA.B\nB.C",
            "Q?\n(A)\n(B)",
        ] {
            assert_eq!(split(text), None, "{text}");
        }
    }
}
