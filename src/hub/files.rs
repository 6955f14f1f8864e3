//! Which files of a repository podium reads: the configuration, the tokenizer and one set of
//! safetensors, all in its top folder. Copies of the weights in other layouts (`original/`,
//! `metal/`) would double a download.

use std::collections::BTreeSet;
use std::path::Path;

use super::{HubError, Part};

pub const CONFIG: &str = "config.json";
pub const TOKENIZER: &str = "tokenizer.json";
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// Taken where they are there, for podium and for who opens the folder with another tool.
const OPTIONAL: [&str; 5] = [
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
];

/// Configuration and tokenizer. `config.json` is the last: where it lies the others do.
///
/// # Errors
/// One that a checkpoint must have is not among `names`.
pub fn description<'a>(id: &str, names: &'a [String]) -> Result<Vec<&'a str>, HubError> {
    let mut found: Vec<&str> = among(names, |name| OPTIONAL.contains(&name)).collect();
    for missing in [TOKENIZER, CONFIG] {
        let name = among(names, |name| name == missing).next();
        found.push(name.ok_or_else(|| no_checkpoint(id, missing))?);
    }
    Ok(found)
}

/// The list of the weights' files, where there are several.
pub fn index(names: &[String]) -> Option<&str> {
    among(names, |name| name == INDEX).next()
}

/// The files of the weights: those that the index lists, or the only one.
///
/// # Errors
/// There are none, or one that the index lists is not among `names`.
pub fn weights<'a>(
    id: &str,
    names: &'a [String],
    index: Option<&[u8]>,
) -> Result<Vec<&'a str>, HubError> {
    if let Some(index) = index {
        let listed = listed(index).ok_or_else(|| no_checkpoint(id, "weight_map"))?;
        let found: Vec<_> = among(names, |name| listed.contains(name)).collect();
        return match found.len() == listed.len() {
            true => Ok(found),
            false => Err(no_checkpoint(id, "*.safetensors that its index lists")),
        };
    }
    let is_weights = |name: &str| name.ends_with(".safetensors");
    let single = among(names, |name| name == SINGLE).next();
    let mut all = among(names, is_weights);
    match (single, all.next(), all.next()) {
        (Some(name), _, _) | (None, Some(name), None) => Ok(vec![name]),
        _ => Err(no_checkpoint(id, SINGLE)),
    }
}

/// Whether a folder holds this part of a checkpoint. A link to nothing is no file.
pub fn are_in(folder: &Path, part: Part) -> bool {
    let is_there = |name: &str| folder.join(name).is_file();
    if !is_there(CONFIG) || !is_there(TOKENIZER) {
        return false;
    }
    if part == Part::Description {
        return true;
    }
    if is_there(INDEX) {
        let listed = std::fs::read(folder.join(INDEX)).ok();
        let listed = listed.and_then(|index| listed_owned(&index));
        return listed.is_some_and(|names| names.iter().all(|name| is_there(name)));
    }
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths = entries.map(|entry| entry.path());
    paths.any(|path| path.extension().is_some_and(|e| e == "safetensors") && path.is_file())
}

fn listed_owned(index: &[u8]) -> Option<BTreeSet<String>> {
    let index: serde_json::Value = serde_json::from_slice(index).ok()?;
    let map = index.get("weight_map")?.as_object()?;
    map.values()
        .map(|name| Some(name.as_str()?.to_owned()))
        .collect()
}

fn listed(index: &[u8]) -> Option<BTreeSet<String>> {
    listed_owned(index).filter(|names| !names.is_empty())
}

fn among(names: &[String], is_wanted: impl Fn(&str) -> bool) -> impl Iterator<Item = &str> {
    let names = names.iter().map(String::as_str);
    names.filter(move |name| is_top_level(name) && is_wanted(name))
}

/// The name becomes a file's in the cache: it must not lead elsewhere.
fn is_top_level(name: &str) -> bool {
    Path::new(name).file_name() == Some(name.as_ref())
}

fn no_checkpoint(id: &str, missing: &'static str) -> HubError {
    HubError::NoCheckpoint {
        id: id.to_owned(),
        missing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn of_gpt_oss_only_one_copy_of_the_weights_is_taken() {
        let names = owned(&[
            ".gitattributes",
            "README.md",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "metal/model.bin",
            "model-00000-of-00001.safetensors",
            "model-00001-of-00001.safetensors",
            "model.safetensors.index.json",
            "original/config.json",
            "original/model.safetensors",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]);
        let description = description("a/b", &names).expect("it is whole");
        assert_eq!(
            description,
            [
                "chat_template.jinja",
                "generation_config.json",
                "special_tokens_map.json",
                "tokenizer_config.json",
                "tokenizer.json",
                "config.json"
            ]
        );
        assert_eq!(index(&names), Some(INDEX));
        let map = br#"{"weight_map": {"x": "model-00000-of-00001.safetensors",
            "y": "model-00001-of-00001.safetensors", "z": "model-00000-of-00001.safetensors"}}"#;
        let weights = weights("a/b", &names, Some(map)).expect("they are listed");
        assert_eq!(weights, [names[6].as_str(), names[7].as_str()]);
    }

    #[test]
    fn what_is_no_checkpoint_is_told() {
        let missing = |names: &[&str], index: Option<&[u8]>| {
            weights("a/b", &owned(names), index).map(|names| names.len())
        };
        assert_eq!(missing(&["model.safetensors"], None).ok(), Some(1));
        assert_eq!(missing(&["only.safetensors"], None).ok(), Some(1));
        assert!(missing(&["model.gguf", "original/model.safetensors"], None).is_err());
        assert!(missing(&["a.safetensors", "b.safetensors"], None).is_err());
        // A name that leads out of the folder is not among those of the repository.
        let map = br#"{"weight_map": {"x": "../evil.safetensors"}}"#;
        assert!(missing(&["../evil.safetensors"], Some(map)).is_err());
        assert!(missing(&[], Some(br#"{"weight_map": {}}"#)).is_err());
        assert!(description("a/b", &owned(&["config.json"])).is_err());
    }
}
