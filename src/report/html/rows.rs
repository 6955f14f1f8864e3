//! The rows of a run as the page's table takes them: columns, words by number, and what all
//! prompts begin and end with written once, so that 20,000 rows stay a page that opens at once.

use std::collections::HashMap;

use crate::dataset::Gold;
use crate::score::option_letter;
use crate::submission::prompts::PromptRow;
use crate::submission::write::status_name;
use crate::submission::{ResultRow, RowError};

use crate::submission::reply_text::{all_raw_text, shown_row};

/// Texts of a page are cut to this many bytes together; the longest lose most.
pub(super) const MAX_TEXT_BYTES: usize = 48 << 20;

/// A text shorter than this is never cut.
const MIN_CUT_BYTES: usize = 1024;

/// Questions and samples in columns. Numbers of words are places in `words`.
#[derive(Debug, Default, serde::Serialize)]
pub struct RowTable {
    /// Statuses, groups and rules, each once.
    words: Vec<String>,
    /// What every prompt begins and ends with.
    prompt_start: String,
    prompt_end: String,
    /// Longer texts were cut to this many bytes; absent when all are whole.
    cut_bytes: Option<usize>,
    questions: Questions,
    samples: Samples,
}

#[derive(Debug, Default, serde::Serialize)]
struct Questions {
    id: Vec<String>,
    group: Vec<Option<usize>>,
    /// Between `prompt_start` and `prompt_end`.
    prompt: Vec<Option<String>>,
    gold: Vec<Option<String>>,
}

#[derive(Debug, Default, serde::Serialize)]
struct Samples {
    question: Vec<usize>,
    sample: Vec<u32>,
    status: Vec<usize>,
    /// 1, 0, or absent without gold.
    correct: Vec<Option<u8>>,
    answer: Vec<Option<String>>,
    rule: Vec<Option<usize>>,
    /// Start and end in UTF-16 units of the final text, of a lenient answer too.
    span: Vec<Option<[usize; 2]>>,
    analysis: Vec<String>,
    #[serde(rename = "final")]
    final_text: Vec<Option<String>>,
    prompt_tokens: Vec<u32>,
    analysis_tokens: Vec<u32>,
    final_tokens: Vec<u32>,
    output_tokens: Vec<usize>,
    seconds: Vec<Option<f64>>,
    logprob: Vec<Option<f64>>,
    /// Samples with something to say beyond the columns.
    notes: HashMap<usize, Note>,
}

/// What few samples have.
#[derive(Debug, Default, PartialEq, serde::Serialize)]
struct Note {
    /// The reply as it was written, where analysis and final text do not say all.
    #[serde(skip_serializing_if = "Option::is_none")]
    raw: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    issues: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<RowError>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    rules_disagree: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    lenient: Option<LenientNote>,
}

/// The answer of a sample that has a lenient one alone.
#[derive(Debug, PartialEq, serde::Serialize)]
struct LenientNote {
    answer: String,
    /// 1, 0, or absent without gold.
    correct: Option<u8>,
    rule: String,
    channel: Option<String>,
    /// Start and end in UTF-16 units of the analysis, where it stands there.
    span: Option<[usize; 2]>,
}

/// Columns of a run's rows. `samples` stand in the order of `prompts`, each with its prompt's place.
pub fn table(prompts: &[PromptRow], samples: &[(usize, ResultRow)]) -> RowTable {
    let mut words = Words::default();
    let (start, end) = common_ends(prompts.iter().filter_map(|prompt| prompt.text.as_deref()));
    let cap = text_cap(prompts, samples, start.len() + end.len());
    let cut = |text: &str| cut(text, cap.unwrap_or(usize::MAX)).0;
    let mut questions = Questions::default();
    for prompt in prompts {
        questions.id.push(id_text(prompt));
        questions
            .group
            .push(prompt.group.as_deref().map(|group| words.place(group)));
        let middle = prompt
            .text
            .as_deref()
            .and_then(|text| text.get(start.len()..text.len().checked_sub(end.len())?));
        questions.prompt.push(middle.map(cut));
        questions.gold.push(None);
    }
    let mut columns = Samples::default();
    for (place, row) in samples {
        if let (Some(gold), Some(cell)) = (&row.gold, questions.gold.get_mut(*place)) {
            *cell = Some(match gold {
                Gold::Option(index) => option_letter(*index),
                Gold::Text(text) => text.clone(),
            });
        }
        columns.push(*place, row, cap.unwrap_or(usize::MAX), &mut words);
    }
    RowTable {
        words: words.list,
        prompt_start: start.to_owned(),
        prompt_end: end.to_owned(),
        cut_bytes: cap,
        questions,
        samples: columns,
    }
}

