//! A row's options out of a list, an object or a column each.

use super::Defect;
use super::cell::{Cell, Row, from_json};
use super::mapping::OptionsSource;
use super::names::{plain_name, role_name};

/// The options of a row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    pub texts: Vec<String>,
    /// The labels that the row gives them, such as an object's keys; empty where it gives none.
    pub labels: Vec<String>,
}

/// Options are lettered `A` to `Z`.
const MAX_OPTIONS: usize = 26;

const COLUMN_PREFIXES: [&str; 9] = [
    "",
    "option",
    "choice",
    "opt",
    "op",
    "ending",
    "candidate",
    "sol",
    "answer",
];

/// Columns that hold an option each: `A`, `B`, … or `option_a`, … or `option1`, ….
pub fn find_columns(fields: &[String]) -> Option<Vec<String>> {
    let find = |plain: &str| fields.iter().find(|field| role_name(field) == plain);
    for prefix in COLUMN_PREFIXES {
        let letters: Vec<String> = ('a'..='z')
            .map_while(|c| find(&format!("{prefix}{c}")).cloned())
            .collect();
        // Small letters alone are as likely the numbers of a sum as options.
        let is_clear = !prefix.is_empty()
            || letters.len() >= 4
            || letters.iter().all(|it| it.chars().all(char::is_uppercase));
        if letters.len() >= 2 && is_clear {
            return Some(letters);
        }
        for first in [1, 0] {
            let numbered: Vec<String> = (first..MAX_OPTIONS)
                .map_while(|n| find(&format!("{prefix}{n}")).cloned())
                .collect();
            if numbered.len() >= 2 && !prefix.is_empty() {
                return Some(numbered);
            }
        }
    }
    None
}

/// The options of a row; none where the field is blank.
pub fn read(row: &Row, source: &OptionsSource) -> Result<Options, Defect> {
    let mut options = match source {
        OptionsSource::Field(field) => match row.get(field) {
            Some(cell) => from_cell(cell, field)?,
            None => Options::default(),
        },
        OptionsSource::Columns(columns) => from_columns(row, columns)?,
    };
    if options.texts.len() > MAX_OPTIONS {
        return Err(defect(
            source,
            format!(
                "{} options, at most {MAX_OPTIONS} have a letter",
                options.texts.len()
            ),
        ));
    }
    strip_letters(&mut options.texts);
    Ok(options)
}

fn from_columns(row: &Row, columns: &[String]) -> Result<Options, Defect> {
    let mut cells: Vec<(&String, Option<&Cell>)> = columns
        .iter()
        .map(|column| (column, row.get(column)))
        .collect();
    while let Some((_, last)) = cells.last()
        && last.is_none_or(Cell::is_blank)
    {
        cells.pop();
    }
    let mut options = Options::default();
    for (column, cell) in cells {
        let text = cell.filter(|cell| !cell.is_blank()).and_then(Cell::scalar);
        let Some(text) = text else {
            return Err(Defect {
                field: Some(column.clone()),
                message: "the option is empty or not text, a later one is not".into(),
                hint: "fill it, or leave the last columns empty".into(),
            });
        };
        options.texts.push(text);
        let label = plain_name(column);
        let digits = label.trim_start_matches(|c: char| !c.is_ascii_digit());
        options.labels.push(if digits.is_empty() {
            label.chars().last().map(String::from).unwrap_or_default()
        } else {
            digits.to_owned()
        });
    }
    // The number of a column without a name is its place, no label.
    let is_number = |column: &String| column.chars().all(|c| c.is_ascii_digit());
    if columns.iter().all(is_number) {
        options.labels.clear();
    }
    Ok(options)
}

