//! The figures against scipy's, statsmodels' and numpy's, by `tests/golden/make_compare_stats.py`.

use serde::Deserialize;

use super::cluster::clustered_mean;
use super::holm::holm;
use super::mcnemar::mcnemar;
use super::normal::two_sided_p;
use super::power::{detectable_mean, detectable_pairs};
use super::resample::{N_REPLICATES, bootstrap_mean, quantile, sign_flip_p};
use super::tango::tango;

/// Two ways to write one formula in f64, or two root finders.
const TOLERANCE: f64 = 1e-9;

/// Two Monte-Carlo figures may be this many standard errors of their difference apart: 12 figures
/// with fixed seeds, each beyond it by chance once in 15,000.
const MONTE_CARLO_ERRORS: f64 = 4.0;

#[derive(Deserialize)]
struct Golden {
    tables: Vec<Table>,
    means: Vec<Mean>,
    holm: Vec<Holm>,
    normal: Vec<Normal>,
    resampled: Vec<Resampled>,
    clustered: Vec<Clustered>,
}

#[derive(Deserialize)]
struct Table {
    lost: u64,
    gained: u64,
    n: u64,
    exact_p: f64,
    mid_p: f64,
    low: f64,
    high: f64,
    detectable: Option<f64>,
}

#[derive(Deserialize)]
struct Mean {
    deviation: f64,
    n: u64,
    detectable: f64,
}

#[derive(Deserialize)]
struct Holm {
    p: Vec<f64>,
    adjusted: Vec<f64>,
}

#[derive(Deserialize)]
struct Normal {
    z: f64,
    p: f64,
}

#[derive(Deserialize)]
struct Resampled {
    values: Vec<f64>,
    low: f64,
    high: f64,
    permutation_p: f64,
    /// Standard error of the bounds with one replicate; it falls with the replicates' root.
    low_error_of_one: f64,
    high_error_of_one: f64,
    n_replicates: f64,
}

#[derive(Deserialize)]
struct Clustered {
    values: Vec<f64>,
    clusters: Vec<String>,
    mean: f64,
    standard_error: f64,
    low: f64,
    high: f64,
    p: f64,
}

fn golden() -> Golden {
    let text = include_str!("../../tests/golden/stats/compare.json");
    serde_json::from_str(text).expect("the golden file is JSON")
}

fn close(what: &str, found: f64, expected: f64) {
    // Absolute near 1, relative for tiny p-values.
    let allowed = TOLERANCE * expected.abs().clamp(1e-3, 1.0);
    assert!(
        (found - expected).abs() <= allowed,
        "{what}: {found}, not {expected}"
    );
}

#[test]
fn mcnemar_tango_and_power_equal_the_golden_ones() {
    let tables = golden().tables;
    assert!(tables.len() >= 15);
    for table in tables {
        let Table {
            lost, gained, n, ..
        } = table;
        let at = |what: &str| format!("{what} of {lost} lost, {gained} gained of {n}");
        let test = mcnemar(lost, gained);
        close(&at("exact p"), test.exact_p, table.exact_p);
        close(&at("mid p"), test.mid_p, table.mid_p);
        let interval = tango(gained, lost, n).expect("n is not 0");
        close(&at("low"), interval.low, table.low);
        close(&at("high"), interval.high, table.high);
        let found = detectable_pairs((lost + gained) as f64 / n as f64, n);
        match (found, table.detectable) {
            (Some(found), Some(expected)) => close(&at("detectable"), found, expected),
            (found, expected) => assert_eq!(found, expected, "{}", at("detectable")),
        }
    }
    assert_eq!(tango(0, 0, 0), None);
    assert_eq!(tango(2, 2, 3), None);
}

#[test]
fn means_holm_and_the_normal_tail_equal_the_golden_ones() {
    let golden = golden();
    for mean in golden.means {
        let found = detectable_mean(mean.deviation, mean.n).expect("there is spread");
        close("detectable mean", found, mean.detectable);
    }
    for case in golden.holm {
        let p: Vec<Option<f64>> = case.p.iter().copied().map(Some).collect();
        for (found, expected) in holm(&p).iter().zip(case.adjusted) {
            close("Holm", found.expect("it was given"), expected);
        }
    }
    for case in golden.normal {
        close(&format!("p of {}", case.z), two_sided_p(case.z), case.p);
        let relative = (two_sided_p(-case.z) - case.p).abs() / case.p;
        assert!(relative < TOLERANCE, "p of {}: {relative}", case.z);
    }
    assert_eq!(
        holm(&[None, Some(0.03), Some(0.02)]),
        [None, Some(0.04), Some(0.04)]
    );
    assert_eq!(detectable_mean(0.0, 10), None);
}

#[test]
fn clustered_errors_equal_the_golden_ones() {
    for case in golden().clustered {
        let clusters: Vec<&str> = case.clusters.iter().map(String::as_str).collect();
        let found = clustered_mean(&case.values, &clusters).expect("there are enough clusters");
        close("mean", found.mean, case.mean);
        close("standard error", found.standard_error, case.standard_error);
        close("low", found.interval.low, case.low);
        close("high", found.interval.high, case.high);
        close("p", found.p, case.p);
        let few = clustered_mean(&case.values[..10], &clusters[..10]);
        assert_eq!(few, None, "two clusters are too few");
    }
}

#[test]
fn resampling_agrees_with_numpy_within_monte_carlo_error() {
    for case in golden().resampled {
        let spread = (1.0 / f64::from(N_REPLICATES) + 1.0 / case.n_replicates).sqrt();
        let interval = bootstrap_mean(&case.values, 7).expect("there are values");
        for (found, expected, error) in [
            (interval.low, case.low, case.low_error_of_one),
            (interval.high, case.high, case.high_error_of_one),
        ] {
            // Means of quarters stand on a grid: a quantile can be a step beside another.
            let step = 0.25 / case.values.len() as f64;
            let allowed = MONTE_CARLO_ERRORS * error * spread + step;
            assert!(
                (found - expected).abs() <= allowed,
                "{found}, not {expected} within {allowed}"
            );
        }
        let found = sign_flip_p(&case.values, 7).expect("there are values");
        let p = case.permutation_p;
        let allowed = MONTE_CARLO_ERRORS * (p * (1.0 - p)).sqrt() * spread + 1.0 / 10_001.0;
        assert!(
            (found - p).abs() <= allowed,
            "p {found}, not {p} within {allowed}"
        );
    }
}

#[test]
fn a_seed_gives_the_same_figures_and_another_others() {
    let values: Vec<f64> = (0..200).map(|i| f64::from(i % 7) / 7.0 - 0.4).collect();
    assert_eq!(bootstrap_mean(&values, 1), bootstrap_mean(&values, 1));
    assert_ne!(bootstrap_mean(&values, 1), bootstrap_mean(&values, 2));
    assert_eq!(sign_flip_p(&values, 1), sign_flip_p(&values, 1));
    assert_ne!(sign_flip_p(&values, 1), sign_flip_p(&values, 2));
    assert_eq!(sign_flip_p(&[0.0; 9], 0), Some(1.0), "nothing moved");
    assert_eq!(bootstrap_mean(&[], 0), None);
    assert_eq!(sign_flip_p(&[], 0), None);
    assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.75), 3.0);
}
