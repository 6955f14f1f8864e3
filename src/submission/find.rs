//! Runs by name: a path, a unique prefix of a folder under `submissions/`, or `latest`.

use std::io;
use std::path::{Path, PathBuf};

use super::manifest::{RUN_FILE, RunManifest};

/// Candidates that a message names.
const MAX_NAMED: usize = 10;

/// Finds a run's folder. `root` is the folder that holds the runs, usually `submissions`.
pub fn find_run(root: &Path, name: &str) -> Result<PathBuf, FindError> {
    let path = Path::new(name);
    if path.join(RUN_FILE).is_file() {
        return Ok(path.to_owned());
    }
    let mut runs = list_runs(root)?;
    if name == "latest" {
        return newest(runs).ok_or_else(|| FindError::NoRuns {
            root: root.to_owned(),
        });
    }
    // A whole name wins over a longer one that begins with it.
    if let Some(exact) = runs.iter().find(|run| folder_name(run) == name) {
        return Ok(exact.clone());
    }
    let mut matching: Vec<PathBuf> = runs
        .iter()
        .filter(|run| folder_name(run).starts_with(name))
        .cloned()
        .collect();
    match (matching.pop(), matching.is_empty()) {
        (Some(only), true) => Ok(only),
        (Some(last), false) => {
            matching.push(last);
            Err(FindError::Ambiguous {
                name: name.to_owned(),
                matching: named(&matching),
            })
        }
        (None, _) => {
            runs.truncate(MAX_NAMED);
            Err(FindError::Unknown {
                name: name.to_owned(),
                root: root.to_owned(),
                runs: named(&runs),
            })
        }
    }
}

/// The folders under `root` that hold a run, sorted by name. No `root`, no runs.
pub fn list_runs(root: &Path) -> Result<Vec<PathBuf>, FindError> {
    let failed = |source| FindError::Read {
        root: root.to_owned(),
        source,
    };
    let entries = match std::fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(failed(source)),
    };
    let mut runs = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if path.join(RUN_FILE).is_file() {
            runs.push(path);
        }
    }
    runs.sort();
    Ok(runs)
}

/// By the start of the newest session. A run whose manifest cannot be read is passed over.
fn newest(runs: Vec<PathBuf>) -> Option<PathBuf> {
    runs.into_iter()
        .filter_map(|run| {
            let manifest = RunManifest::read(&run).ok()?;
            Some((manifest.last_start().to_owned(), run))
        })
        .max()
        .map(|(_, run)| run)
}

fn folder_name(run: &Path) -> String {
    run.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn named(runs: &[PathBuf]) -> Vec<String> {
    runs.iter()
        .take(MAX_NAMED)
        .map(|run| folder_name(run))
        .collect()
}

/// Why a name is no run.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    #[error("cannot list `{root}`: {source}")]
    Read { root: PathBuf, source: io::Error },
    #[error("there are no runs in `{root}`")]
    NoRuns { root: PathBuf },
    #[error("no run in `{root}` is called `{name}`")]
    Unknown {
        name: String,
        root: PathBuf,
        runs: Vec<String>,
    },
    #[error("`{name}` is the beginning of several runs")]
    Ambiguous { name: String, matching: Vec<String> },
}

impl FindError {
    pub fn hint(&self) -> String {
        match self {
            Self::Read { .. } => "check the folder's permissions".to_owned(),
            Self::NoRuns { .. } => "make one with `podium eval DATASET`".to_owned(),
            Self::Unknown { runs, .. } if runs.is_empty() => {
                "make one with `podium eval DATASET`".to_owned()
            }
            Self::Unknown { runs, .. } => format!("there are: {}", runs.join(", ")),
            Self::Ambiguous { matching, .. } => format!("name one of: {}", matching.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::submission::manifest::tests::manifest;
    use crate::submission::manifest::{Session, Shard};
    use crate::telemetry::test_dir::TestDir;

    fn make_run(root: &Path, name: &str, start: &str) {
        let folder = root.join(name);
        std::fs::create_dir_all(&folder).expect("the test folder is writable");
        let mut manifest = manifest();
        let mut session = Session::start("cpu", "cpu/avx512", 1);
        session.start = start.to_owned();
        session.shard = Some(Shard { index: 1, count: 2 });
        manifest.begin_session(&folder, session);
        manifest
            .write(&folder)
            .expect("the test folder is writable");
    }

    #[test]
    fn runs_are_named_by_path_prefix_or_latest() {
        let dir = TestDir::new("find");
        let root = dir.path();
        make_run(root, "sums-4bit-aa", "2026-01-02T00:00:00.000Z");
        make_run(root, "sums-4bit-ab", "2026-01-03T00:00:00.000Z");
        make_run(root, "sums-4bit-a", "2026-01-01T00:00:00.000Z");
        std::fs::create_dir_all(root.join("compare-x")).expect("the test folder is writable");

        let found = |name: &str| find_run(root, name).map(|run| folder_name(&run));
        assert_eq!(found("latest").expect("there are runs"), "sums-4bit-ab");
        assert_eq!(found("sums-4bit-ab").expect("it is there"), "sums-4bit-ab");
        assert_eq!(found("sums-4bit-a").expect("a whole name"), "sums-4bit-a");
        let path = root.join("sums-4bit-aa");
        let by_path = find_run(Path::new("elsewhere"), &path.to_string_lossy());
        assert_eq!(by_path.expect("a path is a name"), path);

        let error = found("sums").expect_err("three runs begin so");
        assert!(error.hint().contains("sums-4bit-aa"));
        let error = found("compare").expect_err("a comparison is no run");
        assert!(matches!(error, FindError::Unknown { .. }));
        let error = find_run(Path::new("/nonexistent-podium-folder"), "latest");
        assert!(matches!(error, Err(FindError::NoRuns { .. })));
    }
}