impl Samples {
    fn push(&mut self, question: usize, row: &ResultRow, cap: usize, words: &mut Words) {
        let index = self.question.len();
        let reply = shown_row(row);
        let answer = row.answer.as_ref();
        let whole = reply.final_text.as_ref();
        let final_text = whole.map(|text| cut(text, cap));
        let analysis = cut(&reply.analysis, cap);
        let lenient = row.lenient.as_ref().and_then(|it| it.answer.as_ref());
        let lenient_span = |text: &str, left_out| {
            let span = span_within(text, row.last_raw_text(), lenient?.span)?;
            utf16_span(text, span, left_out)
        };
        let raw = all_raw_text(row);
        let second_issues = row.second.iter().flat_map(|second| &second.format_issues);
        let note = Note {
            raw: (!reply.is_whole && !raw.is_empty()).then(|| cut(&raw, cap).0),
            issues: row
                .format_issues
                .iter()
                .chain(second_issues)
                .cloned()
                .collect(),
            error: row.error.clone(),
            rules_disagree: answer.is_some_and(|answer| !answer.rules_agree),
            lenient: lenient.map(|answer| LenientNote {
                answer: answer.text.clone(),
                correct: row.lenient_correct().map(u8::from),
                rule: answer.rule.clone(),
                channel: answer.channel.clone(),
                span: lenient_span(&reply.analysis, analysis.1),
            }),
        };
        if note != Note::default() {
            self.notes.insert(index, note);
        }
        self.question.push(question);
        self.sample.push(row.sample);
        self.status.push(words.place(status_name(row.status)));
        self.correct.push(row.correct.map(u8::from));
        self.answer.push(answer.map(|answer| answer.text.clone()));
        self.rule.push(
            answer
                .filter(|answer| !answer.rule.is_empty())
                .map(|answer| words.place(&answer.rule)),
        );
        self.span.push(whole.zip(final_text.as_ref()).and_then(
            |(whole, (_, left_out))| match answer {
                Some(answer) => utf16_span(whole, answer.span, *left_out),
                None => lenient_span(whole, *left_out),
            },
        ));
        self.analysis.push(analysis.0);
        self.final_text.push(final_text.map(|(text, _)| text));
        self.prompt_tokens.push(row.prompt_tokens);
        self.analysis_tokens.push(row.analysis_tokens);
        self.final_tokens.push(row.final_tokens);
        self.output_tokens.push(row.all_output_ids().len());
        self.seconds
            .push(row.seconds.map(|seconds| (seconds * 1e4).round() / 1e4));
        self.logprob.push(
            row.logprob_sum
                .map(|sum| (f64::from(sum) * 1e4).round() / 1e4),
        );
    }
}

/// Where a span of a raw text lies in a part of it; absent where it does not.
fn span_within(part: &str, raw: &str, span: [usize; 2]) -> Option<[usize; 2]> {
    let from = raw.find(part).filter(|_| !part.is_empty())?;
    let start = span[0].checked_sub(from)?;
    let end = span[1].checked_sub(from)?;
    (start < end && end <= part.len()).then_some([start, end])
}

/// Each word once; columns hold its place.
#[derive(Default)]
struct Words {
    list: Vec<String>,
    places: HashMap<String, usize>,
}

impl Words {
    fn place(&mut self, word: &str) -> usize {
        if let Some(&place) = self.places.get(word) {
            return place;
        }
        self.list.push(word.to_owned());
        self.places.insert(word.to_owned(), self.list.len() - 1);
        self.list.len() - 1
    }
}

fn id_text(prompt: &PromptRow) -> String {
    match &prompt.id {
        None => prompt.key.clone(),
        Some(serde_json::Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

/// The longest text that all begin with, and the longest that they end with beside it.
fn common_ends<'a>(texts: impl Iterator<Item = &'a str>) -> (&'a str, &'a str) {
    let mut found: Option<(&str, &str, usize)> = None;
    for text in texts {
        found = Some(match found {
            None => (text, text, text.len()),
            Some((start, end, shortest)) => (
                common_start(start, text),
                common_end(end, text),
                shortest.min(text.len()),
            ),
        });
    }
    let (start, end, shortest) = found.unwrap_or_default();
    // The two must not overlap in the shortest text.
    let room = shortest - start.len();
    let end = &end[end.ceil_char_boundary(end.len().saturating_sub(room))..];
    (start, end)
}

fn common_start<'a>(a: &'a str, b: &str) -> &'a str {
    let length: usize = a
        .chars()
        .zip(b.chars())
        .take_while(|(a, b)| a == b)
        .map(|(char, _)| char.len_utf8())
        .sum();
    &a[..length]
}

