//! The hub cache on disk, as all tools of the hub lay it out:
//!
//! ```text
//! models--owner--name/refs/main                      a commit
//!                     snapshots/<commit>/config.json -> ../../blobs/<etag>
//!                     blobs/<etag>                   a whole file
//!                     blobs/<etag>.incomplete        what has come of one
//! .locks/models--owner--name/<etag>.lock             held (flock) by who downloads it
//! ```

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::files;
use super::{HubError, MAIN, Part};

/// A repository's folder in the cache.
pub struct Repository {
    root: PathBuf,
    locks: PathBuf,
}

impl Repository {
    pub fn new(cache: &Path, id: &str) -> Self {
        let name = format!("models--{}", id.replace('/', "--"));
        Self {
            root: cache.join(&name),
            locks: cache.join(".locks").join(&name),
        }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    pub fn incomplete(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// The snapshot of a revision that holds this part. Without a revision it is that of `main`;
    /// where no tool has noted which that is, the newest.
    pub fn find(&self, revision: Option<&str>, part: Part) -> Option<PathBuf> {
        let is_whole = |path: &PathBuf| files::are_in(path, part);
        let noted = self.root.join("refs").join(revision.unwrap_or(MAIN));
        if let Ok(commit) = std::fs::read_to_string(noted) {
            return Some(self.snapshot(commit.trim())).filter(is_whole);
        }
        if let Some(commit) = revision {
            return Some(self.snapshot(commit)).filter(is_whole);
        }
        let entries = std::fs::read_dir(self.root.join("snapshots")).ok()?;
        entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(is_whole)
            .max_by_key(|path| path.metadata().and_then(|m| m.modified()).ok())
    }

    /// Makes the folders that a download writes to.
    ///
    /// # Errors
    /// One that cannot be made.
    pub fn make(&self, commit: &str) -> Result<(), HubError> {
        for folder in [
            &self.root.join("blobs"),
            &self.snapshot(commit),
            &self.locks,
        ] {
            std::fs::create_dir_all(folder).map_err(failed(folder))?;
        }
        Ok(())
    }

    /// Locks a blob against other processes, of other tools, too. `waiting` is called where one
    /// has it and must be waited for.
    ///
    /// # Errors
    /// A lock that cannot be had on this disk.
    pub fn lock(&self, etag: &str, waiting: impl FnOnce()) -> Result<File, HubError> {
        let path = self.locks.join(format!("{etag}.lock"));
        let mut options = OpenOptions::new();
        let options = options.create(true).truncate(false).write(true);
        let file = options.open(&path).map_err(failed(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                waiting();
                file.lock().map_err(failed(&path))?;
            }
            Err(TryLockError::Error(source)) => return Err(failed(&path)(source)),
        }
        Ok(file)
    }

    /// Gives a blob its name in a snapshot.
    ///
    /// # Errors
    /// A link that cannot be made.
    pub fn link(&self, commit: &str, name: &str, etag: &str) -> Result<(), HubError> {
        let path = self.snapshot(commit).join(name);
        // Relative, so that the cache may be moved.
        let target = Path::new("../../blobs").join(etag);
        if std::fs::read_link(&path).is_ok_and(|found| found == target) {
            return Ok(());
        }
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(failed(&path)(error)),
            _ => symlink(&target, &path).map_err(failed(&path)),
        }
    }

    /// Notes which commit a revision is. This comes last: until then `main` stays what it was.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn set_revision(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed(folder))?;
        }
        std::fs::write(&path, commit).map_err(failed(&path))
    }
}

/// Bytes that a user may still write on the disk of `folder`; nothing where that cannot be told.
pub fn free_bytes(folder: &Path) -> Option<u64> {
    let path = std::ffi::CString::new(folder.as_os_str().as_bytes()).ok()?;
    // SAFETY: the path ends with a zero byte, and the struct, for which zeros are valid, is
    // written by the call alone.
    #[allow(unsafe_code, reason = "std has no call for it")]
    let found = unsafe {
        let mut found: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(path.as_ptr(), &mut found) == 0).then_some(found)
    }?;
    #[allow(
        clippy::unnecessary_cast,
        reason = "the fields' width differs by platform"
    )]
    Some((found.f_bavail as u64).saturating_mul(found.f_frsize as u64))
}

/// The error of writing `path`.
pub fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> HubError {
    let path = path.to_owned();
    move |source| HubError::Write { path, source }
}
