//! `comparison.html`: runs side by side, out of a [`Comparison`].

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::PageError;
use super::page::{Kind, document};
use super::rows::{MAX_TEXT_BYTES, cap_for, cut, utf16_span};
use crate::dataset::Gold;
use crate::report::compare::{Change, ChangeSide, Comparison};
use crate::score::option_letter;
use crate::submission::write::replace;

pub const COMPARISON_PAGE_FILE: &str = "comparison.html";

/// Writes the page into a comparison's folder.
///
/// # Errors
/// The folder cannot be written to.
pub fn write_comparison_page(folder: &Path, comparison: &Comparison) -> Result<PathBuf, PageError> {
    let path = folder.join(COMPARISON_PAGE_FILE);
    let html = comparison_page(comparison);
    replace(&path, |out| out.write_all(html.as_bytes()))?;
    Ok(path)
}

/// The page as text.
pub fn comparison_page(comparison: &Comparison) -> String {
    let mut data = serde_json::to_value(comparison).expect("a comparison has only text keys");
    let cap = cap(comparison);
    if let Some(object) = data.as_object_mut() {
        // comparison.json and .csv have every question; the page lists those that changed.
        object.remove("questions");
        object.insert("n_questions".to_owned(), comparison.questions.len().into());
        object.insert("cut_bytes".to_owned(), json!(cap));
    }
    let limit = cap.unwrap_or(usize::MAX);
    for (index, pair) in comparison.pairs.iter().enumerate() {
        let changes: Vec<Value> = pair.changes.iter().map(|one| change(one, limit)).collect();
        if let Some(slot) = data.pointer_mut(&format!("/pairs/{index}/changes")) {
            *slot = changes.into();
        }
    }
    document(
        Kind::Comparison,
        &comparison.name,
        &[("data", data.to_string())],
    )
}

fn cap(comparison: &Comparison) -> Option<usize> {
    let changes = comparison.pairs.iter().flat_map(|pair| &pair.changes);
    let texts = changes.flat_map(|change| {
        [
            &change.prompt,
            &change.base.final_text,
            &change.base.raw_tail,
            &change.other.final_text,
            &change.other.raw_tail,
        ]
    });
    cap_for(texts.flatten().map(String::len).collect(), MAX_TEXT_BYTES)
}

fn change(change: &Change, cap: usize) -> Value {
    json!({
        "key": change.key,
        "sample": change.sample,
        "group": change.group,
        "cause": change.cause.title(),
        "direction": change.direction,
        "gold": change.gold.as_ref().map(|gold| match gold {
            Gold::Option(index) => option_letter(*index),
            Gold::Text(text) => text.clone(),
        }),
        "prompt": change.prompt.as_deref().map(|text| cut(text, cap).0),
        "first_differing_token": change.first_differing_token,
        "base": side(&change.base, cap),
        "other": side(&change.other, cap),
    })
}

fn side(side: &ChangeSide, cap: usize) -> Value {
    let text = side.final_text.as_deref().map(|text| cut(text, cap));
    let span = side
        .final_text
        .as_deref()
        .zip(side.span)
        .zip(text.as_ref())
        .and_then(|((whole, span), (_, left_out))| utf16_span(whole, span, *left_out));
    json!({
        "status": side.status,
        "correct": side.correct.map(u8::from),
        "answer": side.answer,
        "rule": side.rule,
        "span": span,
        "final": text.map(|(text, _)| text),
        "raw_tail": side.raw_tail.as_deref().map(|text| cut(text, cap).0),
        "output_tokens": side.output_tokens,
    })
}
