//! Code out of a reply, byte for byte: a lost blank changes a Python program.

/// The span of the longest fenced block's content, of equal ones the last. A fence that is not
/// closed runs to the end of the text. Without a fence it is the whole text, less blanks at its
/// end and blank lines at its head. Absent when there is nothing in it.
pub fn block(text: &str) -> Option<[usize; 2]> {
    let longest = fenced(text).into_iter().max_by_key(|[from, to]| to - from);
    let [mut from, to] = longest.unwrap_or([0, text.len()]);
    let content = text.get(from..to)?;
    let to = from + content.trim_end().len();
    // The first line's indentation is part of the program.
    let lead = content.len() - content.trim_start().len();
    if let Some(newline) = content.get(..lead)?.rfind('\n') {
        from += newline + 1;
    }
    (from < to).then_some([from, to])
}

/// The contents of all fenced blocks.
fn fenced(text: &str) -> Vec<[usize; 2]> {
    let mut blocks = Vec::new();
    // Of the open block: its fence, and where its content begins.
    let mut open: Option<(&str, usize)> = None;
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let bare = line.trim();
        let next = at + line.len();
        match open {
            Some((fence, from))
                if bare.starts_with(fence) && bare.trim_matches('`').trim().is_empty() =>
            {
                blocks.push([from, at]);
                open = None;
            }
            Some(_) => {}
            None => {
                let n_ticks = bare.len() - bare.trim_start_matches('`').len();
                if let Some(fence) = bare.get(..n_ticks).filter(|_| n_ticks >= 3) {
                    open = Some((fence, next));
                }
            }
        }
        at = next;
    }
    if let Some((_, from)) = open {
        blocks.push([from, text.len()]);
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_taken_byte_for_byte() {
        for (text, expected) in [
            (
                "```python\ndef f():\n    return 1\n```",
                Some("def f():\n    return 1"),
            ),
            ("Here:\n```\n    return 1\n```\nDone.", Some("    return 1")),
            // The function, not the call that shows it.
            (
                "```py\ndef f(x):\n    return x\n```\nFor example:\n```py\nf(1)\n```",
                Some("def f(x):\n    return x"),
            ),
            ("```\na\n```\n```\nb\n```", Some("b")),
            // Cut off, or the fence forgotten.
            (
                "```python\ndef f():\n    return 1\n",
                Some("def f():\n    return 1"),
            ),
            ("    return 1\n", Some("    return 1")),
            ("\n\n  x = 1\n  y = 2\n\n", Some("  x = 1\n  y = 2")),
            // Three ticks within four are content, an indented fence is one.
            ("````md\n```\nx\n```\n````", Some("```\nx\n```")),
            ("1. so:\n   ```\n   a = 1\n   ```", Some("   a = 1")),
            ("```python\n```", None),
            ("  \n", None),
        ] {
            let found = block(text).and_then(|span| text.get(span[0]..span[1]));
            assert_eq!(found, expected, "{text:?}");
        }
    }
}
