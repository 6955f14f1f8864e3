//! What a person reads at the end of a run: the summary, as a table and as one JSON object, and
//! the pages of [`html`].
//!
//! Works on finished figures (result rows, the manifest, telemetry totals) and loads no model.
//! polars does the aggregation. Nothing here prints; the caller chooses the stream.

pub mod compare;
pub mod html;
pub mod inspection;
pub mod lint;
pub mod over_samples;
pub mod rescore;
pub mod summary;
pub mod table;
pub mod tally;

#[cfg(test)]
mod formats;
