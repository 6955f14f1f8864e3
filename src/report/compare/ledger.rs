//! The runs' ledgers side by side: which tensor classes hold other values.

use serde_json::Value;

use super::load::LoadedRun;
use super::{LedgerClass, LedgerSide, ValuesVerdict};

/// A row for each class that any run's ledger names, in order of first appearance.
pub fn classes(runs: &[LoadedRun]) -> Vec<LedgerClass> {
    let ledgers: Vec<Vec<(String, LedgerSide)>> = runs
        .iter()
        .map(|run| entries(&run.manifest.ledger))
        .collect();
    let mut names: Vec<&String> = Vec::new();
    for (name, _) in ledgers.iter().flatten() {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let rows = names.into_iter().map(|class| {
        let sides: Vec<Option<LedgerSide>> = ledgers
            .iter()
            .map(|ledger| {
                let entry = ledger.iter().find(|(name, _)| name == class);
                entry.map(|(_, side)| side.clone())
            })
            .collect();
        let model = |run: &LoadedRun| run.manifest.generation.model.clone();
        let values = runs.iter().zip(&sides).skip(1).map(|(run, side)| {
            let same_model = runs.first().map(model) == Some(model(run));
            let base = sides.first().and_then(Option::as_ref);
            verdict(base, side.as_ref(), same_model)
        });
        LedgerClass {
            class: class.clone(),
            values: values.collect(),
            sides,
        }
    });
    rows.collect()
}

fn verdict(
    base: Option<&LedgerSide>,
    other: Option<&LedgerSide>,
    same_model: bool,
) -> ValuesVerdict {
    match (base, other) {
        (Some(base), Some(other)) if same_model => {
            if base.scheme == other.scheme {
                ValuesVerdict::Same
            } else {
                match (base.lossless, other.lossless) {
                    (Some(true), Some(true)) => ValuesVerdict::Same,
                    (Some(_), Some(_)) => ValuesVerdict::Differ,
                    _ => ValuesVerdict::Unknown,
                }
            }
        }
        _ => ValuesVerdict::Unknown,
    }
}

/// The entries of a manifest's ledger. Older ledgers have fewer fields, newer ones more; an entry
/// without a class is passed over.
fn entries(ledger: &Value) -> Vec<(String, LedgerSide)> {
    let entry = |entry: &Value| {
        let text = |name: &str| entry.get(name).and_then(Value::as_str).map(str::to_owned);
        let count = |name: &str| entry.get(name).and_then(Value::as_u64).unwrap_or(0);
        let side = LedgerSide {
            scheme: text("scheme").unwrap_or_default(),
            stored_bytes: count("stored_bytes"),
            loaded_bytes: count("loaded_bytes"),
            lossless: entry.get("lossless").and_then(Value::as_bool),
            relative_error: entry.get("relative_error").and_then(Value::as_f64),
        };
        Some((text("class")?, side))
    };
    ledger
        .as_array()
        .map(|entries| entries.iter().filter_map(entry).collect())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_that_are_exact_in_both_hold_the_same_values() {
        let ledger = serde_json::json!([
            {"class": "experts", "scheme": "mxfp4", "stored_bytes": 17, "loaded_bytes": 17,
             "lossless": true},
            {"class": "attention", "scheme": "mxint8", "stored_bytes": 20, "loaded_bytes": 10,
             "lossless": false, "relative_error": 0.004},
            {"class": "router", "scheme": "bf16"},
            {"no class": 1},
        ]);
        let entries = entries(&ledger);
        assert_eq!(entries.len(), 3);
        let [(_, experts), (_, attention), (_, router)] = &entries[..] else {
            panic!("three entries");
        };
        assert_eq!(attention.relative_error, Some(0.004));
        let wide = LedgerSide {
            scheme: "mxint8".to_owned(),
            ..experts.clone()
        };
        let bf16 = LedgerSide {
            scheme: "bf16".to_owned(),
            lossless: Some(true),
            ..attention.clone()
        };
        let f32 = LedgerSide {
            scheme: "f32".to_owned(),
            ..router.clone()
        };
        use ValuesVerdict::{Differ, Same, Unknown};
        for (base, other, same_model, expected) in [
            (experts, &wide, true, Same),
            (experts, &wide, false, Unknown),
            (&bf16, attention, true, Differ),
            (attention, attention, true, Same),
            (router, router, true, Same),
            (router, &f32, true, Unknown),
        ] {
            assert_eq!(verdict(Some(base), Some(other), same_model), expected);
        }
        assert_eq!(verdict(Some(experts), None, true), Unknown);
    }
}
