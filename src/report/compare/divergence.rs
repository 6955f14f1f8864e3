//! How far one run's precision is from another's, as a comparison keeps and shows it. Measured by
//! `job::divergence`, with the model; here are only figures.

use crate::report::table::{Align, Table, grouped, percent};

/// The distance between two precisions on one run's outputs. Logarithms are natural.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Divergence {
    /// The precision that wrote the outputs, and the one set against it.
    pub precision: String,
    pub other_precision: String,
    pub n_rows: usize,
    pub n_tokens: usize,
    /// Rows whose forced log-probabilities under their own precision add up to the logged bits:
    /// all of them, or something is wrong.
    pub n_rows_equal_to_log: usize,
    /// Kullback-Leibler divergence of the other precision's distribution from the run's own.
    pub mean_kl: Option<f64>,
    pub p99_kl: Option<f64>,
    /// Share of positions where both put the same token first.
    pub top1_agreement: Option<f64>,
    /// Of the run's outputs under each precision.
    pub perplexity: Option<f64>,
    pub other_perplexity: Option<f64>,
    pub by_position: Vec<PositionRange>,
}

/// The same for a range of output positions, counted from 0.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PositionRange {
    pub from: usize,
    /// One past the last position that occurs.
    pub to: usize,
    pub n_tokens: usize,
    pub mean_kl: f64,
    pub top1_agreement: f64,
}

impl Divergence {
    /// The figures and their course over the output, for a terminal.
    pub fn render(&self, color: bool) -> String {
        let mut text = format!(
            "divergence of {} from {}, on A's outputs ({} tokens)\n",
            self.other_precision,
            self.precision,
            grouped(self.n_tokens as u64)
        );
        let mut figures = Table::new(&[Align::Left, Align::Right, Align::Left]);
        for (name, value, unit) in self.figures() {
            figures.push(vec![name.to_owned(), value, unit]);
        }
        text += &figures.render(color);
        let columns = [Align::Left, Align::Right, Align::Right, Align::Right];
        let header = ["output tokens", "n", "mean KL", "same top token"];
        let mut course = Table::with_header(&columns, &header);
        for cells in self.course() {
            course.push(cells);
        }
        text + "\n" + &course.render(color)
    }

    /// The same as Markdown.
    pub fn to_markdown(&self) -> String {
        let mut text = format!(
            "\nDivergence of {} from {}, on A's outputs ({} tokens):\n\n",
            self.other_precision,
            self.precision,
            grouped(self.n_tokens as u64)
        );
        for (name, value, unit) in self.figures() {
            text += &format!("- {name}: {value} {unit}\n");
        }
        text +=
            "\n| output tokens | n | mean KL | same top token |\n| --- | ---: | ---: | ---: |\n";
        for cells in self.course() {
            text += &format!("| {} |\n", cells.join(" | "));
        }
        text
    }

    fn figures(&self) -> Vec<(&'static str, String, String)> {
        let nats = |value: Option<f64>| value.map_or(String::new(), |v| format!("{v:.3e}"));
        let number = |value: Option<f64>| value.map_or(String::new(), |v| format!("{v:.4}"));
        vec![
            ("mean KL", nats(self.mean_kl), "nats a token".to_owned()),
            ("99th percentile KL", nats(self.p99_kl), "nats".to_owned()),
            (
                "same top token",
                self.top1_agreement.map_or(String::new(), percent),
                String::new(),
            ),
            (
                "perplexity",
                number(self.perplexity),
                format!(
                    "under {}: {}",
                    self.other_precision,
                    number(self.other_perplexity)
                ),
            ),
            (
                "noise floor",
                format!("{}/{}", self.n_rows_equal_to_log, self.n_rows),
                "samples equal to the logged bits under their own precision".to_owned(),
            ),
        ]
    }

    fn course(&self) -> impl Iterator<Item = Vec<String>> {
        self.by_position.iter().map(|range| {
            vec![
                format!("{} to {}", range.from + 1, range.to),
                grouped(range.n_tokens as u64),
                format!("{:.3e}", range.mean_kl),
                percent(range.top1_agreement),
            ]
        })
    }
}
