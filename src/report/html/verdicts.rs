//! The verdicts in force. `podium score` may have judged the replies by other rules than the log's
//! lines were written with; `scores.csv` always holds the newest.

use std::path::Path;

use crate::score::{Answer, Status};
use crate::submission::ResultRow;
use crate::submission::write::SCORES_FILE;

#[derive(serde::Deserialize)]
struct ScoreLine {
    sample: u32,
    answer: String,
    correct: String,
    status: Status,
}

/// Puts the verdicts of `scores.csv` in place of the log's. `rows` come as the file has them: in
/// input order, then by sample. False when the file is not of these rows; they stay as they are.
pub fn apply(run_dir: &Path, rows: &mut [ResultRow]) -> bool {
    let Ok(reader) = csv::Reader::from_path(run_dir.join(SCORES_FILE)) else {
        return false;
    };
    let lines: Result<Vec<ScoreLine>, _> = reader.into_deserialize().collect();
    let Ok(lines) = lines else { return false };
    let fits = lines.len() == rows.len()
        && lines
            .iter()
            .zip(rows.iter())
            .all(|(line, row)| line.sample == row.sample);
    if fits {
        for (line, row) in lines.into_iter().zip(rows) {
            apply_line(line, row);
        }
    }
    fits
}

fn apply_line(line: ScoreLine, row: &mut ResultRow) {
    row.status = line.status;
    row.correct = match line.correct.as_str() {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    };
    let had = row.answer.as_ref().map_or("", |answer| &answer.text);
    if line.answer == had {
        return;
    }
    let text = line.answer;
    row.answer = (!text.is_empty()).then(|| {
        // The file has no spans; an answer that stands in the text as it is can be found again.
        let reply = row.final_text.as_deref().unwrap_or_default();
        let start = reply.rfind(&text);
        Answer {
            span: start.map_or([0, 0], |start| [start, start + text.len()]),
            rule: String::new(),
            rules_agree: true,
            text,
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::submission::test_rows::{row, wrong};
    use crate::telemetry::test_dir::TestDir;

    #[test]
    fn scores_stand_above_the_log_where_they_are_of_the_same_rows() {
        let dir = TestDir::new("verdicts");
        let mut rows = vec![row("a", 0), wrong("b", 0, "9")];
        assert!(!apply(dir.path(), &mut rows), "there is no file");
        let scores = "id,sample,answer,correct,status,group\n\
                      a,0,4200,true,answered,sums\nb,0,answer,true,answered,sums\n";
        std::fs::write(dir.path().join(SCORES_FILE), scores).expect("the folder is writable");
        assert!(apply(dir.path(), &mut rows));
        assert_eq!(rows[0], row("a", 0), "nothing changed, the rule is kept");
        assert_eq!(rows[1].correct, Some(true));
        let answer = rows[1].answer.as_ref().expect("it has one");
        assert_eq!((answer.text.as_str(), answer.span), ("answer", [4, 10]));
        assert!(!apply(dir.path(), &mut rows[..1]), "another number of rows");
    }
}