fn common_end<'a>(a: &'a str, b: &str) -> &'a str {
    let length: usize = a
        .chars()
        .rev()
        .zip(b.chars().rev())
        .take_while(|(a, b)| a == b)
        .map(|(char, _)| char.len_utf8())
        .sum();
    &a[a.len() - length..]
}

/// The length at which texts are cut so that all together keep [`MAX_TEXT_BYTES`]; absent when
/// they do anyway.
fn text_cap(prompts: &[PromptRow], samples: &[(usize, ResultRow)], shared: usize) -> Option<usize> {
    let prompts = prompts.iter().filter_map(|prompt| prompt.text.as_ref());
    let lengths = prompts.map(|text| text.len().saturating_sub(shared));
    // A reply's parts are its raw text, or stand beside it.
    let replies = samples.iter().map(|(_, row)| row.raw_text.len());
    cap_for(lengths.chain(replies).collect(), MAX_TEXT_BYTES)
}

pub(super) fn cap_for(mut lengths: Vec<usize>, budget: usize) -> Option<usize> {
    lengths.sort_unstable();
    let mut left = budget;
    let n = lengths.len();
    for (index, length) in lengths.into_iter().enumerate() {
        let share = left / (n - index);
        if length > share {
            return Some(share.max(MIN_CUT_BYTES));
        }
        left -= length;
    }
    None
}

/// What was left out of a text: from which byte, how many, and how many stand in their place.
pub(super) type LeftOut = Option<(usize, usize, usize)>;

/// A text of about `cap` bytes: a third from its begin and two thirds from its end, where the
/// answer is, with a mark between.
pub(super) fn cut(text: &str, cap: usize) -> (String, LeftOut) {
    if text.len() <= cap {
        return (text.to_owned(), None);
    }
    let start = text.floor_char_boundary(cap / 3);
    let resume = text.ceil_char_boundary(text.len() - (cap - cap / 3));
    let mark = format!(
        "\n[… {} bytes are left out here; results.jsonl has all …]\n",
        resume - start
    );
    let short = [&text[..start], &mark, &text[resume..]].concat();
    (short, Some((start, resume - start, mark.len())))
}