fn from_cell(cell: &Cell, field: &str) -> Result<Options, Defect> {
    let source = OptionsSource::Field(field.to_owned());
    match cell {
        Cell::List(cells) => from_list(cells, &source),
        Cell::Object(fields) => from_object(fields, &source),
        _ if cell.is_blank() => Ok(Options::default()),
        Cell::Text(text) => {
            // CSV cells hold lists as JSON or as Python prints them.
            let parsed = match text.trim().as_bytes().first() {
                Some(b'[' | b'{') => from_json(text).ok().or_else(|| from_python(text)),
                _ => None,
            };
            match parsed {
                Some(cell @ (Cell::List(_) | Cell::Object(_))) => from_cell(&cell, field),
                _ => Err(defect(
                    &source,
                    "the options are one text, not a list".into(),
                )),
            }
        }
        _ => Err(defect(&source, "the options are not a list".into())),
    }
}

fn from_list(cells: &[Cell], source: &OptionsSource) -> Result<Options, Defect> {
    let mut options = Options::default();
    for (index, cell) in cells.iter().enumerate() {
        let (label, text) = match cell {
            Cell::Object(_) => {
                let find = |names: &[&str]| {
                    names
                        .iter()
                        .find_map(|name| cell.get(name).and_then(Cell::scalar))
                };
                (
                    find(&["label", "key", "letter", "id"]),
                    find(&["text", "value", "content", "option"]),
                )
            }
            _ => (None, cell.scalar()),
        };
        let Some(text) = text else {
            return Err(defect(source, format!("option {} is not text", index + 1)));
        };
        options.texts.push(text);
        options.labels.extend(label);
    }
    if options.labels.len() != options.texts.len() {
        options.labels.clear();
    }
    Ok(options)
}

fn from_object(fields: &[(String, Cell)], source: &OptionsSource) -> Result<Options, Defect> {
    let lists = |name: &str| {
        fields.iter().find_map(|(field, cell)| match cell {
            Cell::List(cells) if field == name => Some(cells),
            _ => None,
        })
    };
    // The Hugging Face shape of ARC and CommonsenseQA.
    if let (Some(texts), Some(labels)) = (lists("text"), lists("label")) {
        let mut options = from_list(texts, source)?;
        options.labels = labels.iter().filter_map(Cell::scalar).collect();
        if options.labels.len() != options.texts.len() {
            return Err(defect(
                source,
                format!(
                    "{} texts and {} labels",
                    options.texts.len(),
                    options.labels.len()
                ),
            ));
        }
        return Ok(options);
    }
    let mut fields: Vec<&(String, Cell)> = fields.iter().collect();
    if fields.iter().all(|(label, _)| label.chars().count() == 1) {
        fields.sort_by(|a, b| a.0.cmp(&b.0));
    }
    while fields.last().is_some_and(|(_, cell)| *cell == Cell::Null) {
        fields.pop();
    }
    let mut options = Options::default();
    for (label, cell) in fields {
        let Some(text) = cell.scalar() else {
            return Err(defect(source, format!("option `{label}` is not text")));
        };
        options.texts.push(text);
        options.labels.push(label.clone());
    }
    Ok(options)
}

fn defect(source: &OptionsSource, message: String) -> Defect {
    Defect {
        field: Some(source.to_string()),
        message,
        hint: "give the options as a list of texts, or as an object from letter to text".into(),
    }
}

/// Takes `A)`, `(B)`, `C.`, `D:` off where every option carries its own letter.
fn strip_letters(texts: &mut [String]) {
    let stripped: Option<Vec<String>> = texts
        .iter()
        .zip('A'..='Z')
        .map(|(text, letter)| {
            let text = text.trim_start();
            let rest = match text.strip_prefix('(') {
                Some(inner) => inner.strip_prefix(letter)?.strip_prefix(')')?,
                None => text.strip_prefix(letter)?.strip_prefix(['.', ')', ':'])?,
            };
            Some(rest.trim_start().to_owned()).filter(|rest| !rest.is_empty())
        })
        .collect();
    if let Some(stripped) = stripped
        && texts.len() >= 2
    {
        for (text, stripped) in texts.iter_mut().zip(stripped) {
            *text = stripped;
        }
    }
}

