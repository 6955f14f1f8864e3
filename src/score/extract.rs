//! The answer out of a final message, by the profile's rules in order.
//!
//! The first rule that finds an answer decides; the others are asked only whether they agree.
//! Every rule takes the last place that fits: models restate before they conclude. What a reply
//! takes back in so many words does not count (`correction.rs`).

use serde::{Deserialize, Serialize};

use super::choice::{
    Resolved, bare_letter, contained_option, is_wrapping, letter, marked_letters, resolve,
};
use super::correction::corrections;
use super::metric::normalize;
use super::{Answer, Scorer, code, final_channel, number};

/// A way to find the answer in a final message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// `\boxed{…}`, nested braces included.
    Boxed,
    /// `Answer: …`, `the answer is …`.
    AnswerIs,
    /// `#### …`, as GSM8K writes it.
    Hash,
    /// The last number; only where a number is expected.
    LastNumber,
    /// An option's letter, alone or marked as one; only with options.
    OptionLetter,
    /// The text of one option; only with options.
    OptionText,
    /// The longest fenced block, blanks and all; without a fence the whole message.
    Code,
    /// The whole message.
    Whole,
    /// What takes an earlier answer back; goes with `answer_is`, and no profile names it.
    #[serde(skip_deserializing)]
    Correction,
}

impl Rule {
    /// The name it has in profiles and result files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Boxed => "boxed",
            Self::AnswerIs => "answer_is",
            Self::Hash => "hash",
            Self::LastNumber => "last_number",
            Self::OptionLetter => "option_letter",
            Self::OptionText => "option_text",
            Self::Code => "code",
            Self::Whole => "whole",
            Self::Correction => "correction",
        }
    }

    /// Whether it reads what a text states to be the answer, wherever that stands; the others
    /// need the text to be whole, and to be the answer.
    pub fn is_statement(self) -> bool {
        match self {
            Self::Boxed | Self::AnswerIs | Self::Hash | Self::Correction => true,
            Self::LastNumber | Self::OptionLetter | Self::OptionText | Self::Code | Self::Whole => {
                false
            }
        }
    }
}

/// What the rules found.
#[derive(Clone, Debug, PartialEq)]
pub enum Extraction {
    Found(Answer),
    /// An answer is given, but it is none of the options.
    NotAnOption(Answer),
    Nothing,
}

/// A rule's find, before the others are asked.
struct Hit {
    rule: Rule,
    text: String,
    span: [usize; 2],
    is_option: bool,
}

/// Reads the answer. `scorer` says what is expected: an option, a number or text.
pub fn extract(text: &str, options: &[String], scorer: Scorer, rules: &[Rule]) -> Extraction {
    let mut hits: Vec<Hit> = Vec::new();
    for &rule in rules {
        let hit = match scorer {
            Scorer::Choice => choice_hit(rule, text, options),
            Scorer::Integer | Scorer::Decimal => number_hit(rule, text),
            Scorer::Auto | Scorer::Exact | Scorer::Normalized => text_hit(rule, text),
        };
        hits.extend(hit);
    }
    if rules.contains(&Rule::AnswerIs)
        && let Some(last) = correction_hit(text, options, scorer)
        && hits.first().is_none_or(|hit| hit.span[0] < last.span[0])
    {
        // What the other rules read from the part that was taken back is no disagreement.
        hits.retain(|hit| hit.span[0] > last.span[0]);
        hits.insert(0, last);
    }
    let Some(first) = hits.first() else {
        return Extraction::Nothing;
    };
    let same = normalize(&first.text);
    let rules_agree = hits
        .iter()
        .filter(|hit| hit.rule != Rule::Whole)
        .all(|hit| normalize(&hit.text) == same);
    let answer = Answer {
        text: first.text.clone(),
        rule: first.rule.name().to_owned(),
        span: first.span,
        rules_agree,
        channel: final_channel(),
    };
    if first.is_option {
        Extraction::Found(answer)
    } else {
        Extraction::NotAnOption(answer)
    }
}

