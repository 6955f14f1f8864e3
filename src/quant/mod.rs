//! Number formats: pure functions between bits and `f32`.
//!
//! Formats are named by their specifications (OCP Microscaling Formats 1.0): `mxfp4` has E2M1
//! codes and one E8M0 scale a block of 32, `mxint8` 8-bit integers under such a scale. Nothing
//! here knows a tensor, a file or a kernel's layout.

pub mod bf16;
pub mod mxfp4;
pub mod mxint8;
