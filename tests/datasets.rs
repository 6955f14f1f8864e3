//! The committed data sets through reader, profile and scorer: a reply that is the gold is right,
//! another row's gold is wrong, and every row renders.

use std::path::Path;

use podium::dataset::{self, Gold};
use podium::profile::Profile;
use podium::prompt::Reasoning;
use podium::score::{self, Status};

#[test]
fn the_gold_as_a_reply_is_right_and_a_wrong_one_is_not() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/nano");
    let mut n_files = 0;
    for entry in std::fs::read_dir(folder).expect("the folder is checked in") {
        let path = entry.expect("the folder is readable").path();
        let mut dataset = dataset::read(&path).expect("a committed file is good");
        assert!(dataset.records.len() >= 300);
        for is_nano in [true, false] {
            let profile = Profile::for_dataset(&dataset, is_nano)
                .expect("built in")
                .resolved(&mut dataset.records)
                .expect("it has no few-shot rows");
            for record in &dataset.records {
                assert_eq!(record.defect, None);
                profile
                    .render(record, Reasoning::Medium, None)
                    .expect("it renders");
                let gold = match record.gold.as_ref().expect("every row has gold") {
                    Gold::Option(index) => score::option_letter(*index),
                    Gold::Text(text) => text.clone(),
                };
                for reply in [gold.clone(), format!("Answer: {gold}")] {
                    let verdict = score::judge_text(record, &profile.scoring, &reply);
                    assert_eq!(verdict.status, Status::Answered, "{reply}");
                    assert_eq!(verdict.correct, Some(true), "{reply}");
                }
                let verdict = score::judge_text(record, &profile.scoring, "Answer: 123456789");
                assert_eq!(verdict.correct, Some(false), "{record:?}");
            }
        }
        n_files += 1;
    }
    assert!(n_files >= 8);
}

/// The split of `models/nano/data.py`: a question is a test question iff the first byte of its
/// text's SHA-256 is below 26, and only such questions stand in `datasets/nano`.
#[test]
fn every_question_of_nano_is_on_the_test_side() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/nano");
    let profile = podium::profile::Profile::builtin("nano").expect("it is built in");
    let mut n_rows = 0;
    for entry in std::fs::read_dir(folder).expect("the folder is there") {
        let path = entry.expect("it can be read").path();
        for record in podium::dataset::read(&path)
            .expect("it is a data set")
            .records
        {
            let prompt = profile
                .render(&record, podium::prompt::Reasoning::Medium, None)
                .expect("it renders");
            let text = &prompt.turns.last().expect("there is a question").content;
            let digest = podium::submission::identity::sha256_hex(text.as_bytes());
            let first = u8::from_str_radix(&digest[..2], 16).expect("it is hex");
            assert!(first < 26, "{}: {text}", path.display());
            n_rows += 1;
        }
    }
    assert!(n_rows > 2000, "{n_rows} rows");
}
