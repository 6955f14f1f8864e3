//! The comparison for a terminal: at most 80 columns for up to four runs, unless a name or a path
//! is longer.

use super::load::short;
use super::words::{RUN_FIGURES, excluded, gold, held, outcome, p_value, points, values, verdict};
use super::{Change, Comparison, Direction, Pair};
use crate::report::summary::wrapped;
use crate::report::table::{Align, Table, bold, grouped, percent, printable, rate};

/// Flips shown; the files have all changes.
const MAX_FLIPS: usize = 5;
/// Characters of a text on one line.
const MAX_TEXT_CHARS: usize = 79;

impl Comparison {
    /// `written` names what was written where, for the last section.
    pub fn render(&self, color: bool, written: Option<&str>) -> String {
        let mut sections = vec![self.heading(color), self.figures().render(color)];
        sections.extend(self.statuses(color));
        sections.extend(self.ledger_table(color));
        for pair in &self.pairs {
            sections.push(self.pair_section(pair, color));
        }
        for note in &self.notes {
            sections.push(wrapped(&format!("note: {}", printable(note))));
        }
        sections.extend(written.map(str::to_owned));
        sections.join("\n")
    }

    fn heading(&self, color: bool) -> String {
        let mut text = String::new();
        for run in &self.runs {
            let line = format!("{}  {}", run.label, printable(&run.name));
            text.push_str(&if color { bold(&line) } else { line });
            text.push('\n');
        }
        if !self.differences.is_empty() {
            text.push_str("\nNOT ONLY THE PRECISION DIFFERS (--force):\n");
        }
        for difference in &self.differences {
            text.push_str(&wrapped(&format!(
                "`{}` is {} in {}, {} in {}",
                difference.key,
                printable(&short(&difference.other)),
                self.label(difference.run),
                printable(&short(&difference.base)),
                self.label(0)
            )));
        }
        text
    }

    /// A run a column.
    fn figures(&self) -> Table {
        let mut table = self.run_columns("");
        for (name, figure) in RUN_FIGURES {
            let cells: Vec<Option<String>> = self.runs.iter().map(figure).collect();
            if cells.iter().any(Option::is_some) {
                push(
                    &mut table,
                    name,
                    cells.into_iter().map(Option::unwrap_or_default),
                );
            }
        }
        table
    }

    /// Samples of each status, whole and by group.
    fn statuses(&self, color: bool) -> Option<String> {
        let mut names: Vec<&String> = self
            .runs
            .iter()
            .flat_map(|run| run.statuses.keys())
            .collect();
        names.sort_unstable();
        names.dedup();
        let mut groups: Vec<&String> = Vec::new();
        for entry in self.runs.iter().flat_map(|run| &run.statuses_by_group) {
            if !groups.contains(&&entry.group) {
                groups.push(&entry.group);
            }
        }
        if names.is_empty() {
            return None;
        }
        let mut table = self.run_columns("status");
        let cell = |n: Option<&u64>| n.map_or_else(|| "-".to_owned(), |n| grouped(*n));
        for name in names {
            let all = self.runs.iter().map(|run| cell(run.statuses.get(name)));
            push(&mut table, name, all);
            // With one group or none its lines would repeat the whole.
            for group in groups.iter().filter(|_| groups.len() > 1) {
                let counts: Vec<Option<&u64>> = self
                    .runs
                    .iter()
                    .map(|run| {
                        let mut entries = run.statuses_by_group.iter();
                        let entry = entries.find(|entry| entry.group == **group)?;
                        entry.statuses.get(name)
                    })
                    .collect();
                if counts.iter().any(Option::is_some) {
                    push(
                        &mut table,
                        &format!("  {group}"),
                        counts.into_iter().map(cell),
                    );
                }
            }
        }
        Some(table.render(color))
    }

    fn ledger_table(&self, color: bool) -> Option<String> {
        if self.ledger.is_empty() {
            return None;
        }
        let mut alignment = vec![Align::Left; self.runs.len() + 1];
        alignment.extend(vec![Align::Left; self.pairs.len()]);
        let mut header = vec!["weights".to_owned()];
        header.extend(self.runs.iter().map(|run| run.label.clone()));
        for pair in &self.pairs {
            header.push(format!("values in {}", self.label(pair.run)));
        }
        let header: Vec<&str> = header.iter().map(String::as_str).collect();
        let mut table = Table::with_header(&alignment, &header);
        for class in &self.ledger {
            let sides = class.sides.iter();
            let held = sides.map(|side| side.as_ref().map_or_else(String::new, held));
            let verdicts = class
                .values
                .iter()
                .map(|verdict| values(*verdict).to_owned());
            push(&mut table, &class.class, held.chain(verdicts));
        }
        Some(table.render(color))
    }

