//! What a submission takes out of a result row: the one place that knows where a reply keeps its
//! answer, its words and its turns.

use std::borrow::Cow;

use super::ResultRow;
use super::reply_text::shown;
use crate::dataset::Message;
use crate::score::{Status, option_letter};

impl ResultRow {
    /// The letter of the option chosen; absent where the reply chose none of the row's options.
    /// Where the options are not known (`None`), any letter is one.
    pub fn choice_letter(&self, options: Option<&[String]>) -> Option<&str> {
        let answer = self.answer.as_ref()?;
        let letter = answer.text.as_str();
        let is_letter = match options {
            Some(options) => option_index(letter, options).is_some(),
            None => matches!(letter.as_bytes(), [b'A'..=b'Z']),
        };
        (self.status == Status::Answered && is_letter).then_some(letter)
    }

    /// The answer in words: the open answer of a row that was asked to choose afterwards, else the
    /// text of the option chosen, else the final message. Never blank.
    pub fn prediction_text<'a>(&'a self, options: Option<&'a [String]>) -> Option<&'a str> {
        let options = options.filter(|_| self.second.is_none());
        let option = options.and_then(|options| {
            let index = option_index(self.choice_letter(Some(options))?, options)?;
            options.get(index).map(String::as_str)
        });
        option
            .or(self.final_text.as_deref())
            .filter(|text| !text.trim().is_empty())
    }

    /// The messages from the reply on, its analysis before the final one; of two stages also the
    /// second turn and its reply. Empty without a reply.
    pub fn messages(&self) -> Vec<Message> {
        let mut messages = reply_messages(&self.raw_text);
        if let Some(second) = &self.second {
            messages.push(Message {
                role: "user".to_owned(),
                content: second.user_turn.clone(),
            });
            messages.extend(reply_messages(&second.raw_text));
        }
        messages
    }

    /// Tokens that the model wrote for this sample, in all stages.
    pub fn n_output_tokens(&self) -> usize {
        let second = self.second.as_ref().map_or(0, |it| it.output_ids.len());
        self.output_ids.len() + second
    }
}

fn reply_messages(raw_text: &str) -> Vec<Message> {
    let reply = shown(raw_text);
    [Some(reply.analysis), reply.final_text]
        .into_iter()
        .flatten()
        .filter(|content| !content.is_empty())
        .map(|content| Message {
            role: "assistant".to_owned(),
            content,
        })
        .collect()
}

fn option_index(letter: &str, options: &[String]) -> Option<usize> {
    (0..options.len()).find(|&index| option_letter(index) == letter)
}

/// A text of the model's as a cell holds it. Parsers written in C end a cell at a NUL.
pub(super) fn without_nul(text: &str) -> Cow<'_, str> {
    if text.contains('\0') {
        Cow::Owned(text.replace('\0', "\u{fffd}"))
    } else {
        Cow::Borrowed(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::submission::test_rows::{row, unanswered, wrong};

    fn options() -> Vec<String> {
        ["rest", "Ivolin 5 mg"].map(str::to_owned).into()
    }

    #[test]
    fn a_choice_is_a_letter_of_the_rows_options() {
        let options = options();
        let letter = |text: &str| {
            let row = wrong("a", 0, text);
            row.choice_letter(Some(&options)).map(str::to_owned)
        };
        assert_eq!(letter("B").as_deref(), Some("B"));
        for other in ["C", "b", "rest", "", "BB"] {
            assert_eq!(letter(other), None, "{other}");
        }
        assert_eq!(wrong("a", 0, "C").choice_letter(None), Some("C"));
        let mut outside = wrong("a", 0, "A");
        outside.status = Status::NotAnOption;
        assert_eq!(outside.choice_letter(Some(&options)), None);
    }

    #[test]
    fn a_prediction_is_the_options_text_else_the_final_message() {
        let options = options();
        let chosen = wrong("a", 0, "B");
        assert_eq!(chosen.prediction_text(Some(&options)), Some("Ivolin 5 mg"));
        assert_eq!(
            chosen.prediction_text(Some(&[])),
            chosen.final_text.as_deref()
        );
        assert_eq!(chosen.prediction_text(None), chosen.final_text.as_deref());
        let mut blank = row("a", 0);
        blank.final_text = Some(" \n".to_owned());
        assert_eq!(blank.prediction_text(Some(&[])), None);
        let nothing = unanswered("a", 0, Status::NoFinal);
        assert_eq!(nothing.prediction_text(Some(&options)), None);
    }

    #[test]
    fn messages_are_the_replys_turns() {
        let turns: Vec<(String, String)> = row("a", 0)
            .messages()
            .into_iter()
            .map(|turn| (turn.role, turn.content))
            .collect();
        let turn = |content: &str| ("assistant".to_owned(), content.to_owned());
        assert_eq!(turns, [turn("sum\n"), turn("The answer is 4\u{202f}200.")]);
        let mut error = unanswered("a", 0, Status::Error);
        error.raw_text.clear();
        assert!(error.messages().is_empty());
    }
}
