//! Snapshots of what a command prints: stdout, stderr and exit code in one file, with times,
//! speeds and paths blanked. `PODIUM_UPDATE_SNAPSHOTS=1` writes them anew; read the difference.

use std::path::Path;
use std::process::Output;

use super::{root, run};

/// Runs `podium` in `folder` and holds what it prints against `tests/snapshots/<name>.txt`.
pub fn check(name: &str, folder: &Path, args: &[&str]) {
    check_output(name, folder, args, &run(folder, args));
}

/// The same, for a command that was run already.
pub fn check_output(name: &str, folder: &Path, args: &[&str], output: &Output) {
    let text = printed(folder, args, output);
    compare(
        name,
        &text
            .lines()
            .map(|line| measured(line) + "\n")
            .collect::<String>(),
    );
}

/// For a command that measures nothing: every figure counts.
pub fn check_exact(name: &str, folder: &Path, args: &[&str]) {
    compare(name, &printed(folder, args, &run(folder, args)));
}

fn printed(folder: &Path, args: &[&str], output: &Output) -> String {
    let text = format!(
        "$ podium {}\nexit code: {}\n--- stdout\n{}--- stderr\n{}",
        args.join(" "),
        output
            .status
            .code()
            .map_or("none".to_owned(), |code| code.to_string()),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    text.replace(folder.to_str().unwrap(), "<folder>")
}

fn compare(name: &str, found: &str) {
    let path = root().join("tests/snapshots").join(format!("{name}.txt"));
    if std::env::var_os("PODIUM_UPDATE_SNAPSHOTS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, found).unwrap();
        return;
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        expected == found,
        "{name} prints something else than its snapshot\n--- expected\n{expected}\n--- found\n{found}"
    );
}

/// Which of these a machine has is its own business.
const CPU_PATHS: [&str; 5] = [
    "cpu/amx",
    "cpu/avx512bf16",
    "cpu/avx512",
    "cpu/avx2",
    "cpu/portable",
];

/// The summary's measured lines keep their name alone; all others are blanked in part.
fn measured(line: &str) -> String {
    const MEASURED: [&str; 6] = [
        "prefill  ",
        "decode  ",
        "rows  ",
        "occupancy  ",
        "outside the engine  ",
        "memory ",
    ];
    match MEASURED.iter().find(|name| line.starts_with(*name)) {
        Some(name) => format!("{}  <measured>", name.trim_end()),
        None => blank(&CPU_PATHS.iter().fold(line.to_owned(), |line, path| {
            line.replace(path, "cpu/<path>")
        })),
    }
}

/// Blanks what differs from machine to machine and from run to run: every number with a
/// fraction, and hexadecimal words of eight and more digits.
fn blank(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut word = String::new();
    let flush = |word: &mut String, out: &mut String| {
        let body = word.trim_end_matches('.');
        let tail = &word[body.len()..];
        let fraction = body
            .split_once('.')
            .is_some_and(|(a, b)| !a.is_empty() && !b.is_empty() && digits(a) && digits(b));
        let hex = body.len() >= 8
            && body.chars().all(|c| c.is_ascii_hexdigit())
            && body.chars().any(|c| c.is_ascii_digit());
        match (fraction, hex) {
            (true, _) => out.push_str("<n>"),
            (_, true) => out.push_str("<hash>"),
            _ => out.push_str(body),
        }
        out.push_str(tail);
        word.clear();
    };
    for c in text.chars() {
        if c.is_ascii_alphanumeric() || c == '.' {
            word.push(c);
        } else {
            flush(&mut word, &mut out);
            out.push(c);
        }
    }
    flush(&mut word, &mut out);
    out
}

fn digits(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_digit())
}
