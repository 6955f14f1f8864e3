use super::*;
use crate::dataset::{Defect, Location};
use crate::prompt::Reasoning;

fn record(key: &str, question: &str, gold: &str) -> Record {
    Record {
        key: key.into(),
        id: Some(key.into()),
        location: Location {
            file: "a.jsonl".into(),
            line: 1,
        },
        question: question.into(),
        messages: Vec::new(),
        options: Vec::new(),
        gold: Some(Gold::Text(gold.into())),
        group: None,
        cluster: None,
        fields: serde_json::Map::new(),
        defect: None,
    }
}

/// Five rows, the fourth of which asks what the second does.
fn rows() -> Vec<Record> {
    vec![
        record("a", "One?", "1"),
        record("b", "Two?", "2"),
        record("c", "Three?", "3"),
        record("d", " two? ", "2"),
        record("e", "Five?", "5"),
    ]
}

fn profile(few_shot: &str) -> Profile {
    let text = format!(
        "name = \"p\"\ntemplate = \"{{{{ question }}}}\"\nseed = 3\n\
         [few_shot]\n{few_shot}\n[scoring]\nrules = [\"whole\"]\n"
    );
    Profile::from_toml(Path::new("p.toml"), &text).unwrap_or_else(|error| panic!("{error}"))
}

/// The prompt's turns, roles by their first letter.
fn turns(profile: &Profile, record: &Record) -> String {
    let prompt = profile
        .render(record, Reasoning::Medium, None)
        .unwrap_or_else(|error| panic!("{error}"));
    let turns = prompt.turns.iter();
    let spelled: Vec<String> = turns
        .map(|turn| format!("{}:{}", &turn.role[..1], turn.content))
        .collect();
    spelled.join("|")
}

#[test]
fn all_rows_have_the_same_first_shots_but_never_themselves() {
    let mut rows = rows();
    let profile = profile("count = 2\nfrom = \"same_file\"")
        .resolved(&mut rows)
        .expect("there are enough");
    let texts: Vec<String> = rows.iter().map(|row| turns(&profile, row)).collect();
    let first = "u:One?|a:Answer: 1|u:Two?|a:Answer: 2|u:";
    assert_eq!(texts[2], format!("{first}Three?"));
    assert_eq!(texts[4], format!("{first}Five?"));
    // A row that is a shot gets the next in its place, one that asks the same as a shot, too.
    let others = "u:Two?|a:Answer: 2|u:Three?|a:Answer: 3|u:One?";
    assert_eq!(texts[0], others);
    let others = "u:One?|a:Answer: 1|u:Three?|a:Answer: 3|u:";
    assert_eq!(texts[1], format!("{others}Two?"));
    assert_eq!(texts[3], format!("{others} two? "));
}

#[test]
fn ids_name_the_shots_in_order() {
    let mut rows = rows();
    let profile = profile(
        "ids = [\"e\", \"a\"]\nfrom = \"same_file\"\nform = \"inline\"\nanswer = \"A: {{ gold }}\"",
    )
    .resolved(&mut rows)
    .expect("they are there");
    assert_eq!(
        turns(&profile, &rows[2]),
        "u:Five?\nA: 5\n\nOne?\nA: 1\n\nThree?"
    );
    // There is no other to take its place.
    assert_eq!(turns(&profile, &rows[4]), "u:One?\nA: 1\n\nFive?");
}

/// The expected shots are drawn by hashlib, as `draws.rs` says.
#[test]
fn a_choice_by_row_depends_on_seed_and_key_alone() {
    let mut rows = rows();
    rows[3].question = "Four?".into();
    rows[3].gold = Some(Gold::Text("4".into()));
    let few_shot = "count = 2\nfrom = \"same_file\"\nchoose = \"by_row\"";
    let profile = profile(few_shot)
        .resolved(&mut rows)
        .expect("there are enough");
    for (key, first, second) in [
        ("t1", "One", "Three"),
        ("t2", "Four", "Two"),
        ("t3", "Five", "One"),
    ] {
        let own = record(key, "Own?", "SENTINEL");
        let text = turns(&profile, &own);
        assert!(
            text.starts_with(&format!("u:{first}?|")) && text.contains(&format!("|u:{second}?|")),
            "{key}: {text}"
        );
    }
    for row in &rows {
        let text = turns(&profile, row);
        assert_eq!(text.matches(&row.question).count(), 1, "{text}");
        assert_eq!(text.matches("|a:").count(), 2, "{text}");
    }
}

#[test]
fn a_row_without_gold_or_with_a_defect_is_no_shot() {
    let mut rows = rows();
    rows[0].gold = None;
    rows[1].defect = Some(Defect {
        field: None,
        message: "m".into(),
        hint: "h".into(),
    });
    let few_shot = "count = 1\nfrom = \"same_file\"";
    let settled = profile(few_shot)
        .resolved(&mut rows)
        .expect("there are enough");
    assert!(turns(&settled, &rows[4]).starts_with("u:Three?|"));
    for (few_shot, part) in [
        ("count = 4\nfrom = \"same_file\"", "only 3 rows"),
        ("ids = [\"a\"]\nfrom = \"same_file\"", "id `a`"),
        ("ids = [17]\nfrom = \"same_file\"", "id `17`"),
        ("count = 1\nfile = \"nowhere.jsonl\"", "few_shot.file"),
        (
            "count = 1\nfrom = \"same_file\"\nanswer = \"{{ why }}\"",
            "few_shot.answer",
        ),
    ] {
        let error = profile(few_shot)
            .resolved(&mut rows)
            .expect_err(part)
            .to_string();
        assert!(error.contains(part) && error.contains("`p`"), "{error}");
    }
}

#[test]
fn shots_of_the_rows_own_group() {
    let mut rows = rows();
    for (row, group) in rows.iter_mut().zip(["x", "y", "x", "y", "x"]) {
        row.group = Some(group.into());
    }
    let few_shot = "count = 2\nfrom = \"same_file\"\nsame_group = true";
    let profile = profile(few_shot)
        .resolved(&mut rows)
        .expect("there are enough");
    assert_eq!(
        turns(&profile, &rows[4]),
        "u:One?|a:Answer: 1|u:Three?|a:Answer: 3|u:Five?"
    );
}

#[test]
fn shots_come_from_a_file_beside_the_profile_with_options_shuffled_as_well() {
    let folder = std::env::temp_dir().join(format!("podium-shots-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("the temporary folder is ours");
    let shots =
        r#"{"id": "q-1", "question": "Which?", "options": ["w", "x", "y", "z"], "answer": "A"}"#;
    std::fs::write(folder.join("shots.jsonl"), shots).expect("the folder is ours");
    let text = "name = \"p\"\nshuffle_options = true\n\
        template = \"{{ question }}{% for option in options %} {{ option.letter }}={{ option.text }}{% endfor %}\"\n\
        [few_shot]\ncount = 1\nfile = \"shots.jsonl\"\nanswer = \"{{ gold }} {{ gold_text }}\"\n\
        [scoring]\nscorer = \"choice\"\nrules = [\"whole\"]\n";
    let path = folder.join("p.toml");
    std::fs::write(&path, text).expect("the folder is ours");
    let mut own = [record("own", "Own?", "SENTINEL")];
    let profile = Profile::read(&path)
        .and_then(|profile| profile.resolved(&mut own))
        .expect("the file is beside it");
    // `q-1` is shown in the order 1, 0, 2, 3.
    assert_eq!(
        turns(&profile, &own[0]),
        "u:Which? A=x B=w C=y D=z|a:B w|u:Own?"
    );
    let _ = std::fs::remove_dir_all(folder);
}
