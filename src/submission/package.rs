//! The ZIP that a competition takes: the CSV, and one flat JSON object about the run.
//!
//! The same rows give the same bytes: members in the order of their names, without times, deflated
//! at a fixed level.

use std::collections::BTreeMap;
use std::io::{self, Cursor, Read, Write};
use std::path::{Path, PathBuf};

use minijinja::{Environment, UndefinedBehavior};
use serde_json::{Map, Value};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, DateTime, ZipWriter};

use super::write::{SUBMISSION_CSV_FILE, WriteError, replace};

/// A package as a profile and the manifest describe it.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackageFormat {
    /// Its file in the run's folder.
    #[serde(default = "zip_name")]
    pub zip: String,
    /// The members' names.
    #[serde(default = "csv_name")]
    pub csv: String,
    #[serde(default = "meta_name")]
    pub meta: String,
    /// The object's fields; texts are minijinja templates over [`Facts`].
    #[serde(default)]
    pub fields: BTreeMap<String, Value>,
    /// Fields that flags gave, taken as they are; they win.
    #[serde(default)]
    pub given: BTreeMap<String, String>,
}

fn zip_name() -> String {
    "submission.zip".to_owned()
}

fn csv_name() -> String {
    "submission.csv".to_owned()
}

fn meta_name() -> String {
    "meta_data.json".to_owned()
}

/// What a field's template may name.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Facts {
    pub model: String,
    /// Of the weights, such as `4bit`.
    pub precision: String,
    /// The data set's file, without folder and ending.
    pub dataset: String,
    pub profile: String,
    pub reasoning: String,
    pub n_rows: usize,
    /// Tokens written for a row, with one decimal; empty when none was run.
    pub average_tokens: String,
}

impl PackageFormat {
    /// Checks names and templates.
    ///
    /// # Errors
    /// What is wrong with which key, in words.
    pub fn check(&self) -> Result<(), String> {
        let names = [("zip", &self.zip), ("csv", &self.csv), ("meta", &self.meta)];
        for (key, name) in names {
            if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', '\0']) {
                return Err(format!("`{key} = \"{name}\"` is not the name of a file"));
            }
        }
        if !self.zip.ends_with(".zip") {
            return Err(format!(
                "`zip = \"{}\"` does not end in `.zip`; it could be another file of the run",
                self.zip
            ));
        }
        if self.csv == self.meta {
            return Err(format!("`csv` and `meta` are both `{}`", self.csv));
        }
        for (field, value) in &self.fields {
            if value.is_array() || value.is_object() || value.is_null() {
                return Err(format!(
                    "field `{field}` of the package is not a text, a number or true or false"
                ));
            }
        }
        self.meta_data(&Facts::default())
            .map(|_| ())
            .map_err(|(field, reason)| format!("field `{field}` of the package: {reason}"))
    }

    /// The flat object, fields in alphabetical order; else the field that fails, and why.
    pub fn meta_data(&self, facts: &Facts) -> Result<Map<String, Value>, (String, String)> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        let mut fields = BTreeMap::new();
        for (field, value) in &self.fields {
            let value = match value {
                Value::String(template) => environment
                    .render_str(template, facts)
                    .map(Value::from)
                    .map_err(|error| (field.clone(), error.to_string()))?,
                other => other.clone(),
            };
            fields.insert(field.clone(), value);
        }
        for (field, value) in &self.given {
            fields.insert(field.clone(), Value::from(value.as_str()));
        }
        Ok(fields.into_iter().collect())
    }
}

/// Writes the package of the CSV that lies in the run's folder.
pub fn write_package(
    run_dir: &Path,
    package: &PackageFormat,
    facts: &Facts,
) -> Result<PathBuf, WriteError> {
    let path = run_dir.join(&package.zip);
    let meta = package
        .meta_data(facts)
        .map_err(|(field, reason)| WriteError::Field { field, reason })?;
    let csv = run_dir.join(SUBMISSION_CSV_FILE);
    replace(&path, |out| {
        let csv = std::fs::File::open(&csv)?;
        out.write_all(&zip_bytes(package, csv, &meta)?)
    })?;
    Ok(path)
}

