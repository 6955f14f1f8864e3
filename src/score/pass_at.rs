//! pass@k: the chance that at least one of k samples is right.

/// The unbiased estimate 1 - C(n - c, k) / C(n, k) from `n` samples of which `n_correct` are right
/// (Chen et al. 2021, arXiv:2107.03374), as the product of 1 - k/i for i from n - c + 1 to n:
/// binomials of hundreds of samples overflow, the product does not. Absent unless 1 <= k <= n.
pub fn pass_at(k: u32, n: u32, n_correct: u32) -> Option<f64> {
    if k == 0 || k > n || n_correct > n {
        return None;
    }
    let n_wrong = n - n_correct;
    if n_wrong < k {
        return Some(1.0);
    }
    let all_wrong: f64 = (n_wrong + 1..=n)
        .map(|i| 1.0 - f64::from(k) / f64::from(i))
        .product();
    Some(1.0 - all_wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The product of up to hundreds of factors, each rounded once.
    const TOLERANCE: f64 = 1e-13;

    #[test]
    fn equals_the_binomials_by_hand() {
        for (k, n, c, expected) in [
            (1, 1, 0, 0.0),
            (1, 1, 1, 1.0),
            // c/n.
            (1, 8, 2, 0.25),
            // 1 - C(3,2)/C(5,2) = 1 - 3/10.
            (2, 5, 2, 0.7),
            // 1 - C(6,4)/C(8,4) = 1 - 15/70.
            (4, 8, 2, 1.0 - 15.0 / 70.0),
            // 1 - C(7,3)/C(10,3) = 1 - 35/120.
            (3, 10, 3, 1.0 - 35.0 / 120.0),
            (8, 8, 1, 1.0),
            (8, 8, 0, 0.0),
            (4, 8, 5, 1.0),
            // 1 - C(198,100)/C(200,100) = 1 - (100 * 99)/(200 * 199).
            (100, 200, 2, 1.0 - 9_900.0 / 39_800.0),
        ] {
            let found = pass_at(k, n, c).expect("k is in range");
            assert!(
                (found - expected).abs() < TOLERANCE,
                "pass@{k} of {c}/{n} is {found}, not {expected}"
            );
        }
        assert_eq!(pass_at(9, 8, 1), None);
        assert_eq!(pass_at(0, 8, 1), None);
    }
}
