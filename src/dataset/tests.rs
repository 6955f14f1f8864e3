//! Whole files through [`read`]: shapes, bad rows, keys; the parts of a record in `parts`.

mod parts;

use std::io::Write;
use std::path::PathBuf;

use super::*;

/// A file in a folder of its own, removed at the end.
struct TempFile {
    path: PathBuf,
}

impl TempFile {
    fn new(name: &str, bytes: &[u8]) -> Self {
        use std::sync::atomic::{AtomicUsize, Ordering};
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder =
            std::env::temp_dir().join(format!("podium-dataset-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("the temporary folder is ours");
        let path = folder.join(name);
        std::fs::write(&path, bytes).expect("the temporary folder is ours");
        Self { path }
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if let Some(folder) = self.path.parent() {
            let _ = std::fs::remove_dir_all(folder);
        }
    }
}

fn try_read(name: &str, bytes: impl AsRef<[u8]>) -> Result<Dataset, DatasetError> {
    read(&TempFile::new(name, bytes.as_ref()).path)
}

fn read_pinned(bytes: &str, pins: &Pins) -> Result<Dataset, DatasetError> {
    read_with(&TempFile::new("a.jsonl", bytes.as_bytes()).path, pins)
}

fn good(name: &str, bytes: impl AsRef<[u8]>) -> Dataset {
    match try_read(name, bytes) {
        Ok(dataset) => dataset,
        Err(error) => panic!("{name}: {error}"),
    }
}

fn keys(dataset: &Dataset) -> Vec<&str> {
    dataset.records.iter().map(|it| it.key.as_str()).collect()
}

fn lines(dataset: &Dataset) -> Vec<usize> {
    dataset.records.iter().map(|it| it.location.line).collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("memory takes it");
    encoder.finish().expect("memory takes it")
}

const TWO: &str = "{\"id\": 1, \"question\": \"a?\", \"answer\": \"x\"}\n{\"id\": 2, \"question\": \"b?\", \"answer\": \"y\"}\n";

#[test]
fn one_content_in_every_shape_gives_the_same_records() {
    let array = "[\n{\"id\": 1, \"question\": \"a?\", \"answer\": \"x\"},\n{\"id\": 2, \"question\": \"b?\", \"answer\": \"y\"}]";
    let held = "{\"canary\": \"c\", \"examples\": [{\"id\": 1, \"question\": \"a?\", \"answer\": \"x\"}, {\"id\": 2, \"question\": \"b?\", \"answer\": \"y\"}]}";
    let csv = "id,question,answer\n1,a?,x\n2,b?,y\n";
    let pretty = "{\n \"id\": 1,\n \"question\": \"a?\", \"answer\": \"x\"}\n{\"id\": 2, \"question\": \"b?\",\n \"answer\": \"y\"\n}\n";
    let bom = format!("\u{feff}{TWO}");
    let crlf = TWO.replace('\n', "\r\n");
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("a.jsonl", TWO.into()),
        ("a.json", TWO.into()),
        ("a", TWO.into()),
        ("bom.jsonl", bom.into()),
        ("crlf.jsonl", crlf.into()),
        ("open.jsonl", TWO.trim_end().into()),
        ("blank.jsonl", TWO.replace('\n', "\n\n").into()),
        ("array.json", array.into()),
        ("array.jsonl", array.into()),
        ("held.json", held.into()),
        ("pretty.json", pretty.into()),
        ("pretty.jsonl", pretty.into()),
        ("a.csv", csv.into()),
        ("a.txt", csv.into()),
        ("bom.csv", format!("\u{feff}{csv}").into()),
        ("crlf.csv", csv.replace('\n', "\r\n").into()),
        ("a.tsv", csv.replace(',', "\t").into()),
        ("semicolon.csv", csv.replace(',', ";").into()),
        ("a.jsonl.gz", gzip(TWO.as_bytes())),
        ("a.csv.gz", gzip(csv.as_bytes())),
        ("named_wrongly.jsonl", gzip(TWO.as_bytes())),
    ];
    for (name, bytes) in cases {
        let dataset = good(name, bytes);
        assert_eq!(keys(&dataset), ["1", "2"], "{name}");
        for (record, (question, gold)) in dataset.records.iter().zip([("a?", "x"), ("b?", "y")]) {
            assert_eq!(record.question, question, "{name}");
            assert_eq!(record.gold, Some(Gold::Text(gold.into())), "{name}");
            assert_eq!(record.defect, None, "{name}");
            assert!(!record.fields.contains_key("answer"), "{name}");
        }
    }
}

#[test]
fn the_hash_is_of_the_decompressed_bytes() {
    let plain = good("a.jsonl", TWO);
    assert_eq!(
        plain.content_hash,
        good("a.gz", gzip(TWO.as_bytes())).content_hash
    );
    assert_eq!(plain.content_hash.len(), 64);
}

#[test]
fn lines_are_where_rows_begin() {
    assert_eq!(lines(&good("a.jsonl", format!("\n\n{TWO}"))), [3, 4]);
    assert_eq!(
        lines(&good(
            "a.json",
            "[\n\n{\"question\": \"a\"\n},\n {\"question\": \"b\"}]"
        )),
        [3, 5]
    );
    let csv = "question,answer\n\"a\nb\",1\n\nc,2\n\"d\"\"\n,\",3\n";
    let dataset = good("a.csv", csv);
    assert_eq!(lines(&dataset), [2, 5, 6]);
    let questions: Vec<&str> = dataset
        .records
        .iter()
        .map(|it| it.question.as_str())
        .collect();
    assert_eq!(questions, ["a\nb", "c", "d\"\n,"]);
}

#[test]
fn files_that_cannot_be_used_say_why() {
    let cut_gzip = {
        let mut bytes = gzip(TWO.as_bytes());
        bytes.truncate(bytes.len() - 9);
        bytes
    };
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("a.jsonl", b"".into(), "is empty"),
        ("a.jsonl", b" \n\r\n".into(), "is empty"),
        ("a.json", b"[]".into(), "has no rows"),
        ("a.csv", b"id,question\n".into(), "has no rows"),
        ("a.parquet", b"PAR1\x15\x04".into(), "as Parquet"),
        ("a.jsonl", b"PAR1\x15\x04".into(), "as Parquet"),
        ("a.jsonl", b"PK\x03\x04".into(), "ZIP"),
        ("a.jsonl", b"\xff\xfe{\0".into(), "UTF-16"),
        ("a.jsonl", b"{\"a\0".into(), "binary"),
        ("a.gz", cut_gzip, "does not decompress"),
        ("a.txt", b"Hello there".into(), "not a prompt file"),
        ("a.jsonl", b"hello\nthere".into(), "none of the 2 rows"),
        ("a.jsonl", b"[1, 2]\n[3, 4]\n".into(), "the row is a list"),
        (
            "a.jsonl",
            b"{\"id\": 1, \"completion\": \"x\"}".into(),
            "holds replies (`completion`) and no questions",
        ),
        (
            "a.csv",
            b"1,What is this?,What is that?\n2,What is it?,And this?\n".into(),
            "has no header",
        ),
        (
            "a.csv",
            b"What is it\nWho is it\n".into(),
            "no field that holds a question; it has `What is it`",
        ),
        (
            "a.csv",
            b"name,value\nx,y\n".into(),
            "no field that holds a question",
        ),
        (
            "a.csv",
            b"question,answer,answer\nx,y,z\n".into(),
            "names `answer` twice",
        ),
        (
            "a.jsonl",
            b"{\"prompt\": \"a\", \"question\": \"b\"}".into(),
            "the question is `question` or `prompt`",
        ),
        (
            "a.jsonl",
            b"{\"question\": \"a\", \"answer\": \"b\", \"label\": \"c\"}".into(),
            "the gold answer is `answer` or `label`",
        ),
    ];
    for (name, bytes, message) in cases {
        match try_read(name, &bytes) {
            Ok(dataset) => panic!("{name} {message}: {dataset:?}"),
            Err(error) => {
                assert!(error.to_string().contains(message), "{error}");
                assert!(!error.hint().is_empty());
                assert!(error.path().ends_with(name));
            }
        }
    }
    let missing = read(Path::new("/nonexistent/a.jsonl"));
    assert!(matches!(missing, Err(DatasetError::Read { .. })));
    assert!(matches!(
        read(&std::env::temp_dir()),
        Err(DatasetError::Folder { .. })
    ));
}

