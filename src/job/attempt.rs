//! The second attempt at a command whose device was lost.
//!
//! A driver may give a lost GPU to new processes alone (580.159.04 does, after an illegal address),
//! so the process begins anew: `exec` puts the same program with the same arguments in its place,
//! with the same id, streams and parent. The run goes on from its folder, as any that was broken
//! off; what the folders do not say stands in an environment variable. There is one such attempt:
//! a second loss ends the command.

use std::convert::Infallible;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use super::JobError;
use super::device::Engine;
use super::signal;
use crate::cli::print;

const VARIABLE: &str = "PODIUM_ATTEMPT";

/// How far a command is, over both its attempts.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Attempt {
    /// The process that it is meant for: a value that was inherited, or set by hand, is no one's.
    process_id: u32,
    /// Lost before this attempt: 0 or 1.
    pub n_lost_devices: usize,
    /// What the run was on that the loss broke off: `auto` may choose otherwise now, and would
    /// begin another run. Taken by that run, the first of this attempt.
    pub broken_off: Option<Engine>,
    /// Folders of the runs that are done, in order.
    pub done: Vec<PathBuf>,
    /// The highest exit code among them.
    pub code: u8,
}

impl Attempt {
    /// This process's.
    pub fn current() -> Self {
        let text = std::env::var(VARIABLE).unwrap_or_default();
        Self::read(&text, std::process::id())
    }

    fn read(text: &str, process_id: u32) -> Self {
        let first = Self {
            process_id,
            ..Self::default()
        };
        serde_json::from_str(text)
            .ok()
            .filter(|attempt: &Self| attempt.process_id == process_id)
            .unwrap_or(first)
    }

    /// Begins the command anew where `error` is its first lost device, and does not return then.
    /// The run's files must be written and closed; what else the process holds goes with it.
    /// Else, and where that cannot be done, gives the error back.
    pub fn begin_anew_after(&self, error: JobError, engine: Engine) -> JobError {
        if !error.is_lost_device() || self.n_lost_devices > 0 {
            return error;
        }
        // From here on a signal ends the process at once: noted in this program, it would be
        // lost with it.
        signal::uninstall();
        if signal::received().is_some() {
            return error;
        }
        print::tell(&format!(
            "warning: {error}\nwhat is done stays; podium begins anew as a new process, once"
        ));
        let Err(reason) = self.begin_anew(engine);
        print::tell(&format!("warning: it cannot: {reason}"));
        error
    }

    fn begin_anew(&self, engine: Engine) -> io::Result<Infallible> {
        let next = Self {
            n_lost_devices: self.n_lost_devices + 1,
            broken_off: Some(engine),
            ..self.clone()
        };
        let mut arguments = std::env::args_os();
        let mut command = Command::new(std::env::current_exe()?);
        if let Some(name) = arguments.next() {
            command.arg0(name);
        }
        command
            .args(arguments)
            .env(VARIABLE, serde_json::to_string(&next)?);
        io::stdout().flush()?;
        // Ends the other threads and closes every file that is not a standard stream: all of
        // ours, and the driver's, are marked to be.
        Err(command.exec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_is_read_by_the_process_it_is_meant_for() {
        let attempt = Attempt {
            process_id: 17,
            n_lost_devices: 1,
            broken_off: Some(Engine::Cuda(1)),
            done: vec!["submissions/a".into()],
            code: 1,
        };
        let text = serde_json::to_string(&attempt).expect("plain values");
        assert_eq!(Attempt::read(&text, 17), attempt);
        for text in [text.as_str(), "", "1", "{}"] {
            let first = Attempt::read(text, 18);
            assert_eq!((first.process_id, first.n_lost_devices), (18, 0));
            assert_eq!((first.broken_off, first.done.len()), (None, 0));
        }
    }
}
