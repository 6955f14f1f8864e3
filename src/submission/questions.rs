//! `questions.csv`: a line a question of a run with several samples each. The lines of single
//! samples stand in `scores.csv`; answers are as they were shown in both.

use std::path::{Path, PathBuf};

use super::prompts::PromptRow;
use super::vote;
use super::write::{WriteError, id_text, replace, status_name};
use super::{ResultRow, Results};
use crate::score::{Scoring, Status};

pub const QUESTIONS_FILE: &str = "questions.csv";

const HEADER: [&str; 11] = [
    "id", "sample", "answer", "correct", "votes", "voters", "tied", "samples", "right", "status",
    "group",
];

/// Writes the file. `sample`, `answer`, `correct` and `status` are those of the sample that speaks
/// for the question; `samples` counts those that were run, `right` the right ones among them.
///
/// # Errors
/// When the file cannot be written.
pub fn write_questions(
    run_dir: &Path,
    prompts: &[PromptRow],
    results: &Results,
    scoring: &Scoring,
) -> Result<PathBuf, WriteError> {
    let path = run_dir.join(QUESTIONS_FILE);
    let pick = vote::pick(scoring);
    replace(&path, |out| {
        let mut csv = csv::Writer::from_writer(out);
        csv.write_record(HEADER)?;
        for prompt in prompts {
            let samples: Vec<&ResultRow> = results.samples(&prompt.key).collect();
            csv.write_record(line(prompt, &samples, scoring, &pick))?;
        }
        csv.flush()
    })?;
    Ok(path)
}

fn line(
    prompt: &PromptRow,
    samples: &[&ResultRow],
    scoring: &Scoring,
    pick: &dyn Fn(&[&ResultRow]) -> usize,
) -> [String; 11] {
    let chosen = if samples.is_empty() {
        None
    } else {
        samples.get(pick(samples))
    };
    let vote = vote::count(scoring, samples);
    let n_run = samples.iter().filter(|row| row.status != Status::NotRun);
    let n_right = samples.iter().filter(|row| row.correct == Some(true));
    let has_gold = samples.iter().any(|row| row.gold.is_some());
    let status = chosen.map_or(Status::NotRun, |row| row.status);
    let answer = chosen.and_then(|row| row.answer.as_ref());
    [
        id_text(prompt),
        chosen.map_or_else(String::new, |row| row.sample.to_string()),
        answer.map_or_else(String::new, |answer| answer.text.clone()),
        chosen
            .and_then(|row| row.correct)
            .map_or_else(String::new, |correct| correct.to_string()),
        vote.map_or(0, |vote| vote.n_votes).to_string(),
        vote.map_or(0, |vote| vote.n_voters).to_string(),
        vote.is_some_and(|vote| vote.is_tied).to_string(),
        n_run.count().to_string(),
        if has_gold {
            n_right.count().to_string()
        } else {
            String::new()
        },
        status_name(status).to_owned(),
        prompt.group.clone().unwrap_or_default(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::score::{Aggregate, Rule, Scorer};
    use crate::submission::test_rows::{row, unanswered, wrong};
    use crate::telemetry::test_dir::TestDir;

    #[test]
    fn a_line_a_question_with_its_votes() {
        let dir = TestDir::new("questions");
        let scoring = Scoring {
            scorer: Scorer::Auto,
            rules: vec![Rule::Whole],
            tolerance: 1e-6,
            aggregate: Aggregate::Majority,
        };
        let prompts = ["a", "b", "c"].map(|key| PromptRow::new(key, None, None, None));
        let results = Results::new(vec![
            wrong("a", 0, "1"),
            row("a", 1),
            row("a", 2),
            unanswered("b", 0, Status::NoAnswer),
            unanswered("b", 1, Status::NoFinal),
            unanswered("b", 2, Status::NotRun),
        ]);
        write_questions(dir.path(), &prompts, &results, &scoring).expect("the folder is writable");
        let text = std::fs::read_to_string(dir.path().join(QUESTIONS_FILE)).expect("just written");
        assert_eq!(
            text,
            "id,sample,answer,correct,votes,voters,tied,samples,right,status,group\n\
             a,1,4200,true,2,3,false,3,2,answered,\n\
             b,0,,false,0,0,false,2,0,no_answer,\n\
             c,,,,0,0,false,0,,not_run,\n"
        );
    }
}
