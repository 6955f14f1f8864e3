//! What the integration tests share: running the binary, scratch folders, reading run files.

#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

pub mod checkpoint;
pub mod hub;
pub mod random;
pub mod raw;
pub mod snapshot;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use podium::prompt::Segment;
use podium::tokenizer::Tokenizer;

/// The project's folder; `PODIUM_ROOT` where tests were carried elsewhere than where they were built.
pub fn root() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| match std::env::var_os("PODIUM_ROOT") {
        Some(root) => PathBuf::from(root),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")),
    })
}

/// A scratch folder, removed when dropped (kept when the test panics, for a look).
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("podium-{name}-{}-{n}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file and gives its path.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

/// `podium` in `folder`, with an environment that no test depends on.
pub fn podium(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_podium"));
    command
        .current_dir(folder)
        .env_remove("PODIUM_CPU")
        // These tests are of the CPU, also where there is a GPU.
        .env("CUDA_VISIBLE_DEVICES", "")
        .env("NO_COLOR", "1")
        // No test reaches a network; tests/hub.rs has a hub of its own.
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HUB_CACHE", folder.join("no-hub-cache"));
    for name in [
        "ALL_PROXY",
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "HF_TOKEN",
        "HF_TOKEN_PATH",
        "SSL_CERT_FILE",
    ] {
        command
            .env_remove(name)
            .env_remove(name.to_ascii_lowercase());
    }
    command
}

/// Runs `podium` and gives its output.
pub fn run(folder: &Path, args: &[&str]) -> Output {
    podium(folder).args(args).output().unwrap()
}

/// Runs `podium`, which must end with exit code 0.
pub fn run_ok(folder: &Path, args: &[&str]) -> Output {
    let output = run(folder, args);
    assert!(
        output.status.success(),
        "podium {args:?} ended with {}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// The lines of a JSONL file.
pub fn jsonl(path: &Path) -> Vec<serde_json::Value> {
    std::fs::read_to_string(path)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect()
}

/// What the promise of invariance is about: every sample's tokens, log-probability bits and
/// hash of its logits, by key and sample.
pub fn bits(run: &Path) -> BTreeMap<(String, u64), String> {
    let mut found = BTreeMap::new();
    for row in jsonl(&run.join("results.jsonl")) {
        // Early stop logs what it leaves out.
        if row["status"] == "not_run" {
            continue;
        }
        let key = (
            row["key"].as_str().unwrap().to_owned(),
            row["sample"].as_u64().unwrap(),
        );
        let stage = |of: &serde_json::Value| {
            format!(
                "{} {} {} {}",
                of["output_ids"], of["logprob_sum_bits"], of["trace_hash"], of["forced"]
            )
        };
        // A row of one stage has no second one.
        let value = format!("{} {}", stage(&row), stage(&row["second"]));
        assert!(row["logprob_sum_bits"].is_string(), "{row}");
        assert!(
            found.insert(key, value).is_none(),
            "a sample stands twice in the log: {row}"
        );
    }
    found
}

/// The first `n` rows of one of nano's data sets.
pub fn nano_rows(file: &str, n: usize) -> Vec<String> {
    std::fs::read_to_string(root().join("datasets/nano").join(file))
        .unwrap()
        .lines()
        .take(n)
        .map(str::to_owned)
        .collect()
}

pub fn nano_tokenizer() -> Tokenizer {
    Tokenizer::from_file(&root().join("models/nano/tokenizer.json")).unwrap()
}

/// A raw reply cut at its special tokens.
pub fn reply_segments(raw: &str) -> Vec<Segment> {
    const SPECIAL: [&str; 6] = [
        "<|start|>",
        "<|message|>",
        "<|channel|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
    ];
    let mut segments = Vec::new();
    let mut rest = raw;
    while let Some((at, name)) = SPECIAL
        .iter()
        .filter_map(|name| Some((rest.find(name)?, *name)))
        .min()
    {
        segments.push(Segment::Text(rest[..at].to_owned()));
        segments.push(Segment::Special(name));
        rest = &rest[at + name.len()..];
    }
    segments.push(Segment::Text(rest.to_owned()));
    segments
}
