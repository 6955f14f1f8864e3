//! How often a request is tried again, and how long is waited between.

use std::time::Duration;

use super::HubError;
use super::progress::Progress;

/// Attempts in a row without a byte.
const MAX_ATTEMPTS: u32 = 6;
/// Before the second attempt; doubled before each other: 15.5 s in all.
const FIRST_WAIT: Duration = Duration::from_millis(500);

/// A request that failed.
pub enum Failure {
    /// It may go well the next time.
    Again(String),
    Never(HubError),
}

/// Counts failures in a row, and waits after each.
#[derive(Default)]
pub struct Patience {
    n_failed: u32,
}

impl Patience {
    /// Something came: the next failure is the first again.
    pub fn renew(&mut self) {
        self.n_failed = 0;
    }

    /// Waits, unless there is no use in it.
    ///
    /// # Errors
    /// The failure, when it is final or the last of too many.
    pub fn wait(
        &mut self,
        failure: Failure,
        url: &str,
        progress: &Progress,
    ) -> Result<(), HubError> {
        let reason = match failure {
            Failure::Never(error) => return Err(error),
            Failure::Again(reason) => reason,
        };
        self.n_failed += 1;
        if self.n_failed == MAX_ATTEMPTS {
            return Err(HubError::Network {
                url: url.to_owned(),
                reason,
                n_attempts: self.n_failed,
            });
        }
        let wait = FIRST_WAIT * (1 << (self.n_failed - 1));
        progress.say(&format!("{url}: {reason}; again in {wait:?}"));
        std::thread::sleep(wait);
        Ok(())
    }
}
