//! What closes a reply's analysis and opens its final message, wherever the reply stands.

use super::{CHANNEL, Channel, END, MESSAGE, Reply, START};
use crate::prompt::Segment;

/// The segments to write after a reply that has not ended, so that its answer comes next; none
/// where it is in its final message, or has had one.
pub fn closing(reply: &Reply) -> Vec<Segment> {
    let in_header = reply
        .issues
        .iter()
        .any(|issue| issue.starts_with("truncated-header"));
    let text = |text: &str| Segment::Text(text.to_owned());
    let opened = || [START, text("assistant"), CHANNEL, text("final"), MESSAGE];
    match &reply.truncated_in {
        _ if reply.finished_final().is_some() => Vec::new(),
        Some(Channel::Final) if in_header => vec![MESSAGE],
        Some(Channel::Final) => Vec::new(),
        // A header is cut off in its midst: its message is empty.
        Some(_) if in_header => [MESSAGE, END].into_iter().chain(opened()).collect(),
        Some(_) => [END].into_iter().chain(opened()).collect(),
        None => opened().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::harmony::to_text;

    fn reply(truncated_in: Option<Channel>, issue: Option<&str>) -> Reply {
        Reply {
            truncated_in,
            issues: issue.map(str::to_owned).into_iter().collect(),
            ..Reply::default()
        }
    }

    #[test]
    fn the_final_message_is_opened_from_everywhere_but_itself() {
        let header = Some("truncated-header: the reply ends inside a message header");
        let opened = "<|start|>assistant<|channel|>final<|message|>";
        for (place, issue, expected) in [
            (Some(Channel::Analysis), None, format!("<|end|>{opened}")),
            (Some(Channel::Commentary), None, format!("<|end|>{opened}")),
            (None, None, opened.to_owned()),
            (Some(Channel::Final), None, String::new()),
            (Some(Channel::Final), header, "<|message|>".to_owned()),
            (
                Some(Channel::Absent),
                header,
                format!("<|message|><|end|>{opened}"),
            ),
        ] {
            let found = closing(&reply(place.clone(), issue));
            assert_eq!(to_text(&found), expected, "{place:?} {issue:?}");
        }
    }
}
