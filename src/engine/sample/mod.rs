//! Which token comes next: pure functions of a logits row, the same rule on every backend.
//!
//! Order: temperature, top-k, top-p, renormalize. The nucleus is the shortest prefix in (logit
//! descending, id ascending) order whose mass reaches `top_p`; inside it the token with the
//! greatest scaled logit plus Gumbel noise wins, which draws from the renormalized softmax
//! (Gumbel-max). The noise of a token depends on seed, row, sample, position and token id alone,
//! so neither batch mates nor the order of work can change a draw.

mod nucleus;
pub(crate) mod philox;
#[cfg(test)]
mod reference;
mod softmax;
#[cfg(test)]
mod tests;

pub use philox::philox4x32;
pub use softmax::log_softmax_at;

use super::{SamplingParams, TokenId};
use nucleus::{Cut, PrefixSelect, order_key};
use softmax::{Mass, finite_max, ln, log_probability, mass, total_mass};

/// Everything besides the logits that decides a draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleKey {
    /// The run's seed.
    pub seed: u64,
    /// Hash of the row's key.
    pub row_hash: u64,
    /// Index of the sample within its row.
    pub sample: u32,
    /// Position of the token to be drawn.
    pub position: u32,
}

/// A drawn token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampled {
    pub token: TokenId,
    /// Log-probability under the untempered softmax of the whole vocabulary.
    pub logprob: f32,
}

/// A logits row holds NaN or an infinity (either sign: no layer of the model masks a token, so
/// an infinity is always an overflow), or is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("logits are not finite")]
pub struct NotFinite;

/// 64-bit hash of a logits row's bits: the wrapping sum over ids of
/// `mix((id << 32) | bits(logit))`, mixed with the length. The sum is free of order, so lanes and
/// threads may split the row in any way.
pub fn logits_hash(logits: &[f32]) -> u64 {
    let sum = (0u64..).zip(logits).fold(0u64, |sum, (id, logit)| {
        sum.wrapping_add(mix(id << 32 | u64::from(logit.to_bits())))
    });
    mix(sum ^ logits.len() as u64)
}

/// Adds a step's logits hash to a row's running trace hash; the order of the steps counts.
pub fn trace_hash(so_far: u64, logits_hash: u64) -> u64 {
    mix(so_far.rotate_left(23) ^ logits_hash)
}

