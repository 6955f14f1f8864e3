//! The lenient answer: what a reply says where it has no finished final message with an answer.
//!
//! It is looked for by the profile's rules in their order, corrections included: first in the
//! reply's final messages, then in its others, each from the newest to the oldest; a call's
//! arguments are for a tool and are left out. Two things are done with care, for a lenient score
//! that counts guesses says nothing:
//!
//! - From reasoning (any named channel but `final`), and from a message that was cut off, only
//!   rules that read a *statement* of the answer take one ([`Rule::is_statement`]): `the answer is
//!   42`, `\boxed{42}`, `#### 42`. The last number of a thought is whatever was just added up, and its
//!   last letter the option just being ruled out.
//! - What the cut went through is not read: `the answer is 1` may have been on its way to `1,450`.
//!
//! An option that the row does not have is no answer here, and the search goes on.

use super::extract::{Extraction, Rule, extract, sentence_end};
use super::{Answer, Ended, Lenient, Scorer, Scoring, is_correct};
use crate::dataset::Record;
use crate::engine::StopReason;
use crate::prompt::harmony::{Channel, ReplyMessage};

/// Reads a reply that has no strict answer.
pub fn lenient(record: &Record, scoring: &Scoring, ended: Ended) -> Lenient {
    let (finals, others): (Vec<&ReplyMessage>, Vec<_>) = ended
        .reply
        .said()
        .partition(|message| message.channel == Channel::Final);
    // An analysis that podium closed ends in its midst, whatever token stands behind it.
    let closed = others.first().copied().filter(|_| ended.is_closed);
    let answer = finals.into_iter().chain(others).find_map(|message| {
        let is_cut_off = ended.is_cut_off(message) || closed == Some(message);
        read(message, is_cut_off, record, scoring)
    });
    let correct = match &answer {
        Some(answer) => is_correct(record, scoring, answer),
        None => record.gold.as_ref().map(|_| false),
    };
    Lenient { answer, correct }
}

impl Ended<'_> {
    /// Whether the token budget ended inside a message. A message may lack its end for another
    /// reason: a stop id that the chat format does not have.
    fn is_cut_off(&self, message: &ReplyMessage) -> bool {
        message.close.is_none() && self.stop == StopReason::Length
    }
}

fn read(
    message: &ReplyMessage,
    is_cut_off: bool,
    record: &Record,
    scoring: &Scoring,
) -> Option<Answer> {
    let scorer = scoring.scorer_for(record);
    let is_reasoning = match &message.channel {
        Channel::Final | Channel::Absent => false,
        Channel::Other(name) => !name.is_empty(),
        Channel::Analysis | Channel::Commentary => true,
    };
    let only_statements = is_reasoning || is_cut_off;
    let rules = scoring.rules.iter().copied();
    let rules: Vec<Rule> = rules
        .filter(|rule| !only_statements || rule.is_statement())
        .collect();
    let text = if is_cut_off {
        whole_words(&message.text)
    } else {
        &message.text
    };
    let Extraction::Found(answer) = extract(text, &record.options, scorer, &rules) else {
        return None;
    };
    let rest = message.text.get(answer.span[1]..).unwrap_or_default();
    if is_cut_off && is_left_open(rest, scorer) {
        return None;
    }
    Some(Answer {
        span: answer.span.map(|at| message.at + at),
        channel: message.channel.name().map(str::to_owned),
        ..answer
    })
}

/// A text that was cut off, without the word that the cut may have gone through.
fn whole_words(text: &str) -> &str {
    let end = text.rfind(char::is_whitespace).unwrap_or(0);
    text.get(..end).unwrap_or_default()
}

/// Whether what the cut took away may have belonged to an answer; `rest` is what the message still
/// has behind it. A mark closes an answer, and so does the end of its line or sentence.
fn is_left_open(rest: &str, scorer: Scorer) -> bool {
    let line = rest.split('\n').next().unwrap_or_default();
    let has_mark = ["}", "</", "**"].iter().any(|mark| rest.starts_with(mark));
    if has_mark || line.len() < rest.len() || sentence_end(line) < line.len() {
        return false;
    }
    match scorer {
        Scorer::Choice => false,
        // `42 eggs` is said, `6 * 7` is not done.
        Scorer::Integer | Scorer::Decimal => {
            rest.contains(|c: char| c.is_ascii_digit() || "+-*/^=×·÷\\".contains(c))
        }
        // Words may follow words.
        Scorer::Auto | Scorer::Exact | Scorer::Normalized => true,
    }
}

#[cfg(test)]
mod tests;
