//! A cell of a submission: the column's value for a row, by the column's rules.

use serde_json::Value;

use super::ResultRow;
use super::answer_of::without_nul;
use super::format::{Column, ColumnValue, SubmissionFormat};
use super::null_words::{is_null_word, with_stop};
use super::prompts::PromptRow;
use super::write::status_name;
use crate::dataset::Message;
use crate::score::Status;

/// A cell with its JSON type. What is missing is the column's sentinel, or null without one.
pub fn cell(
    column: &Column,
    prompt: &PromptRow,
    row: Option<&ResultRow>,
    format: &SubmissionFormat,
) -> Value {
    let value = value_of(&column.value, prompt, row);
    let is_missing = match &value {
        Value::Null => true,
        Value::String(text) => column.never_null && text.trim().is_empty(),
        _ => false,
    };
    if is_missing {
        return match format.missing_in(column) {
            // A score or a group that is not there has never been an answer.
            "" => Value::Null,
            _ if !column.never_null && !is_answer(&column.value) => Value::Null,
            sentinel => Value::from(sentinel),
        };
    }
    match value {
        // An id must come back as it is; lint says what is wrong with it.
        Value::String(text)
            if column.never_null && column.value != ColumnValue::Id && is_null_word(&text) =>
        {
            Value::from(with_stop(&text))
        }
        value => value,
    }
}

/// Whether a column holds what the model wrote.
fn is_answer(value: &ColumnValue) -> bool {
    matches!(
        value,
        ColumnValue::Answer
            | ColumnValue::Choice
            | ColumnValue::Prediction
            | ColumnValue::Reasoning
            | ColumnValue::FinalText
            | ColumnValue::RawText
    )
}

/// The value as it stands, null where there is none.
fn value_of(value: &ColumnValue, prompt: &PromptRow, row: Option<&ResultRow>) -> Value {
    let options = prompt.options.as_deref();
    let written = |text: Option<&str>| text.map_or(Value::Null, |text| without_nul(text).into());
    // Letters of shuffled options are those of the data set's file again.
    let of_file =
        |text: Option<&str>| written(text.map(|text| prompt.in_file_order(text)).as_deref());
    match value {
        ColumnValue::Id => prompt
            .id
            .clone()
            .unwrap_or_else(|| Value::from(prompt.key.as_str())),
        ColumnValue::Answer => {
            let answer = row.and_then(|row| row.answer.as_ref());
            of_file(answer.map(|answer| answer.text.as_str()))
        }
        ColumnValue::Choice => of_file(row.and_then(|row| row.choice_letter(options))),
        ColumnValue::Prediction => written(row.and_then(|row| row.prediction_text(options))),
        ColumnValue::Reasoning => reasoning(prompt, row),
        ColumnValue::Score => row
            .and_then(|row| row.correct)
            .map_or(Value::Null, |correct| Value::from(u8::from(correct))),
        ColumnValue::Status => {
            Value::from(status_name(row.map_or(Status::NotRun, |row| row.status)))
        }
        ColumnValue::Group => prompt.group.as_deref().map_or(Value::Null, Value::from),
        ColumnValue::FinalText => written(row.and_then(|row| row.final_text.as_deref())),
        ColumnValue::RawText => written(row.map(|row| row.raw_text.as_str())),
        ColumnValue::Constant(constant) => Value::from(constant.as_str()),
    }
}

/// The conversation as JSON text; null where the model did not speak.
fn reasoning(prompt: &PromptRow, row: Option<&ResultRow>) -> Value {
    let reply = row.map(ResultRow::messages).unwrap_or_default();
    if reply.is_empty() {
        return Value::Null;
    }
    let conversation: Vec<Message> = prompt.asked().into_iter().chain(reply).collect();
    let text = serde_json::to_string(&conversation).expect("messages have only text keys");
    Value::from(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::submission::test_rows::{row, unanswered, wrong};

    /// The columns of the built-in curebench profile.
    fn format() -> SubmissionFormat {
        let column = |name: &str, value| Column {
            never_null: true,
            ..Column::new(name, value)
        };
        SubmissionFormat {
            columns: vec![
                column("id", ColumnValue::Id),
                column("prediction", ColumnValue::Prediction),
                column("choice", ColumnValue::Choice),
                column("reasoning", ColumnValue::Reasoning),
            ],
            missing: "NOTAVALUE".to_owned(),
            quote_all: true,
            package: None,
        }
    }

    fn cells(row: Option<&ResultRow>) -> Vec<Value> {
        let mut prompt = PromptRow::new("q", Some("NA".into()), None, None);
        prompt.options = Some(["x", "None"].map(str::to_owned).into());
        let format = format();
        format
            .columns
            .iter()
            .map(|column| cell(column, &prompt, row, &format))
            .collect()
    }

    #[test]
    fn no_cell_is_empty_or_read_as_missing() {
        let found = cells(Some(&wrong("q", 0, "B")));
        assert_eq!(found[0], "NA", "an id is what it is");
        assert_eq!(found[1], "None.");
        assert_eq!(found[2], "B");
        let turns: Vec<Message> =
            serde_json::from_str(found[3].as_str().expect("a text")).expect("it is JSON");
        assert_eq!(turns.len(), 2);

        let mut final_only = row("q", 0);
        final_only.final_text = Some("=cmd|' /C calc'!A0".to_owned());
        final_only.raw_text = "a\0b".to_owned();
        let found = cells(Some(&final_only));
        assert_eq!(
            found[1], "=cmd|' /C calc'!A0",
            "cells are written as they are"
        );
        assert_eq!(found[2], "NOTAVALUE");
        assert_eq!(
            found[3],
            "[{\"role\":\"assistant\",\"content\":\"a\\u0000b\"}]"
        );
        let mut error = unanswered("q", 0, Status::Error);
        error.raw_text.clear();
        for row in [None, Some(&error)] {
            assert_eq!(cells(row)[1..], ["NOTAVALUE", "NOTAVALUE", "NOTAVALUE"]);
        }
    }

    #[test]
    fn a_sentinel_may_be_a_columns_own() {
        let mut format = SubmissionFormat {
            missing: "-".to_owned(),
            ..SubmissionFormat::default()
        };
        format.columns[1].missing = Some("none given".to_owned());
        let prompt = PromptRow::new("q", None, None, None);
        let found: Vec<Value> = format
            .columns
            .iter()
            .map(|column| cell(column, &prompt, None, &format))
            .collect();
        let expected = serde_json::json!(["q", "none given", null, "not_run", null]);
        assert_eq!(Value::from(found), expected);
    }
}
