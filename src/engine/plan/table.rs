//! Ledger, plan and grid as text for a terminal.

use std::fmt;

use super::{BatchSize, GridCell, LedgerEntry, MemoryPlan, PrecisionFit};

/// Bytes as a person reads them: `12.82 GiB`, `640.0 MiB`, `312 B`.
pub fn bytes_text(bytes: u64) -> String {
    const KIB: f64 = 1024.0;
    let value = bytes as f64;
    if value < KIB {
        format!("{bytes} B")
    } else if value < KIB * KIB {
        format!("{:.1} KiB", value / KIB)
    } else if value < KIB * KIB * KIB {
        format!("{:.1} MiB", value / (KIB * KIB))
    } else {
        format!("{:.2} GiB", value / (KIB * KIB * KIB))
    }
}

/// The ledger, a line a class, with the totals.
pub fn ledger_table(ledger: &[LedgerEntry]) -> String {
    struct Table<'a>(&'a [LedgerEntry]);
    impl fmt::Display for Table<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write_ledger(f, self.0)
        }
    }
    Table(ledger).to_string()
}

fn write_ledger(f: &mut fmt::Formatter<'_>, ledger: &[LedgerEntry]) -> fmt::Result {
    let mut rows = vec![["weights", "held as", "stored", "loaded", "values"].map(str::to_owned)];
    for entry in ledger {
        let values = match (entry.lossless, entry.relative_error) {
            (Some(true), _) => "exact".to_owned(),
            (Some(false), Some(error)) => format!("changed, error {:.2} %", 100.0 * error),
            (Some(false), None) => "changed".to_owned(),
            (None, _) => "quantized at load".to_owned(),
        };
        rows.push([
            entry.class.clone(),
            entry.scheme.clone(),
            bytes_text(entry.stored_bytes),
            bytes_text(entry.loaded_bytes),
            values,
        ]);
    }
    let sum = |of: fn(&LedgerEntry) -> u64| ledger.iter().map(of).sum::<u64>();
    rows.push([
        "total".to_owned(),
        String::new(),
        bytes_text(sum(|e| e.stored_bytes)),
        bytes_text(sum(|e| e.loaded_bytes)),
        String::new(),
    ]);
    write_aligned(f, &rows, &[false, false, true, true, false])
}

/// The ledger, then the plan, a line a use.
impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_ledger(f, &self.ledger)?;
        writeln!(f)?;

        let shape = &self.shape;
        let origin = match self.batch {
            BatchSize::Auto => "auto",
            BatchSize::Slots(_) => "given",
        };
        let pages = if shape.n_pages < self.full_pages {
            format!(
                "{} pages of the {} that all slots at full context would take",
                shape.n_pages, self.full_pages
            )
        } else {
            format!("{} pages", shape.n_pages)
        };
        let forks = match shape.n_forks {
            0 => String::new(),
            n => format!(" + {n} shared prefixes"),
        };
        let mut plan = vec![
            ["memory plan".to_owned(), String::new(), String::new()],
            [
                "weights".to_owned(),
                bytes_text(self.memory.weights_bytes),
                String::new(),
            ],
            [
                "kv cache".to_owned(),
                bytes_text(self.memory.kv_bytes),
                format!(
                    "{}, {} slots ({origin}){forks} x {} positions, {pages}",
                    self.kv_scheme, shape.n_slots, shape.max_context
                ),
            ],
            [
                "workspace".to_owned(),
                bytes_text(self.memory.workspace_bytes),
                format!("prefill passes of {} tokens", shape.prefill_rows),
            ],
        ];
        if self.driver_bytes > 0 {
            plan.push([
                "driver".to_owned(),
                bytes_text(self.driver_bytes),
                "code, captured graphs and rounding, by estimate".to_owned(),
            ]);
        }
        plan.push([
            "total".to_owned(),
            bytes_text(self.total_bytes),
            format!("budget {}", bytes_text(self.budget_bytes)),
        ]);
        write_aligned(f, &plan, &[false, true, false])
    }
}

/// Slots down, contexts across; a `*` marks what exceeds the budget.
pub fn grid_table(cells: &[Vec<GridCell>], budget_bytes: u64) -> String {
    struct Table<'a>(&'a [Vec<GridCell>], u64);
    impl fmt::Display for Table<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let Self(cells, budget_bytes) = *self;
            let contexts = cells.first().into_iter().flatten();
            let head = ["slots".to_owned()]
                .into_iter()
                .chain(contexts.map(|cell| format!("context {}", cell.max_context)));
            let mut rows = vec![head.collect::<Vec<String>>()];
            for line in cells {
                let n_slots = line.first().map_or(0, |cell| cell.n_slots);
                let mut row = vec![n_slots.to_string()];
                row.extend(line.iter().map(|cell| {
                    let over = if cell.total_bytes > budget_bytes {
                        "*"
                    } else {
                        " "
                    };
                    format!("{}{over}", bytes_text(cell.total_bytes))
                }));
                rows.push(row);
            }
            let right = vec![true; rows.iter().map(Vec::len).max().unwrap_or(0)];
            write_aligned(f, &rows, &right)
        }
    }
    Table(cells, budget_bytes).to_string()
}

/// Precisions down, contexts across: the largest number of slots, each at its full context.
pub fn fit_table(fits: &[PrecisionFit]) -> String {
    struct Table<'a>(&'a [PrecisionFit]);
    impl fmt::Display for Table<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let contexts = self.0.first().map_or(&[][..], |fit| &fit.cells);
            let head = ["precision", "weights", "fits"].map(str::to_owned);
            let contexts = contexts
                .iter()
                .map(|cell| format!("context {}", cell.max_context));
            let mut rows = vec![head.into_iter().chain(contexts).collect::<Vec<String>>()];
            for fit in self.0 {
                let yes = if fit.fits { "yes" } else { "no" };
                let head = [
                    fit.precision.to_owned(),
                    bytes_text(fit.weights_bytes),
                    yes.to_owned(),
                ];
                let cells = fit.cells.iter().map(|cell| match cell.n_slots {
                    0 => "-".to_owned(),
                    super::MAX_FIT_SLOTS.. => format!("{}+", super::MAX_FIT_SLOTS),
                    n => n.to_string(),
                });
                rows.push(head.into_iter().chain(cells).collect());
            }
            let width = rows.iter().map(Vec::len).max().unwrap_or(0);
            let right: Vec<bool> = (0..width).map(|column| column == 1 || column > 2).collect();
            write_aligned(f, &rows, &right)
        }
    }
    Table(fits).to_string()
}

/// Writes rows with columns padded to their widest cell, no blanks at line ends.
fn write_aligned<R: AsRef<[String]>>(
    f: &mut fmt::Formatter<'_>,
    rows: &[R],
    right: &[bool],
) -> fmt::Result {
    let mut widths = vec![0; right.len()];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row.as_ref()) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in rows {
        let mut line = String::new();
        for ((cell, &width), &right) in row.as_ref().iter().zip(&widths).zip(right) {
            if !line.is_empty() {
                line.push_str("  ");
            }
            line.push_str(&if right {
                format!("{cell:>width$}")
            } else {
                format!("{cell:<width$}")
            });
        }
        writeln!(f, "{}", line.trim_end())?;
    }
    Ok(())
}
