//! A package opened: its members by name, and the JSON object about the run.

use std::io::{Cursor, Read};

use serde_json::{Map, Value};
use zip::ZipArchive;

use super::{Kind, Notes};
use crate::submission::package::PackageFormat;

/// A member larger than this when inflated is not read.
const MAX_MEMBER_BYTES: u64 = 4 << 30;

/// Checks the members and the object; gives the CSV's bytes where they can be had.
pub(super) fn check(bytes: &[u8], package: &PackageFormat, notes: &mut Notes) -> Option<Vec<u8>> {
    let mut archive = match ZipArchive::new(Cursor::new(bytes)) {
        Ok(archive) => archive,
        Err(error) => {
            notes.file(Kind::Member, format!("it cannot be opened: {error}"));
            return None;
        }
    };
    let mut names: Vec<String> = archive.file_names().map(str::to_owned).collect();
    names.sort();
    for name in &names {
        if *name != package.csv && *name != package.meta {
            notes.file(
                Kind::Member,
                format!(
                    "member `{name}` does not belong there; expected are `{}` and `{}`, at the top",
                    package.csv, package.meta
                ),
            );
        }
    }
    let mut member = |name: &str| match read_member(&mut archive, name) {
        Ok(bytes) => Some(bytes),
        Err(reason) => {
            notes.file(Kind::Member, format!("member `{name}`: {reason}"));
            None
        }
    };
    let csv = member(&package.csv);
    if let Some(meta) = member(&package.meta) {
        check_meta(&meta, package, notes);
    }
    csv
}

fn read_member(archive: &mut ZipArchive<Cursor<&[u8]>>, name: &str) -> Result<Vec<u8>, String> {
    let member = archive.by_name(name).map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    // The size in a header is a claim; what comes out is counted.
    member
        .take(MAX_MEMBER_BYTES)
        .read_to_end(&mut bytes)
        .map_err(|error| error.to_string())?;
    if bytes.len() as u64 == MAX_MEMBER_BYTES {
        return Err(format!("it has {MAX_MEMBER_BYTES} bytes or more"));
    }
    Ok(bytes)
}

fn check_meta(bytes: &[u8], package: &PackageFormat, notes: &mut Notes) {
    let mut note = |field: Option<&str>, message: String| {
        let name = &package.meta;
        let message = format!("`{name}`: {message}");
        notes.cell(Kind::Field, None, None, field, message);
    };
    let object: Map<String, Value> = match serde_json::from_slice(bytes) {
        Ok(object) => object,
        Err(error) => return note(None, format!("it is not a JSON object: {error}")),
    };
    for field in package.fields.keys().chain(package.given.keys()) {
        if !object.contains_key(field) {
            note(Some(field), format!("field `{field}` is missing"));
        }
    }
    for (field, value) in &object {
        if value.is_object() || value.is_array() || value.is_null() {
            note(
                Some(field),
                format!("field `{field}` is not a text, a number or true or false"),
            );
        }
    }
}
