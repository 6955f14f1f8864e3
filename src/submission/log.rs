//! The result log `results.jsonl`: append-only, a line a finished sample, one write a line.
//!
//! Opening it reads what is there and repairs the tail that a kill or a power cut tore; nothing
//! finished is lost and no garbage stays. Appending never waits for the disk: a thread syncs the
//! data at most [`SYNC_PERIOD`] after a write. A line that cannot be written whole (disk full) is
//! taken back, so the log stays valid. Who holds the folder is [`super::lock`]'s business.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::identity::MAX_SAMPLES;
use super::{RESULT_SCHEMA, ResultRow};
use crate::dataset::Gold;

pub const RESULTS_FILE: &str = "results.jsonl";

/// The longest time that a finished row may wait for its sync.
pub const SYNC_PERIOD: Duration = Duration::from_millis(200);

/// Written and taken back to find a full disk before the model loads.
const PROBE_BYTES: usize = 1 << 20;

/// What a log held when it was opened.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Every line, in the order written; [`super::Results`] says which count.
    pub rows: Vec<ResultRow>,
    /// Bytes of a torn last line that were cut off (or passed over, when only read).
    pub repaired_bytes: u64,
    /// The last line was whole but its newline was missing; it was kept.
    pub completed_last_line: bool,
}

/// What the log needs of a file: the seam at which tests make the disk fail.
pub(crate) trait LogFile: Send + Sync {
    fn write(&self, bytes: &[u8]) -> io::Result<usize>;
    fn sync(&self) -> io::Result<()>;
    fn set_len(&self, n_bytes: u64) -> io::Result<()>;
}

impl LogFile for File {
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut file = self;
        Write::write(&mut file, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn set_len(&self, n_bytes: u64) -> io::Result<()> {
        File::set_len(self, n_bytes)
    }
}

/// The open log. Dropping it syncs, too, but only [`ResultLog::close`] tells of a failure.
pub struct ResultLog {
    path: PathBuf,
    file: Arc<dyn LogFile>,
    /// Bytes of whole lines.
    n_bytes: u64,
    /// A failed write left bytes behind that could not be taken back yet.
    torn: bool,
    syncer: Syncer,
}

impl ResultLog {
    /// Opens a run's log, reads it and repairs its tail. The folder must exist and be locked.
    ///
    /// # Errors
    /// A line that is not a result anywhere but at the torn end is an error, never dropped.
    pub fn open(run_dir: &Path) -> Result<(Self, Recovered), LogError> {
        let path = run_dir.join(RESULTS_FILE);
        let open = |source| LogError::Open {
            path: path.clone(),
            source,
        };
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .read(true)
            .open(&path)
            .map_err(open)?;
        let scan = scan(&path, &file)?;
        if scan.recovered.repaired_bytes > 0 {
            file.set_len(scan.whole_bytes).map_err(open)?;
        }
        let mut log = Self {
            syncer: Syncer::none(),
            file: Arc::new(file),
            n_bytes: scan.whole_bytes,
            torn: false,
            path,
        };
        if scan.recovered.completed_last_line {
            log.append_bytes(b"\n")?;
        }
        log.sync_now()?;
        // The file's name is on the disk only once its folder is.
        File::open(run_dir)
            .and_then(|folder| folder.sync_all())
            .map_err(|source| LogError::Sync {
                path: run_dir.to_owned(),
                source,
            })?;
        log.syncer = Syncer::start(&log.path, Arc::clone(&log.file))?;
        Ok((log, scan.recovered))
    }

    /// Appends one row: a single write of the whole line with its newline.
    ///
    /// # Errors
    /// When the disk takes no more, the part of the line already written is taken back and the
    /// log is as it was before. A failed sync of earlier rows is told here, too.
    pub fn append(&mut self, row: &ResultRow) -> Result<(), LogError> {
        let mut line = serde_json::to_vec(row).map_err(|source| LogError::Encode {
            key: row.key.clone(),
            reason: source.to_string(),
        })?;
        line.push(b'\n');
        self.append_bytes(&line)?;
        self.syncer.mark_dirty(&self.path)
    }

    /// Syncs and closes.
    pub fn close(mut self) -> Result<(), LogError> {
        self.syncer.stop();
        self.syncer.failure(&self.path)?;
        self.sync_now()
    }

