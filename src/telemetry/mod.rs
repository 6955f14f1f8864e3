//! What a run measures about itself: memory (`memory.jsonl`) and throughput
//! (`throughput.jsonl`), and the stamps both carry.
//!
//! The engine returns counts and times as values; the job hands them here. A log that cannot be
//! written never stops a run: the first failure is kept and told when the log is finished. What
//! was not measured is absent (`null`), never 0.

pub mod device;
pub mod memory;
pub mod throughput;

#[cfg(test)]
pub(crate) mod test_dir;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

static PROCESS_START: OnceLock<Instant> = OnceLock::new();

/// When the process began: at the first call, which is `main`'s.
pub fn process_start() -> Instant {
    *PROCESS_START.get_or_init(Instant::now)
}

/// The present time as RFC 3339 in UTC with milliseconds, `2026-01-02T03:04:05.678Z`.
pub fn utc_now() -> String {
    rfc3339(SystemTime::now())
}

/// A time as RFC 3339 in UTC with milliseconds. Times before 1970 are given as 1970's start.
pub fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs();
    let (year, month, day) = civil_from_days(seconds / 86_400);
    let of_day = seconds % 86_400;
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        of_day / 3600,
        of_day / 60 % 60,
        of_day % 60,
        since.subsec_millis()
    )
}

/// Year, month and day of a day counted from 1970-01-01 (Howard Hinnant, `chrono`-compatible
/// low-level date algorithms, `civil_from_days`). Years begin in March, so that the leap day is
/// a year's last.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468; // days from 0000-03-01 to 1970-01-01
    let era = shifted / 146_097; // days in 400 years
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

/// What can go wrong with a telemetry log. The run goes on; the caller warns.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("cannot write `{path}`: {source}")]
    Write { path: PathBuf, source: io::Error },
}

impl TelemetryError {
    pub fn hint(&self) -> String {
        match self {
            Self::Write { .. } => {
                "results are not affected; the measurements in this file end where the disk failed"
                    .to_owned()
            }
        }
    }
}

/// A file of JSON lines that grows over the sessions of a run. After the first failed write it
/// stays silent: measurements are worth less than the run.
struct JsonLines {
    path: PathBuf,
    file: Option<File>,
    failed: Option<io::Error>,
}

impl JsonLines {
    /// Opens for appending; a failure is kept for [`JsonLines::finish`].
    fn open(path: PathBuf) -> Self {
        match open_after_last_line(&path) {
            Ok(file) => Self {
                path,
                file: Some(file),
                failed: None,
            },
            Err(error) => Self {
                path,
                file: None,
                failed: Some(error),
            },
        }
    }

    fn append(&mut self, line: &impl serde::Serialize) {
        let Some(file) = &mut self.file else { return };
        let written = serde_json::to_vec(line)
            .map_err(io::Error::from)
            .and_then(|mut bytes| {
                bytes.push(b'\n');
                file.write_all(&bytes)
            });
        if let Err(error) = written {
            self.failed = Some(error);
            self.file = None;
        }
    }

    fn finish(&mut self) -> Result<(), TelemetryError> {
        self.file = None;
        match self.failed.take() {
            None => Ok(()),
            Some(source) => Err(TelemetryError::Write {
                path: self.path.clone(),
                source,
            }),
        }
    }
}

/// Opens a log for appending; a killed session's torn last line is cut off, so that every line
/// of the file stays JSON.
fn open_after_last_line(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().create(true).append(true).open(path)?;
    let bytes = std::fs::read(path)?;
    let whole = bytes
        .iter()
        .rposition(|&byte| byte == b'\n')
        .map_or(0, |at| at + 1);
    if whole < bytes.len() {
        file.set_len(whole as u64)?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Expected stamps from `date -u -d @N +%FT%TZ`.
    #[test]
    fn stamps_are_utc_civil_time() {
        for (seconds, stamp) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (951_868_800, "2000-03-01T00:00:00.000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000Z"),
            (1_735_689_600, "2025-01-01T00:00:00.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), stamp);
        }
        assert_eq!(
            rfc3339(UNIX_EPOCH + Duration::from_millis(1_767_323_045_678)),
            "2026-01-02T03:04:05.678Z"
        );
    }
}
