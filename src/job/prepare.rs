//! A data set becomes token rows: read, rendered, encoded, each defect kept with its place.

use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;

use crate::dataset::{Dataset, Message, Record};
use crate::engine::TokenId;
use crate::profile::Profile;
use crate::prompt::{Prompt, Reasoning, Segment, harmony};
use crate::submission::RowError;
use crate::submission::prompts::PromptRow;
use crate::tokenizer::Tokenizer;

/// A row that is ready to run, or the reason why it cannot.
pub struct Row {
    /// Token ids of the rendered prompt; empty for a row in error.
    pub tokens: Arc<[TokenId]>,
    pub error: Option<RowError>,
    /// The second stage of a row that has one.
    pub next: Option<NextTurn>,
}

/// What is asked of a row after its first reply.
pub struct NextTurn {
    /// The user's second turn.
    pub text: String,
    /// Tokens that the second prompt has beside the first one's and the reply between them.
    pub n_tokens: usize,
}

/// A data set with its rendered prompts; `rows` stand beside `dataset.records`.
pub struct Prepared {
    pub dataset: Dataset,
    pub profile: Profile,
    pub rows: Vec<Row>,
    pub prompts: Vec<PromptRow>,
    pub reasoning: Reasoning,
    pub date: Option<String>,
}

impl Prepared {
    /// Tokens of the longest prompt that can run.
    pub fn longest_prompt(&self) -> usize {
        self.rows
            .iter()
            .map(|row| row.tokens.len())
            .max()
            .unwrap_or(0)
    }

    /// Positions of the row that may grow longest, among those whose prompt is shorter than
    /// `most`, with these budgets of its stages.
    pub fn longest_row(&self, most: usize, budget: usize, second_budget: usize) -> usize {
        let fitting = self.rows.iter().filter(|row| row.tokens.len() < most);
        fitting
            .map(|row| {
                let first = row.tokens.len().saturating_add(budget);
                match &row.next {
                    Some(next) => first
                        .saturating_add(next.n_tokens)
                        .saturating_add(second_budget),
                    None => first,
                }
            })
            .max()
            .unwrap_or_else(|| budget.saturating_add(1))
    }

    /// The prompt of a row's second stage: the first one whole, the reply's final message, the
    /// user's second turn. The analysis between is dropped, as Harmony has it. Absent for a row
    /// of one stage, and where the tokenizer gives up on the reply.
    pub fn second_prompt(
        &self,
        row: usize,
        final_text: &str,
        tokenizer: &Tokenizer,
    ) -> Option<Arc<[TokenId]>> {
        let (record, prepared) = (self.dataset.records.get(row)?, self.rows.get(row)?);
        let next = prepared.next.as_ref()?;
        let prompt = self
            .profile
            .render(record, self.reasoning, self.date.as_deref());
        let added = added_segments(prompt.ok()?, final_text, &next.text);
        let added = tokenizer.encode(&added).ok()?;
        Some(prepared.tokens.iter().copied().chain(added).collect())
    }

    /// Records with their rows, in input order.
    pub fn pairs(&self) -> impl Iterator<Item = (&Record, &Row)> {
        self.dataset.records.iter().zip(&self.rows)
    }

    /// Marks rows whose prompt leaves no room for a reply, in a context of `max_context` or in
    /// the model's own.
    pub fn refuse_too_long(&mut self, max_context: usize, model_context: usize) {
        for (record, row) in self.dataset.records.iter().zip(&mut self.rows) {
            let n = row.tokens.len();
            let (holder, holds, hint) = if n >= model_context {
                (
                    "model",
                    model_context,
                    "shorten the row or the prompt template",
                )
            } else {
                let hint = "raise `--context`, or shorten the row or the prompt template";
                ("context", max_context, hint)
            };
            if n >= holds {
                let message = format!("needs {n} tokens, the {holder} holds {holds}");
                row.error = Some(error_at(record, message, hint.to_owned(), None));
                row.tokens = Arc::from([]);
                row.next = None;
            }
        }
    }

    /// The first row in error.
    pub fn first_error(&self) -> Option<(&Record, &RowError)> {
        self.pairs()
            .find_map(|(record, row)| Some((record, row.error.as_ref()?)))
    }
}

