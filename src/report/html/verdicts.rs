//! The verdicts in force. `podium score` may have judged the replies by other rules than the log's
//! lines were written with; `scores.csv` always holds the newest.

use std::path::Path;

use crate::score::{Answer, Lenient, Status};
use crate::submission::ResultRow;
use crate::submission::write::SCORES_FILE;

#[derive(serde::Deserialize)]
struct ScoreLine {
    sample: u32,
    answer: String,
    correct: String,
    status: Status,
    /// Absent where the cell is empty, and in older files, which have none of these.
    lenient_answer: Option<String>,
    lenient_correct: Option<String>,
    channel: Option<String>,
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
    row.correct = truth(&line.correct);
    let reply = row.final_text.as_deref().unwrap_or_default();
    let had = row.answer.take();
    row.answer = answer(line.answer, Some("final".to_owned()), had, reply);
    let had = row.lenient.take().and_then(|lenient| lenient.answer);
    let correct = line.lenient_correct.as_deref().and_then(truth);
    let text = line.lenient_answer.unwrap_or_default();
    let is_told = correct.is_some() || !text.is_empty();
    row.lenient = (row.status.is_unanswered() && is_told).then(|| Lenient {
        answer: answer(text, line.channel, had, row.last_raw_text()),
        correct,
    });
}

fn truth(cell: &str) -> Option<bool> {
    match cell {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    }
}

/// The answer of a cell; none where it is empty. The one the log has is kept where it is the same.
/// The file has no spans; another that stands in `reply` as it is can be found again.
fn answer(
    text: String,
    channel: Option<String>,
    had: Option<Answer>,
    reply: &str,
) -> Option<Answer> {
    if text.is_empty() {
        return None;
    }
    if let Some(had) = had.filter(|had| had.text == text && had.channel == channel) {
        return Some(had);
    }
    let start = reply.rfind(&text);
    Some(Answer {
        span: start.map_or([0, 0], |start| [start, start + text.len()]),
        rule: String::new(),
        rules_agree: true,
        channel,
        text,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::submission::test_rows::{cut_off, row, wrong};
    use crate::telemetry::test_dir::TestDir;

    #[test]
    fn scores_stand_above_the_log_where_they_are_of_the_same_rows() {
        let dir = TestDir::new("verdicts");
        let mut rows = vec![row("a", 0), wrong("b", 0, "9")];
        assert!(!apply(dir.path(), &mut rows), "there is no file");
        // As older versions wrote it.
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

    #[test]
    fn lenient_answers_come_along() {
        let dir = TestDir::new("lenient-verdicts");
        let mut rows = vec![
            cut_off("a", 0),
            cut_off("b", 0),
            cut_off("c", 0),
            row("d", 0),
        ];
        let scores = "id,sample,answer,correct,status,group,lenient_answer,lenient_correct,channel\n\
                      a,0,,false,truncated_analysis,sums,4200,true,analysis\n\
                      b,0,,false,truncated_analysis,sums,Then,false,analysis\n\
                      c,0,,false,truncated_analysis,sums,,false,\n\
                      d,0,4200,true,answered,sums,4200,true,final\n";
        std::fs::write(dir.path().join(SCORES_FILE), scores).expect("the folder is writable");
        assert!(apply(dir.path(), &mut rows));
        assert_eq!(
            rows[0],
            cut_off("a", 0),
            "nothing changed, rule and span are kept"
        );
        assert_eq!(rows[3], row("d", 0));
        let [b, c] = [1, 2].map(|at: usize| rows[at].lenient.as_ref().expect("it is unanswered"));
        let answer = b.answer.as_ref().expect("it has one");
        assert_eq!(&rows[1].raw_text[answer.span[0]..answer.span[1]], "Then");
        assert_eq!(
            (answer.channel.as_deref(), b.correct),
            (Some("analysis"), Some(false))
        );
        assert_eq!((&c.answer, c.correct), (&None, Some(false)));
    }
}
