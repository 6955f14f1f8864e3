//! The two streams: results go to stdout, everything else to stderr.

/// Prints a result to stdout. A reader that went away (`| head`) is no error of ours.
pub fn result(text: &str) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes());
    if !text.ends_with('\n') {
        let _ = out.write_all(b"\n");
    }
}

/// Tells the user something beside the result.
#[allow(
    clippy::print_stderr,
    reason = "the one place where commands speak beside their result"
)]
pub fn tell(text: &str) {
    eprintln!("{}", text.trim_end());
}
