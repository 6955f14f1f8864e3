//! Which SIMD path runs, and the macro that compiles one kernel body for each.
//!
//! All paths but `amx` give equal bits: a body is written once over fixed arrays of lanes with
//! explicit `mul_add`, and no compiler setting lets LLVM reorder floating-point arithmetic. On `amx`
//! matrix products are summed in another order, that of its instruction ([`super::amx`]), and probabilities and
//! SwiGLU, which are rounded to bf16, take shorter exponentials (`exp2`); all else, and all of an exact
//! run, is as on the others. A path is chosen when the backend opens;
//! `PODIUM_CPU=portable|avx2|avx512|avx512bf16|amx` forces one.

use crate::engine::config::ConfigError;

/// The variable that forces a path.
const VARIABLE: &str = "PODIUM_CPU";

/// The instructions a kernel may use. A value of a kind other than [`Kind::Portable`] exists only where
/// the CPU has them, which is what makes the calls in `on_each_path` sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CpuPath {
    kind: Kind,
    /// Matrix products are of tiles, by AMX-BF16 or in tests its emulation.
    has_tiles: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Whatever the target's baseline has; right everywhere, slow without hardware `fma`.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same with VBMI, GFNI and AVX512-BF16: products of bf16 pairs. It takes subnormal numbers for 0,
    /// which those above do not.
    Avx512Bf16,
}

impl CpuPath {
    /// Always available.
    pub const PORTABLE: Self = Self::of(Kind::Portable);

    const fn of(kind: Kind) -> Self {
        Self {
            kind,
            has_tiles: false,
        }
    }

    pub fn kind(self) -> Kind {
        self.kind
    }

    /// Whether matrix products are of tiles of bf16 pairs.
    pub fn has_tiles(self) -> bool {
        self.has_tiles
    }

    /// Whether the CPU has all of [`Kind::Avx512Bf16`].
    pub fn has_pairs(self) -> bool {
        self.kind == Kind::Avx512Bf16
    }

    /// Whether the CPU has all of [`Kind::Avx2`].
    pub fn has_avx2(self) -> bool {
        self.kind != Kind::Portable
    }

    /// The paths this CPU can run, slowest first.
    pub fn available() -> Vec<Self> {
        let mut paths = vec![Self::PORTABLE];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if avx2 {
                paths.push(Self::of(Kind::Avx2));
            }
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                paths.push(Self::of(Kind::Avx512));
                // Of the CPUs that multiply pairs, Cooper Lake alone cannot permute bytes.
                if is_x86_feature_detected!("avx512bf16")
                    && is_x86_feature_detected!("avx512vbmi")
                    && is_x86_feature_detected!("gfni")
                {
                    let pairs = Self::of(Kind::Avx512Bf16);
                    paths.push(pairs);
                    if super::amx::is_available() {
                        paths.push(pairs.with_tiles());
                    }
                }
            }
        }
        paths
    }

    /// Whether the bits of a run are those of the other paths that say so, subnormal numbers aside.
    pub fn gives_common_bits(self, exact: bool) -> bool {
        exact || !self.has_tiles
    }

    /// The same with products of tiles: where there is no unit, in tests alone, which emulate it.
    fn with_tiles(self) -> Self {
        Self {
            has_tiles: true,
            ..self
        }
    }

    /// `amx` where the CPU has it, else its products emulated beside the fastest of the other paths.
    #[cfg(test)]
    pub fn tiles() -> Self {
        Self::best().with_tiles()
    }

    /// The fastest path, or the one that `PODIUM_CPU` names.
    ///
    /// # Errors
    /// The variable holds an unknown word or a path that this CPU lacks.
    pub fn choose() -> Result<Self, ConfigError> {
        match std::env::var_os(VARIABLE) {
            None => Ok(Self::best()),
            Some(word) => Self::named(&word.to_string_lossy()),
        }
    }

    fn best() -> Self {
        Self::available().pop().unwrap_or(Self::PORTABLE)
    }

    fn named(word: &str) -> Result<Self, ConfigError> {
        let available = Self::available();
        let found = available.iter().find(|path| path.name() == word);
        found.copied().ok_or_else(|| ConfigError::Environment {
            variable: VARIABLE,
            found: word.to_owned(),
            expected: match word {
                "avx2" | "avx512" | "avx512bf16" | "amx" => {
                    format!("one of {}: this CPU lacks it", list(&available))
                }
                _ => format!("one of {}", list(&available)),
            },
        })
    }

    pub fn name(self) -> &'static str {
        match self.kind {
            _ if self.has_tiles => "amx",
            Kind::Portable => "portable",
            Kind::Avx2 => "avx2",
            Kind::Avx512 => "avx512",
            Kind::Avx512Bf16 => "avx512bf16",
        }
    }
}

fn list(paths: &[CpuPath]) -> String {
    let names: Vec<_> = paths
        .iter()
        .map(|path| format!("`{}`", path.name()))
        .collect();
    names.join(", ")
}

/// Declares a function that takes a [`CpuPath`] first and runs `body`, an `#[inline(always)]`
/// function of the remaining arguments, compiled once for each path.
macro_rules! on_each_path {
    ($(#[$doc:meta])* $vis:vis fn $name:ident $(<$($generic:ident : $bound:path),+>)? (
        $($arg:ident : $ty:ty),* $(,)?
    ) $(-> $ret:ty)? = $body:path) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments, reason = "kernels take their shapes one by one")]
        $vis fn $name $(<$($generic: $bound),+>)? (
            path: $crate::engine::cpu::path::CpuPath, $($arg: $ty),*
        ) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            #[allow(clippy::too_many_arguments, reason = "as above")]
            fn avx512 $(<$($generic: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                $body($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments, reason = "as above")]
            fn avx2 $(<$($generic: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                $body($($arg),*)
            }
            match path.kind() {
                $crate::engine::cpu::path::Kind::Portable => $body($($arg),*),
                // SAFETY: a path of this kind exists only where the CPU has its features.
                #[cfg(target_arch = "x86_64")]
                #[allow(unsafe_code, reason = "features were detected")]
                $crate::engine::cpu::path::Kind::Avx2 => unsafe { avx2($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                #[allow(unsafe_code, reason = "features were detected")]
                $crate::engine::cpu::path::Kind::Avx512
                | $crate::engine::cpu::path::Kind::Avx512Bf16 => {
                    // SAFETY: as above; those behind the first have its features, too.
                    unsafe { avx512($($arg),*) }
                }
                #[cfg(not(target_arch = "x86_64"))]
                _ => $body($($arg),*),
            }
        }
    };
}
pub(crate) use on_each_path;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_word_is_refused() {
        let message = CpuPath::named("sse9")
            .expect_err("no such path")
            .to_string();
        assert!(message.contains("`PODIUM_CPU` is `sse9`"), "{message}");
    }

    #[test]
    fn every_available_path_can_be_named() {
        for path in CpuPath::available() {
            assert_eq!(CpuPath::named(path.name()).expect("it is available"), path);
        }
    }
}
