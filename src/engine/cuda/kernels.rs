//! The kernels' texts, how they are compiled for a model and a GPU, and the cache of cubins.
//!
//! A text is `ptx.cuh`, `common.cuh`, what its family shares, then the kernel itself. The cache's
//! key is a hash over text, options, GPU architecture and NVRTC version, so nothing in it is ever
//! out of date.

use std::path::PathBuf;

use sha2::{Digest, Sha256};

use super::error::CudaError;
use super::nvrtc::Nvrtc;
use crate::engine::checkpoint::{MatrixFormat, VectorFormat, WeightFormat};
use crate::engine::config::ModelConfig;

const PTX: &str = include_str!("../../../kernels/ptx.cuh");
const COMMON: &str = include_str!("../../../kernels/common.cuh");
const GEMM: &str = concat!(
    include_str!("../../../kernels/gemm.cuh"),
    include_str!("../../../kernels/wgmma.cuh"),
    include_str!("../../../kernels/gemm_wgmma.cuh"),
    include_str!("../../../kernels/gemm_stream.cuh"),
    include_str!("../../../kernels/gemm_direct.cuh")
);
const ATTENTION: &str = concat!(
    include_str!("../../../kernels/wgmma.cuh"),
    include_str!("../../../kernels/attention.cuh"),
    include_str!("../../../kernels/attention_wgmma.cuh"),
    include_str!("../../../kernels/attention_row.cuh")
);
const MATMUL: &str = concat!(
    include_str!("../../../kernels/matmul_outputs.cuh"),
    include_str!("../../../kernels/matmul.cuh")
);
const MOE: &str = include_str!("../../../kernels/moe_matmul.cuh");

/// One text to compile.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// File name without its end.
    pub name: &'static str,
    pub text: String,
    /// Whether its code must hold matrix instructions.
    pub uses_matrix_units: bool,
}

fn kernel(name: &'static str, shared: &[&str], text: &str) -> Kernel {
    let mut whole = [PTX, COMMON].concat();
    shared.iter().for_each(|part| whole.push_str(part));
    whole.push_str(text);
    Kernel {
        name,
        text: whole,
        uses_matrix_units: name.contains("matmul") || ["attention", "topk_routing"].contains(&name),
    }
}

/// The file of the dense products on weights of a format.
pub fn matmul_file(format: MatrixFormat) -> &'static str {
    match format {
        MatrixFormat::Bf16 => "matmul_bf16",
        MatrixFormat::Mxint8 => "matmul_mxint8",
        MatrixFormat::Mxfp4 => "matmul_mxfp4",
    }
}

/// The file of the experts' products on weights of a format.
pub fn moe_matmul_file(format: MatrixFormat) -> &'static str {
    match format {
        MatrixFormat::Bf16 => "moe_matmul_bf16",
        MatrixFormat::Mxint8 => "moe_matmul_mxint8",
        MatrixFormat::Mxfp4 => "moe_matmul_mxfp4",
    }
}

/// The texts for weights of these formats: one for each format of the dense products.
pub fn texts(format: WeightFormat) -> Vec<Kernel> {
    macro_rules! text {
        ($name:literal) => {
            include_str!(concat!("../../../kernels/", $name, ".cu"))
        };
    }
    let matmul = |format| {
        let text = match format {
            MatrixFormat::Bf16 => text!("matmul_bf16"),
            MatrixFormat::Mxint8 => text!("matmul_mxint8"),
            MatrixFormat::Mxfp4 => text!("matmul_mxfp4"),
        };
        kernel(matmul_file(format), &[GEMM, MATMUL], text)
    };
    let moe_matmul = match format.experts {
        MatrixFormat::Bf16 => text!("moe_matmul_bf16"),
        MatrixFormat::Mxint8 => text!("moe_matmul_mxint8"),
        MatrixFormat::Mxfp4 => text!("moe_matmul_mxfp4"),
    };
    let moe_matmul = kernel(moe_matmul_file(format.experts), &[GEMM, MOE], moe_matmul);
    let mut kernels = vec![
        kernel("embed", &[], text!("embed")),
        kernel("rmsnorm", &[], text!("rmsnorm")),
        kernel("topk_routing", &[], text!("topk_routing")),
        kernel("attention", &[ATTENTION], text!("attention")),
        matmul(format.attention),
        moe_matmul,
        kernel("sample", &[], text!("sample")),
        kernel("synthetic", &[], text!("synthetic")),
    ];
    if format.lm_head != format.attention {
        kernels.push(matmul(format.lm_head));
    }
    kernels
}

/// The text that loading uses, the same for every model.
pub fn repack_text() -> Kernel {
    kernel("repack", &[], include_str!("../../../kernels/repack.cu"))
}

/// What kernels are compiled for, beside the architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Build {
    pub hidden: usize,
    /// Experts per token.
    pub top_k: usize,
    pub head_dim: usize,
    /// Query heads that share a KV head.
    pub group: usize,
    pub format: WeightFormat,
    /// Some scale is beyond the narrow form: of MXFP4 above 2, of MXINT8 2^127.
    pub wide_scales: bool,
    /// A block has less than 100 KB of shared memory.
    pub small_shared: bool,
    /// The warpgroup instructions are used where the GPU has them.
    pub warpgroups: bool,
}