/// Reads a prompt file and renders its rows.
///
/// `choose` gives the profile for the records found, once the file has been read with `pinned`'s
/// fields.
///
/// # Errors
/// The file as a whole cannot be used; a bad row is a row with an error.
pub fn prepare(
    dataset: Dataset,
    profile: Profile,
    tokenizer: &Tokenizer,
    reasoning: Reasoning,
    date: Option<&str>,
) -> Prepared {
    let rendered: Vec<Result<Rendered, RowError>> = dataset
        .records
        .par_iter()
        .map(|record| render(record, &profile, tokenizer, reasoning, date))
        .collect();
    let mut rows = Vec::with_capacity(rendered.len());
    let mut prompts = Vec::with_capacity(rendered.len());
    for (record, rendered) in dataset.records.iter().zip(rendered) {
        let shown = rendered
            .as_ref()
            .ok()
            .map(|rendered| (rendered.text.as_str(), rendered.ids.as_slice()));
        let mut prompt =
            PromptRow::new(&record.key, record.id.clone(), record.group.clone(), shown);
        prompt.option_order = profile.option_order(record);
        prompt.options = Some(record.options.clone());
        if profile.submission.tells_conversation() && shown.is_some() {
            prompt.messages = asked(record, &profile, reasoning, date);
        }
        let next = rendered.as_ref().ok().and_then(|it| it.next.as_ref());
        prompt.next_turn = next.map(|next| next.text.clone());
        prompts.push(prompt);
        rows.push(match rendered {
            Ok(rendered) => Row {
                tokens: rendered.ids.into(),
                error: None,
                next: rendered.next,
            },
            Err(error) => Row {
                tokens: Arc::from([]),
                error: Some(error),
                next: None,
            },
        });
    }
    Prepared {
        dataset,
        profile,
        rows,
        prompts,
        reasoning,
        date: date.map(str::to_owned),
    }
}

/// A row's prompt.
struct Rendered {
    text: String,
    ids: Vec<TokenId>,
    next: Option<NextTurn>,
}

fn render(
    record: &Record,
    profile: &Profile,
    tokenizer: &Tokenizer,
    reasoning: Reasoning,
    date: Option<&str>,
) -> Result<Rendered, RowError> {
    if let Some(defect) = &record.defect {
        let field = defect.field.clone();
        return Err(error_at(
            record,
            defect.message.clone(),
            defect.hint.clone(),
            field,
        ));
    }
    let prompt = profile
        .render(record, reasoning, date)
        .map_err(|error| error_at(record, error.to_string(), error.hint().to_owned(), None))?;
    let segments = harmony::render(&prompt);
    let encode = |segments: &[Segment]| {
        tokenizer
            .encode(segments)
            .map_err(|error| error_at(record, error.to_string(), error.hint().to_owned(), None))
    };
    let ids = encode(&segments)?;
    let next = profile
        .next_turn(record)
        .map_err(|error| error_at(record, error.to_string(), error.hint().to_owned(), None))?;
    let next = match next {
        Some(text) => {
            let n_tokens = encode(&added_segments(prompt, "", &text))?.len();
            Some(NextTurn { text, n_tokens })
        }
        None => None,
    };
    Ok(Rendered {
        text: spell(&segments),
        ids,
        next,
    })
}

/// What a prompt goes on with after a final message and another turn of the user.
fn added_segments(mut prompt: Prompt, final_text: &str, next_turn: &str) -> Vec<Segment> {
    let n_before = harmony::render(&prompt).len();
    for (role, content) in [("assistant", final_text), ("user", next_turn)] {
        prompt.turns.push(Message {
            role: role.to_owned(),
            content: content.to_owned(),
        });
    }
    harmony::render(&prompt).split_off(n_before)
}

/// A rendered row's turns for the submission, the instructions first.
fn asked(
    record: &Record,
    profile: &Profile,
    reasoning: Reasoning,
    date: Option<&str>,
) -> Vec<Message> {
    let Ok(prompt) = profile.render(record, reasoning, date) else {
        return Vec::new();
    };
    let instructions = prompt.instructions.map(|content| Message {
        role: "developer".to_owned(),
        content,
    });
    instructions.into_iter().chain(prompt.turns).collect()
}

/// A prompt as one text, special tokens spelled out.
pub fn spell(segments: &[Segment]) -> String {
    segments
        .iter()
        .map(|segment| match segment {
            Segment::Special(name) => name,
            Segment::Text(text) => text.as_str(),
        })
        .collect()
}

fn error_at(record: &Record, message: String, hint: String, field: Option<String>) -> RowError {
    RowError {
        message,
        hint,
        file: shown_path(&record.location.file),
        line: record.location.line,
        field,
        transient: false,
    }
}

/// A data set's path as results name it: its file name, so that a log tells nothing of a machine.
pub fn shown_path(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}
