//! `podium inspect`: how a prompt file is read and rendered; no model runs.

use std::collections::BTreeMap;

use super::JobError;
use super::datasets;
use super::eval::{indent, read_dataset};
use super::model::Description;
use super::nano::NANO;
use super::prepare::prepare;
use crate::cli::eval::InspectArgs;
use crate::cli::print;
use crate::report::table::percent;
use crate::score::baseline;

/// Golds that the distribution names.
const MAX_GOLDS: usize = 10;
/// Rows that cannot run which are shown.
const MAX_DEFECTS: usize = 10;

/// Runs the command.
///
/// # Errors
/// A file, profile or tokenizer that cannot be used.
pub fn inspect(args: &InspectArgs) -> Result<u8, JobError> {
    let paths = datasets::find(&args.datasets)?;
    let model = Description::read(args.model.as_deref().unwrap_or(NANO), args.json)?;
    for path in &paths {
        let (dataset, profile) = read_dataset(path, args.profile.as_deref(), model.is_nano)?;
        let reasoning = args
            .reasoning
            .or(profile.defaults.reasoning)
            .unwrap_or_default();
        let prepared = prepare(
            dataset,
            profile,
            &model.tokenizer,
            reasoning,
            args.date.as_deref(),
        );
        let records = &prepared.dataset.records;
        let defects: Vec<_> = prepared
            .pairs()
            .filter_map(|(record, row)| Some((record, row.error.as_ref()?)))
            .collect();
        let mut lengths: Vec<usize> = prepared
            .rows
            .iter()
            .map(|row| row.tokens.len())
            .filter(|&n| n > 0)
            .collect();
        lengths.sort_unstable();
        let at = |share: f64| {
            lengths.get(((lengths.len().saturating_sub(1)) as f64 * share).round() as usize)
        };
        let max_context = model.config.max_context;
        let n_too_long = lengths.iter().filter(|&&n| n >= max_context).count();
        let mut groups: BTreeMap<&str, usize> = BTreeMap::new();
        for group in records.iter().filter_map(|record| record.group.as_deref()) {
            *groups.entry(group).or_default() += 1;
        }
        let majority = baseline::majority(records);
        let random = baseline::random(records);
        let golds = baseline::gold_distribution(records);
        let prompt = prepared
            .prompts
            .iter()
            .find_map(|prompt| prompt.text.as_deref());
        let n_gold = records
            .iter()
            .filter(|record| record.gold.is_some())
            .count();

        if args.json {
            let document = serde_json::json!({
                "schema": "podium.inspect/1",
                "dataset": path,
                "content_hash": prepared.dataset.content_hash,
                "mapping": prepared.dataset.mapping,
                "profile": prepared.profile.name,
                "n_rows": records.len(),
                "n_defects": defects.len(),
                "defects": defects.iter().map(|(_, error)| error).collect::<Vec<_>>(),
                "n_gold": n_gold,
                "golds": golds,
                "majority_baseline": majority.as_ref().map(|m| m.share),
                "random_baseline": random,
                "groups": groups,
                "prompt_tokens": {
                    "min": lengths.first(), "median": at(0.5), "p90": at(0.9), "p99": at(0.99),
                    "max": lengths.last(),
                },
                "max_context": max_context,
                "n_too_long": n_too_long,
                "first_prompt": prompt,
            });
            print::result(&document.to_string());
            continue;
        }
        let mut text = format!(
            "{}: {} rows\n{}\nprofile {}\n",
            path.display(),
            records.len(),
            indent(&prepared.dataset.mapping.to_string()),
            prepared.profile.name
        );
        if let Some(prompt) = prompt {
            text += &format!("\nfirst prompt\n{}\n", indent(prompt));
        }
        if let (Some(min), Some(max), Some(median), Some(p90), Some(p99)) =
            (lengths.first(), lengths.last(), at(0.5), at(0.9), at(0.99))
        {
            text += &format!(
                "\nprompt tokens ({} tokenizer)\n  min {min}, median {median}, 90 % {p90}, 99 % {p99}, \
                 max {max}; {n_too_long} of {} rows exceed the model's {max_context} positions\n",
                model.name,
                lengths.len()
            );
        }
        if !groups.is_empty() {
            text += "\ngroups\n";
            for (group, n) in &groups {
                text += &format!("  {group}: {n}\n");
            }
        }
        text += &format!("\ngold in {n_gold} of {} rows\n", records.len());
        for (gold, n) in golds.iter().take(MAX_GOLDS) {
            text += &format!("  {gold}: {n}\n");
        }
        if golds.len() > MAX_GOLDS {
            text += &format!("  and {} others\n", golds.len() - MAX_GOLDS);
        }
        if let Some(majority) = majority {
            text += &format!("majority baseline {}", percent(majority.share));
            text += &random.map_or("\n".to_owned(), |r| format!(", by chance {}\n", percent(r)));
        }
        if !defects.is_empty() {
            text += &format!("\n{} rows cannot run\n", defects.len());
            for (record, error) in defects.iter().take(MAX_DEFECTS) {
                text += &format!(
                    "  `{}`: {}\n    in {}, line {}; {}\n",
                    record.key, error.message, error.file, error.line, error.hint
                );
            }
        }
        print::result(&text);
    }
    Ok(0)
}
