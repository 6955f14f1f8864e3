//! First-person corrections: `no, it is B`, `actually, it's 6`, `correction: 45 minutes`. What is
//! said last counts, whatever a rule found before it.

use super::choice::is_wrapping;
use super::extract::sentence_end;

/// Words that take something back, and whether a statement such as `it is` must follow.
const TRIGGERS: [(&str, bool); 12] = [
    ("no", true),
    ("actually", true),
    ("wait", true),
    ("sorry", true),
    ("hmm", true),
    ("rather", true),
    ("oops", true),
    ("correction", false),
    ("i mean", false),
    ("i meant", false),
    ("make that", false),
    ("scratch that", true),
];

/// How a statement begins.
const STATEMENTS: [&str; 11] = [
    "the correct answer is ",
    "the right answer is ",
    "the answer is ",
    "the answer should be ",
    "it is ",
    "it's ",
    "it must be ",
    "it should be ",
    "that is ",
    "that's ",
    "should be ",
];

/// Spans of what corrections state, in order; what they say is for the caller to judge.
pub fn corrections(text: &str) -> Vec<[usize; 2]> {
    // ASCII lower case keeps every byte where it is.
    let lower = text.to_ascii_lowercase();
    let mut spans: Vec<[usize; 2]> = Vec::new();
    for (trigger, needs_statement) in TRIGGERS {
        for (at, _) in lower.match_indices(trigger) {
            let end = at + trigger.len();
            let is_word = |c: char| c.is_alphanumeric() || c == '\'';
            let before = lower.get(..at).unwrap_or_default();
            let rest = lower.get(end..).unwrap_or_default();
            if before.ends_with(is_word) || rest.starts_with(is_word) {
                continue;
            }
            let mut from = end + skipped(rest);
            // `actually no, it is 14`, `hmm, no, it's 6`
            while let Some(word) = TRIGGERS.iter().find_map(|(word, _)| {
                let rest = lower.get(from..)?.strip_prefix(word)?;
                (!rest.starts_with(is_word)).then_some(*word)
            }) {
                from += word.len();
                from += skipped(lower.get(from..).unwrap_or_default());
            }
            let rest = lower.get(from..).unwrap_or_default();
            let statement = STATEMENTS.iter().find(|start| rest.starts_with(**start));
            match statement {
                Some(start) => from += start.len(),
                None if needs_statement => continue,
                None => {}
            }
            let line = text.get(from..).unwrap_or_default();
            let line = line.split('\n').next().unwrap_or_default();
            let length = sentence_end(line);
            let content = line.get(..length).unwrap_or_default();
            let inner = content.trim_start_matches(is_wrapping);
            from += content.len() - inner.len();
            let inner = inner.trim_end_matches(|c: char| is_wrapping(c) || ".,;!".contains(c));
            let is_denial = ["not ", "no "].iter().any(|it| {
                let start = inner.get(..it.len()).unwrap_or_default();
                start.eq_ignore_ascii_case(it)
            });
            if !inner.is_empty() && !is_denial {
                spans.push([from, from + inner.len()]);
            }
        }
    }
    spans.sort_unstable();
    spans.dedup();
    spans
}

/// Bytes of punctuation and blanks between a trigger and what follows it.
fn skipped(rest: &str) -> usize {
    rest.len()
        - rest
            .trim_start_matches(|c: char| is_wrapping(c) || ",.:;-–—!".contains(c))
            .len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<&str> {
        let spans = corrections(text).into_iter();
        spans.map(|[from, to]| &text[from..to]).collect()
    }

    #[test]
    fn what_is_said_last_is_found() {
        assert_eq!(found("Answer: A. No, it is B."), ["B"]);
        assert_eq!(found("Actually no, it is 14."), ["14"]);
        assert_eq!(found("Correction: 45 minutes."), ["45 minutes"]);
        assert_eq!(found("I mean (B)."), ["(B)"]);
    }

    #[test]
    fn talk_is_no_correction() {
        assert!(found("There is no doubt that it is 5.").is_empty());
        assert!(found("No, it is not B.").is_empty());
        assert!(found("Nowadays it is B.").is_empty());
        assert!(found("I cannot wait.").is_empty());
    }
}