fn choice_hit(rule: Rule, text: &str, options: &[String]) -> Option<Hit> {
    let hit = |index: usize, span| Hit {
        rule,
        text: letter(index),
        span,
        is_option: true,
    };
    let outside = |span: [usize; 2]| Hit {
        rule,
        text: slice(text, span).to_owned(),
        span,
        is_option: false,
    };
    let of_span = |span: [usize; 2], is_decisive: bool| match resolve(slice(text, span), options) {
        Resolved::Option(index) => Some(hit(index, span)),
        Resolved::Outside => Some(outside(span)),
        Resolved::Unclear => is_decisive.then(|| outside(span)),
    };
    match rule {
        Rule::Boxed => of_span(boxed(text)?, true),
        Rule::AnswerIs => {
            let found = answer_is(text)?;
            of_span(found.span, found.is_label)
        }
        Rule::Hash => of_span(hash(text)?, true),
        Rule::OptionLetter => {
            let whole = trimmed(text, [0, text.len()]);
            if bare_letter(slice(text, whole)).is_some() {
                return of_span(whole, true);
            }
            let &(at, found) = marked_letters(text).last()?;
            match resolve(&found.to_string(), options) {
                Resolved::Option(index) => Some(hit(index, [at, at + 1])),
                _ => None,
            }
        }
        Rule::OptionText => {
            let index = contained_option(text, options)?;
            Some(hit(index, trimmed(text, [0, text.len()])))
        }
        Rule::Whole => {
            let span = trimmed(text, [0, text.len()]);
            let is_short = slice(text, span).split_whitespace().count() <= SHORT_WORDS;
            of_span(span, is_short && span[0] < span[1])
        }
        Rule::LastNumber | Rule::Code | Rule::Correction => None,
    }
}

/// The last correction that states what is expected.
fn correction_hit(text: &str, options: &[String], scorer: Scorer) -> Option<Hit> {
    corrections(text).into_iter().rev().find_map(|span| {
        let content = slice(text, span);
        let hit = |text: String, span| Hit {
            rule: Rule::Correction,
            text,
            span,
            is_option: true,
        };
        match scorer {
            Scorer::Choice => match resolve(content, options) {
                Resolved::Option(index) => Some(hit(letter(index), span)),
                _ => None,
            },
            // A number behind other words is talk: `it should be noted that 10 …`.
            Scorer::Integer | Scorer::Decimal => {
                let found = number::find_all(content).into_iter().next()?;
                (found.span[0] <= 2).then(|| {
                    let span = [span[0] + found.span[0], span[0] + found.span[1]];
                    hit(found.number.text, span)
                })
            }
            Scorer::Auto | Scorer::Exact | Scorer::Normalized => {
                let is_short = content.split_whitespace().count() <= SHORT_WORDS;
                is_short.then(|| hit(content.to_owned(), span))
            }
        }
    })
}

/// A message of up to so many words is an answer, if not an option; a longer one is talk.
const SHORT_WORDS: usize = 6;

fn number_hit(rule: Rule, text: &str) -> Option<Hit> {
    let span = match rule {
        Rule::Boxed => boxed(text)?,
        Rule::AnswerIs => answer_is(text)?.span,
        Rule::Hash => hash(text)?,
        Rule::Whole => trimmed(text, [0, text.len()]),
        Rule::LastNumber => {
            let found = number::find_all(text).pop()?;
            return Some(Hit {
                rule,
                text: found.number.text,
                span: found.span,
                is_option: true,
            });
        }
        Rule::OptionLetter | Rule::OptionText | Rule::Code | Rule::Correction => return None,
    };
    // Of `3 * 6 = 18 eggs` the number behind the last `=`, else the first.
    let content = slice(text, span);
    if let Some(number) = number::parse(content) {
        return Some(Hit {
            rule,
            text: number.text,
            span,
            is_option: true,
        });
    }
    let from = content.rfind('=').map_or(0, |at| at + 1);
    let found = number::find_all(content.get(from..)?)
        .into_iter()
        .next()
        .map(|found| (found, from))
        .or_else(|| Some((number::find_all(content).into_iter().next()?, 0)));
    let (found, from) = found?;
    Some(Hit {
        rule,
        text: found.number.text,
        span: [
            span[0] + from + found.span[0],
            span[0] + from + found.span[1],
        ],
        is_option: true,
    })
}

