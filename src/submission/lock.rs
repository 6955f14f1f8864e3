//! The lock on a run folder: one podium writes to it at a time.
//!
//! It is an advisory lock of the operating system (`flock`) on `.lock`, held until the value is
//! dropped or the process ends, however it ends: a killed run leaves none. The file itself stays.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

const LOCK_FILE: &str = ".lock";

/// A held lock on a run folder.
#[derive(Debug)]
pub struct RunLock {
    /// The lock lives as long as this handle.
    _file: File,
}

impl RunLock {
    /// Takes the lock, without waiting. The folder must exist.
    ///
    /// # Errors
    /// [`LockError::Held`] when another podium has it.
    pub fn acquire(run_dir: &Path) -> Result<Self, LockError> {
        let path = run_dir.join(LOCK_FILE);
        let open = |source| LockError::Open {
            path: path.clone(),
            source,
        };
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(open)?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => Err(LockError::Held {
                run_dir: run_dir.to_owned(),
            }),
            Err(TryLockError::Error(source)) => Err(open(source)),
        }
    }
}

/// Why a run folder cannot be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("another podium is writing to `{run_dir}`")]
    Held { run_dir: PathBuf },
    #[error("cannot lock `{path}`: {source}")]
    Open { path: PathBuf, source: io::Error },
}

impl LockError {
    pub fn hint(&self) -> String {
        match self {
            Self::Held { .. } => {
                "wait until it ends, or write elsewhere with `--out DIR`".to_owned()
            }
            Self::Open { .. } => {
                "check that the folder is writable, or write elsewhere with `--out DIR`".to_owned()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::test_dir::TestDir;

    #[test]
    fn a_second_holder_is_refused_until_the_first_lets_go() {
        let dir = TestDir::new("lock");
        let first = RunLock::acquire(dir.path()).expect("nobody holds it");
        assert!(matches!(
            RunLock::acquire(dir.path()),
            Err(LockError::Held { .. })
        ));
        drop(first);
        RunLock::acquire(dir.path()).expect("the file left behind is no lock");
    }

    #[test]
    fn a_missing_folder_is_named() {
        let error = RunLock::acquire(Path::new("/nonexistent-podium-folder"))
            .expect_err("there is no such folder");
        assert!(error.to_string().contains("/nonexistent-podium-folder"));
    }
}
