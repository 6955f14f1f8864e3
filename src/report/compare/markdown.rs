//! `comparison.md`: the comparison for a code forge or a notebook, with every changed sample and
//! both of its texts. What a model wrote stands in fenced blocks and is never taken for markup.

use super::load::short;
use super::words::{
    RUN_FIGURES, excluded, first_differences, gold, held, outcome, p_value, points, values, verdict,
};
use super::{Change, Comparison, Pair};
use crate::report::table::{grouped, percent};

impl Comparison {
    pub fn to_markdown(&self) -> String {
        let mut text = String::from("# Comparison\n\n");
        for run in &self.runs {
            text.push_str(&format!("- **{}** {}\n", run.label, code(&run.name)));
        }
        if !self.differences.is_empty() {
            text.push_str("\n**Not only the precision differs (`--force`):**\n\n");
        }
        for difference in &self.differences {
            text.push_str(&format!(
                "- `{}` is {} in {}, {} in {}\n",
                difference.key,
                code(&short(&difference.other)),
                self.label(difference.run),
                code(&short(&difference.base)),
                self.label(0)
            ));
        }
        for pair in &self.pairs {
            text.push_str(&format!("\n{}\n", verdict(self, pair)));
        }
        for note in &self.notes {
            text.push_str(&format!("\nNote: {}\n", cell(note)));
        }
        text.push_str("\n## Runs\n\n");
        self.push_runs(&mut text);
        self.push_statuses(&mut text);
        self.push_ledger(&mut text);
        for pair in &self.pairs {
            self.push_pair(&mut text, pair);
        }
        text
    }

    fn push_runs(&self, text: &mut String) {
        self.push_header(text, "");
        for (name, figure) in RUN_FIGURES {
            let cells: Vec<Option<String>> = self.runs.iter().map(figure).collect();
            if cells.iter().any(Option::is_some) {
                let cells = cells.into_iter().map(Option::unwrap_or_default).collect();
                push_row(text, name.trim(), cells);
            }
        }
    }