fn text_hit(rule: Rule, text: &str) -> Option<Hit> {
    let span = match rule {
        Rule::Boxed => boxed(text)?,
        Rule::AnswerIs => answer_is(text)?.span,
        Rule::Hash => hash(text)?,
        Rule::Code => code::block(text)?,
        Rule::Whole => trimmed(text, [0, text.len()]),
        Rule::LastNumber | Rule::OptionLetter | Rule::OptionText | Rule::Correction => return None,
    };
    let found = slice(text, span);
    (!found.is_empty()).then(|| Hit {
        rule,
        text: found.to_owned(),
        span,
        is_option: true,
    })
}

fn slice(text: &str, span: [usize; 2]) -> &str {
    text.get(span[0]..span[1]).unwrap_or_default()
}

/// A span without blanks and marks at its ends, such as `**` and `$`. A currency sign before a
/// number stays inside only with its number's other half missing, so it goes, too.
fn trimmed(text: &str, span: [usize; 2]) -> [usize; 2] {
    let mut part = slice(text, span);
    let mut from = span[0];
    loop {
        let mut inner = part.trim_start_matches(is_wrapping);
        for open in ["\\(", "\\[", "\\text{"] {
            let close = match open {
                "\\(" => "\\)",
                "\\[" => "\\]",
                _ => "}",
            };
            let body = inner.trim_end_matches(is_wrapping);
            if let Some(rest) = body.strip_prefix(open)
                && let Some(rest) = rest.strip_suffix(close)
                && !rest.contains(open)
            {
                inner = rest;
            }
        }
        if inner.len() == part.len() {
            break;
        }
        // `inner` is a part of `part`: its distance is what was cut off in front.
        from += inner.as_ptr() as usize - part.as_ptr() as usize;
        part = inner;
    }
    let part = part.trim_end_matches(is_wrapping);
    [from, from + part.len()]
}

/// The content of the last `\boxed{…}` that is closed and not empty.
fn boxed(text: &str) -> Option<[usize; 2]> {
    let mut starts: Vec<usize> = Vec::new();
    for open in ["\\boxed{", "\\fbox{", "\\boxed {"] {
        starts.extend(text.match_indices(open).map(|(at, _)| at + open.len()));
    }
    starts.sort_unstable();
    starts.into_iter().rev().find_map(|from| {
        let mut depth = 1_usize;
        let mut escaped = false;
        for (offset, byte) in text.get(from..)?.bytes().enumerate() {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'{' => depth += 1,
                b'}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                let span = trimmed(text, [from, from + offset]);
                return (span[0] < span[1]).then_some(span);
            }
        }
        None
    })
}

/// What stands behind `#### `, to the end of its line.
fn hash(text: &str) -> Option<[usize; 2]> {
    let from = text.rfind("####")? + 4;
    let line = text.get(from..)?.split('\n').next()?;
    let span = trimmed(text, [from, from + line.len()]);
    (span[0] < span[1]).then_some(span)
}

struct AnswerIs {
    span: [usize; 2],
    /// `Answer: …` at a line's start states an answer; `the answer is …` may be talk.
    is_label: bool,
}

/// Words between `answer` and its `is` or `:`, as in `the answer to this question is`.
const MAX_BETWEEN_BYTES: usize = 48;

