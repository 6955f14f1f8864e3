//! Numbers that depend on the profile's seed and a row's key alone: never on the run's `--seed`,
//! the order of the rows or how many there are.

use sha2::{Digest, Sha256};

/// A row's numbers for one purpose: the n-th is the first 8 bytes, read as big-endian, of the
/// SHA-256 of `seed:purpose:n:key`.
pub struct Draws<'a> {
    seed: u64,
    purpose: &'static str,
    key: &'a str,
    n_drawn: u64,
}

impl<'a> Draws<'a> {
    pub fn new(seed: u64, purpose: &'static str, key: &'a str) -> Self {
        Self {
            seed,
            purpose,
            key,
            n_drawn: 0,
        }
    }

    /// A number below `bound`, which is not 0: the high part of the product, at most 2^-64 bound
    /// from uniform.
    pub fn below(&mut self, bound: usize) -> usize {
        let text = format!(
            "{}:{}:{}:{}",
            self.seed, self.purpose, self.n_drawn, self.key
        );
        self.n_drawn += 1;
        let digest = Sha256::digest(text.as_bytes());
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&digest[..8]);
        let high = (u128::from(u64::from_be_bytes(bytes)) * bound as u128) >> 64;
        // Below `bound`, so it fits.
        high as usize
    }
}