    fn pair_section(&self, pair: &Pair, color: bool) -> String {
        let (base, other) = (self.label(0), self.label(pair.run));
        let title = format!(
            "{other} against {base}: {} questions",
            grouped(pair.n_questions)
        );
        let title = if color { bold(&title) } else { title };
        let mut text = format!("{title}\n{}", wrapped(&verdict(self, pair)));
        if let Some(excluded) = excluded(pair) {
            text.push_str(&format!("{excluded}\n"));
        }
        if let Some(table) = &pair.table {
            let columns = [Align::Left, Align::Right, Align::Right];
            let header = [
                String::new(),
                format!("{other} right"),
                format!("{other} wrong"),
            ];
            let header: Vec<&str> = header.iter().map(String::as_str).collect();
            let mut drawn = Table::with_header(&columns, &header);
            let mut line = |label: String, right, wrong| {
                drawn.push(vec![label, grouped(right), grouped(wrong)]);
            };
            line(format!("{base} right"), table.both_right, table.lost);
            line(format!("{base} wrong"), table.gained, table.both_wrong);
            text.push_str(&format!("\n{}", drawn.render(color)));
        }
        text.push_str(&format!("\n{}", self.tests_table(pair).render(color)));
        if !pair.by_group.is_empty() {
            text.push_str(&format!("\n{}", self.group_table(pair).render(color)));
        }
        if pair.n_changes > 0 {
            text.push_str(&format!("\n{}", causes_table(pair).render(color)));
            text.push_str(&self.flips(pair));
        }
        if let Some(divergence) = &pair.divergence {
            text.push_str(&format!("\n{}", divergence.render(color)));
        }
        text
    }

    fn tests_table(&self, pair: &Pair) -> Table {
        let mut table = Table::new(&[Align::Left, Align::Right, Align::Left]);
        let mut line = |label: &str, value: Option<String>, unit: String| {
            if let Some(value) = value {
                table.push(vec![label.to_owned(), value, unit]);
            }
        };
        // With one sample a question the table above and the runs' accuracies say it.
        if let (None, Some(base), Some(other)) =
            (&pair.table, pair.accuracy_base, pair.accuracy_other)
        {
            let of = format!("against {}: means over questions", percent(base));
            line("right samples", Some(percent(other)), of);
        }
        if let Some(estimate) = &pair.difference {
            let interval = format!(
                "points, 95 %: {} to {}",
                points(estimate.low),
                points(estimate.high)
            );
            line("difference", Some(points(estimate.difference)), interval);
            line("", Some(String::new()), estimate.method.clone());
        }
        let p = |p: Option<f64>| p.map(p_value);
        let tests = &pair.tests;
        line("p, McNemar exact", p(tests.mcnemar_exact_p), String::new());
        line("p, McNemar mid-p", p(tests.mcnemar_mid_p), String::new());
        let replicates = tests.n_permutations.unwrap_or(0);
        let seeded = format!("{} replicates, seed {}", grouped(replicates), self.seed);
        line("p, permutation", p(tests.permutation_p), seeded);
        if let Some(clustered) = &pair.clustered {
            let interval = format!(
                "{} clusters, 95 %: {} to {} points",
                clustered.n_clusters,
                points(clustered.low),
                points(clustered.high)
            );
            line("p, clustered", Some(p_value(clustered.p)), interval);
        }
        if self.pairs.len() > 1 {
            let over = format!("over {} comparisons", self.pairs.len());
            line("p, Holm-adjusted", p(tests.p_holm), over);
        }
        if let Some(detectable) = &pair.detectable {
            let value = format!("{:.1}", detectable.difference * 100.0);
            let what = "points, with 80 % power at 5 %".to_owned();
            line("detectable", Some(value), what);
            let name = detectable.formula.split(':').next().unwrap_or_default();
            let name = name.split(", ").next().unwrap_or_default();
            line("", Some(String::new()), name.to_owned());
        }
        let identity = &pair.identity;
        let of = format!("of {} samples", grouped(identity.n_samples));
        line(
            "same tokens",
            identity.same_tokens_share.map(percent),
            of.clone(),
        );
        line(
            "same log-prob bits",
            identity.same_bits_share.map(percent),
            of,
        );
        if let (Some(min), Some(max)) =
            (identity.first_difference_min, identity.first_difference_max)
        {
            let n_differ = identity.n_samples - identity.n_same_tokens;
            line(
                "first differing token",
                identity.first_difference_median.map(rate),
                format!("median of {} ({min} to {max})", grouped(n_differ)),
            );
        }
        table
    }