/// The finalizer of splitmix64 (Steele, Lea and Flood 2014, variant 13 of Stafford).
#[inline(always)]
fn mix(mut word: u64) -> u64 {
    word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Draws tokens; holds the scratch, so nothing is allocated in a step.
#[derive(Debug)]
pub struct Sampler {
    masses: Vec<Mass>,
    keys: Vec<u32>,
    select: PrefixSelect,
}

/// Scratch that grows at its first draw.
impl Default for Sampler {
    fn default() -> Self {
        Self::new(0)
    }
}

impl Sampler {
    pub fn new(n_vocab: usize) -> Self {
        Self {
            masses: Vec::with_capacity(n_vocab),
            keys: Vec::with_capacity(n_vocab),
            select: PrefixSelect::new(n_vocab),
        }
    }

    /// The next token of a row with these logits `[n_vocab]`. A temperature that is not above 0
    /// is greedy; a tie goes to the lower id.
    ///
    /// # Errors
    /// [`NotFinite`] when a logit is NaN or infinite.
    pub fn sample(
        &mut self,
        logits: &[f32],
        key: &SampleKey,
        params: &SamplingParams,
    ) -> Result<Sampled, NotFinite> {
        let max = finite_max(logits)?;
        let token = if params.temperature > 0.0 {
            let cut = self.cut(logits, max, params);
            self.draw(logits, max, params.temperature, key, cut)
        } else {
            first_equal(logits, max)
        };
        let logit = logits.get(token).copied().ok_or(NotFinite)?;
        Ok(Sampled {
            token: token as TokenId,
            logprob: log_probability(logit, max, total_mass(logits, max)),
        })
    }

    /// The border of top-k and top-p together; `None` keeps all.
    fn cut(&mut self, logits: &[f32], max: f32, params: &SamplingParams) -> Option<Cut> {
        let keeps_k = params.top_k > 0 && (params.top_k as usize) < logits.len();
        // A NaN keeps the best token, as 0 does.
        let keeps_p = params.top_p < 1.0 || params.top_p.is_nan();
        if !keeps_k && !keeps_p {
            return None;
        }
        self.keys.clear();
        self.keys.extend(logits.iter().map(|&l| order_key(l)));
        let keys = &self.keys;
        let top_k = keeps_k
            .then(|| self.select.shortest(keys, u64::from(params.top_k), |_| 1))
            .flatten();
        if !keeps_p {
            return top_k;
        }
        self.masses.clear();
        self.masses
            .extend(logits.iter().map(|&l| mass((l - max) / params.temperature)));
        // The mass top-p is a share of: that of the tokens top-k has left.
        let total = (0u32..)
            .zip(keys)
            .zip(&self.masses)
            .filter(|((id, key), _)| top_k.is_none_or(|cut| cut.keeps(**key, *id)))
            .fold(0u64, |sum, (_, mass)| sum.wrapping_add(*mass));
        let target = share(total, params.top_p);
        // Both prefixes have one order and the target is within top-k's mass, so this prefix
        // ends within top-k by itself.
        let masses = &self.masses;
        self.select.shortest(keys, target, |id| masses[id])
    }

    /// Gumbel-max over the kept tokens.
    fn draw(
        &self,
        logits: &[f32],
        max: f32,
        temperature: f32,
        key: &SampleKey,
        cut: Option<Cut>,
    ) -> usize {
        let noise = NoiseStream::new(key);
        let mut best = (f64::NEG_INFINITY, 0usize);
        for (block, four) in logits.chunks(4).enumerate() {
            let first = block * 4;
            let kept = |lane: usize| {
                cut.is_none_or(|cut| {
                    let id = first + lane;
                    cut.keeps(self.keys[id], id as u32)
                })
            };
            if !(0..four.len()).any(kept) {
                continue;
            }
            let words = noise.block(block as u32);
            for (lane, (&logit, word)) in four.iter().zip(words).enumerate() {
                let scaled = f64::from((logit - max) / temperature);
                // An upper bound first: the two logarithms are needed for few tokens only.
                if scaled + gumbel_bound(word) <= best.0 || !kept(lane) {
                    continue;
                }
                let score = scaled + gumbel(word);
                if score > best.0 {
                    best = (score, first + lane);
                }
            }
        }
        best.1
    }
}

/// The lowest id whose logit is `max`.
fn first_equal(logits: &[f32], max: f32) -> usize {
    logits.iter().position(|&l| l == max).unwrap_or(0)
}

/// `total * top_p` rounded up, at least 1: the mass a nucleus must reach.
fn share(total: Mass, top_p: f32) -> Mass {
    const BITS: u32 = 53;
    let part = (f64::from(top_p) * (1u64 << BITS) as f64) as u64;
    let product = u128::from(total) * u128::from(part);
    let rounded_up = (product + ((1 << BITS) - 1)) >> BITS;
    (rounded_up as u64).clamp(1, total.max(1))
}

/// The noise words of one draw: four tokens share a Philox block.
struct NoiseStream {
    key: [u32; 2],
    tail: [u32; 2],
}

impl NoiseStream {
    fn new(key: &SampleKey) -> Self {
        let [row_low, row_high] = philox::halves(key.row_hash);
        let counter = [row_low, row_high, key.sample, key.position];
        let [k0, k1, t0, t1] = philox4x32(counter, philox::halves(key.seed));
        Self {
            key: [k0, k1],
            tail: [t0, t1],
        }
    }

    /// Words of the tokens `4 * block .. 4 * block + 4`.
    #[inline(always)]
    fn block(&self, block: u32) -> [u32; 4] {
        philox4x32([block, 0, self.tail[0], self.tail[1]], self.key)
    }
}

/// Gumbel noise `-ln(-ln u)` of a word, `u = (word + 1/2) / 2^32`.
#[inline]
fn gumbel(word: u32) -> f64 {
    let u = (f64::from(word) + 0.5) * 2f64.powi(-32);
    -ln(-ln(u))
}

/// A cheap value never below [`gumbel`]: with v = 1 - u, -ln(1 - v) >= v, and v is at least
/// 2^(-1 - leading zeros of the complemented word).
#[inline(always)]
fn gumbel_bound(word: u32) -> f64 {
    /// A hair above ln 2, so that rounding cannot turn the bound around.
    const LN2_ABOVE: f64 = std::f64::consts::LN_2 + 1e-9;
    f64::from((!word).leading_zeros() + 1) * LN2_ABOVE
}
