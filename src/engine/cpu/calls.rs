//! Counts of matrix products by operation and weight format: the run's own word for which
//! kernels did the work.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::engine::checkpoint::MatrixFormat;

/// An operation that comes in several weight formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// A dense projection.
    Matmul,
    /// All experts' half of a layer.
    MoeMatmul,
}

/// Calls by operation and format.
#[derive(Default)]
pub struct Calls([[AtomicU64; 3]; 2]);

const OPS: [(Op, &str); 2] = [(Op::Matmul, "matmul"), (Op::MoeMatmul, "moe_matmul")];

const FORMATS: [MatrixFormat; 3] = [
    MatrixFormat::Mxfp4,
    MatrixFormat::Mxint8,
    MatrixFormat::Bf16,
];

impl Calls {
    /// Counts one call.
    pub fn count(&self, op: Op, format: MatrixFormat) {
        self.0[op as usize][format as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Calls by kernel name, such as `moe_matmul_mxfp4`; those that never ran are left out.
    pub fn by_name(&self) -> BTreeMap<String, u64> {
        let mut calls = BTreeMap::new();
        for (op, name) in OPS {
            for format in FORMATS {
                let n = self.0[op as usize][format as usize].load(Ordering::Relaxed);
                if n > 0 {
                    calls.insert(format!("{name}_{}", format.name()), n);
                }
            }
        }
        calls
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_under_their_kernels_name() {
        let calls = Calls::default();
        calls.count(Op::MoeMatmul, MatrixFormat::Mxint8);
        calls.count(Op::MoeMatmul, MatrixFormat::Mxint8);
        calls.count(Op::Matmul, MatrixFormat::Bf16);
        let expected = [("matmul_bf16", 1), ("moe_matmul_mxint8", 2)];
        let expected = expected.map(|(name, n)| (name.to_owned(), n));
        assert_eq!(calls.by_name(), BTreeMap::from(expected));
    }
}
