//! The parts of a record: gold, options, messages, and the names and pins they are found by.

use super::*;

/// Rows with these options, golds and further fields; the index each gold should have.
fn golds(rows: &[&str]) -> Vec<Option<Gold>> {
    let dataset = good("a.jsonl", rows.join("\n"));
    dataset.records.into_iter().map(|it| it.gold).collect()
}

#[test]
fn gold_is_read_over_the_whole_file() {
    let option = |index| Some(Gold::Option(index));
    let row = |options: &str, rest: &str| {
        format!("{{\"question\": \"q\", \"options\": {options}, {rest}}}")
    };
    let four = "[\"w\", \"x\", \"y\", \"z\"]";
    let cases: Vec<(Vec<String>, Vec<Option<Gold>>)> = vec![
        (
            vec![
                row(four, "\"answer\": \"B\""),
                row(four, "\"answer\": \"(d)\""),
            ],
            vec![option(1), option(3)],
        ),
        (
            vec![row(four, "\"answer\": 0"), row(four, "\"answer\": 3")],
            vec![option(0), option(3)],
        ),
        (
            vec![row(four, "\"answer\": 1"), row(four, "\"answer\": 4")],
            vec![option(0), option(3)],
        ),
        (
            vec![
                row(four, "\"answer\": \"1\""),
                row(four, "\"answer\": \"4.0\""),
            ],
            vec![option(0), option(3)],
        ),
        (
            vec![
                row(four, "\"answer\": \"Z\""),
                row(four, "\"answer\": \"w\""),
            ],
            vec![option(3), option(0)],
        ),
        (
            vec![row(four, "\"answer\": \"A\", \"answer_index\": 0")],
            vec![option(0)],
        ),
        // The second field settles what the first leaves open.
        (
            vec![row(four, "\"answer_index\": 2, \"answer\": \"C\"")],
            vec![option(2)],
        ),
        (
            vec![row(four, "\"answer\": \"x\", \"answer_idx\": \"B\"")],
            vec![option(1)],
        ),
        (
            vec![row("{\"A\": \"x\", \"B\": \"y\"}", "\"answer\": \"B\"")],
            vec![option(1)],
        ),
        (
            vec![row(
                "{\"text\": [\"x\", \"y\"], \"label\": [\"1\", \"2\"]}",
                "\"answerKey\": \"1\"",
            )],
            vec![option(0)],
        ),
        // `label` is no gold here.
        (
            vec![row(four, "\"answer\": \"D\", \"label\": \"hard\"")],
            vec![option(3)],
        ),
        (
            vec![
                row(four, "\"answer\": null"),
                row(four, "\"answer\": \"D\""),
            ],
            vec![None, option(3)],
        ),
        // Rows with and without options in one file.
        (
            vec![
                row(four, "\"answer\": \"D\""),
                "{\"question\": \"q\", \"answer\": \"12\"}".into(),
            ],
            vec![option(3), Some(Gold::Text("12".into()))],
        ),
    ];
    for (rows, expected) in cases {
        let rows: Vec<&str> = rows.iter().map(String::as_str).collect();
        assert_eq!(golds(&rows), expected, "{rows:?}");
    }
}

#[test]
fn free_golds_keep_their_spelling() {
    for (answer, gold) in [
        ("18", "18"),
        ("1.50", "1.50"),
        ("true", "true"),
        ("\"a b\"", "a b"),
        ("[\"one\"]", "one"),
        ("\"She has 3*6=18.\\n#### 18\"", "18"),
        ("\"#### 1,450\"", "1,450"),
    ] {
        let row = format!("{{\"question\": \"q\", \"answer\": {answer}}}");
        assert_eq!(golds(&[&row]), [Some(Gold::Text(gold.into()))], "{answer}");
    }
    let many = good(
        "a.jsonl",
        "{\"question\": \"q\", \"answer\": [\"a\", \"b\"]}",
    );
    assert!(many.records[0].defect.is_some());
}

#[test]
fn an_open_index_base_is_ambiguous_until_pinned() {
    let row = "{\"question\": \"q\", \"options\": [\"w\", \"x\", \"y\"], \"answer\": 1}";
    let error = read_pinned(row, &Pins::default()).expect_err("both bases fit");
    assert!(
        error.to_string().contains("counted from 0") && error.hint().contains("gold_kind"),
        "{error}"
    );
    let pins = Pins {
        gold_kind: Some(GoldKind::IndexFrom1),
        ..Pins::default()
    };
    let dataset = read_pinned(row, &pins).expect("the pin decides");
    assert_eq!(dataset.records[0].gold, Some(Gold::Option(0)));
}

