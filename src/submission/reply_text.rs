//! A reply's raw text taken apart for reading. The verdict came from the token ids, in
//! [`crate::prompt::harmony`]; here only the spelling is at hand, so a literal `<|end|>` that a
//! model wrote in ordinary tokens looks like the special one. Nothing is scored by this; pages and
//! a submission's reasoning are made of it.

use super::ResultRow;

/// What is shown of a reply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shown {
    /// All that is not the final message: analysis, and other channels under their names.
    pub analysis: String,
    /// The last final message, finished or not.
    pub final_text: Option<String>,
    /// Whether the two above say all: put together they are the raw text again.
    pub is_whole: bool,
}

/// What a page shows of a row: of two stages the second one's reply, with all that came before
/// it as its analysis.
pub fn shown_row(row: &ResultRow) -> Shown {
    let first = shown(&row.raw_text);
    let Some(second) = &row.second else {
        return Shown {
            final_text: row.final_text.clone().or(first.final_text),
            ..first
        };
    };
    let last = shown(&second.raw_text);
    let open = row.final_text.clone().or(first.final_text);
    let parts = [
        first.analysis,
        format!("[final] {}", open.unwrap_or_default()),
        format!("[user] {}", second.user_turn),
        last.analysis,
    ];
    let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    Shown {
        analysis: parts.join("\n\n"),
        final_text: second.final_text.clone().or(last.final_text),
        is_whole: first.is_whole && last.is_whole,
    }
}

/// The raw texts of all stages.
pub fn all_raw_text(row: &ResultRow) -> String {
    match &row.second {
        None => row.raw_text.clone(),
        Some(second) => format!("{}\n\n{}", row.raw_text, second.raw_text),
    }
}

const ENDS: [&str; 3] = ["<|end|>", "<|return|>", "<|call|>"];

/// Takes a raw text apart.
pub fn shown(raw: &str) -> Shown {
    let mut analysis: Vec<String> = Vec::new();
    let mut final_text = None;
    let mut rest = raw;
    while !rest.is_empty() {
        let end = ENDS
            .iter()
            .filter_map(|end| rest.find(end).map(|at| (at, end.len())))
            .min();
        let (message, after) = match end {
            Some((at, length)) => (&rest[..at], &rest[at + length..]),
            None => (rest, ""),
        };
        rest = after;
        let (header, body) = message.split_once("<|message|>").unwrap_or(("", message));
        if body.is_empty() {
            continue;
        }
        let channel = channel_of(header);
        match channel {
            "final" => final_text = Some(body.to_owned()),
            "analysis" | "" => analysis.push(body.to_owned()),
            other => analysis.push(format!("[{other}] {body}")),
        }
    }
    let analysis = analysis.join("\n\n");
    let whole = match &final_text {
        Some(text) => format!(
            "<|channel|>analysis<|message|>{analysis}<|end|><|start|>assistant\
             <|channel|>final<|message|>{text}<|return|>"
        ),
        None => format!("<|channel|>analysis<|message|>{analysis}"),
    };
    Shown {
        is_whole: whole == raw,
        analysis,
        final_text,
    }
}

fn channel_of(header: &str) -> &str {
    header
        .rsplit_once("<|channel|>")
        .map_or("", |(_, name)| name)
        .split(['<', ' '])
        .next()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_usual_reply_needs_no_raw_text_beside_it() {
        let raw = "<|channel|>analysis<|message|>1 + 1<|end|><|start|>assistant\
                   <|channel|>final<|message|>2<|return|>";
        let found = shown(raw);
        assert_eq!(found.analysis, "1 + 1");
        assert_eq!(found.final_text.as_deref(), Some("2"));
        assert!(found.is_whole);
        let cut = shown("<|channel|>analysis<|message|>1 + ");
        assert_eq!((cut.analysis.as_str(), cut.is_whole), ("1 + ", true));
        assert_eq!(cut.final_text, None);
    }

    #[test]
    fn nothing_a_model_writes_is_lost() {
        for (raw, analysis, final_text) in [
            ("", "", None),
            ("no header at all", "no header at all", None),
            (
                "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
                "[commentary] {}",
                None,
            ),
            (
                "<|channel|>final<|message|>1<|end|><|start|>assistant<|channel|>final<|message|>2",
                "",
                Some("2"),
            ),
            ("<|message|>a<|end|><|end|>b", "a\n\nb", None),
        ] {
            let found = shown(raw);
            assert_eq!(found.analysis, analysis, "{raw}");
            assert_eq!(found.final_text.as_deref(), final_text, "{raw}");
            assert!(!found.is_whole, "{raw}");
        }
    }
}
