//! Norm scales, biases and sinks.

use crate::engine::cpu::buffer::{Buffer, Plain};
use crate::quant::bf16;

/// A norm's scale, a bias or the sinks: bf16 as released, or f32 where the file holds f32.
pub enum Vector {
    Bf16(Buffer<u16>),
    F32(Buffer<f32>),
}

impl Vector {
    pub fn len(&self) -> usize {
        match self {
            Self::Bf16(values) => values.len(),
            Self::F32(values) => values.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn n_bytes(&self) -> u64 {
        match self {
            Self::Bf16(values) => values.n_bytes(),
            Self::F32(values) => values.n_bytes(),
        }
    }

    #[inline(always)]
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Self::Bf16(values) => bf16::to_f32(values[i]),
            Self::F32(values) => values[i],
        }
    }

    /// Values `start..start + N`, zeros past the end.
    #[inline(always)]
    pub fn lanes<const N: usize>(&self, start: usize) -> [f32; N] {
        #[inline(always)]
        fn take<T: Plain, const N: usize>(
            values: &[T],
            start: usize,
            value: impl Fn(T) -> f32,
        ) -> [f32; N] {
            let mut lanes = [0.0; N];
            match values[start..].first_chunk::<N>() {
                Some(values) => {
                    for lane in 0..N {
                        lanes[lane] = value(values[lane]);
                    }
                }
                None => {
                    for (lane, &x) in lanes.iter_mut().zip(&values[start..]) {
                        *lane = value(x);
                    }
                }
            }
            lanes
        }
        match self {
            Self::Bf16(values) => take(values, start, bf16::to_f32),
            Self::F32(values) => take(values, start, |x| x),
        }
    }
}
