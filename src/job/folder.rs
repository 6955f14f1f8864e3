//! The run folder: its name, who may write to it, and whether it is this run's.

use std::path::{Path, PathBuf};

use super::JobError;
use crate::submission::Results;
use crate::submission::identity::{GenerationIdentity, run_name};
use crate::submission::lock::RunLock;
use crate::submission::log::{self, ResultLog};
use crate::submission::manifest::{ManifestError, RUN_FILE, RunManifest};

/// Where runs lie unless `--out` says otherwise.
pub const SUBMISSIONS: &str = "submissions";

/// A run folder that this process alone writes to.
pub struct RunFolder {
    pub path: PathBuf,
    /// What stood there already, of this same run.
    pub manifest: Option<RunManifest>,
    pub log: ResultLog,
    pub results: Results,
    /// Bytes of a torn last line that were cut off.
    pub repaired_bytes: u64,
    _lock: RunLock,
}

/// What a folder is opened for.
pub struct Opening<'a> {
    pub dataset: &'a Path,
    pub identity: &'a GenerationIdentity,
    pub out: Option<&'a Path>,
    pub fresh: bool,
    pub allow_mixed: bool,
}

impl Opening<'_> {
    /// The folder's path.
    pub fn path(&self) -> PathBuf {
        match self.out {
            Some(out) => out.to_owned(),
            None => Path::new(SUBMISSIONS).join(run_name(self.dataset, self.identity)),
        }
    }

    /// What stands in the folder, when it is this run's; read without touching it.
    ///
    /// # Errors
    /// The folder holds another run, or something that is no run.
    pub fn existing(&self) -> Result<Option<RunManifest>, JobError> {
        let path = self.path();
        if self.fresh || !path.join(RUN_FILE).exists() {
            return Ok(None);
        }
        let manifest = RunManifest::read(&path)?;
        manifest.check_same_generation(&path, self.identity, self.allow_mixed)?;
        Ok(Some(manifest))
    }

    /// Makes or takes the folder: checked for space, locked, its log read and repaired.
    ///
    /// # Errors
    /// As [`Opening::existing`]; another podium writes there; the disk takes nothing.
    pub fn open(&self) -> Result<RunFolder, JobError> {
        let path = self.path();
        if self.fresh {
            rename_aside(&path)?;
        }
        // The check that refuses another run's folder comes before anything is written to it.
        let manifest = self.existing()?;
        let is_other = manifest.is_none()
            && std::fs::read_dir(&path).is_ok_and(|entries| {
                entries
                    .flatten()
                    .any(|entry| !entry.file_name().to_string_lossy().starts_with('.'))
            })
            && !path.join(log::RESULTS_FILE).exists();
        if is_other {
            return Err(JobError::NotARun { path });
        }
        log::probe_writable(&path)?;
        let lock = RunLock::acquire(&path)?;
        let (log, recovered) = ResultLog::open(&path)?;
        if manifest.is_none() && !recovered.rows.is_empty() {
            // A log without a manifest says nothing of what its rows came from.
            return Err(ManifestError::Missing { run_dir: path }.into());
        }
        Ok(RunFolder {
            manifest,
            log,
            results: Results::new(recovered.rows),
            repaired_bytes: recovered.repaired_bytes,
            path,
            _lock: lock,
        })
    }
}

/// Renames an existing folder to `<name>.old`, `<name>.old-2`, …; deletes nothing.
fn rename_aside(path: &Path) -> Result<(), JobError> {
    if !path.exists() {
        return Ok(());
    }
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let aside = (1..)
        .map(|n| match n {
            1 => path.with_file_name(format!("{name}.old")),
            n => path.with_file_name(format!("{name}.old-{n}")),
        })
        .find(|aside| !aside.exists())
        .unwrap_or_else(|| path.with_extension("old"));
    std::fs::rename(path, &aside).map_err(|source| JobError::Rename {
        path: path.to_owned(),
        source,
    })
}
