//! Whether runs differ in anything besides the precision.

use super::RunDifference;
use super::load::{CompareError, LoadedRun};

/// The part of a generation's identity that a comparison is about.
const PRECISION: &str = "precision";

/// All that differs from the first run besides the precision: parts of the generation's identity,
/// the profile and the scoring rules. Another checkpoint is such a difference, too: whether it is
/// the same model in another precision, no hash can tell.
pub fn differences(runs: &[LoadedRun]) -> Vec<RunDifference> {
    let Some((base, others)) = runs.split_first() else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for (index, other) in others.iter().enumerate() {
        let run = index + 1;
        let identity = base
            .manifest
            .generation
            .differences(&other.manifest.generation);
        for difference in identity {
            if difference.key != PRECISION {
                found.push(RunDifference {
                    run,
                    key: difference.key.to_owned(),
                    base: difference.ours,
                    other: difference.theirs,
                });
            }
        }
        for (key, ours, theirs) in [
            ("profile", &base.manifest.profile, &other.manifest.profile),
            (
                "scoring",
                &base.manifest.scoring_hash,
                &other.manifest.scoring_hash,
            ),
        ] {
            if ours != theirs {
                found.push(RunDifference {
                    run,
                    key: key.to_owned(),
                    base: serde_json::Value::from(ours.as_str()).to_string(),
                    other: serde_json::Value::from(theirs.as_str()).to_string(),
                });
            }
        }
    }
    found
}

/// Refuses runs that differ in more than the precision.
///
/// # Errors
/// [`CompareError::Differs`] names every key with both values.
pub fn check(runs: &[LoadedRun]) -> Result<(), CompareError> {
    let differences = differences(runs);
    if differences.is_empty() {
        return Ok(());
    }
    let name = |index: usize| {
        runs.get(index)
            .map_or_else(String::new, |run| run.name.clone())
    };
    Err(CompareError::Differs {
        base: name(0),
        differences: differences
            .into_iter()
            .map(|difference| (name(difference.run), difference))
            .collect(),
    })
}
