//! McNemar's test of a 2 by 2 table of pairs (McNemar 1947): given that `lost + gained` questions
//! changed, each went either way by a fair coin.

/// Two-sided p-values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct McNemar {
    /// The binomial test of the smaller count.
    pub exact_p: f64,
    /// The same with half of the observed table's own probability: less conservative
    /// (Fagerland, Lydersen and Laake 2013).
    pub mid_p: f64,
}

/// Tests the pairs that changed. With none there is no evidence: both are 1.
pub fn mcnemar(lost: u64, gained: u64) -> McNemar {
    let n = lost + gained;
    let smaller = lost.min(gained);
    // P(X <= smaller) for X of n fair coins, from the largest term down.
    let own = (ln_choose(n, smaller) - n as f64 * std::f64::consts::LN_2).exp();
    let mut term = own;
    let mut tail = own;
    for k in (1..=smaller).rev() {
        term *= k as f64 / (n - k + 1) as f64;
        tail += term;
        if term < tail * 1e-18 {
            break;
        }
    }
    McNemar {
        exact_p: (2.0 * tail).min(1.0),
        mid_p: (2.0 * tail - own).clamp(0.0, 1.0),
    }
}

/// The logarithm of `n` over `k`. A plain sum of logarithms: its rounding grows with the count's
/// root only, and `n` is a number of questions.
fn ln_choose(n: u64, k: u64) -> f64 {
    let mut sum = 0.0;
    let mut lost = 0.0;
    for i in 1..=k.min(n - k) {
        // Kahan's summation.
        let term = ((n - i + 1) as f64 / i as f64).ln() - lost;
        let next = sum + term;
        lost = (next - sum) - term;
        sum = next;
    }
    sum
}