#[test]
fn option_columns_and_lists_in_cells() {
    let dataset = good(
        "a.csv",
        "question,A,B,C,answer\nq,x,y,z,C\nr,x,y,,A\ns,x,,z,A\n",
    );
    assert_eq!(dataset.records[0].options, ["x", "y", "z"]);
    assert_eq!(dataset.records[0].gold, Some(Gold::Option(2)));
    assert_eq!(dataset.records[1].options, ["x", "y"]);
    assert_eq!(
        dataset.records[2]
            .defect
            .as_ref()
            .and_then(|it| it.field.as_deref()),
        Some("B")
    );
    assert!(dataset.mapping.to_string().contains("options <- A, B, C"));
    let dataset = good(
        "a.csv",
        "question,choices,answer\nq,\"['x', 'y']\",0\nq,\"[\"\"x\"\", \"\"y\"\"]\",1\n",
    );
    assert_eq!(dataset.records[1].options, ["x", "y"]);
    assert_eq!(dataset.records[1].gold, Some(Gold::Option(1)));
}

#[test]
fn messages_pass_through() {
    let dataset = good(
        "a.jsonl",
        "{\"id\": 1, \"messages\": [{\"role\": \"system\", \"content\": \"s\"}, {\"role\": \"user\", \"content\": [{\"type\": \"text\", \"text\": \"q\"}]}], \"answer\": \"g\"}\n{\"id\": 2, \"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \"content\": \"g\"}]}\n{\"id\": 3, \"messages\": []}\n{\"id\": 4, \"messages\": [{\"role\": \"wizard\", \"content\": \"q\"}]}\n",
    );
    assert_eq!(dataset.mapping.messages.as_deref(), Some("messages"));
    assert_eq!(dataset.records[0].question, "q");
    assert_eq!(dataset.records[0].messages.len(), 2);
    assert!(dataset.records[0].fields.get("messages").is_none());
    let bad: Vec<bool> = dataset
        .records
        .iter()
        .map(|it| it.defect.is_some())
        .collect();
    assert_eq!(bad, [false, true, true, true]);
}

#[test]
fn names_are_found_whatever_their_case_and_dashes() {
    let dataset = good(
        "a.jsonl",
        "{\"Question ID\": \"x1\", \"Problem\": \"p\", \"Final_Answer\": \"1\", \"Category\": \"c\", \"difficulty\": 3, \"rationale\": \"1 it is\"}",
    );
    assert_eq!(
        dataset.mapping.to_string(),
        "id <- Question ID\nquestion <- Problem\ngold <- Final_Answer (text)\ngroup <- Category"
    );
    let record = &dataset.records[0];
    assert_eq!(record.group.as_deref(), Some("c"));
    assert_eq!(record.fields.get("difficulty"), Some(&3.into()));
    assert!(
        !record.fields.contains_key("rationale") && !record.fields.contains_key("Final_Answer")
    );
}

#[test]
fn pins_decide_and_must_exist() {
    let row = "{\"prompt\": \"a\", \"question\": \"b\", \"doc\": 7, \"key\": \"k\"}";
    let pins = Pins {
        question: Some("prompt".into()),
        cluster: Some("doc".into()),
        ..Pins::default()
    };
    let dataset = read_pinned(row, &pins).expect("the pins decide");
    assert_eq!(dataset.records[0].question, "a");
    assert_eq!(dataset.records[0].cluster.as_deref(), Some("7"));
    assert_eq!(dataset.records[0].key, "k");
    let pins = Pins {
        question: Some("promt".into()),
        ..Pins::default()
    };
    let error = read_pinned(row, &pins).expect_err("no such field");
    assert!(error.to_string().contains("no field `promt`"), "{error}");
    let pins = Pins {
        question: Some("prompt".into()),
        id: Some(String::new()),
        ..Pins::default()
    };
    let dataset = read_pinned(row, &pins).expect("an empty pin is none");
    assert!(dataset.records[0].key.starts_with("row-"));
}
