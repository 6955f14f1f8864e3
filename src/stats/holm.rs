//! Holm's step-down adjustment (Holm 1979): p-values of several comparisons with one base.

/// Adjusted p-values in the order given. An absent p stays absent and is no comparison.
pub fn holm(p_values: &[Option<f64>]) -> Vec<Option<f64>> {
    let mut order: Vec<(usize, f64)> = p_values
        .iter()
        .enumerate()
        .filter_map(|(index, p)| Some((index, (*p)?)))
        .collect();
    order.sort_by(|a, b| a.1.total_cmp(&b.1));
    let mut adjusted = vec![None; p_values.len()];
    let mut highest: f64 = 0.0;
    for (rank, (index, p)) in order.iter().enumerate() {
        let n_left = (order.len() - rank) as f64;
        highest = highest.max((p * n_left).min(1.0));
        if let Some(slot) = adjusted.get_mut(*index) {
            *slot = Some(highest);
        }
    }
    adjusted
}
