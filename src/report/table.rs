//! Aligned plain-text tables for a terminal, and the spellings of figures in them.

/// How a column's cells stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    Left,
    Right,
}

/// A table: columns padded to their widest cell, two spaces apart, no lines.
#[derive(Clone, Debug)]
pub struct Table {
    alignment: Vec<Align>,
    rows: Vec<Vec<String>>,
    has_header: bool,
}

/// Cells of the first column are cut to this many characters, so that the usual table fits 80
/// columns whatever the groups are called.
const MAX_LABEL_CHARS: usize = 28;

impl Table {
    pub fn new(alignment: &[Align]) -> Self {
        Self {
            alignment: alignment.to_vec(),
            rows: Vec::new(),
            has_header: false,
        }
    }

    /// A table with a first row that is set off (bold where there is color).
    pub fn with_header(alignment: &[Align], header: &[&str]) -> Self {
        let mut table = Self::new(alignment);
        table.has_header = true;
        table.push(header.iter().map(|cell| (*cell).to_owned()).collect());
        table
    }

    /// Adds a row; missing cells are empty, cells beyond the columns are dropped.
    pub fn push(&mut self, mut cells: Vec<String>) {
        cells.resize(self.alignment.len(), String::new());
        for (index, cell) in cells.iter_mut().enumerate() {
            *cell = printable(cell);
            if index == 0 {
                *cell = shortened(cell, MAX_LABEL_CHARS);
            }
        }
        self.rows.push(cells);
    }

    pub fn render(&self, color: bool) -> String {
        let mut widths = vec![0; self.alignment.len()];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        for (index, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for ((cell, width), align) in row.iter().zip(&widths).zip(&self.alignment) {
                if !line.is_empty() {
                    line.push_str("  ");
                }
                // Not by a width of `format!`, which takes no more than 65,535.
                let pad = " ".repeat(width.saturating_sub(cell.chars().count()));
                match align {
                    Align::Left => line.extend([cell.as_str(), pad.as_str()]),
                    Align::Right => line.extend([pad.as_str(), cell.as_str()]),
                }
            }
            let line = line.trim_end();
            if color && self.has_header && index == 0 {
                text.push_str(&bold(line));
            } else {
                text.push_str(line);
            }
            text.push('\n');
        }
        text
    }
}

/// Text in bold, for a terminal.
pub fn bold(text: &str) -> String {
    format!("\u{1b}[1m{text}\u{1b}[0m")
}

/// Whether standard output takes color: a terminal, and `NO_COLOR` unset or empty.
pub fn color_wanted() -> bool {
    std::io::IsTerminal::is_terminal(&std::io::stdout())
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Text from a data set must not steer the terminal.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|char| if char.is_control() { '\u{fffd}' } else { char })
        .collect()
}

fn shortened(text: &str, max_chars: usize) -> String {
    if text.chars().count() <= max_chars {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(max_chars.saturating_sub(1)).collect();
    short.push('…');
    short
}

/// `86.0 %`.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// `1,234,567`.
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Three significant figures or whole numbers: `0.123`, `4.57`, `89.1`, `1,235`.
pub fn rate(value: f64) -> String {
    match value {
        value if value >= 100.0 => grouped(value.round() as u64),
        value if value >= 10.0 => format!("{value:.1}"),
        value if value >= 1.0 => format!("{value:.2}"),
        value => format!("{value:.3}"),
    }
}

/// Binary units: `512 B`, `12.8 MiB`, `20.62 GiB`.
pub fn bytes(count: u64) -> String {
    const KIB: f64 = 1024.0;
    let value = count as f64;
    if value < KIB {
        format!("{count} B")
    } else if value < KIB * KIB {
        format!("{:.1} KiB", value / KIB)
    } else if value < KIB * KIB * KIB {
        format!("{:.1} MiB", value / KIB / KIB)
    } else {
        format!("{:.2} GiB", value / KIB / KIB / KIB)
    }
}

/// `0.25 s`, `12.3 s`, `4 min 05 s`, `2 h 03 min`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    if seconds < 10.0 {
        format!("{seconds:.2} s")
    } else if seconds < 60.0 {
        format!("{seconds:.1} s")
    } else if whole < 3600 {
        format!("{} min {:02} s", whole / 60, whole % 60)
    } else {
        format!("{} h {:02} min", whole / 3600, whole / 60 % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_have_no_trailing_space() {
        let mut table = Table::with_header(&[Align::Left, Align::Right], &["group", "n"]);
        table.push(vec!["sümme".to_owned(), "1,234".to_owned()]);
        table.push(vec!["a\u{1b}[2J".to_owned()]);
        let expected = "group      n\nsümme  1,234\na\u{fffd}[2J\n";
        assert_eq!(table.render(false), expected);
        assert!(
            table
                .render(true)
                .starts_with("\u{1b}[1mgroup      n\u{1b}[0m\n")
        );
    }

    #[test]
    fn a_cell_may_have_any_length() {
        let long = "x".repeat(70_000);
        for align in [Align::Left, Align::Right] {
            let mut table = Table::new(&[Align::Left, align]);
            table.push(vec!["profile".to_owned(), long.clone()]);
            table.push(vec!["model".to_owned(), "y".to_owned()]);
            let text = table.render(false);
            assert!(text.starts_with(&format!("profile  {long}\n")));
        }
    }

    #[test]
    fn figures_are_spelled_for_reading() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(percent(0.8604), "86.0 %");
        assert_eq!(rate(1234.5), "1,235");
        assert_eq!(rate(12.34), "12.3");
        assert_eq!(rate(0.1234), "0.123");
        assert_eq!(bytes(13_764_607_672), "12.82 GiB");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(duration(245.2), "4 min 05 s");
        assert_eq!(duration(7380.0), "2 h 03 min");
        assert_eq!(shortened(&"x".repeat(40), 5), "xxxx…");
    }
}