impl Build {
    /// # Errors
    /// A shape that the kernels do not take.
    pub fn new(config: &ModelConfig, format: WeightFormat) -> Result<Self, CudaError> {
        if !config.head_dim.is_multiple_of(16) {
            return Err(CudaError::Shape {
                key: "head_dim",
                found: config.head_dim,
                expected: "a multiple of 16",
            });
        }
        Ok(Self {
            hidden: config.hidden,
            top_k: config.n_experts_per_token,
            head_dim: config.head_dim,
            group: config.group(),
            format,
            wide_scales: false,
            small_shared: false,
            warpgroups: true,
        })
    }

    /// Options for NVRTC.
    pub fn options(&self, arch: &str) -> Vec<String> {
        let mut options = common_options(arch);
        options.extend([
            format!("-DHIDDEN={}", self.hidden),
            format!("-DTOP_K={}", self.top_k),
            format!("-DHEAD_DIM={}", self.head_dim),
            format!("-DGROUP={}", self.group),
        ]);
        if self.format.vectors == VectorFormat::F32 {
            options.push("-DVECTORS_F32".to_owned());
        }
        if self.wide_scales {
            options.push("-DWIDE_SCALES".to_owned());
        }
        if self.small_shared {
            options.push("-DSMALL_SHARED".to_owned());
        }
        if self.warpgroups && arch == "sm_90a" {
            options.push("-DWARPGROUPS".to_owned());
        }
        options
    }

    /// Hash of all that decides the kernels' bits, beside architecture and compiler. Neither wide
    /// scales nor the number of stages changes a bit.
    pub fn hash(&self) -> String {
        let mut hasher = Sha256::new();
        let plain = Self {
            wide_scales: false,
            small_shared: false,
            ..*self
        };
        for option in plain.options("") {
            hasher.update(option);
        }
        // Which text is whose.
        for format in [self.format.attention, self.format.lm_head] {
            hasher.update(format.name());
        }
        for kernel in texts(self.format) {
            hasher.update(kernel.text);
        }
        hex(hasher).chars().take(12).collect()
    }
}

/// NVRTC's name of an architecture: with the features of just this one where it has such.
pub fn architecture(major: u32, minor: u32) -> String {
    let suffix = if major >= 9 { "a" } else { "" };
    format!("sm_{major}{minor}{suffix}")
}

/// A compiled kernel file.
pub struct Cubin {
    pub name: &'static str,
    pub bytes: Vec<u8>,
    /// It was in the cache.
    pub cached: bool,
}

/// Options for every text.
pub fn common_options(arch: &str) -> Vec<String> {
    vec![
        format!("--gpu-architecture={arch}"),
        "--std=c++17".to_owned(),
        // Sums and products stay as they are written: bits are promised.
        "--fmad=false".to_owned(),
    ]
}

/// Compiles all kernels of a build, or takes them from the cache.
///
/// # Errors
/// The compiler's log.
pub fn compile(nvrtc: &Nvrtc, arch: &str, build: &Build) -> Result<Vec<Cubin>, CudaError> {
    let options = build.options(arch);
    let kernels = texts(build.format);
    std::thread::scope(|scope| {
        let threads: Vec<_> = kernels
            .iter()
            .map(|kernel| scope.spawn(|| compile_one(nvrtc, arch, &options, kernel)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("compiling does not panic"))
            .collect()
    })
}

/// The same for the text that loading uses.
///
/// # Errors
/// The compiler's log.
pub fn compile_repack(nvrtc: &Nvrtc, arch: &str) -> Result<Cubin, CudaError> {
    compile_one(nvrtc, arch, &common_options(arch), &repack_text())
}

fn compile_one(
    nvrtc: &Nvrtc,
    arch: &str,
    options: &[String],
    kernel: &Kernel,
) -> Result<Cubin, CudaError> {
    let mut hasher = Sha256::new();
    for part in [&nvrtc.version, &options.join(" "), &kernel.text] {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let file = format!("{}-{arch}-{}.cubin", kernel.name, hex(hasher));
    let path = cache_folder().map(|folder| folder.join(file));
    if let Some(bytes) = path.as_ref().and_then(|path| std::fs::read(path).ok()) {
        return Ok(Cubin {
            name: kernel.name,
            bytes,
            cached: true,
        });
    }
    let name = format!("{}.cu", kernel.name);
    let (bytes, _) = nvrtc.compile(&name, &kernel.text, arch, options)?;
    if let Some(path) = &path {
        store(path, &bytes);
    }
    Ok(Cubin {
        name: kernel.name,
        bytes,
        cached: false,
    })
}

/// `PODIUM_CACHE`, else `podium` in the user's cache folder.
fn cache_folder() -> Option<PathBuf> {
    let var = |key| std::env::var_os(key).map(PathBuf::from);
    var("PODIUM_CACHE")
        .or_else(|| Some(var("XDG_CACHE_HOME")?.join("podium")))
        .or_else(|| Some(var("HOME")?.join(".cache/podium")))
}

/// Writes a cache entry as a whole or not at all; without it the next run compiles again.
fn store(path: &std::path::Path, bytes: &[u8]) {
    let Some(folder) = path.parent() else {
        return;
    };
    let part = path.with_extension(format!("{}.part", std::process::id()));
    let written = std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&part, bytes))
        .and_then(|()| std::fs::rename(&part, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&part);
    }
}

fn hex(hasher: Sha256) -> String {
    hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
