//! The tile unit: whether there is one, how it is set, and the loops over its instructions.
//!
//! Stable Rust has neither intrinsics nor detection for AMX, but its assembler knows the instructions.
//! A block of assembly is a whole loop: tiles hold nothing that outlives it but their shapes, which a
//! [`TileUnit`]'s value stands for.

/// Four C, and of what they are products.
///
/// Sums are rows of 32 f32; `w` is a tile's pairs `[n_steps * 16][32]`; `rows` is a block of rows, of
/// 16 pairs each, `a_step` words further on for each step.
#[derive(Clone, Copy)]
pub struct Operands {
    pub sums: *mut f32,
    pub w: *const u32,
    pub rows: *const u32,
    pub a_step: usize,
    pub n_steps: usize,
}

/// What multiplies tiles: the CPU's unit, or in tests its emulation.
///
/// The operands' memory must hold the rows that the unit was set to, and 16 where another block stands
/// before it.
#[allow(unsafe_code, reason = "operands are pointers")]
pub trait TileUnit {
    /// Until the value is dropped the thread's unit takes so many rows, at least 1, in first blocks and
    /// in second ones.
    fn set(n_rows: [usize; 2]) -> Self;

    /// Two blocks of rows by a tile; the first has 16 rows.
    ///
    /// # Safety
    /// The operands lie in memory that may be read, and sums written.
    unsafe fn two_blocks(&self, of: &Operands);

    /// One block by two tiles, of the same rows; the unit was set to the same number of rows for both
    /// blocks, or to one block alone.
    ///
    /// # Safety
    /// As [`TileUnit::two_blocks`].
    unsafe fn two_tiles(&self, low: &Operands, high: &Operands);

    /// One block by one tile.
    ///
    /// # Safety
    /// As [`TileUnit::two_blocks`].
    unsafe fn one(&self, of: &Operands);
}

/// Whether the CPU has AMX-BF16 and the system lets this process use it, which is asked for once.
pub fn is_available() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    {
        static AVAILABLE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        *AVAILABLE.get_or_init(|| x86::has_unit() && x86::permitted())
    }
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    false
}

/// The CPU's unit. A thread's tiles are its own, so the value stays with its thread; dropping it, in a
/// panic as well, leaves the thread without tiles, whose 8 KiB the system would save at each switch.
pub struct Hardware {
    _of_thread: std::marker::PhantomData<*const ()>,
}

#[cfg(not(target_arch = "x86_64"))]
#[allow(unsafe_code, reason = "the trait's")]
impl TileUnit for Hardware {
    fn set(_: [usize; 2]) -> Self {
        unreachable!("no unit");
    }
    unsafe fn two_blocks(&self, _: &Operands) {}
    unsafe fn two_tiles(&self, _: &Operands, _: &Operands) {}
    unsafe fn one(&self, _: &Operands) {}
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "instructions that Rust does not know")]
mod x86 {
    use super::{Hardware, Operands, TileUnit};
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    use std::marker::PhantomData;

    /// Whether the CPU says AMX-TILE and AMX-BF16, and the system keeps the state of tiles.
    #[cfg(target_os = "linux")]
    pub fn has_unit() -> bool {
        /// Leaf 7, EDX: AMX-BF16 and AMX-TILE.
        const AMX: u32 = 1 << 22 | 1 << 24;
        /// XCR0: the shapes of tiles and what they hold.
        const TILES: u64 = 1 << 17 | 1 << 18;
        #[target_feature(enable = "xsave")]
        fn state_kept() -> u64 {
            // SAFETY: the CPU has the instruction; register 0 always exists.
            unsafe { _xgetbv(0) }
        }
        if __cpuid(0).eax < 7 || __cpuid_count(7, 0).edx & AMX != AMX {
            return false;
        }
        // AVX is detected only where the system lets programs ask for the state it keeps.
        is_x86_feature_detected!("xsave")
            && is_x86_feature_detected!("avx")
            // SAFETY: the CPU has XSAVE, by the lines above.
            && unsafe { state_kept() } & TILES == TILES
    }