/// A list of strings and numbers as Python's `repr` writes it.
fn from_python(text: &str) -> Option<Cell> {
    let inner = text.trim().strip_prefix('[')?.strip_suffix(']')?;
    let mut cells = Vec::new();
    let mut chars = inner.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_whitespace() || *c == ',').is_some() {}
        let Some(&first) = chars.peek() else {
            return Some(Cell::List(cells));
        };
        if first == '\'' || first == '"' {
            chars.next();
            let mut word = String::new();
            loop {
                match chars.next()? {
                    c if c == first => break,
                    '\\' => match chars.next()? {
                        'n' => word.push('\n'),
                        't' => word.push('\t'),
                        c => word.push(c),
                    },
                    c => word.push(c),
                }
            }
            cells.push(Cell::Text(word));
        } else {
            let mut word = String::new();
            while let Some(c) = chars.next_if(|c| *c != ',') {
                word.push(c);
            }
            let word = word.trim();
            word.parse::<f64>().ok()?;
            cells.push(Cell::Number(word.to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(json: &str) -> Result<Options, Defect> {
        from_cell(&from_json(json).expect("valid JSON"), "options").map(|mut options| {
            strip_letters(&mut options.texts);
            options
        })
    }

    #[test]
    fn lists_objects_and_texts() {
        for (json, texts, labels) in [
            (r#"["x", 2]"#, vec!["x", "2"], vec![]),
            (r#"{"B": "y", "A": "x"}"#, vec!["x", "y"], vec!["A", "B"]),
            (
                r#"{"A": "x", "B": "y", "C": null}"#,
                vec!["x", "y"],
                vec!["A", "B"],
            ),
            (
                r#"{"text": ["x", "y"], "label": ["1", "2"]}"#,
                vec!["x", "y"],
                vec!["1", "2"],
            ),
            (r#"[{"label": "A", "text": "x"}]"#, vec!["x"], vec!["A"]),
            (r#""[\"x\", \"y\"]""#, vec!["x", "y"], vec![]),
            (
                r#""['it\\'s', \"y\", 3.5]""#,
                vec!["it's", "y", "3.5"],
                vec![],
            ),
            (r#"["A) x", "B) y"]"#, vec!["x", "y"], vec![]),
            (r#"["(A) x", "(B) y"]"#, vec!["x", "y"], vec![]),
            (r#"["A. x", "y"]"#, vec!["A. x", "y"], vec![]),
            ("null", vec![], vec![]),
            (r#"" ""#, vec![], vec![]),
        ] {
            let options = options(json).expect(json);
            assert_eq!(
                (options.texts, options.labels),
                (
                    texts.into_iter().map(String::from).collect(),
                    labels.into_iter().map(String::from).collect(),
                ),
                "{json}"
            );
        }
    }

    #[test]
    fn options_that_are_not_text_are_defects() {
        for json in [
            r#"[["x"]]"#,
            r#"["x", null]"#,
            "3",
            "true",
            r#""x or y""#,
            r#"{"A": {}}"#,
            r#"{"text": ["x", "y"], "label": ["1"]}"#,
            r#""['x""#,
        ] {
            assert!(options(json).is_err(), "{json}");
        }
    }

    #[test]
    fn columns_are_found_by_their_names() {
        let find = |names: &[&str]| {
            find_columns(&names.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>())
        };
        for (names, found) in [
            (&["id", "A", "B", "C"][..], &["A", "B", "C"][..]),
            (&["a", "b"], &[]),
            (&["a", "b", "c", "d"], &["a", "b", "c", "d"]),
            (&["option_a", "Option B"], &["option_a", "Option B"]),
            (&["opa", "opb", "opc", "opd"], &["opa", "opb", "opc", "opd"]),
            (&["ending0", "ending1"], &["ending0", "ending1"]),
            (
                &["option1", "option2", "option3"],
                &["option1", "option2", "option3"],
            ),
            (&["A"], &[]),
        ] {
            assert_eq!(find(names).unwrap_or_default(), found, "{names:?}");
        }
    }
}
