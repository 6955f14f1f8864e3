//! A file's bytes and format: decompressed, hashed, without a byte order mark; told from the
//! content as much as from the name.

use std::fmt;
use std::io::{self, Read};
use std::path::Path;

use flate2::read::MultiGzDecoder;
use sha2::{Digest, Sha256};

use super::DatasetError;
use super::names::is_question_name;

/// A prompt file's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// An object a line.
    Jsonl,
    /// An array of objects, or an object that holds one.
    Json,
    /// Comma, semicolon or tab separated, with or without a header.
    Csv,
    Parquet,
}

impl fmt::Display for Format {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Jsonl => "JSON lines",
            Self::Json => "JSON",
            Self::Csv => "CSV",
            Self::Parquet => "Parquet",
        })
    }
}

/// A file in memory.
pub struct OpenFile {
    /// Decompressed, without a byte order mark.
    pub bytes: Vec<u8>,
    /// SHA-256 of the decompressed bytes, the mark included, in hex.
    pub content_hash: String,
    pub format: Format,
}

/// A gzip file that unpacks to more is refused: it could fill the memory.
const MAX_BYTES: u64 = 4 << 30;

/// The first and the last bytes of a Parquet file.
const PARQUET_MAGIC: &[u8] = b"PAR1";

/// Bytes looked at for zero bytes.
const HEAD_BYTES: usize = 8 << 10;

/// Reads a file, decompresses it if need be and tells its format.
pub fn open(path: &Path) -> Result<OpenFile, DatasetError> {
    if path.is_dir() {
        return Err(DatasetError::Folder {
            path: path.to_owned(),
        });
    }
    let stored = std::fs::read(path).map_err(|source| DatasetError::Read {
        path: path.to_owned(),
        source,
    })?;
    let mut bytes = if stored.starts_with(&[0x1f, 0x8b]) {
        decompress(path, &stored)?
    } else {
        stored
    };
    let content_hash = hex(&Sha256::digest(&bytes));
    if bytes.starts_with(PARQUET_MAGIC) {
        return Ok(OpenFile {
            bytes,
            content_hash,
            format: Format::Parquet,
        });
    }
    check_content(path, &bytes)?;
    if bytes.starts_with(b"\xef\xbb\xbf") {
        bytes.drain(..3);
    }
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(DatasetError::Empty {
            path: path.to_owned(),
        });
    }
    let format = tell_format(path, &bytes)?;
    Ok(OpenFile {
        bytes,
        content_hash,
        format,
    })
}

/// Bytes as lower-case hex digits.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn decompress(path: &Path, stored: &[u8]) -> Result<Vec<u8>, DatasetError> {
    let mut bytes = Vec::new();
    MultiGzDecoder::new(stored)
        .take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|source: io::Error| DatasetError::Decompress {
            path: path.to_owned(),
            source,
        })?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(DatasetError::TooLarge {
            path: path.to_owned(),
            limit: MAX_BYTES,
        });
    }
    Ok(bytes)
}

/// Refuses what is certainly no text, by its first bytes.
fn check_content(path: &Path, bytes: &[u8]) -> Result<(), DatasetError> {
    const MAGIC: [(&[u8], &str); 8] = [
        (b"ARROW1", "an Arrow file"),
        (b"PK\x03\x04", "a ZIP archive or an Excel workbook"),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
        (b"\xfd7zXZ\0", "compressed with xz"),
        (b"BZh", "compressed with bzip2"),
        (b"\xff\xfe", "UTF-16 text"),
        (b"\xfe\xff", "UTF-16 text"),
        (b"SQLite format 3", "a SQLite database"),
    ];
    let unsupported = |what| DatasetError::Unsupported {
        path: path.to_owned(),
        what,
    };
    if let Some((_, what)) = MAGIC.iter().find(|(magic, _)| bytes.starts_with(magic)) {
        return Err(unsupported(what));
    }
    if bytes.iter().take(HEAD_BYTES).any(|&byte| byte == 0) {
        return Err(unsupported("a binary file"));
    }
    Ok(())
}

fn tell_format(path: &Path, bytes: &[u8]) -> Result<Format, DatasetError> {
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy().to_lowercase())
        .unwrap_or_default();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    let named = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    let first = bytes.iter().find(|byte| !byte.is_ascii_whitespace());
    match first {
        Some(b'[' | b'{') if !named(&[".csv", ".tsv"]) || is_json_line(bytes) => {
            if first == Some(&b'[') {
                return Ok(Format::Json);
            }
            // An object that is the whole file may hold the rows; one a line is JSON lines.
            let whole = serde_json::from_slice::<serde::de::IgnoredAny>(bytes).is_ok();
            let one_line = first_line(bytes).len() == bytes.trim_ascii().len();
            let is_json = if named(&[".jsonl", ".ndjson"]) {
                whole && !one_line
            } else {
                whole || !is_json_line(bytes)
            };
            Ok(if is_json { Format::Json } else { Format::Jsonl })
        }
        _ if named(&[".jsonl", ".ndjson", ".json"]) => Ok(Format::Jsonl),
        _ if named(&[".csv", ".tsv"]) => Ok(Format::Csv),
        _ => {
            // Without a name that says so, only a header tells CSV from any other text.
            let line = String::from_utf8_lossy(first_line(bytes)).into_owned();
            let is_header = line
                .split([',', ';', '\t'])
                .any(|cell| is_question_name(cell.trim().trim_matches('"')));
            if is_header {
                Ok(Format::Csv)
            } else {
                Err(DatasetError::UnknownFormat {
                    path: path.to_owned(),
                })
            }
        }
    }
}

/// The first line that is not blank, trimmed.
fn first_line(bytes: &[u8]) -> &[u8] {
    let bytes = bytes.trim_ascii_start();
    let end = bytes.iter().position(|&byte| byte == b'\n');
    bytes
        .get(..end.unwrap_or(bytes.len()))
        .unwrap_or_default()
        .trim_ascii()
}

fn is_json_line(bytes: &[u8]) -> bool {
    serde_json::from_slice::<serde::de::IgnoredAny>(first_line(bytes)).is_ok()
}