    fn append_bytes(&mut self, bytes: &[u8]) -> Result<(), LogError> {
        if self.torn {
            self.take_back()?;
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let written = match self.file.write(rest) {
                Ok(0) => Err(io::Error::from(io::ErrorKind::WriteZero)),
                Ok(n_written) => Ok(rest.get(n_written..).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
            match written {
                Ok(left) => rest = left,
                Err(source) => {
                    self.torn = true;
                    // A failure here is met again, and told, at the next append or open.
                    self.take_back().ok();
                    return Err(LogError::write(&self.path, source));
                }
            }
        }
        self.n_bytes += bytes.len() as u64;
        Ok(())
    }

    /// Cuts the file back to its whole lines.
    fn take_back(&mut self) -> Result<(), LogError> {
        self.file
            .set_len(self.n_bytes)
            .map_err(|source| LogError::write(&self.path, source))?;
        self.torn = false;
        Ok(())
    }

    fn sync_now(&self) -> Result<(), LogError> {
        self.file.sync().map_err(|source| LogError::Sync {
            path: self.path.clone(),
            source,
        })
    }
}

/// Reads a run's log without touching it: for `score`, `compare`, `report` and a run in progress.
/// A torn last line is passed over. A folder without a log has no rows.
pub fn read(run_dir: &Path) -> Result<Recovered, LogError> {
    let path = run_dir.join(RESULTS_FILE);
    match File::open(&path) {
        Ok(file) => scan(&path, &file).map(|scan| scan.recovered),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Recovered::default()),
        Err(source) => Err(LogError::Open { path, source }),
    }
}

/// Makes the run folder and checks that results can be written to it, before a model is loaded.
pub fn probe_writable(run_dir: &Path) -> Result<(), LogError> {
    let path = run_dir.join(".probe");
    let probe = || {
        std::fs::create_dir_all(run_dir)?;
        let mut file = File::create(&path)?;
        file.write_all(&vec![0x5A; PROBE_BYTES])?;
        file.sync_data()
    };
    let probed = probe();
    std::fs::remove_file(&path).ok();
    probed.map_err(|source| LogError::write(run_dir, source))
}

struct Scan {
    recovered: Recovered,
    /// Bytes up to the end of the last valid line.
    whole_bytes: u64,
}

/// More options than a row can have: an index past them is damage.
const MAX_OPTIONS: usize = 1 << 32;

/// Reads all lines. Only the very last one may be torn: cut off in the middle, so that it is not
/// JSON. A last line that is JSON but no result is no tear, and an error like any other.
fn scan(path: &Path, file: &File) -> Result<Scan, LogError> {
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut scan = Scan {
        recovered: Recovered::default(),
        whole_bytes: 0,
    };
    let mut line = Vec::new();
    let mut line_number = 0;
    // A line that is no JSON is an error only once another line follows it.
    let mut torn: Option<LogError> = None;
    loop {
        line.clear();
        let n_read = reader
            .read_until(b'\n', &mut line)
            .map_err(|source| LogError::Open {
                path: path.to_owned(),
                source,
            })?;
        if n_read == 0 {
            return Ok(scan);
        }
        line_number += 1;
        if let Some(error) = torn {
            return Err(error);
        }
        let terminated = line.last() == Some(&b'\n');
        let text = line.trim_ascii();
        if text.is_empty() && terminated {
            scan.whole_bytes += n_read as u64;
            continue;
        }
        match parse(text) {
            Ok(row) => {
                scan.recovered.rows.push(row);
                scan.recovered.completed_last_line = !terminated;
                scan.whole_bytes += n_read as u64;
                torn = None;
            }
            Err(problem) => {
                let error = LogError::InvalidLine {
                    path: path.to_owned(),
                    line: line_number,
                    reason: problem.reason,
                };
                if problem.is_json {
                    return Err(error);
                }
                scan.recovered.repaired_bytes = n_read as u64;
                torn = Some(error);
            }
        }
    }
}

struct Problem {
    is_json: bool,
    reason: String,
}

fn parse(text: &[u8]) -> Result<ResultRow, Problem> {
    let row: ResultRow = serde_json::from_slice(text).map_err(|error| Problem {
        is_json: serde_json::from_slice::<serde::de::IgnoredAny>(text).is_ok(),
        reason: error.to_string(),
    })?;
    let reason = match &row {
        row if row.schema != RESULT_SCHEMA => {
            format!("schema `{}`, expected `{RESULT_SCHEMA}`", row.schema)
        }
        row if row.sample >= MAX_SAMPLES => {
            format!("`sample` is {}, expected below {MAX_SAMPLES}", row.sample)
        }
        ResultRow {
            gold: Some(Gold::Option(index)),
            ..
        } if *index >= MAX_OPTIONS => {
            format!("`gold` is option {index}, expected below {MAX_OPTIONS}")
        }
        _ => return Ok(row),
    };
    Err(Problem {
        is_json: true,
        reason,
    })
}

/// Syncs the file on a thread of its own, so that a slow disk never holds up the engine.
struct Syncer {
    shared: Arc<(Mutex<SyncState>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct SyncState {
    dirty: bool,
    stop: bool,
    failed: Option<io::Error>,
}

impl Syncer {
    fn none() -> Self {
        Self {
            shared: Arc::default(),
            thread: None,
        }
    }

    fn start(path: &Path, file: Arc<dyn LogFile>) -> Result<Self, LogError> {
        let mut syncer = Self::none();
        let shared = Arc::clone(&syncer.shared);
        let thread = std::thread::Builder::new()
            .name("podium-sync".to_owned())
            .spawn(move || sync_loop(&shared, &*file))
            .map_err(|source| LogError::Open {
                path: path.to_owned(),
                source,
            })?;
        syncer.thread = Some(thread);
        Ok(syncer)
    }

    fn mark_dirty(&self, path: &Path) -> Result<(), LogError> {
        let mut state = lock(&self.shared.0);
        state.dirty = true;
        self.shared.1.notify_one();
        take_failure(&mut state, path)
    }

    fn failure(&self, path: &Path) -> Result<(), LogError> {
        take_failure(&mut lock(&self.shared.0), path)
    }

    fn stop(&mut self) {
        lock(&self.shared.0).stop = true;
        self.shared.1.notify_one();
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

impl Drop for Syncer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn take_failure(state: &mut SyncState, path: &Path) -> Result<(), LogError> {
    match state.failed.take() {
        None => Ok(()),
        Some(source) => Err(LogError::Sync {
            path: path.to_owned(),
            source,
        }),
    }
}

fn lock(state: &Mutex<SyncState>) -> MutexGuard<'_, SyncState> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Syncs at once after the first write, then gathers the writes of a period into one sync. The
/// sync that a stop leaves undone is `close`'s or, at a kill, the power cut's 200 ms.
fn sync_loop(shared: &(Mutex<SyncState>, Condvar), file: &dyn LogFile) {
    let (state, changed) = shared;
    let mut state = lock(state);
    while !state.stop || state.dirty {
        if !state.dirty {
            state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        state.dirty = false;
        drop(state);
        let synced = file.sync();
        state = lock(&shared.0);
        if let Err(error) = synced {
            state.failed.get_or_insert(error);
        }
        if !state.stop {
            // Half the promise for the pause, the other half for the sync itself.
            state = changed
                .wait_timeout_while(state, SYNC_PERIOD / 2, |state| !state.stop)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// What can go wrong with the log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("cannot open `{path}`: {source}")]
    Open { path: PathBuf, source: io::Error },
    #[error("line {line} of `{path}` is not a result: {reason}")]
    InvalidLine {
        path: PathBuf,
        line: usize,
        reason: String,
    },
    #[error("no space left for `{path}`: {source}")]
    NoSpace { path: PathBuf, source: io::Error },
    #[error("cannot write `{path}`: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot sync `{path}` to the disk: {source}")]
    Sync { path: PathBuf, source: io::Error },
    #[error("cannot encode the result of `{key}`: {reason}")]
    Encode { key: String, reason: String },
}

impl LogError {
    fn write(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            // A file-size limit is a disk of its own.
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => Self::NoSpace { path, source },
            _ => Self::Write { path, source },
        }
    }

    pub fn hint(&self) -> String {
        match self {
            Self::Open { .. } | Self::Write { .. } => {
                "check that the folder is writable, or write elsewhere with `--out DIR`".to_owned()
            }
            Self::InvalidLine { line, .. } => format!(
                "if the line is damaged, delete line {line}: its row runs again; \
                 `--fresh` starts over and keeps the old folder"
            ),
            Self::NoSpace { .. } => {
                "every finished row is kept; make room and give the same command again".to_owned()
            }
            Self::Sync { .. } => {
                "the disk reports a failure: rows of the last moments may not be on it".to_owned()
            }
            Self::Encode { .. } => "report it, with the log kept as it is".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests;