    /// Asks the system for the state of tiles, for all threads of the process (Linux,
    /// Documentation/arch/x86/xstate.rst).
    #[cfg(target_os = "linux")]
    pub fn permitted() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: the call takes two numbers and touches no memory of ours.
        let failed = unsafe {
            libc::syscall(
                libc::SYS_arch_prctl,
                ARCH_REQ_XCOMP_PERM,
                XFEATURE_XTILEDATA,
            )
        };
        failed == 0
    }

    /// What `ldtilecfg` reads.
    #[repr(C, align(64))]
    struct Shapes {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        /// Bytes of a row of each tile; there are 8.
        row_bytes: [u16; 16],
        n_rows: [u8; 16],
    }

    /// Bytes between rows of sums, and between rows of a B.
    const WIDE: usize = 128;
    /// Bytes between rows of an A.
    const NARROW: usize = 64;

    /// The loop over the steps of K of four or two C. Tiles 0 to 3 are C, 4 and 5 A, 6 and 7 B; `{c}`,
    /// `{w}` and `{rows}` are where the operands begin, `{wide}` and `{narrow}` the strides above. C, then
    /// each step, then C back: the lines in between are the caller's.
    macro_rules! steps {
        (
            load: [$($load:literal),*], step: [$($step:literal),*], store: [$($store:literal),*],
            $of:expr, $($operand:tt)*
        ) => {
            asm!(
                $($load,)*
                "2:",
                $($step,)*
                "add {rows}, {a_step}",
                "add {w}, 2048",
                "dec {n}",
                "jnz 2b",
                $($store,)*
                w = inout(reg) $of.w => _,
                rows = inout(reg) $of.rows => _,
                n = inout(reg) $of.n_steps => _,
                a_step = in(reg) $of.a_step * size_of::<u32>(),
                c = in(reg) $of.sums,
                wide = in(reg) WIDE,
                narrow = in(reg) NARROW,
                $($operand)*
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            )
        };
    }

    impl TileUnit for Hardware {
        fn set(n_rows: [usize; 2]) -> Self {
            let n_rows = n_rows.map(|n| {
                assert!((1..=16).contains(&n), "a tile has up to 16 rows");
                n as u8
            });
            let [a, b] = n_rows;
            let mut shapes = Shapes {
                palette: 1,
                start_row: 0,
                reserved: [0; 14],
                row_bytes: [0; 16],
                n_rows: [0; 16],
            };
            shapes.row_bytes[..8].fill(64);
            shapes.n_rows[..8].copy_from_slice(&[a, a, b, b, a, b, 16, 16]);
            // SAFETY: `path` and the tests make a unit only where there is one; it reads 64 bytes.
            unsafe {
                asm!(
                    "ldtilecfg [{}]",
                    in(reg) &raw const shapes,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
            Self {
                _of_thread: PhantomData,
            }
        }

        unsafe fn two_blocks(&self, of: &Operands) {
            // SAFETY: the caller's; the value says that the unit is set. Lines 1024 and 2048 bytes on
            // are those of 16 rows further on.
            unsafe {
                steps!(
                    load: [
                        "tileloadd tmm0, [{c} + {wide}]",
                        "tileloadd tmm1, [{c} + {wide} + 64]",
                        "tileloadd tmm2, [{c} + {wide} + 2048]",
                        "tileloadd tmm3, [{c} + {wide} + 2112]"
                    ],
                    step: [
                        "tileloadd tmm6, [{w} + {wide}]",
                        "tileloadd tmm4, [{rows} + {narrow}]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tileloadd tmm7, [{w} + {wide} + 64]",
                        "tdpbf16ps tmm1, tmm4, tmm7",
                        "tileloadd tmm5, [{rows} + {narrow} + 1024]",
                        "tdpbf16ps tmm2, tmm5, tmm6",
                        "tdpbf16ps tmm3, tmm5, tmm7"
                    ],
                    store: [
                        "tilestored [{c} + {wide}], tmm0",
                        "tilestored [{c} + {wide} + 64], tmm1",
                        "tilestored [{c} + {wide} + 2048], tmm2",
                        "tilestored [{c} + {wide} + 2112], tmm3"
                    ],
                    of,
                );
            }
        }

        unsafe fn two_tiles(&self, low: &Operands, high: &Operands) {
            // SAFETY: as above; the tiles' pairs are a fixed distance apart.
            unsafe {
                steps!(
                    load: [
                        "tileloadd tmm0, [{c} + {wide}]",
                        "tileloadd tmm1, [{c} + {wide} + 64]",
                        "tileloadd tmm2, [{c_high} + {wide}]",
                        "tileloadd tmm3, [{c_high} + {wide} + 64]"
                    ],
                    step: [
                        "tileloadd tmm4, [{rows} + {narrow}]",
                        "tileloadd tmm6, [{w} + {wide}]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tileloadd tmm7, [{w} + {wide} + 64]",
                        "tdpbf16ps tmm1, tmm4, tmm7",
                        "tileloadd tmm6, [{w_high} + {wide}]",
                        "tdpbf16ps tmm2, tmm4, tmm6",
                        "tileloadd tmm7, [{w_high} + {wide} + 64]",
                        "tdpbf16ps tmm3, tmm4, tmm7",
                        "add {w_high}, 2048"
                    ],
                    store: [
                        "tilestored [{c} + {wide}], tmm0",
                        "tilestored [{c} + {wide} + 64], tmm1",
                        "tilestored [{c_high} + {wide}], tmm2",
                        "tilestored [{c_high} + {wide} + 64], tmm3"
                    ],
                    low,
                    w_high = inout(reg) high.w => _,
                    c_high = in(reg) high.sums,
                );
            }
        }

        unsafe fn one(&self, of: &Operands) {
            // SAFETY: as above.
            unsafe {
                steps!(
                    load: [
                        "tileloadd tmm0, [{c} + {wide}]",
                        "tileloadd tmm1, [{c} + {wide} + 64]"
                    ],
                    step: [
                        "tileloadd tmm4, [{rows} + {narrow}]",
                        "tileloadd tmm6, [{w} + {wide}]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tileloadd tmm7, [{w} + {wide} + 64]",
                        "tdpbf16ps tmm1, tmm4, tmm7"
                    ],
                    store: [
                        "tilestored [{c} + {wide}], tmm0",
                        "tilestored [{c} + {wide} + 64], tmm1"
                    ],
                    of,
                );
            }
        }
    }

    impl Drop for Hardware {
        fn drop(&mut self) {
            // SAFETY: the unit was set by this value, on this thread.
            unsafe {
                asm!(
                    "tilerelease",
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, nomem),
                );
            }
        }
    }
}