#[test]
fn bad_rows_are_records_with_defects() {
    let mut bytes =
        b"{\"id\": \"a\", \"question\": \"q\", \"options\": [\"x\", \"y\"], \"answer\": \"A\"}\n"
            .to_vec();
    let bad: [(&[u8], &str); 12] = [
        (b"not json", "not JSON"),
        (b"{\"id\": \"cut", "not JSON"),
        (b"[1]", "a list"),
        (b"null", "a constant"),
        (b"{\"id\": \"b\", \"question\": \"\xff\"}", "not UTF-8"),
        (b"{\"id\": \"c\"}", "no `question`"),
        (b"{\"id\": \"d\", \"question\": \"  \"}", "empty"),
        (b"{\"id\": \"e\", \"question\": null}", "empty"),
        (b"{\"id\": \"f\", \"question\": {\"a\": 1}}", "not text"),
        (
            b"{\"id\": \"a\", \"question\": \"q\"}",
            "already that of line 1",
        ),
        (
            b"{\"id\": \"g\", \"question\": \"q\", \"options\": [\"x\", \"y\"], \"answer\": \"C\"}",
            "none of the 2 options",
        ),
        (
            b"{\"id\": \"h\", \"question\": \"q\", \"options\": [[], 1], \"answer\": \"A\"}",
            "option 1 is not text",
        ),
    ];
    for (row, _) in bad {
        bytes.extend_from_slice(row);
        bytes.push(b'\n');
    }
    let dataset = good("a.jsonl", &bytes);
    assert_eq!(dataset.records.len(), bad.len() + 1);
    assert_eq!(dataset.records[0].defect, None);
    for (index, (_, message)) in bad.iter().enumerate() {
        let record = &dataset.records[index + 1];
        let defect = record.defect.as_ref().expect(message);
        assert!(defect.message.contains(message), "{defect:?}");
        assert!(!defect.hint.is_empty());
        assert_eq!(record.location.line, index + 2);
    }
    let unique: std::collections::HashSet<&str> = keys(&dataset).into_iter().collect();
    assert_eq!(unique.len(), dataset.records.len());
    assert!(unique.contains("a#2"));
}

