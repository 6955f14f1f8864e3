use super::*;

/// Upper 0.1 % points of the chi-square distribution for 1, 2, … degrees of freedom
/// (Abramowitz and Stegun, table 26.8).
const CHI_SQUARE_0_001: [f64; 11] = [
    10.828, 13.816, 16.266, 18.467, 20.515, 22.458, 24.322, 26.124, 27.877, 29.588, 31.264,
];

const TWELVE: [f32; 12] = [
    0.3, 1.9, -0.4, 1.1, 2.0, -1.3, 0.0, 1.9, 0.7, -0.9, 1.5, 0.2,
];

fn params(temperature: f32, top_k: u32, top_p: f32) -> SamplingParams {
    SamplingParams {
        temperature,
        top_p,
        top_k,
        seed: 0,
    }
}

fn key(seed: u64, position: u32) -> SampleKey {
    SampleKey {
        seed,
        row_hash: 0x1234_5678_9abc_def0,
        sample: 3,
        position,
    }
}

/// Logits that look random, from Philox itself.
fn random_logits(n: usize, seed: u32, spread: f32) -> Vec<f32> {
    (0..n as u32)
        .map(|i| {
            let [a, b, ..] = philox4x32([i, seed, 0, 0], [7, 9]);
            ((a >> 8) as f32 / 16_777_216.0 + (b >> 8) as f32 / 16_777_216.0 - 1.0) * spread
        })
        .collect()
}

fn assert_draws_follow(params: &SamplingParams, seed: u64) {
    const N_DRAWS: u32 = 100_000;
    let expected = reference::probabilities(&TWELVE, params);
    let mut sampler = Sampler::new(TWELVE.len());
    let mut counts = [0u32; TWELVE.len()];
    for position in 0..N_DRAWS {
        let drawn = sampler
            .sample(&TWELVE, &key(seed, position), params)
            .expect("these logits are finite");
        counts[drawn.token as usize] += 1;
    }
    let mut statistic = 0.0;
    let mut n_kept = 0;
    for (&count, p) in counts.iter().zip(expected) {
        if p == 0.0 {
            assert_eq!(count, 0, "a token outside the nucleus was drawn");
        } else {
            let mean = p * f64::from(N_DRAWS);
            statistic += (f64::from(count) - mean).powi(2) / mean;
            n_kept += 1;
        }
    }
    assert!(n_kept >= 2, "nothing to test with {n_kept} tokens");
    let critical = CHI_SQUARE_0_001[n_kept - 2];
    assert!(
        statistic < critical,
        "chi-square {statistic} reaches {critical} with {n_kept} tokens"
    );
}

#[test]
fn draws_follow_temperature_alone() {
    assert_draws_follow(&params(1.0, 0, 1.0), 11);
    assert_draws_follow(&params(0.6, 0, 1.0), 12);
    assert_draws_follow(&params(3.0, 0, 1.0), 13);
}

#[test]
fn draws_follow_top_k() {
    assert_draws_follow(&params(1.0, 5, 1.0), 21);
    assert_draws_follow(&params(1.0, 2, 1.0), 22);
}

#[test]
fn draws_follow_top_p() {
    assert_draws_follow(&params(1.0, 0, 0.9), 31);
    assert_draws_follow(&params(1.0, 0, 0.5), 32);
}

#[test]
fn draws_follow_all_three_together() {
    assert_draws_follow(&params(0.8, 6, 0.85), 41);
    assert_draws_follow(&params(1.7, 9, 0.95), 42);
}

#[test]
fn samples_rows_and_seeds_draw_independently() {
    // 12 x 12 counts of pairs drawn at one position under two keys, with known probabilities:
    // 143 degrees of freedom, upper 0.1 % point 201.1 (Wilson-Hilferty).
    let params = params(1.0, 0, 1.0);
    let p = reference::probabilities(&TWELVE, &params);
    let base = key(5, 0);
    let others = [
        SampleKey { seed: 6, ..base },
        SampleKey { sample: 4, ..base },
        SampleKey {
            row_hash: base.row_hash ^ 1,
            ..base
        },
    ];
    let mut sampler = Sampler::new(TWELVE.len());
    for other in others {
        let mut counts = [[0u32; 12]; 12];
        for position in 0..100_000 {
            let mut draw = |key: SampleKey| {
                let key = SampleKey { position, ..key };
                let drawn = sampler.sample(&TWELVE, &key, &params);
                drawn.expect("these logits are finite").token as usize
            };
            counts[draw(base)][draw(other)] += 1;
        }
        let mut statistic = 0.0;
        for (a, row) in counts.iter().enumerate() {
            for (b, &count) in row.iter().enumerate() {
                let mean = p[a] * p[b] * 100_000.0;
                statistic += (f64::from(count) - mean).powi(2) / mean;
            }
        }
        assert!(statistic < 201.1, "chi-square {statistic}");
    }
}

#[test]
fn fast_draws_equal_the_sorted_reference() {
    let settings = [
        params(1.0, 0, 1.0),
        params(0.7, 0, 0.9),
        params(1.3, 40, 1.0),
        params(1.0, 50, 0.95),
        params(0.2, 0, 0.3),
        params(1.0, 1, 1.0),
    ];
    for n_vocab in [1, 3, 4, 5, 800, 2049] {
        let mut sampler = Sampler::new(n_vocab);
        for seed in 0..20 {
            let logits = random_logits(n_vocab, seed, 6.0);
            for params in settings {
                let key = key(u64::from(seed), seed * 31);
                let fast = sampler
                    .sample(&logits, &key, &params)
                    .expect("these logits are finite");
                assert_eq!(fast.token, reference::draw(&logits, &key, &params));
                let forced = log_softmax_at(&logits, fast.token);
                assert_eq!(fast.logprob.to_bits(), forced.to_bits());
            }
        }
    }
}

