//! A CSV's bytes to its table, with what is wrong about the bytes.

use super::{Kind, Notes, Table, TableRow};

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Reads a CSV. Bytes that are not text are told and read as they can be.
pub(super) fn read(bytes: &[u8], quote_all: bool, notes: &mut Notes) -> Table {
    let bytes = match bytes.strip_prefix(BYTE_ORDER_MARK) {
        Some(rest) => {
            notes.file(
                Kind::ByteOrderMark,
                "it begins with a byte-order mark, which becomes part of the first column's name"
                    .to_owned(),
            );
            rest
        }
        None => bytes,
    };
    let line_of = |at: usize| {
        let before = bytes.get(..at).unwrap_or_default();
        before.iter().filter(|&&byte| byte == b'\n').count() as u64 + 1
    };
    if let Err(error) = std::str::from_utf8(bytes) {
        let at = error.valid_up_to();
        notes.cell(
            Kind::NotUtf8,
            None,
            Some(line_of(at)),
            None,
            format!("byte {at} is not UTF-8"),
        );
    }
    if let Some(at) = bytes.iter().position(|&byte| byte == 0) {
        notes.cell(
            Kind::Nul,
            None,
            Some(line_of(at)),
            None,
            format!("byte {at} is NUL, where many readers end a cell or stop"),
        );
    }
    let table = cells(bytes, notes);
    if quote_all {
        check_quotes(bytes, &table, notes);
    }
    table
}

fn cells(bytes: &[u8], notes: &mut Notes) -> Table {
    let mut reader = ::csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .from_reader(bytes);
    let mut table = Table::default();
    let mut record = ::csv::ByteRecord::new();
    let mut is_header = true;
    // Reading out of memory, with any number of cells, cannot fail.
    while reader.read_byte_record(&mut record).unwrap_or(false) {
        let cells = record.iter().map(|cell| String::from_utf8_lossy(cell));
        if is_header {
            table.columns = cells.map(std::borrow::Cow::into_owned).collect();
            is_header = false;
            continue;
        }
        let line = record.position().map_or(0, ::csv::Position::line);
        let cells: Vec<Option<String>> = cells.map(|cell| Some(cell.into_owned())).collect();
        if cells.len() != table.columns.len() {
            notes.cell(
                Kind::CellCount,
                Some(table.rows.len() + 1),
                Some(line),
                None,
                format!(
                    "{} cells, where the header has {}",
                    cells.len(),
                    table.columns.len()
                ),
            );
        }
        table.rows.push(TableRow { line, cells });
    }
    table
}

/// Every cell must begin with a quote: what the CSV reader does not tell, so the bytes are gone
/// through once more.
fn check_quotes(bytes: &[u8], table: &Table, notes: &mut Notes) {
    let (mut row, mut column, mut line) = (0usize, 0usize, 1u64);
    let mut at_start = true;
    let mut inside = false;
    for &byte in bytes {
        if byte == b'\n' {
            line += 1;
        }
        if inside {
            // A doubled quote leaves and enters again.
            inside = byte != b'"';
            continue;
        }
        let is_blank_line = at_start && column == 0 && matches!(byte, b'\n' | b'\r');
        if is_blank_line {
            continue;
        }
        if at_start && byte != b'"' {
            notes.cell(
                Kind::NotQuoted,
                (row > 0).then_some(row),
                Some(line - u64::from(byte == b'\n')),
                Some(&column_name(table, column)),
                "the cell is not in quotes, and the profile wants all in quotes".to_owned(),
            );
        }
        at_start = false;
        match byte {
            b'"' => inside = true,
            b',' => {
                column += 1;
                at_start = true;
            }
            b'\n' => {
                row += 1;
                column = 0;
                at_start = true;
            }
            _ => {}
        }
    }
}

fn column_name(table: &Table, column: usize) -> String {
    let number = || format!("number {}", column + 1);
    table.columns.get(column).cloned().unwrap_or_else(number)
}
