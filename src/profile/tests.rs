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
    assert!(error.hint().contains("qa, choice, nano, aime"));
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
}

#[test]
fn a_broken_template_is_named_with_its_key_and_line() {
    let head = "name = \"p\"\n";
    let tail = "\n[scoring]\nrules = [\"whole\"]\n";
    let shots = "template = \"q\"\n[few_shot]\ncount = 1\nfrom = \"same_file\"\n";
    for (body, key, line) in [
        ("template = \"{{ question\"".to_owned(), "`template`", 2),
        // The second line of the text, which begins below its quotes.
        (
            "template = \"\"\"\nQ:\n{% if %}\n\"\"\"".to_owned(),
            "`template`",
            4,
        ),
        (
            format!("{shots}answer = \"{{{{ gold }}\""),
            "`few_shot.answer`",
            6,
        ),
        (
            format!("{shots}template = '{{% for %}}'"),
            "`few_shot.template`",
            6,
        ),
    ] {
        let text = format!("{head}{body}{tail}");
        let error = Profile::from_toml(Path::new("p.toml"), &text).expect_err(key);
        assert!(matches!(error, ProfileError::Template { .. }));
        let message = error.to_string();
        let place = format!("line {line}:");
        assert!(
            message.contains(key) && message.contains(&place),
            "{message}"
        );
    }
}

#[test]
fn what_does_not_go_together_is_named_with_its_line() {
    let head = "name = \"p\"\ntemplate = \"q\"\n";
    let tail = "\n[scoring]\nscorer = \"exact\"\nrules = [\"whole\"]\n";
    for (body, part, line) in [
        ("[few_shot]\ncount = 1", "`file` or `from`", 3),
        (
            "[few_shot]\nfile = \"a\"\nfrom = \"same_file\"\ncount = 1",
            "exclude",
            5,
        ),
        ("[few_shot]\nfile = \"a\"", "`count` or `ids`", 3),
        ("[few_shot]\nfile = \"a\"\ncount = 0", "`count` is 0", 5),
        (
            "[few_shot]\nfile = \"a\"\nids = [1]\ncount = 2",
            "larger",
            6,
        ),
        ("[few_shot]\nfile = \"a\"\ncout = 2", "cout", 5),
        ("seed = 1\nshuffle_options = true", "`shuffle_options`", 4),
        ("[defaults]\nsamples = \"many\"", "expected usize", 4),
    ] {
        let text = format!("{head}{body}{tail}");
        let error = Profile::from_toml(Path::new("p.toml"), &text).expect_err(part);
        let message = error.to_string();
        let place = format!("line {line}:");
        assert!(
            message.contains(part) && message.contains(&place),
            "{message}"
        );
    }
}

#[test]
fn a_number_out_of_range_is_named_with_its_line() {
    let head = "name = \"p\"\ntemplate = \"q\"\n";
    let scoring = "scorer = \"exact\"\nrules = [\"whole\"]\n";
    let second = "[second_stage]\ntemplate = \"q\"\n";
    for (table, key, bad) in [
        ("[defaults]\n", "max_new_tokens", "0"),
        ("[defaults]\n", "temperature", "-1.0"),
        ("[defaults]\n", "temperature", "nan"),
        ("[defaults]\n", "temperature", "1e9"),
        ("[defaults]\n", "top_p", "0.0"),
        ("[defaults]\n", "top_p", "nan"),
        ("[defaults]\n", "top_p", "1.5"),
        ("[defaults]\n", "samples", "0"),
        ("[defaults]\n", "samples", "9223372036854775807"),
        ("", "tolerance", "nan"),
        ("", "tolerance", "-0.1"),
        ("", "tolerance", "inf"),
        (second, "max_new_tokens", "0"),
        (
            "[second_stage]\ntemplate = \"q\"\n[second_stage.scoring]\nscorer = \"exact\"\n\
             rules = [\"whole\"]\n",
            "tolerance",
            "nan",
        ),
    ] {
        let text = format!("{head}[scoring]\n{scoring}{table}{key} = {bad}\n");
        let line = text.lines().count();
        let error = Profile::from_toml(Path::new("p.toml"), &text).expect_err(key);
        let message = error.to_string();
        let expected = format!("profile `p.toml`, line {line}: `{key}` must be ");
        assert!(message.starts_with(&expected), "{bad}: {message}");
    }
}