#[test]
fn a_large_vocabulary_draws_as_the_reference_does() {
    let logits = random_logits(201_088, 3, 12.0);
    let mut sampler = Sampler::new(logits.len());
    for (position, params) in [
        (1, params(1.0, 0, 1.0)),
        (2, params(1.0, 0, 0.95)),
        (3, params(0.8, 200, 0.9)),
    ] {
        let drawn = sampler
            .sample(&logits, &key(77, position), &params)
            .expect("these logits are finite");
        assert_eq!(
            drawn.token,
            reference::draw(&logits, &key(77, position), &params)
        );
    }
}

#[test]
fn greedy_takes_the_lowest_best_id() {
    let mut sampler = Sampler::new(6);
    let logits = [1.0, 4.0, -2.0, 4.0, 4.0, 3.9];
    for temperature in [0.0, -1.0, f32::NAN] {
        let drawn = sampler.sample(&logits, &key(1, 1), &params(temperature, 3, 0.5));
        assert_eq!(drawn.map(|s| s.token), Ok(1));
    }
    let zeros = [-0.0, 0.0];
    let drawn = sampler.sample(&zeros, &key(1, 1), &params(0.0, 0, 1.0));
    assert_eq!(drawn.map(|s| s.token), Ok(0));
}

#[test]
fn top_p_near_zero_keeps_the_best_token_alone() {
    let mut sampler = Sampler::new(TWELVE.len());
    for top_p in [0.0, 1e-30, 1e-3, -1.0, f32::NAN] {
        for position in 0..200 {
            let drawn = sampler.sample(&TWELVE, &key(8, position), &params(5.0, 0, top_p));
            assert_eq!(drawn.map(|s| s.token), Ok(4), "top_p {top_p}");
        }
    }
}

#[test]
fn top_p_one_and_top_k_zero_keep_all() {
    let mut sampler = Sampler::new(TWELVE.len());
    let mut seen = [false; TWELVE.len()];
    for position in 0..2000 {
        let drawn = sampler
            .sample(&TWELVE, &key(9, position), &params(50.0, 0, 1.0))
            .expect("these logits are finite");
        seen[drawn.token as usize] = true;
    }
    assert_eq!(seen, [true; TWELVE.len()]);
}

#[test]
fn ties_at_the_border_of_the_nucleus_go_to_the_lower_ids() {
    // Eight equal logits: the masses are equal, so top_p = 3/8 keeps exactly three.
    let equal = [2.5f32; 8];
    let mut sampler = Sampler::new(equal.len());
    for (top_p, n_kept) in [(0.375, 3), (0.3751, 4), (0.25, 2), (0.01, 1)] {
        let mut seen = [false; 8];
        for position in 0..500 {
            let drawn = sampler
                .sample(&equal, &key(10, position), &params(1.0, 0, top_p))
                .expect("these logits are finite");
            seen[drawn.token as usize] = true;
        }
        let expected: [bool; 8] = std::array::from_fn(|id| id < n_kept);
        assert_eq!(seen, expected, "top_p {top_p}");
    }
}

#[test]
fn a_draw_does_not_depend_on_earlier_draws() {
    let logits = random_logits(800, 1, 5.0);
    let params = params(1.0, 100, 0.9);
    let mut used = Sampler::new(800);
    for position in 0..50 {
        let other = random_logits(800, position + 100, 9.0);
        let _ = used.sample(&other, &key(3, position), &params);
        let fresh = Sampler::new(800).sample(&logits, &key(4, position), &params);
        assert_eq!(used.sample(&logits, &key(4, position), &params), fresh);
    }
}

#[test]
fn logits_that_are_not_finite_are_refused() {
    let mut sampler = Sampler::new(3);
    for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let drawn = sampler.sample(&[0.0, special, 1.0], &key(1, 1), &params(0.0, 0, 1.0));
        assert_eq!(drawn, Err(NotFinite));
    }
}

#[test]
fn the_gumbel_bound_is_never_below_the_noise() {
    let edges = [0, 1, u32::MAX, u32::MAX - 1, 1 << 31, (1 << 31) - 1];
    let spread = (0..200_000u32).map(|i| philox4x32([i, 0, 0, 0], [1, 2])[0]);
    let near_one = (0..31).map(|bits| u32::MAX - (1 << bits));
    for word in edges.into_iter().chain(spread).chain(near_one) {
        assert!(gumbel_bound(word) >= gumbel(word), "word {word:#x}");
    }
}

/// The definition is fixed: these values may not change, or old trace hashes become worthless.
#[test]
fn hashes_keep_their_definition() {
    let row = [0.0f32, 1.0, -1.5, 3.25e-7];
    // From ten lines of Python that follow the doc comment.
    assert_eq!(logits_hash(&row), 0x91e8_0210_289c_7f96);
    assert_ne!(logits_hash(&row), logits_hash(&[1.0, 0.0, -1.5, 3.25e-7]));
    assert_ne!(logits_hash(&[0.0]), logits_hash(&[-0.0]));
    assert_ne!(logits_hash(&[0.0]), logits_hash(&[0.0, 0.0]));
    assert_ne!(
        trace_hash(trace_hash(0, 1), 2),
        trace_hash(trace_hash(0, 2), 1)
    );
}
