use super::*;
use crate::dataset::{Gold, Location};
use crate::prompt::harmony;

fn record(options: &[&str]) -> Record {
    Record {
        key: "k".into(),
        id: None,
        location: Location {
            file: "a.jsonl".into(),
            line: 1,
        },
        question: "Which <b> & {{ one }}?".into(),
        messages: Vec::new(),
        options: options.iter().map(|it| (*it).to_owned()).collect(),
        gold: Some(Gold::Text("SENTINEL".into())),
        group: None,
        cluster: None,
        fields: serde_json::Map::new(),
        defect: None,
    }
}

fn user_text(profile: &Profile, record: &Record) -> Result<String, ProfileError> {
    let prompt = profile.render(record, Reasoning::Medium, None)?;
    Ok(prompt.turns.into_iter().map(|turn| turn.content).collect())
}

#[test]
fn every_builtin_profile_is_valid() {
    for name in Profile::builtin_names() {
        let profile = Profile::builtin(name).expect(name);
        assert_eq!(profile.name, name);
        assert!(!profile.scoring.rules.is_empty());
    }
    let error = Profile::builtin("qwen").expect_err("there is none");
    assert!(error.hint().contains("qa, choice, nano, curebench"));
}

#[test]
fn nano_asks_as_it_was_trained() {
    let profile = Profile::builtin("nano").expect("it is built in");
    let text = |options| user_text(&profile, &record(options)).expect("it renders");
    assert_eq!(text(&[]), "Which <b> & {{ one }}?");
    assert_eq!(text(&["x", "y"]), "Which <b> & {{ one }}?\nA. x\nB. y");
    assert_eq!(
        profile.instructions.as_deref(),
        Some("Think briefly, then give only the answer.")
    );
    assert_eq!(profile.defaults.max_new_tokens, Some(512));
}

#[test]
fn an_unknown_key_is_named_with_file_and_line() {
    let good = include_str!("../../datasets/profiles/qa.toml");
    for (text, part) in [
        (good.replace("[scoring]", "[scoring]\nscorre = 1"), "scorre"),
        (format!("temprature = 1\n{good}"), "temprature"),
        (format!("{good}\n[defaults]\nheat = 1"), "heat"),
        (format!("{good}\n[mapping]\nquestoin = \"q\""), "questoin"),
        (good.replace("\"auto\"", "\"magic\""), "magic"),
        (good.replace("\"hash\"", "\"hush\""), "hush"),
        (good.replace("\"status\"", "\"stats\""), "stats"),
        ("name = ".into(), "line 1"),
    ] {
        let error = Profile::from_toml(Path::new("p.toml"), &text).expect_err(part);
        let message = error.to_string();
        assert!(
            message.contains(part) && message.contains("p.toml"),
            "{message}"
        );
    }
    let broken = good.replace("{{ question }}", "{{ question");
    let error = Profile::from_toml(Path::new("p.toml"), &broken);
    assert!(matches!(error, Err(ProfileError::Template { .. })));
}

#[test]
fn a_template_sees_fields_but_an_absent_one_is_an_error() {
    let mut profile = Profile::builtin("qa").expect("it is built in");
    profile.template = "{{ passage }} {{ row['Long Name'] }} {{ question }}".into();
    let mut record = record(&[]);
    record.fields.insert("passage".into(), "P".into());
    record.fields.insert("Long Name".into(), 7.into());
    record.fields.insert("question".into(), "other".into());
    let text = user_text(&profile, &record).expect("it renders");
    assert_eq!(text, "P 7 Which <b> & {{ one }}?");
    profile.template = "{{ answer }}".into();
    let error = user_text(&profile, &record).expect_err("no such field");
    assert!(error.to_string().contains("record `k`"), "{error}");
    profile.template = " ".into();
    let error = user_text(&profile, &record);
    assert!(matches!(error, Err(ProfileError::EmptyPrompt { .. })));
}

#[test]
fn a_messages_row_passes_through_with_its_own_instructions() {
    let profile = Profile::builtin("qa").expect("it is built in");
    let mut record = record(&[]);
    let turn = |role: &str, content: &str| Message {
        role: role.into(),
        content: content.into(),
    };
    record.messages = vec![turn("user", "a"), turn("assistant", "b"), turn("user", "c")];
    let prompt = profile
        .render(&record, Reasoning::Low, None)
        .expect("it renders");
    assert_eq!(prompt.turns, record.messages);
    assert_eq!(prompt.instructions, profile.instructions);
    record.messages.insert(0, turn("system", "own"));
    let prompt = profile
        .render(&record, Reasoning::Low, None)
        .expect("it renders");
    assert_eq!(prompt.turns.len(), 3);
    assert_eq!(prompt.instructions.as_deref(), Some("own"));
}

#[test]
fn columns_have_names_of_their_own() {
    let column = Column::try_from("answer as prediction".to_owned()).expect("it is valid");
    assert_eq!(
        (column.source, column.name.as_str()),
        (Source::Answer, "prediction")
    );
    assert_eq!(String::from(column), "answer as prediction");
    assert_eq!(String::from(Column::of(Source::Id)), "id");
}

