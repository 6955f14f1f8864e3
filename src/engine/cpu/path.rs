//! Which SIMD path runs, and the macro that compiles one kernel body for each.
//!
//! All paths but `amx` give equal bits: a body is written once over fixed arrays of lanes with
//! explicit `mul_add`, and no compiler setting lets LLVM reorder floating-point arithmetic. On `amx`
//! matrix products are summed in another order, that of its instruction ([`super::amx`]); all else, and
//! all of an exact run, is as on the others. A path is chosen when the backend opens;
//! `PODIUM_CPU=portable|avx2|avx512|avx512bf16|amx` forces one.

use crate::engine::config::ConfigError;

/// The variable that forces a path.
const VARIABLE: &str = "PODIUM_CPU";

/// The instructions a kernel may use. A value other than [`Kind::Portable`] exists only where
/// the CPU has them, which is what makes the calls in `on_each_path` sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CpuPath(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Whatever the target's baseline has; right everywhere, slow without hardware `fma`.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same with VBMI and AVX512-BF16: products of bf16 pairs. It takes subnormal numbers for 0,
    /// which those above do not.
    Avx512Bf16,
    /// The same with AMX-BF16: products of tiles of bf16 pairs.
    Amx,
}

impl CpuPath {
    /// Always available.
    pub const PORTABLE: Self = Self(Kind::Portable);

    pub fn kind(self) -> Kind {
        self.0
    }

    /// Whether the CPU has all of [`Kind::Avx512Bf16`].
    pub fn has_pairs(self) -> bool {
        matches!(self.0, Kind::Avx512Bf16 | Kind::Amx)
    }

    /// Whether the CPU has all of [`Kind::Avx2`].
    pub fn has_avx2(self) -> bool {
        self.0 != Kind::Portable
    }

    /// The paths this CPU can run, slowest first.
    pub fn available() -> Vec<Self> {
        let mut paths = vec![Self::PORTABLE];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if avx2 {
                paths.push(Self(Kind::Avx2));
            }
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                paths.push(Self(Kind::Avx512));
                // Of the CPUs that multiply pairs, Cooper Lake alone cannot permute bytes.
                if is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vbmi")
                {
                    paths.push(Self(Kind::Avx512Bf16));
                    if super::amx::is_available() {
                        paths.push(Self(Kind::Amx));
                    }
                }
            }
        }
        paths
    }

    /// Whether the bits of a run are those of the other paths that say so, subnormal numbers aside.
    pub fn gives_common_bits(self, exact: bool) -> bool {
        exact || self.0 != Kind::Amx
    }

    /// The path `amx` with its instruction emulated, where the CPU has all else that it needs.
    #[cfg(test)]
    pub fn emulated_amx() -> Option<Self> {
        let has_pairs = Self::available().contains(&Self(Kind::Avx512Bf16));
        has_pairs.then_some(Self(Kind::Amx))
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
        match self.0 {
            Kind::Portable => "portable",
            Kind::Avx2 => "avx2",
            Kind::Avx512 => "avx512",
            Kind::Avx512Bf16 => "avx512bf16",
            Kind::Amx => "amx",
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
                | $crate::engine::cpu::path::Kind::Avx512Bf16
                | $crate::engine::cpu::path::Kind::Amx => {
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