    fn group_table(&self, pair: &Pair) -> Table {
        let columns = [
            Align::Left,
            Align::Right,
            Align::Right,
            Align::Right,
            Align::Right,
            Align::Right,
            Align::Right,
        ];
        let (base, other) = (self.label(0), self.label(pair.run));
        let header = ["group", "n", &base, &other, "points", "lost", "gained"];
        let mut table = Table::with_header(&columns, &header);
        for group in &pair.by_group {
            table.push(vec![
                group.group.clone(),
                grouped(group.n_questions),
                percent(group.accuracy_base),
                percent(group.accuracy_other),
                points(group.difference),
                grouped(group.lost),
                grouped(group.gained),
            ]);
        }
        table
    }

    fn flips(&self, pair: &Pair) -> String {
        let mut text = String::new();
        let flips = || {
            let is_flip = |change: &&Change| change.direction != Direction::Neither;
            pair.changes.iter().filter(is_flip)
        };
        for change in flips().take(MAX_FLIPS) {
            let mut head = format!("\n{}: {}", change.key, change.cause.title());
            if let Some(gold) = gold(change) {
                head.push_str(&format!(", gold {gold}"));
            }
            if let Some(token) = change.first_differing_token {
                head.push_str(&format!(", differs from token {token}"));
            }
            text.push('\n');
            text.push_str(&line(&head));
            for (label, side) in [
                (self.label(0), &change.base),
                (self.label(pair.run), &change.other),
            ] {
                text.push_str(&line(&format!("  {label}  {}", outcome(side))));
                let written = side.final_text.as_ref().or(side.raw_tail.as_ref());
                if let Some(written) = written {
                    let spaced = written.split_whitespace().collect::<Vec<_>>().join(" ");
                    text.push_str(&line(&format!("     {spaced}")));
                }
            }
        }
        if flips().count() > MAX_FLIPS {
            let n_more = flips().count() - MAX_FLIPS;
            text.push_str(&format!("\n{n_more} more flips are in comparison.md\n"));
        }
        text
    }

    fn run_columns(&self, first: &str) -> Table {
        let mut alignment = vec![Align::Left];
        alignment.extend(vec![Align::Right; self.runs.len()]);
        let mut header = vec![first];
        header.extend(self.runs.iter().map(|run| run.label.as_str()));
        Table::with_header(&alignment, &header)
    }

    pub(super) fn label(&self, run: usize) -> String {
        self.runs
            .get(run)
            .map_or_else(String::new, |run| run.label.clone())
    }
}

fn causes_table(pair: &Pair) -> Table {
    let columns = [Align::Left, Align::Right, Align::Right, Align::Right];
    let header = ["changed samples", "lost", "gained", "neither"];
    let mut table = Table::with_header(&columns, &header);
    for count in &pair.causes {
        if count.lost + count.gained + count.neither > 0 {
            table.push(vec![
                count.cause.title().to_owned(),
                grouped(count.lost),
                grouped(count.gained),
                grouped(count.neither),
            ]);
        }
    }
    table
}

fn push(table: &mut Table, name: &str, cells: impl Iterator<Item = String>) {
    let mut row = vec![name.to_owned()];
    row.extend(cells);
    table.push(row);
}

/// One printable line, cut where the terminal ends.
fn line(text: &str) -> String {
    let text = text.trim_start_matches('\n');
    let mut cut: String = text.chars().take(MAX_TEXT_CHARS).collect();
    if cut.len() < text.len() {
        cut.push('…');
    }
    format!("{}\n", printable(&cut))
}