fn zip_bytes(
    package: &PackageFormat,
    mut csv: impl Read,
    meta: &Map<String, Value>,
) -> io::Result<Vec<u8>> {
    // Every part that the crate would take from its surroundings is fixed here.
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Deflated)
        .compression_level(Some(6))
        .last_modified_time(DateTime::default())
        .unix_permissions(0o644);
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let mut names = [&package.csv, &package.meta];
    names.sort();
    for name in names {
        zip.start_file(name.as_str(), options)?;
        if *name == package.csv {
            io::copy(&mut csv, &mut zip)?;
        } else {
            serde_json::to_writer_pretty(&mut zip, meta)?;
            zip.write_all(b"\n")?;
        }
    }
    Ok(zip.finish()?.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(fields: &[(&str, Value)]) -> PackageFormat {
        PackageFormat {
            zip: zip_name(),
            csv: csv_name(),
            meta: meta_name(),
            fields: fields
                .iter()
                .map(|(name, value)| ((*name).to_owned(), value.clone()))
                .collect(),
            given: BTreeMap::new(),
        }
    }

    fn members(bytes: &[u8]) -> Vec<(String, String)> {
        let mut archive = zip::ZipArchive::new(Cursor::new(bytes)).expect("it is a ZIP");
        (0..archive.len())
            .map(|index| {
                let mut member = archive.by_index(index).expect("it is there");
                let mut text = String::new();
                member.read_to_string(&mut text).expect("it is a text");
                (member.name().to_owned(), text)
            })
            .collect()
    }

    #[test]
    fn fields_are_templates_and_flags_win() {
        let mut package = package(&[
            ("model_name", "{{ model }} in {{ precision }}".into()),
            ("average_tokens_per_question", "{{ average_tokens }}".into()),
            ("tools", 0.into()),
            ("track", "internal_reasoning".into()),
        ]);
        package.given.insert("track".into(), "{{ agentic }}".into());
        assert_eq!(package.check(), Ok(()));
        let facts = Facts {
            model: "nano".to_owned(),
            precision: "4bit".to_owned(),
            average_tokens: "12.5".to_owned(),
            ..Facts::default()
        };
        let meta = package.meta_data(&facts).expect("it renders");
        assert_eq!(
            Value::from(meta).to_string(),
            "{\"average_tokens_per_question\":\"12.5\",\"model_name\":\"nano in 4bit\",\
             \"tools\":0,\"track\":\"{{ agentic }}\"}"
        );
    }

    #[test]
    fn a_package_that_cannot_be_is_refused() {
        let refused = |package: PackageFormat, part: &str| {
            let reason = package.check().expect_err(part);
            assert!(reason.contains(part), "{reason}");
        };
        refused(package(&[("a", Value::Null)]), "field `a`");
        refused(package(&[("a", serde_json::json!({"b": 1}))]), "field `a`");
        refused(package(&[("a", "{{ modle }}".into())]), "undefined");
        refused(package(&[("a", "{{ model".into())]), "field `a`");
        let named = |csv: &str, meta: &str| PackageFormat {
            csv: csv.to_owned(),
            meta: meta.to_owned(),
            ..package(&[])
        };
        refused(named("a/b.csv", "m.json"), "csv");
        refused(named("..", "m.json"), "csv");
        refused(named("a", "a"), "both");
        for zip in ["results.jsonl", "run.json", "../a.zip", "/a.zip"] {
            let zip = zip.to_owned();
            refused(
                PackageFormat {
                    zip,
                    ..package(&[])
                },
                "zip",
            );
        }
    }

    #[test]
    fn the_same_rows_give_the_same_bytes() {
        let package = package(&[("model_name", "{{ model }}".into())]);
        let meta = package.meta_data(&Facts::default()).expect("it renders");
        let csv = "\"id\"\n\"é, \"\"x\"\"\n\"\n";
        let bytes = zip_bytes(&package, csv.as_bytes(), &meta).expect("into memory");
        let again = zip_bytes(&package, csv.as_bytes(), &meta).expect("into memory");
        assert_eq!(bytes, again);
        let found = members(&bytes);
        let meta = "{\n  \"model_name\": \"\"\n}\n".to_owned();
        assert_eq!(
            found,
            [
                ("meta_data.json".to_owned(), meta),
                ("submission.csv".to_owned(), csv.to_owned())
            ]
        );
    }
}
