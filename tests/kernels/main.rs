//! Each CPU kernel against its slow `reference`, on every SIMD path this machine has, at the
//! edges of its shapes; and all paths against each other, bit for bit: products are exact ones here,
//! and of these `amx` gives the common bits as well.

mod attention;
mod common;
mod elements;
mod products;
#[path = "../support/mod.rs"]
mod support;
