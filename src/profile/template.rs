//! A profile's templates (minijinja): checked when the profile is read, rendered for each record.

use minijinja::{Environment, UndefinedBehavior, Value, context};

use super::ProfileError;
use crate::dataset::Record;
use crate::score::option_letter;

/// A template and the profile's key that holds it.
#[derive(Clone, Copy)]
pub(super) struct Template<'a> {
    key: &'static str,
    text: &'a str,
}

impl<'a> Template<'a> {
    pub(super) fn new(key: &'static str, text: &'a str) -> Self {
        Self { key, text }
    }
}

/// Why a template cannot be parsed.
#[derive(Debug)]
pub(super) struct Broken {
    /// The template's own line, from 1.
    pub line: usize,
    pub reason: String,
}

/// The most characters of a tag: the parser goes a call deeper for each operator and filter in it.
const MAX_TAG: usize = 10_000;

/// Where a tag begins that is longer than [`MAX_TAG`].
fn long_tag(text: &str) -> Option<usize> {
    let (mut from, ends) = (0, ["}}", "%}"]);
    while let Some(start) = ["{{", "{%"]
        .iter()
        .filter_map(|open| text[from..].find(open))
        .min()
    {
        let start = from + start;
        let end = ends
            .iter()
            .filter_map(|close| text[start..].find(close))
            .min();
        let length = end.unwrap_or(text.len() - start);
        if length > MAX_TAG {
            return Some(start);
        }
        from = start + length.max(2);
    }
    None
}

/// Whether a template can be parsed.
pub(super) fn check(text: &str) -> Result<(), Broken> {
    if let Some(start) = long_tag(text) {
        return Err(Broken {
            line: text[..start].matches('\n').count() + 1,
            reason: format!("a tag of more than {MAX_TAG} characters"),
        });
    }
    match environment().template_from_str(text) {
        Ok(_) => Ok(()),
        Err(error) => Err(Broken {
            line: error.line().unwrap_or(1),
            reason: reason(&error),
        }),
    }
}

/// The text for a record. `gold` holds what only a shot's answer may see.
pub(super) fn render(
    profile: &str,
    template: Template,
    record: &Record,
    gold: Option<Value>,
) -> Result<String, ProfileError> {
    let options: Vec<Value> = record
        .options
        .iter()
        .enumerate()
        .map(|(index, text)| context! { letter => option_letter(index), text => text })
        .collect();
    let row = Value::from_serialize(&record.fields);
    // The first of two wins: a field named `options` does not hide the options.
    let context = context! {
        question => record.question,
        options => options,
        row => row,
        ..context! { ..gold.unwrap_or_else(|| context! {}), ..row.clone() }
    };
    let text = environment()
        .render_str(template.text, context)
        .map_err(|error| ProfileError::Render {
            profile: profile.to_owned(),
            template: template.key,
            key: record.key.clone(),
            reason: reason(&error),
        })?;
    if text.trim().is_empty() {
        return Err(ProfileError::EmptyPrompt {
            profile: profile.to_owned(),
            template: template.key,
            key: record.key.clone(),
        });
    }
    Ok(text)
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment
}

/// minijinja's words without its name for a text that came from no file.
fn reason(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_too_long_for_the_parser_is_refused_where_it_begins() {
        let chained = |n: usize| {
            format!(
                "a\n{{{{ question }}}}\n{{{{ question{} }}}}",
                "|trim".repeat(n)
            )
        };
        assert!(check(&chained(1000)).is_ok());
        for broken in [chained(50_000), chained(50_000).replace("}}", "")] {
            let broken = check(&broken).expect_err("too long");
            assert!(
                broken.reason.contains("more than 10000"),
                "{}",
                broken.reason
            );
            assert!((2..=3).contains(&broken.line), "{}", broken.line);
        }
        // What stands outside of tags has any length.
        assert!(check(&format!("{{{{ question }}}}{}", "é".repeat(20_000))).is_ok());
        assert!(check(&"{".repeat(3)).is_err());
    }
}