/// A byte span as a script counts, in the text after its cut; absent when it was cut or empty.
pub(super) fn utf16_span(text: &str, span: [usize; 2], left_out: LeftOut) -> Option<[usize; 2]> {
    let [start, end] = span;
    if start >= end {
        return None;
    }
    let units = |until: usize| -> Option<usize> { Some(text.get(..until)?.encode_utf16().count()) };
    let (from, to) = (units(start)?, units(end)?);
    match left_out {
        Some((at, n_bytes, mark)) if start >= at + n_bytes => {
            let skipped = text.get(at..at + n_bytes)?.encode_utf16().count();
            // The mark holds two `…` of three bytes and one unit each.
            let inserted = mark - 4;
            Some([from - skipped + inserted, to - skipped + inserted])
        }
        Some((at, ..)) if end > at => None,
        _ => Some([from, to]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::submission::test_rows::{cut_off, row, wrong};

    fn prompt(key: &str, text: &str) -> PromptRow {
        let ids: &[u32] = &[1];
        PromptRow::new(
            key,
            Some(key.into()),
            Some("sums".to_owned()),
            Some((text, ids)),
        )
    }

    fn value(prompts: &[PromptRow], samples: &[(usize, ResultRow)]) -> serde_json::Value {
        serde_json::to_value(table(prompts, samples)).expect("only text keys")
    }

    #[test]
    fn words_and_shared_prompt_parts_stand_once() {
        let prompts = [prompt("a", "<sys>ü1+1<end>"), prompt("b", "<sys>ö1+1<end>")];
        let samples = [(0, row("a", 0)), (0, row("a", 1)), (1, wrong("b", 0, "9"))];
        let table = value(&prompts, &samples);
        assert_eq!(table["prompt_start"], "<sys>");
        assert_eq!(table["prompt_end"], "1+1<end>");
        assert_eq!(table["questions"]["prompt"], serde_json::json!(["ü", "ö"]));
        assert_eq!(
            table["questions"]["gold"],
            serde_json::json!(["4200", "4200"])
        );
        assert_eq!(table["samples"]["question"], serde_json::json!([0, 0, 1]));
        assert_eq!(table["samples"]["correct"], serde_json::json!([1, 1, 0]));
        assert_eq!(table["samples"]["analysis"][0], "sum\n");
        assert_eq!(
            table["words"],
            serde_json::json!(["sums", "answered", "answer_is"])
        );
        assert_eq!(table["samples"]["notes"], serde_json::json!({}));
        assert_eq!(table["cut_bytes"], serde_json::Value::Null);
    }

    #[test]
    fn spans_are_counted_as_a_script_counts() {
        let mut sample = row("a", 0);
        // The answer's span is 14..21 in bytes; its blank takes three, and one unit.
        assert_eq!(
            sample.final_text.as_deref(),
            Some("The answer is 4\u{202f}200.")
        );
        let answer = sample.answer.as_mut().expect("it has one");
        answer.span = [14, 21];
        let table = value(&[prompt("a", "x")], &[(0, sample)]);
        assert_eq!(table["samples"]["span"][0], serde_json::json!([14, 19]));
        assert_eq!(utf16_span("😀 4", [5, 6], None), Some([3, 4]));
        assert_eq!(utf16_span("ab", [1, 9], None), None, "beyond the text");
        assert_eq!(utf16_span("ab", [0, 0], None), None);
    }

    #[test]
    fn a_lenient_answer_is_marked_where_it_stands() {
        let mut in_final = cut_off("b", 0);
        in_final.raw_text = "<|channel|>final<|message|>é: the answer is 4200. Th".to_owned();
        let start = in_final.raw_text.find("4200").expect("it stands there");
        let lenient = in_final.lenient.as_mut().expect("it has one");
        let answer = lenient.answer.as_mut().expect("it has one");
        answer.span = [start, start + 4];
        answer.channel = Some("final".to_owned());
        let samples = [(0, cut_off("a", 0)), (0, in_final), (0, row("c", 0))];
        let table = value(&[prompt("a", "x")], &samples);
        let samples = &table["samples"];
        let note = &samples["notes"]["0"]["lenient"];
        assert_eq!(note["answer"], "4200");
        assert_eq!(
            (&note["channel"], &note["correct"]),
            (&"analysis".into(), &1.into())
        );
        assert_eq!(samples["analysis"][0], "So the answer is 4200. Then");
        assert_eq!(note["span"], serde_json::json!([17, 21]));
        assert_eq!(samples["span"][0], serde_json::Value::Null);
        assert_eq!(samples["final"][1], "é: the answer is 4200. Th");
        assert_eq!(samples["span"][1], serde_json::json!([17, 21]));
        assert_eq!(
            samples["notes"]["1"]["lenient"]["span"],
            serde_json::Value::Null
        );
        assert_eq!(samples["notes"]["2"], serde_json::Value::Null);
    }

    #[test]
    fn only_too_much_text_is_cut_and_the_span_moves_along() {
        assert_eq!(cap_for(vec![10, 20, 30], 60), None);
        assert_eq!(cap_for(vec![5000, 3000, 100], 5100), Some(2500));
        let text = format!("{}answer 42", "ü".repeat(3000));
        let (short, left_out) = cut(&text, 1500);
        assert!(short.len() < 1600 && short.ends_with("answer 42"));
        let at = text.len() - 2;
        let span = utf16_span(&text, [at, at + 2], left_out).expect("it is not cut");
        let units: Vec<u16> = short.encode_utf16().collect();
        assert_eq!(String::from_utf16_lossy(&units[span[0]..span[1]]), "42");
        assert_eq!(utf16_span(&text, [2000, 2002], left_out), None);
        assert_eq!(cut("short", 1500), ("short".to_owned(), None));
    }

    #[test]
    fn ends_shared_by_all_prompts_are_found_at_characters() {
        assert_eq!(common_ends(["only"].into_iter()), ("only", ""));
        assert_eq!(common_ends(["aXz", "aYz"].into_iter()), ("a", "z"));
        assert_eq!(common_ends(["é", "è"].into_iter()), ("", ""));
        // Begin and end would overlap in the shorter one.
        assert_eq!(common_ends(["aa", "aaa"].into_iter()), ("aa", ""));
        let prompts = [prompt("a", "aa"), PromptRow::new("c", None, None, None)];
        let table = value(&prompts, &[]);
        assert_eq!(table["questions"]["prompt"], serde_json::json!(["", null]));
    }
}