#[test]
fn a_broken_array_element_is_one_bad_row() {
    let dataset = good(
        "a.json",
        "[{\"question\": \"a\"}, {\"question\": oops}, {\"question\": \"c\"}, {\"quest",
    );
    let bad: Vec<bool> = dataset
        .records
        .iter()
        .map(|it| it.defect.is_some())
        .collect();
    assert_eq!(bad, [false, true, false, true]);
}

#[test]
fn ragged_and_unclosed_csv_rows_are_defects() {
    let dataset = good(
        "a.csv",
        "id,question,answer\n1,a,x\n2,b,c,y\n3,d\n4,\"e,z\n5,f,w\n",
    );
    let messages: Vec<Option<&str>> = dataset
        .records
        .iter()
        .map(|it| it.defect.as_ref().map(|defect| defect.message.as_str()))
        .collect();
    assert_eq!(messages.len(), 4);
    assert_eq!(messages[0], None);
    assert_eq!(messages[1], Some("the row has 4 cells, the header 3"));
    assert_eq!(messages[2], Some("the row has 2 cells, the header 3"));
    assert!(messages[3].is_some_and(|it| it.contains("never closed") && it.contains("2 lines")));
}

#[test]
fn ids_keep_type_and_spelling_and_keys_are_unique() {
    let dataset = good("a.csv", "id,question\n007,a\n7,b\n");
    assert_eq!(dataset.records[0].id, Some("007".into()));
    let dataset = good(
        "a.jsonl",
        "{\"id\": 1.0, \"question\": \"a\"}\n{\"id\": \"1\", \"question\": \"b\"}\n{\"id\": 1, \"question\": \"c\"}\n{\"id\": \"1#2\", \"question\": \"d\"}\n{\"id\": null, \"question\": \"e\"}\n{\"id\": 18446744073709551616123, \"question\": \"f\"}\n",
    );
    assert_eq!(keys(&dataset)[..4], ["1.0", "1", "1#3", "1#2"]);
    assert!(keys(&dataset)[4].starts_with("row-"));
    assert_eq!(keys(&dataset)[5], "18446744073709551616123");
    assert!(dataset.records[2].defect.is_some());
    assert_eq!(dataset.records[3].defect, None);
}

#[test]
fn rows_without_ids_are_told_apart() {
    let dataset = good(
        "a.jsonl",
        "{\"question\": \"a\"}\n{\"question\": \"b\"}\n{\"question\": \"a\"}\n",
    );
    let keys = keys(&dataset);
    assert!(keys[0].ends_with("-1") && keys[2].ends_with("-2"));
    assert_eq!(keys[0].strip_suffix("1"), keys[2].strip_suffix("2"));
    assert_eq!(keys[0].len(), "row-0123456789abcdef-1".len());
}

mod properties {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Quotes, newlines and other letters survive JSON lines and CSV.
        #[test]
        fn questions_survive(questions in prop::collection::vec("[^\u{feff}]*[a-zé]", 1..6)) {
            let jsonl: String = questions
                .iter()
                .map(|question| serde_json::json!({"question": question}).to_string() + "\n")
                .collect();
            let mut writer = ::csv::Writer::from_writer(Vec::new());
            writer.write_record(["question", "n"]).expect("memory takes it");
            for question in &questions {
                writer.write_record([question.as_str(), "1"]).expect("memory takes it");
            }
            let csv = writer.into_inner().expect("memory takes it");
            for (name, bytes) in [("a.jsonl", jsonl.into_bytes()), ("a.csv", csv)] {
                // A zero byte says binary, whatever the name says.
                if bytes.contains(&0) { continue; }
                let dataset = good(name, &bytes);
                let read: Vec<&String> = dataset.records.iter().map(|it| &it.question).collect();
                prop_assert_eq!(read, questions.iter().collect::<Vec<_>>());
            }
        }

        /// Any bytes give records or an error, never a panic; no line is lost.
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            for name in ["a.jsonl", "a.json", "a.csv"] {
                let _ = try_read(name, &bytes);
            }
            let mut file = b"{\"question\": \"q\"}\n".to_vec();
            file.extend(bytes.iter().map(|&byte| if byte == 0 { 1 } else { byte }));
            let dataset = good("a.jsonl", &file);
            let n_lines = file.split(|&b| b == b'\n').filter(|it| !it.trim_ascii().is_empty()).count();
            prop_assert_eq!(dataset.records.len(), n_lines);
        }
    }
}
