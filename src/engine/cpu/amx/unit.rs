//! The tile unit: whether there is one, how it is set, and the loops over its instructions.
//!
//! Stable Rust has neither intrinsics nor detection for AMX, but its assembler knows the instructions.
//! A block of assembly is a whole loop: tiles hold nothing that outlives it but their shapes, which a
//! [`TileUnit`]'s value stands for.

use super::{LANES, STEP_WORDS};

/// What multiplies tiles: the CPU's unit, or in tests its emulation. It holds the sums of one block of
/// rows by one tile of 32 lanes.
pub trait TileUnit {
    /// Until the value is dropped the thread's unit takes blocks of so many rows, 1 to 16.
    fn set(n_rows: usize) -> Self;

    /// Sums begin as zeros.
    fn clear(&self);

    /// Sums go on from these.
    ///
    /// # Panics
    /// When there are fewer rows than the unit was set to; so do the others.
    fn load(&self, sums: &[[f32; LANES]]);

    /// Takes the rows of a step of 32 k, of [`STEP_PAIRS`](super::STEP_PAIRS) words, one behind the other. Rows
    /// that are `PASSING` are not met again soon: they need not stay in the first-level cache.
    fn take_rows<const PASSING: bool>(&self, rows: &[u32]);

    /// Takes the pairs of the lower (0) or the upper half of a tile's lanes, of `[16][32 lanes]`.
    fn take_pairs<const HALF: usize>(&self, pairs: &[u32; STEP_WORDS]);

    /// Adds the products of what was taken to the sums of that half. The upper half's are a step's last.
    fn multiply<const HALF: usize>(&self);

    /// All of a step.
    #[inline(always)]
    fn multiply_step(&self, rows: &[u32], pairs: &[u32; STEP_WORDS]) {
        self.take_rows::<false>(rows);
        self.take_pairs::<0>(pairs);
        self.multiply::<0>();
        self.take_pairs::<1>(pairs);
        self.multiply::<1>();
    }

    fn store(&self, sums: &mut [[f32; LANES]]);
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
///
/// Between its calls sums stay in tiles 0 and 1, and what was taken in 2 and 3. The compiler knows no use for
/// tiles, so nothing that it puts between touches them.
pub struct Hardware {
    n_rows: usize,
    /// Words of as many rows.
    n_words: usize,
    _of_thread: std::marker::PhantomData<*const ()>,
}

#[cfg(not(target_arch = "x86_64"))]
impl TileUnit for Hardware {
    fn set(_: usize) -> Self {
        unreachable!("no unit");
    }
    fn clear(&self) {}
    fn load(&self, _: &[[f32; LANES]]) {}
    fn take_rows<const PASSING: bool>(&self, _: &[u32]) {}
    fn take_pairs<const HALF: usize>(&self, _: &[u32; STEP_WORDS]) {}
    fn multiply<const HALF: usize>(&self) {}
    fn store(&self, _: &mut [[f32; LANES]]) {}
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "instructions that Rust does not know")]
mod x86 {
    use super::super::STEP_PAIRS;
    use super::{Hardware, LANES, STEP_WORDS, TileUnit};
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

    // Tiles 0 and 1 are C, 2 is A, 3 is B. A core has few tiles beside those that programs name, and
    // shares them with its other thread: where all eight are in use, a load waits until the product that
    // read its tile is done. With four, as many are free, and while the other thread is busy a product
    // takes 14 ns in place of 28; alone it takes 6 either way. A tile that is cleared after its last
    // product needs no place until it is loaded: 13 ns.
    impl TileUnit for Hardware {
        fn set(n_rows: usize) -> Self {
            assert!((1..=16).contains(&n_rows), "a tile has up to 16 rows");
            let of_block = n_rows as u8;
            let mut shapes = Shapes {
                palette: 1,
                start_row: 0,
                reserved: [0; 14],
                row_bytes: [0; 16],
                n_rows: [0; 16],
            };
            shapes.row_bytes[..4].fill(64);
            shapes.n_rows[..4].copy_from_slice(&[of_block, of_block, of_block, 16]);
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
                n_rows,
                n_words: n_rows * STEP_PAIRS,
                _of_thread: PhantomData,
            }
        }

        #[inline(always)]
        fn clear(&self) {
            // SAFETY: the value says that the unit is set.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    out("tmm0") _, out("tmm1") _,
                    options(nostack, nomem),
                );
            }
        }

        #[inline(always)]
        fn load(&self, sums: &[[f32; LANES]]) {
            let sums = sums[..self.n_rows].as_ptr();
            // SAFETY: as above, to so many rows.
            unsafe {
                asm!(
                    "tileloadd tmm0, [{sums} + {wide}]",
                    "tileloadd tmm1, [{sums} + {wide} + 64]",
                    sums = in(reg) sums,
                    wide = in(reg) WIDE,
                    out("tmm0") _, out("tmm1") _,
                    options(nostack, readonly),
                );
            }
        }

        #[inline(always)]
        fn take_rows<const PASSING: bool>(&self, rows: &[u32]) {
            assert!(rows.len() >= self.n_words, "rows too short");
            let rows = rows.as_ptr();
            macro_rules! load {
                ($load:literal) => {
                    asm!(
                        concat!($load, " tmm2, [{rows} + {narrow}]"),
                        rows = in(reg) rows,
                        narrow = in(reg) NARROW,
                        out("tmm2") _,
                        options(nostack, preserves_flags, readonly),
                    )
                };
            }
            // SAFETY: the value says that the unit is set, to so many rows.
            unsafe {
                match PASSING {
                    true => load!("tileloaddt1"),
                    false => load!("tileloadd"),
                }
            }
        }

        #[inline(always)]
        fn take_pairs<const HALF: usize>(&self, pairs: &[u32; STEP_WORDS]) {
            const { assert!(HALF < 2, "a tile's lanes are two B") };
            let pairs = pairs.as_ptr().wrapping_add(HALF * STEP_PAIRS);
            // SAFETY: the value says that the unit is set; pairs are 16 rows.
            unsafe {
                asm!(
                    "tileloadd tmm3, [{pairs} + {wide}]",
                    pairs = in(reg) pairs,
                    wide = in(reg) WIDE,
                    out("tmm3") _,
                    options(nostack, preserves_flags, readonly),
                );
            }
        }

        #[inline(always)]
        fn multiply<const HALF: usize>(&self) {
            // SAFETY: as above. Said to read memory, so that it stays where it is among stores.
            unsafe {
                match HALF {
                    0 => asm!(
                        "tdpbf16ps tmm0, tmm2, tmm3",
                        "tilezero tmm3",
                        out("tmm0") _, out("tmm3") _,
                        options(nostack, preserves_flags, readonly),
                    ),
                    _ => asm!(
                        "tdpbf16ps tmm1, tmm2, tmm3",
                        "tilezero tmm2",
                        "tilezero tmm3",
                        out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        options(nostack, preserves_flags, readonly),
                    ),
                }
            }
        }

        #[inline(always)]
        fn store(&self, sums: &mut [[f32; LANES]]) {
            let sums = sums[..self.n_rows].as_mut_ptr();
            // SAFETY: as above.
            unsafe {
                asm!(
                    "tilestored [{sums} + {wide}], tmm0",
                    "tilestored [{sums} + {wide} + 64], tmm1",
                    sums = in(reg) sums,
                    wide = in(reg) WIDE,
                    options(nostack),
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