/// What the last `answer is`, `answer:` or `answer =` says.
fn answer_is(text: &str) -> Option<AnswerIs> {
    if let Some(span) = tagged(text) {
        return Some(AnswerIs {
            span,
            is_label: true,
        });
    }
    // ASCII lower case keeps every byte where it is.
    let lower = text.to_ascii_lowercase();
    let mut starts: Vec<usize> = Vec::new();
    for word in [
        "answer",
        "correct option",
        "correct choice",
        "right option",
        "right choice",
    ] {
        starts.extend(lower.match_indices(word).map(|(at, _)| at));
    }
    starts.sort_unstable();
    starts
        .into_iter()
        .rev()
        .find_map(|at| answer_at(text, &lower, at))
}

/// The content of the last `<answer>…</answer>`.
fn tagged(text: &str) -> Option<[usize; 2]> {
    const OPEN: &str = "<answer>";
    let from = text.rfind(OPEN)? + OPEN.len();
    let length = text.get(from..)?.find("</answer>")?;
    let span = trimmed(text, [from, from + length]);
    (span[0] < span[1]).then_some(span)
}

fn answer_at(text: &str, lower: &str, at: usize) -> Option<AnswerIs> {
    let before = lower.get(..at)?;
    if before.ends_with(|c: char| c.is_alphanumeric()) {
        return None;
    }
    let rest = lower.get(at..)?;
    let head: &str = rest.split(['\n', '.', '?', '!', ';']).next()?;
    let (marker_at, marker) = [":", "：", " is ", "=", " is\n", "** is "]
        .iter()
        .filter_map(|marker| Some((head.find(marker)?, *marker)))
        .chain(head.ends_with(" is").then(|| (head.len() - 3, " is")))
        .min()?;
    if marker_at > MAX_BETWEEN_BYTES {
        return None;
    }
    let is_label = matches!(marker, ":" | "：") && {
        let line = before.rsplit('\n').next().unwrap_or_default();
        let line = line.trim_matches(|c: char| is_wrapping(c) || c == '\\');
        line.is_empty() || ["final", "the final", "the", "correct", "my"].contains(&line)
    };
    let mut from = at + marker_at + marker.len();
    // `the answer is: B`, `**Answer:** B`
    let skipped = text.get(from..)?;
    from += skipped.len()
        - skipped
            .trim_start_matches(|c: char| is_wrapping(c) || matches!(c, ':' | '：'))
            .len();
    let line = text.get(from..)?.split('\n').next()?;
    let end = from + sentence_end(line);
    let content = text.get(from..end)?;
    // `:` may close a talk about the answer whose box comes below.
    if let Some(inner) = boxed(content) {
        return Some(AnswerIs {
            span: [from + inner[0], from + inner[1]],
            is_label: true,
        });
    }
    let content_lower = lower.get(from..end)?;
    if ["not ", "n't ", "therefore not"]
        .iter()
        .any(|it| content_lower.starts_with(it))
    {
        return None;
    }
    let mut span = trimmed(text, [from, end]);
    let bare = slice(text, span).trim_end_matches(['.', ',', ';', '!']);
    span[1] = span[0] + bare.trim_end_matches(is_wrapping).len();
    (span[0] < span[1]).then_some(AnswerIs { span, is_label })
}

/// Where a line's first sentence ends: at a stop before a capital, unless the stop belongs to a
/// letter or an abbreviation (`B. Rome`, `U.S. Army`, `Dr. No`).
pub(super) fn sentence_end(line: &str) -> usize {
    for (at, _) in line.match_indices(". ") {
        let before = line.get(..at).unwrap_or_default();
        let after = line.get(at + 2..).unwrap_or_default();
        let word = before
            .rsplit(|c: char| c.is_whitespace() || c == '*')
            .find(|word| !word.is_empty())
            .unwrap_or_default();
        let is_letter = bare_letter(word).is_some();
        let is_short = word.contains('.') && word.parse::<f64>().is_err()
            || ["Dr", "Mr", "Mrs", "Ms", "St", "No", "Mt", "vs"].contains(&word);
        if !is_letter && !is_short && after.trim_start().starts_with(char::is_uppercase) {
            return at;
        }
    }
    line.len()
}