#[test]
fn the_built_in_profiles_are_the_folders() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/profiles");
    let mut files: Vec<String> = std::fs::read_dir(folder)
        .expect("it is checked in")
        .map(|entry| entry.expect("it is readable").file_name())
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    let mut built_in: Vec<String> = Profile::builtin_names()
        .map(|name| format!("{name}.toml"))
        .collect();
    files.sort();
    built_in.sort();
    assert_eq!(files, built_in);
}

#[test]
fn shuffled_options_keep_their_gold() {
    let mut profile = Profile::builtin("gpqa").expect("it is built in");
    let mut shown: Vec<Record> = ["q-1", "q-2"]
        .map(|key| Record {
            key: key.into(),
            gold: Some(Gold::Option(0)),
            ..record(&["right", "x", "y", "z"])
        })
        .into();
    profile = profile.resolved(&mut shown).expect("it has no shots");
    for (row, order) in shown.iter().zip([[1, 0, 2, 3], [2, 3, 0, 1]]) {
        assert_eq!(profile.option_order(row), Some(order.to_vec()));
        let Some(Gold::Option(gold)) = row.gold else {
            panic!("the gold is an option");
        };
        assert_eq!(row.options[gold], "right");
    }
    assert_eq!(profile.option_order(&record(&[])), None);
    let plain = Profile::builtin("choice").expect("it is built in");
    assert_eq!(plain.option_order(&shown[0]), None);
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
    assert_eq!(Column::of(Source::Id).name, "id");
}

#[test]
fn a_submission_has_sentinels_rules_and_a_package() {
    let parse = |text: &str| toml::from_str::<Submission>(text);
    let found = parse(
        r#"columns = ["id", "choice", { name = "track", constant = "2" }, "prediction as words"]
           missing = { choice = "NOTAVALUE", words = "no answer" }
           never_null = ["choice", "words"]
           quote = "all"
           package = { fields = { model_name = "{{ model }}" } }"#,
    )
    .expect("it is valid");
    let missing: Vec<Option<&str>> = found
        .columns
        .iter()
        .map(|column| column.missing.as_deref())
        .collect();
    assert_eq!(missing, [None, Some("NOTAVALUE"), None, Some("no answer")]);
    let never_null: Vec<bool> = found.columns.iter().map(|it| it.never_null).collect();
    assert_eq!(never_null, [false, true, false, true]);
    assert_eq!(found.columns[2].source, Source::Constant("2".into()));
    assert_eq!(found.quote, Quote::All);
    assert_eq!(found.package.expect("it is there").csv, "submission.csv");
    let all = parse("columns = [\"id\", \"answer\"]\nmissing = \"-\"\nnever_null = true");
    let all = all.expect("it is valid").columns;
    assert!(
        all.iter()
            .all(|it| it.never_null && it.missing.as_deref() == Some("-"))
    );

    for (text, part) in [
        (r#"columns = ["id", "answer as id"]"#, "two columns"),
        (r#"columns = []"#, "no columns"),
        (r#"columns = ["id", 7]"#, "constant"),
        (r#"columns = [{ name = "a", konstant = "b" }]"#, "konstant"),
        (r#"columns = ["answer"]"#, "no column `id`"),
        (
            "columns = [\"id\"]\nmissing = { choice = \"x\" }",
            "`choice`",
        ),
        ("columns = [\"id\"]\nnever_null = [\"words\"]", "`words`"),
        (
            "columns = [\"id\", \"answer\"]\nnever_null = true",
            "`missing`",
        ),
        (
            "columns = [\"id\", \"answer\"]\nnever_null = true\nmissing = \"N/A\"",
            "pandas",
        ),
        ("columns = [\"id\"]\nquote = \"some\"", "some"),
        ("columns = [\"id\"]\npackage = { csv = \"a/b\" }", "a/b"),
        ("columns = [\"id\"]\nmising = \"\"", "mising"),
    ] {
        let error = parse(text).expect_err(part).to_string();
        assert!(error.contains(part), "{error}");
    }
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
