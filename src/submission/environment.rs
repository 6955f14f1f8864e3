//! Where a run ran, as far as it matters to repeat it: never tokens, user names or host names.

use std::path::Path;

/// What stands in place of something secret.
const REDACTED: &str = "[redacted]";

/// The machine and the command. Absent values do not apply or could not be read.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Environment {
    pub podium_version: String,
    /// The command line, redacted.
    pub command_line: Vec<String>,
    pub cpu_model: Option<String>,
    /// The instruction set chosen, such as `avx512`.
    pub cpu_path: Option<String>,
    pub n_threads: Option<usize>,
    /// The cgroup's limit where there is one, else the machine's memory.
    pub memory_limit_bytes: Option<u64>,
    pub kernel: Option<String>,
    pub gpu: Option<String>,
    pub driver: Option<String>,
    pub nvrtc: Option<String>,
}

impl Environment {
    /// Reads what the system tells of itself.
    pub fn read(arguments: impl IntoIterator<Item = String>) -> Self {
        let home = std::env::var("HOME").unwrap_or_default();
        let cpu_info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok();
        Self {
            podium_version: env!("CARGO_PKG_VERSION").to_owned(),
            command_line: redact_arguments(arguments, &home),
            cpu_model: cpu_info
                .lines()
                .find_map(|line| line.strip_prefix("model name"))
                .map(|rest| rest.trim_start_matches([' ', '\t', ':']).to_owned()),
            memory_limit_bytes: memory_limit_bytes(),
            kernel: kernel.map(|kernel| kernel.trim().to_owned()),
            ..Self::default()
        }
    }
}

fn memory_limit_bytes() -> Option<u64> {
    let number =
        |path: &str| -> Option<u64> { std::fs::read_to_string(path).ok()?.trim().parse().ok() };
    let machine = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|info| {
            let line = info
                .lines()
                .find_map(|line| line.strip_prefix("MemTotal:"))?;
            let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
            kib.checked_mul(1024)
        });
    let group = number("/sys/fs/cgroup/memory.max")
        .or_else(|| number("/sys/fs/cgroup/memory/memory.limit_in_bytes"));
    match (machine, group) {
        // Version 1 spells "no limit" as a huge number.
        (Some(machine), Some(group)) => Some(machine.min(group)),
        (machine, group) => machine.or(group),
    }
}

/// A path or other value of the configuration, without user names: the home folder is `~`.
pub fn redact(text: &str) -> String {
    redact_in(text, &std::env::var("HOME").unwrap_or_default())
}

fn redact_in(text: &str, home: &str) -> String {
    let mut text = text.to_owned();
    if home.len() > 1 {
        text = text.replace(home, "~");
    }
    for root in ["/home/", "/Users/"] {
        text = redact_user(&text, root);
    }
    text.split_inclusive([' ', ',', '=', ':', '/'])
        .map(|part| {
            if part.starts_with("hf_") {
                REDACTED
            } else {
                part
            }
        })
        .collect()
}

/// Replaces the folder name that follows `root` everywhere.
fn redact_user(text: &str, root: &str) -> String {
    let mut pieces = text.split(root);
    let mut redacted = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let name_end = piece.find('/').unwrap_or(piece.len());
        redacted.push_str(root);
        redacted.push('~');
        redacted.push_str(piece.get(name_end..).unwrap_or_default());
    }
    redacted
}

/// The program's name without its folder; values of options that sound secret are left out.
fn redact_arguments(arguments: impl IntoIterator<Item = String>, home: &str) -> Vec<String> {
    let secret = |flag: &str| {
        flag.starts_with('-')
            && ["token", "password", "secret", "api-key"]
                .iter()
                .any(|word| flag.contains(word))
            && !flag.contains("tokens")
    };
    let mut redacted = Vec::new();
    let mut hide_next = false;
    for (index, argument) in arguments.into_iter().enumerate() {
        let shown = if index == 0 {
            Path::new(&argument)
                .file_name()
                .map_or_else(String::new, |name| name.to_string_lossy().into_owned())
        } else if hide_next {
            REDACTED.to_owned()
        } else {
            match argument.split_once('=') {
                Some((flag, _)) if secret(flag) => format!("{flag}={REDACTED}"),
                _ => redact_in(&argument, home),
            }
        };
        hide_next = !hide_next && secret(&argument) && !argument.contains('=');
        redacted.push(shown);
    }
    redacted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_and_no_token_is_kept() {
        let arguments = [
            "/home/user/bin/podium",
            "eval",
            "/home/user/data/a.jsonl",
            "/home/other/b.jsonl",
            "--model=/srv/models/x",
            "--max-new-tokens",
            "512",
            "--hf-token",
            "abc",
            "--token=abc",
            "hf_abcdef",
            "--answer-headroom",
            "9",
        ];
        assert_eq!(
            redact_arguments(arguments.map(str::to_owned), "/home/user"),
            [
                "podium",
                "eval",
                "~/data/a.jsonl",
                "/home/~/b.jsonl",
                "--model=/srv/models/x",
                "--max-new-tokens",
                "512",
                "--hf-token",
                REDACTED,
                "--token=[redacted]",
                REDACTED,
                "--answer-headroom",
                "9",
            ]
        );
    }

    #[test]
    fn this_machine_is_described() {
        let environment = Environment::read(["podium".to_owned()]);
        assert!(
            environment
                .memory_limit_bytes
                .is_some_and(|bytes| bytes > 0)
        );
        assert!(environment.kernel.is_some());
        assert_eq!(environment.gpu, None);
    }
}
