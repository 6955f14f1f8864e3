//! kernels/repack.cu, compiled for this machine by a C++ compiler, makes the bytes that the
//! host's packers make. The same on a GPU is in `cuda_loading.rs`.

#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]
#![allow(unsafe_code, reason = "calls compiled kernels")]

mod support;

use std::process::Command;

use libloading::Library;
use podium::engine::cuda::pack;
use podium::engine::cuda::pieces::Then;
use podium::engine::cuda::repack::{RepackArgs, kernel_name};
use support::raw::{cases, check};
use support::{Scratch, root};

/// The words of CUDA that the text uses, and a loop in place of a grid.
const BEFORE: &str = r#"
#include <math.h>
#include <string.h>
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(n)
static struct { u32 x; } blockIdx, threadIdx;
static void atomicMin(u64* at, u64 value) { if (value < *at) *at = value; }
static void atomicMax(u64* at, u64 value) { if (value > *at) *at = value; }
static double __longlong_as_double(long long bits) { double x; memcpy(&x, &bits, 8); return x; }
static float bf16_to_f32(u16 bits) { u32 word = (u32)bits << 16; float x; memcpy(&x, &word, 4); return x; }
"#;
const BEHIND: &str = r#"
template <typename F> static void grid(u32 n_blocks, F kernel) {
    for (blockIdx.x = 0; blockIdx.x < n_blocks; blockIdx.x++) {
        for (threadIdx.x = 0; threadIdx.x < 256; threadIdx.x++) kernel();
    }
}
extern "C" void run(void (*kernel)(RepackArgs), const RepackArgs* args, u32 n_blocks) {
    grid(n_blocks, [&] { kernel(*args); });
}
extern "C" void run_widen(u8* tiles, u64 n_tiles, u32 tile_bytes, u32 bias) {
    grid((u32)((n_tiles * 32 + 255) / 256), [&] { widen(tiles, n_tiles, tile_bytes, bias); });
}
"#;

type Kernel = unsafe extern "C" fn(RepackArgs);
type Run = unsafe extern "C" fn(Kernel, *const RepackArgs, u32);
type Widen = unsafe extern "C" fn(*mut u8, u64, u32, u32);

#[test]
#[ignore = "needs a C++ compiler: just test-full"]
fn independent_compiler_repacks_as_the_host_does() {
    let scratch = Scratch::new("repack");
    let text = std::fs::read_to_string(root().join("kernels/repack.cu")).unwrap();
    let source = scratch.write("repack.cpp", [BEFORE, &text, BEHIND].concat());
    let path = scratch.join("repack.so");
    let compiled = Command::new("c++")
        .args([
            "-std=c++17",
            "-O2",
            "-Wall",
            "-Wno-unknown-pragmas",
            "-Werror",
            "-fPIC",
            "-shared",
            "-o",
        ])
        .args([&path, &source])
        .output()
        .expect("a C++ compiler");
    let log = String::from_utf8_lossy(&compiled.stderr);
    assert!(compiled.status.success(), "{log}");
    // SAFETY: compiled from the text above; the types are its functions'.
    let library = unsafe { Library::new(&path) }.unwrap();
    // SAFETY: as above.
    let run = unsafe { library.get::<Run>(b"run") }.unwrap();
    // SAFETY: as above.
    let widen = unsafe { library.get::<Widen>(b"run_widen") }.unwrap();

    for case in cases() {
        let raw = case.raw();
        let least = case.matrix(&raw, 0, 0, 0).least_slot();
        for slot_bytes in case.slot_sizes(least) {
            let mut tiles = vec![0xEE; case.n_bytes() + 16];
            let first = tiles.as_ptr().align_offset(16);
            let mut report = [u64::MAX, 0];
            let at = report.as_mut_ptr() as u64;
            let matrix = case.matrix(&raw, tiles[first..].as_mut_ptr() as u64, at, at + 8);
            for piece in matrix.pieces(slot_bytes) {
                assert!(piece.n_bytes() <= slot_bytes, "{case:?}");
                let mut slot = vec![0xDD; slot_bytes + 16];
                let skip = slot.as_ptr().align_offset(16);
                piece.read(&mut slot[skip..]).unwrap();
                let Then::Repack { stored, held, args } = piece.then else {
                    panic!("matrices are repacked");
                };
                let args = args.in_slot(slot[skip..].as_ptr() as u64);
                let name = kernel_name(stored, held);
                // SAFETY: as above; all that the piece tells of lies in the buffers above.
                unsafe {
                    let kernel = library.get::<Kernel>(name.as_bytes()).unwrap();
                    run(*kernel, &args, args.n_blocks());
                }
            }
            if report[1] > 0 {
                let tile_bytes = pack::tile_bytes(case.held);
                let n_tiles = (case.n_bytes() / tile_bytes) as u64;
                let bias = pack::narrow_bias(case.held).expect("bf16 has no scales");
                // SAFETY: so many tiles there are.
                unsafe {
                    widen(
                        tiles[first..].as_mut_ptr(),
                        n_tiles,
                        tile_bytes as u32,
                        u32::from(bias),
                    );
                }
            }
            let tiles = &tiles[first..][..case.n_bytes()];
            check(&case, &raw, &matrix, tiles, report[0], report[1]);
        }
    }
}
