//! Which prompt files the arguments mean: files, folders and globs.

use std::path::{Path, PathBuf};

/// Endings that a folder's files are taken by; each also with `.gz`.
const ENDINGS: [&str; 6] = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"];

/// Why no prompt file was found.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    #[error("no data set was given")]
    None,
    #[error("there is no data set `{path}`")]
    Missing { path: PathBuf },
    #[error("nothing matches `{pattern}`")]
    NoMatch { pattern: PathBuf },
    #[error("the folder `{path}` holds no prompt file")]
    EmptyFolder { path: PathBuf },
    #[error("cannot read the folder `{path}`: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
}

impl FindError {
    /// How to mend it.
    pub fn hint(&self) -> String {
        match self {
            Self::None => "name a prompt file, such as datasets/nano/mixed.jsonl".to_owned(),
            Self::Missing { .. } | Self::NoMatch { .. } | Self::Read { .. } => {
                "check the path".to_owned()
            }
            Self::EmptyFolder { .. } => {
                format!(
                    "podium takes {} files, each also gzipped",
                    ENDINGS.join(", ")
                )
            }
        }
    }
}

/// The prompt files that `arguments` name, in order, each once.
///
/// # Errors
/// An argument names nothing.
pub fn find(arguments: &[PathBuf]) -> Result<Vec<PathBuf>, FindError> {
    let mut found: Vec<PathBuf> = Vec::new();
    for argument in arguments {
        let paths = if argument.is_dir() {
            let paths = folder(argument)?;
            if paths.is_empty() {
                return Err(FindError::EmptyFolder {
                    path: argument.clone(),
                });
            }
            paths
        } else if argument.exists() {
            vec![argument.clone()]
        } else if argument.to_string_lossy().contains(['*', '?']) {
            let paths = glob(argument)?;
            if paths.is_empty() {
                return Err(FindError::NoMatch {
                    pattern: argument.clone(),
                });
            }
            paths
        } else {
            return Err(FindError::Missing {
                path: argument.clone(),
            });
        };
        for path in paths {
            if !found.contains(&path) {
                found.push(path);
            }
        }
    }
    if found.is_empty() {
        Err(FindError::None)
    } else {
        Ok(found)
    }
}

/// A data set's name: its file name without its endings.
pub fn stem(path: &Path) -> String {
    let name = path
        .file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    ENDINGS
        .iter()
        .find_map(|ending| name.strip_suffix(ending))
        .unwrap_or(name)
        .to_owned()
}

fn is_prompt_file(path: &Path) -> bool {
    let name = path
        .file_name()
        .map(|n| n.to_string_lossy().to_lowercase())
        .unwrap_or_default();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    path.is_file() && ENDINGS.iter().any(|ending| name.ends_with(ending))
}

/// Sorted entries of a folder.
fn entries(path: &Path) -> Result<Vec<PathBuf>, FindError> {
    let read = |source| FindError::Read {
        path: path.to_owned(),
        source,
    };
    let mut entries = std::fs::read_dir(path)
        .map_err(read)?
        .map(|entry| Ok(entry.map_err(read)?.path()))
        .collect::<Result<Vec<_>, FindError>>()?;
    entries.sort();
    Ok(entries)
}

fn folder(path: &Path) -> Result<Vec<PathBuf>, FindError> {
    Ok(entries(path)?
        .into_iter()
        .filter(|path| is_prompt_file(path))
        .collect())
}

/// `*` and `?` in the last part of a path, for shells that do not expand them.
fn glob(pattern: &Path) -> Result<Vec<PathBuf>, FindError> {
    let parent = match pattern.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let Some(last) = pattern.file_name() else {
        return Ok(Vec::new());
    };
    let last: Vec<char> = last.to_string_lossy().chars().collect();
    if !parent.is_dir() {
        return Ok(Vec::new());
    }
    let matching = entries(parent)?.into_iter().filter(|path| {
        path.is_file()
            && path.file_name().is_some_and(|name| {
                matches(&last, &name.to_string_lossy().chars().collect::<Vec<_>>())
            })
    });
    // `./a.jsonl` is `a.jsonl`, as a shell would have written it.
    Ok(matching
        .map(|path| path.strip_prefix(".").map(Path::to_owned).unwrap_or(path))
        .collect())
}

/// Goes back to the last star alone: an earlier one has nothing to gain from taking more, and
/// trying each would take a time exponential in the number of stars.
fn matches(pattern: &[char], name: &[char]) -> bool {
    let (mut at, mut n_read) = (0, 0);
    // Where the last star stands, and up to where it has taken the name.
    let mut star: Option<(usize, usize)> = None;
    while let Some(c) = name.get(n_read) {
        match (pattern.get(at), star) {
            (Some('*'), _) => {
                star = Some((at, n_read));
                at += 1;
            }
            (Some(p), _) if *p == '?' || p == c => {
                at += 1;
                n_read += 1;
            }
            (_, Some((star_at, taken))) => {
                star = Some((star_at, taken + 1));
                at = star_at + 1;
                n_read = taken + 1;
            }
            (_, None) => return false,
        }
    }
    pattern.iter().skip(at).all(|p| *p == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_in_a_shell() {
        let is = |pattern: &str, name: &str| {
            let chars = |text: &str| text.chars().collect::<Vec<_>>();
            matches(&chars(pattern), &chars(name))
        };
        assert!(is("*.jsonl", "a.jsonl"));
        assert!(is("a*?.csv", "abc.csv"));
        assert!(!is("*.jsonl", "a.csv"));
        assert!(!is("?", ""));
        assert!(is("a*b*c", "a-b-b-c"));
        assert!(is("**", ""));
        assert!(is("*a?c", "abc-abc"));
        assert!(!is("a*b*c", "a-c-b"));
        // In no time, however many stars.
        let name = "a".repeat(100);
        assert!(!is(&("*a".repeat(50) + "b"), &name));
        assert!(!is(&("*".repeat(100) + "b"), &name));
    }

    #[test]
    fn a_stem_has_no_endings() {
        assert_eq!(stem(Path::new("x/val.jsonl.gz")), "val");
        assert_eq!(stem(Path::new("x/v1.2.csv")), "v1.2");
        assert_eq!(stem(Path::new("odd.txt")), "odd.txt");
    }
}
