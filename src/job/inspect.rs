//! `podium inspect`: how a prompt file is read and rendered; no model runs.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::JobError;
use super::datasets;
use super::eval::read_dataset;
use super::model::Description;
use super::nano::NANO;
use super::prepare::{Prepared, prepare};
use crate::cli::eval::InspectArgs;
use crate::cli::print;
use crate::report::inspection::{INSPECT_SCHEMA, Inspection, Lengths, Reason};
use crate::score::baseline;

/// Runs the command.
///
/// # Errors
/// A file, profile or tokenizer that cannot be used; files before it are shown.
pub fn inspect(args: &InspectArgs) -> Result<u8, JobError> {
    let paths = datasets::find(&args.datasets)?;
    let model = Description::read(args.model.as_deref().unwrap_or(NANO), args.json)?;
    for (index, path) in paths.iter().enumerate() {
        let inspection = inspect_one(args, &model, path)?;
        if args.json {
            print::result(&serde_json::json!(inspection).to_string());
        } else {
            let gap = if index > 0 { "\n" } else { "" };
            print::result(&format!("{gap}{}", inspection.render()));
        }
    }
    Ok(0)
}

fn inspect_one(
    args: &InspectArgs,
    model: &Description,
    path: &Path,
) -> Result<Inspection, JobError> {
    let (dataset, profile) = read_dataset(path, args.profile.as_deref(), model.is_nano)?;
    let reasoning = args
        .reasoning
        .or(profile.defaults.reasoning)
        .unwrap_or_default();
    let date = args.date.as_deref();
    let mut prepared = prepare(dataset, profile, &model.tokenizer, reasoning, date);
    let lengths = prepared.rows.iter().map(|row| row.tokens.len());
    let lengths: Vec<usize> = lengths.filter(|&n| n > 0).collect();
    let most = model.config.max_context;
    let context = args
        .context
        .map_or(most, |context| most.min(context as usize));
    let n_too_long = lengths.iter().filter(|&&n| n >= context).count();
    prepared.refuse_too_long(context, most);

    let records = &prepared.dataset.records;
    let mut groups: BTreeMap<String, usize> = BTreeMap::new();
    let mut n_options: BTreeMap<usize, usize> = BTreeMap::new();
    for record in records {
        if let Some(group) = &record.group {
            *groups.entry(group.clone()).or_default() += 1;
        }
        if prepared.dataset.mapping.options.is_some() && record.defect.is_none() {
            *n_options.entry(record.options.len()).or_default() += 1;
        }
    }
    let prompt = prepared.prompts.iter().find_map(|it| it.text.clone());
    Ok(Inspection {
        schema: INSPECT_SCHEMA,
        dataset: path.to_string_lossy().into_owned(),
        format: prepared.dataset.format,
        content_hash: prepared.dataset.content_hash.clone(),
        mapping: prepared.dataset.mapping.clone(),
        profile: prepared.profile.name.clone(),
        n_rows: records.len(),
        n_defects: prepared
            .rows
            .iter()
            .filter(|row| row.error.is_some())
            .count(),
        defects: reasons(&prepared),
        n_gold: records.iter().filter(|it| it.gold.is_some()).count(),
        golds: baseline::gold_distribution(records),
        majority_baseline: baseline::majority(records).map(|it| it.share),
        random_baseline: baseline::random(records),
        groups,
        n_options,
        tokenizer: model.name.clone(),
        prompt_tokens: Lengths::new(lengths),
        context,
        n_too_long,
        first_prompt: prompt,
    })
}

/// Why rows cannot run, the most frequent reason first, ties in the file's order. Rows that are
/// mended alike are one reason (each too long one has a length of its own), told by the first.
fn reasons(prepared: &Prepared) -> Vec<Reason> {
    let mut reasons: Vec<Reason> = Vec::new();
    let mut places: HashMap<(Option<String>, String), usize> = HashMap::new();
    for (record, row) in prepared.pairs() {
        let Some(error) = &row.error else { continue };
        let place = *places
            .entry((error.field.clone(), error.hint.clone()))
            .or_insert(reasons.len());
        match reasons.get_mut(place) {
            Some(reason) => reason.n_rows += 1,
            None => reasons.push(Reason {
                message: error.message.clone(),
                hint: error.hint.clone(),
                field: error.field.clone(),
                n_rows: 1,
                first_key: record.key.clone(),
                first_line: error.line,
            }),
        }
    }
    reasons.sort_by_key(|reason| std::cmp::Reverse(reason.n_rows));
    reasons
}
