//! Numbers that differ by position and are the same in every run.

use podium::quant::bf16;

/// SplitMix64 (Steele, Lea and Flood 2014), from its seed.
pub struct Random(pub u64);

impl Random {
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        word ^ (word >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.word() % n as u64) as usize
    }

    /// Between -1 and 1.
    pub fn value(&mut self) -> f32 {
        (self.word() >> 40) as f32 / 8_388_608.0 - 1.0
    }

    pub fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }

    /// Near enough to a standard normal: a sum of uniforms.
    pub fn normal(&mut self) -> f32 {
        let sum: f64 = (0..12)
            .map(|_| (self.word() >> 11) as f64 / (1u64 << 53) as f64)
            .sum();
        (sum - 6.0) as f32
    }

    /// bf16 of values between -1 and 1.
    pub fn bits(&mut self, n: usize) -> Vec<u16> {
        self.wide_bits(n, 0)
    }

    /// Values times a power of two between `-powers` and `powers`.
    pub fn wide_bits(&mut self, n: usize, powers: i32) -> Vec<u16> {
        let value = |_| {
            let power = (self.word() >> 33) as i32 % (2 * powers + 1) - powers;
            bf16::from_f32(self.value() * 2f32.powi(power))
        };
        (0..n).map(value).collect()
    }
}
