//! Every kernel compiles for every architecture we name, without a GPU: through the NVRTC of the
//! PyPI wheel. Registers may not spill, and kernels that say so must hold matrix instructions.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use podium::engine::checkpoint::{MatrixFormat, Precision, VectorFormat};
use podium::engine::config::ModelConfig;
use podium::engine::cuda::kernels::{Build, Kernel, common_options, repack_text, texts};
use podium::engine::cuda::nvrtc::Nvrtc;
use podium::engine::shapes;
use support::{Scratch, root};

const ARCHITECTURES: [&str; 4] = ["sm_80", "sm_90a", "sm_100a", "sm_120a"];

/// A file of the wheels in the Python of `just setup`.
fn of_wheel(pattern: &str) -> PathBuf {
    let python = std::env::var_os("PODIUM_PYTHON")
        .map(PathBuf::from)
        .unwrap_or_else(|| root().join(".venv/bin/python"));
    let find = "import glob, sysconfig, sys; \
                print(glob.glob(sysconfig.get_path('purelib') + '/nvidia/' + sys.argv[1])[0])";
    let output = Command::new(&python)
        .args(["-c", find, pattern])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "`{pattern}` is missing from {}: run `just setup`",
        python.display()
    );
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

/// Bytes that a log of `--ptxas-options=-v` says are spilled.
fn spills(log: &str) -> Vec<&str> {
    let lines = log
        .lines()
        .filter(|line| line.contains("bytes spill stores"));
    lines
        .filter(|line| !line.contains(" 0 bytes spill stores, 0 bytes spill loads"))
        .collect()
}

fn check(nvrtc: &Nvrtc, nvdisasm: &Path, config: &ModelConfig, build: &Build, scratch: &Scratch) {
    for arch in ARCHITECTURES {
        let mut build = *build;
        build.small_shared = arch == "sm_120a";
        let options = build.options(arch);
        for kernel in texts(build.format) {
            let what = format!("{} for {arch}, head dim {}", kernel.name, config.head_dim);
            let cubin = compile(nvrtc, &kernel, arch, &options, &what);
            if kernel.uses_matrix_units {
                let path = scratch.write("kernel.cubin", cubin);
                let output = Command::new(nvdisasm).arg("-c").arg(path).output().unwrap();
                let code = String::from_utf8_lossy(&output.stdout);
                const WARPS: &str = "HMMA.16816.F32.BF16";
                let instructions: &[&str] = match (arch, kernel.name) {
                    // Decode and prefill.
                    ("sm_90a", "attention") => &[WARPS, "HGMMA.64x64x16.F32.BF16"],
                    ("sm_90a", name) if name.contains("matmul") => &["HGMMA.64x128x16.F32.BF16"],
                    _ => &[WARPS],
                };
                for instruction in instructions {
                    assert!(code.contains(instruction), "{what} has no {instruction}");
                }
            }
        }
    }
}

/// The cubin; what the compiler says of registers has been looked at.
fn compile(nvrtc: &Nvrtc, kernel: &Kernel, arch: &str, options: &[String], what: &str) -> Vec<u8> {
    let mut options = options.to_vec();
    options.push("--ptxas-options=-v".to_owned());
    let (cubin, log) = nvrtc
        .compile(kernel.name, &kernel.text, arch, &options)
        .unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(
        log.contains("bytes spill stores"),
        "{what}: no report\n{log}"
    );
    assert!(spills(&log).is_empty(), "{what} spills: {:?}", spills(&log));
    // "wgmma.mma_async instructions are serialized", "setmaxnreg ignored".
    assert!(!log.contains("(C75"), "{what}: {log}");
    cubin
}

#[test]
#[ignore = "needs the NVRTC wheel: just test-full"]
fn independent_compiler_takes_every_kernel() {
    let nvrtc = Nvrtc::open(&of_wheel("*/lib/libnvrtc.so.*")).unwrap();
    let nvdisasm = of_wheel("*/bin/nvdisasm");
    let scratch = Scratch::new("nvrtc");
    let config = shapes::named("gpt-oss-20b").unwrap();
    for (precision, vectors, wide) in [
        (Precision::Bits4Dense4, VectorFormat::Bf16, false),
        (Precision::Bits4Dense4, VectorFormat::F32, true),
        (Precision::Bits8, VectorFormat::Bf16, false),
        (Precision::Bits8, VectorFormat::F32, true),
        (Precision::Bits16, VectorFormat::Bf16, false),
    ] {
        let format = precision.formats(MatrixFormat::Mxfp4, vectors);
        let mut build = Build::new(&config, format).unwrap();
        build.wide_scales = wide;
        check(&nvrtc, &nvdisasm, &config, &build, &scratch);
    }
    for arch in ARCHITECTURES {
        let kernel = repack_text();
        let what = format!("{} for {arch}", kernel.name);
        compile(&nvrtc, &kernel, arch, &common_options(arch), &what);
    }
}