    fn push_statuses(&self, text: &mut String) {
        let mut names: Vec<(Option<&String>, &String)> = Vec::new();
        for run in &self.runs {
            let all = run.statuses.keys().map(|status| (None, status));
            let by_group = run.statuses_by_group.iter().flat_map(|entry| {
                let statuses = entry.statuses.keys();
                statuses.map(move |status| (Some(&entry.group), status))
            });
            for name in all.chain(by_group) {
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        }
        names.sort_by_key(|(group, _)| group.is_some());
        text.push_str("\n## Statuses\n\n");
        self.push_header(text, "samples");
        for (group, status) in names {
            let counts = self.runs.iter().map(|run| {
                let statuses = match group {
                    None => Some(&run.statuses),
                    Some(group) => run
                        .statuses_by_group
                        .iter()
                        .find(|entry| entry.group == *group)
                        .map(|entry| &entry.statuses),
                };
                let count = statuses.and_then(|statuses| statuses.get(status));
                grouped(count.copied().unwrap_or(0))
            });
            let name = match group {
                None => status.clone(),
                Some(group) => format!("{group}: {status}"),
            };
            push_row(text, &name, counts.collect());
        }
    }

    fn push_ledger(&self, text: &mut String) {
        if self.ledger.is_empty() {
            return;
        }
        text.push_str("\n## Weights\n\n| class |");
        for run in &self.runs {
            text.push_str(&format!(" {} |", run.label));
        }
        for pair in &self.pairs {
            text.push_str(&format!(" values in {} |", self.label(pair.run)));
        }
        let n_columns = self.runs.len() + self.pairs.len() + 1;
        text.push_str(&format!("\n|{}\n", " --- |".repeat(n_columns)));
        for class in &self.ledger {
            let sides = class.sides.iter();
            let held = sides.map(|side| side.as_ref().map_or_else(String::new, held));
            let verdicts = class
                .values
                .iter()
                .map(|verdict| values(*verdict).to_owned());
            push_row(text, &class.class, held.chain(verdicts).collect());
        }
    }

    fn push_pair(&self, text: &mut String, pair: &Pair) {
        let (base, other) = (self.label(0), self.label(pair.run));
        text.push_str(&format!(
            "\n## {other} against {base}\n\n{} questions, {} samples",
            grouped(pair.n_questions),
            grouped(pair.n_samples)
        ));
        if let Some(excluded) = excluded(pair) {
            text.push_str(&format!("; {excluded}"));
        }
        text.push_str(".\n");
        if let Some(table) = &pair.table {
            text.push_str(&format!(
                "\n| | {other} right | {other} wrong |\n| --- | ---: | ---: |\n"
            ));
            let counts = |right, wrong| vec![grouped(right), grouped(wrong)];
            push_row(
                text,
                &format!("{base} right"),
                counts(table.both_right, table.lost),
            );
            push_row(
                text,
                &format!("{base} wrong"),
                counts(table.gained, table.both_wrong),
            );
        }
        text.push('\n');
        self.push_tests(text, pair);
        if !pair.by_group.is_empty() {
            text.push_str(&format!(
                "\n| group | questions | {base} | {other} | points | lost | gained |\n\
                 | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
            ));
        }
        for group in &pair.by_group {
            let cells = vec![
                grouped(group.n_questions),
                percent(group.accuracy_base),
                percent(group.accuracy_other),
                points(group.difference),
                grouped(group.lost),
                grouped(group.gained),
            ];
            push_row(text, &group.group, cells);
        }
        text.push_str(
            "\n| changed samples | lost | gained | neither |\n| --- | ---: | ---: | ---: |\n",
        );
        for count in &pair.causes {
            let cells = [count.lost, count.gained, count.neither].map(grouped);
            push_row(text, count.cause.title(), cells.to_vec());
        }
        if let Some(divergence) = &pair.divergence {
            text.push_str(&divergence.to_markdown());
        }
        for change in &pair.changes {
            self.push_change(text, pair, change);
        }
    }

    fn push_tests(&self, text: &mut String, pair: &Pair) {
        let mut line = |line: String| text.push_str(&format!("- {line}\n"));
        if let (Some(base), Some(other)) = (pair.accuracy_base, pair.accuracy_other) {
            line(format!(
                "accuracy {} in {}, {} in {}, over the questions that count",
                percent(base),
                self.label(0),
                percent(other),
                self.label(pair.run)
            ));
        }
        if let Some(estimate) = &pair.difference {
            line(format!(
                "difference {} points, 95 % interval {} to {} ({})",
                points(estimate.difference),
                points(estimate.low),
                points(estimate.high),
                estimate.method
            ));
        }
        let tests = &pair.tests;
        for (name, p) in [
            ("McNemar, exact", tests.mcnemar_exact_p),
            ("McNemar, mid-p", tests.mcnemar_mid_p),
            ("sign-flip permutation", tests.permutation_p),
            ("clustered", pair.clustered.map(|clustered| clustered.p)),
            (
                "Holm-adjusted",
                tests.p_holm.filter(|_| self.pairs.len() > 1),
            ),
        ] {
            if let Some(p) = p {
                line(format!("p {} ({name})", p_value(p)));
            }
        }
        if let Some(n) = tests.n_bootstrap {
            line(format!("{} replicates, seed {}", grouped(n), self.seed));
        }
        if let Some(clustered) = &pair.clustered {
            line(format!(
                "{} clusters: standard error {:.2} points, 95 % interval {} to {}",
                clustered.n_clusters,
                clustered.standard_error * 100.0,
                points(clustered.low),
                points(clustered.high)
            ));
        }
        if let Some(detectable) = &pair.detectable {
            line(format!(
                "detectable with 80 % power at 5 %: {:.1} points ({})",
                detectable.difference * 100.0,
                detectable.formula
            ));
        }
        let identity = &pair.identity;
        if let (Some(tokens), Some(bits)) = (identity.same_tokens_share, identity.same_bits_share) {
            line(format!(
                "of {} samples {} have the same tokens, {} the same log-probability bits, too",
                grouped(identity.n_samples),
                percent(tokens),
                percent(bits)
            ));
        }
        if let Some(differences) = first_differences(identity) {
            line(differences);
        }
    }

    fn push_change(&self, text: &mut String, pair: &Pair, change: &Change) {
        text.push_str(&format!(
            "\n### {}: {}, {}\n\n",
            code(&change.key),
            change.direction.name(),
            change.cause.title()
        ));
        let mut facts = vec![format!("sample {}", change.sample)];
        facts.extend(gold(change).map(|gold| format!("gold {}", code(&gold))));
        let token = change.first_differing_token;
        facts.extend(token.map(|token| format!("first differing token {token}")));
        text.push_str(&format!("{}\n", facts.join(", ")));
        for (label, side) in [
            (self.label(0), &change.base),
            (self.label(pair.run), &change.other),
        ] {
            text.push_str(&format!("\n{label}: {}\n", code(&outcome(side))));
            if let Some(written) = side.final_text.as_ref().or(side.raw_tail.as_ref()) {
                text.push_str(&fenced(written));
            }
        }
    }

    fn push_header(&self, text: &mut String, first: &str) {
        text.push_str(&format!("| {first} |"));
        for run in &self.runs {
            text.push_str(&format!(" {} |", run.label));
        }
        text.push_str(&format!("\n| --- |{}\n", " ---: |".repeat(self.runs.len())));
    }
}

fn push_row(text: &mut String, name: &str, cells: Vec<String>) {
    text.push_str(&format!("| {} |", cell(name)));
    for value in cells {
        text.push_str(&format!(" {} |", cell(&value)));
    }
    text.push('\n');
}

/// Text that markup leaves alone, on one line.
fn cell(text: &str) -> String {
    let mut out = String::new();
    for char in text.chars() {
        match char {
            '|' | '<' | '>' | '*' | '_' | '`' | '[' | ']' | '\\' | '#' => {
                out.push('\\');
                out.push(char);
            }
            '&' => out.push_str("&amp;"),
            char if char.is_control() => out.push(' '),
            char => out.push(char),
        }
    }
    out
}

/// A code span: one line, between more backticks than it holds.
fn code(text: &str) -> String {
    let line: String = text
        .chars()
        .map(|char| if char.is_control() { ' ' } else { char })
        .collect();
    let ticks = "`".repeat(longest_ticks(&line) + 1);
    let pad = if line.starts_with('`') || line.ends_with('`') || line.is_empty() {
        " "
    } else {
        ""
    };
    format!("{ticks}{pad}{line}{pad}{ticks}")
}

/// A fenced block, between more backticks than it holds.
fn fenced(text: &str) -> String {
    let ticks = "`".repeat((longest_ticks(text) + 1).max(3));
    let text: String = text
        .chars()
        .map(|char| match char {
            '\n' | '\t' => char,
            char if char.is_control() => '\u{fffd}',
            char => char,
        })
        .collect();
    format!("{ticks}text\n{}\n{ticks}\n", text.trim_end_matches('\n'))
}

fn longest_ticks(text: &str) -> usize {
    text.split(|char| char != '`')
        .map(str::len)
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_model_wrote_is_no_markup() {
        assert_eq!(cell("a|b<script>\n"), "a\\|b\\<script\\> ");
        assert_eq!(code("x`y"), "``x`y``");
        assert_eq!(code("`"), "`` ` ``");
        assert_eq!(fenced("a\n````\n# b\n"), "`````text\na\n````\n# b\n`````\n");
    }
}