/// Other golds in the same file give the same prompts, whatever the gold's shape.
#[test]
fn gold_never_reaches_a_prompt() {
    let folder = std::env::temp_dir().join(format!("podium-gold-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("the temporary folder is ours");
    let files = [
        (
            r#"{"id": 1, "question": "q", "answer": "GOLD", "solution": "GOLD", "rationale": "GOLD"}"#,
            ["11", "SENTINEL"],
        ),
        (
            r##"{"id": 1, "problem": "q", "solution": "work #### GOLD", "difficulty": 2}"##,
            ["11", "SENTINEL"],
        ),
        (
            r#"{"id": 1, "question": "q", "options": ["w", "x"], "answer": "GOLD"}"#,
            ["A", "B"],
        ),
        (
            r#"{"id": 1, "question": "q", "options": ["w", "x"], "answer": "GOLD"}"#,
            ["w", "x"],
        ),
        (
            r#"{"id": 1, "prompt": [{"role": "user", "content": "q"}], "target": "GOLD"}"#,
            ["11", "SENTINEL"],
        ),
    ];
    for (index, (row, golds)) in files.into_iter().enumerate() {
        let texts = golds.map(|gold| {
            let path = folder.join(format!("{index}-{gold}.jsonl"));
            std::fs::write(&path, row.replace("GOLD", gold)).expect("the folder is ours");
            let dataset = crate::dataset::read(&path).expect(row);
            let record = dataset.records.first().expect("there is a row");
            assert!(
                record.gold.is_some() && record.defect.is_none(),
                "{record:?}"
            );
            let mut texts = Vec::new();
            for name in Profile::builtin_names() {
                let mut profile = Profile::builtin(name).expect("it is built in");
                for all_fields in [false, true] {
                    if all_fields {
                        profile.template = "{{ question }} {{ row }} {{ options }}".into();
                    }
                    let prompt = profile
                        .render(record, Reasoning::Medium, None)
                        .expect("it renders");
                    texts.push(harmony::to_text(&harmony::render(&prompt)));
                    if let Some(stage) = &mut profile.second_stage {
                        stage.when.clear();
                        if all_fields {
                            stage.template = "{{ question }} {{ row }} {{ options }}".into();
                        }
                    }
                    texts.extend(profile.next_turn(record).expect("it renders"));
                }
            }
            texts
        });
        assert_eq!(texts[0], texts[1], "{row}");
        assert!(!texts[1].concat().contains("SENTINEL"));
    }
    let _ = std::fs::remove_dir_all(folder);
}

/// A row of CUREBench.
fn cure_record(question_type: &str, options: &[&str]) -> Record {
    let mut record = record(options);
    record
        .fields
        .insert("question_type".into(), question_type.into());
    record
}

#[test]
fn curebench_asks_openly_first_and_then_to_choose() {
    let profile = Profile::builtin("curebench").expect("it is built in");
    let turns = |kind: &str, options: &[&str]| {
        let record = cure_record(kind, options);
        let first = user_text(&profile, &record).expect("it renders");
        (first, profile.next_turn(&record).expect("it renders"))
    };
    let (first, second) = turns("open_ended_multi_choice", &["x", "y"]);
    assert!(first.starts_with("Which <b> & {{ one }}?\n\nBegin your answer"));
    assert!(!first.contains("A. x"), "{first}");
    let second = second.expect("it has a second stage");
    assert!(
        second.contains("\n\nA. x\nB. y\n\nGive one line"),
        "{second}"
    );
    let (first, second) = turns("multi_choice", &["x", "y"]);
    assert!(first.contains("one }}?\n\nA. x\nB. y\n\nSay in"), "{first}");
    assert_eq!(second, None);
    let (first, second) = turns("open_ended", &[]);
    assert!(!first.contains("option"), "{first}");
    assert_eq!(second, None);
    assert_eq!(
        profile.second_scoring().scorer,
        crate::score::Scorer::Choice
    );
}

#[test]
fn a_second_stage_is_for_the_rows_whose_fields_have_the_values() {
    let text = |when: &str| {
        format!(
            "name = \"two\"\ntemplate = \"{{{{ question }}}}\"\n[scoring]\nrules = [\"whole\"]\n\
             [second_stage]\ntemplate = \"Choose.\"\n{when}"
        )
    };
    let has = |when: &str, kind: &str| {
        let profile = Profile::from_toml(Path::new("two.toml"), &text(when)).expect("it is valid");
        let turn = profile.next_turn(&cure_record(kind, &[]));
        turn.expect("it renders").is_some()
    };
    assert!(has("", "a"));
    assert!(has("when = { question_type = \"a\" }", "a"));
    assert!(!has("when = { question_type = \"a\" }", "b"));
    assert!(has("when = { question_type = [\"a\", \"b\"] }", "b"));
    assert!(!has("when = { question_type = \"a\", other = \"b\" }", "a"));
    let broken = text("when = {}").replace("Choose.", "{% if");
    let error = Profile::from_toml(Path::new("two.toml"), &broken).expect_err("it is no template");
    assert!(matches!(error, ProfileError::Template { .. }), "{error}");
}
