//! The driver's figures through a library that stands in for NVML, made by a C++ compiler.

#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::process::Command;

use podium::engine::cuda::nvml::Nvml;
use podium::telemetry::device::{DeviceProbe, DeviceSample};
use support::Scratch;

/// Names and records as in nvml.h. Memory clock and utilization are not supported here.
const LIBRARY: &str = r#"
#include <string.h>
#include <unistd.h>
struct Memory { unsigned long long total, free, used; };
struct ProcessInfo { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; };
static int device;
extern "C" {
int nvmlInit_v2() { return 0; }
int nvmlShutdown() { return 0; }
int nvmlSystemGetDriverVersion(char* text, unsigned n) { strncpy(text, "580.1.2", n); return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char* id, void** handle) {
    *handle = &device;
    return strcmp(id, "0000:1B:00.0") == 0 ? 0 : 6;
}
int nvmlDeviceGetPowerUsage(void* handle, unsigned* mw) { *mw = 350500; return handle == &device ? 0 : 2; }
int nvmlDeviceGetClockInfo(void*, unsigned which, unsigned* mhz) { *mhz = 1755; return which == 1 ? 0 : 3; }
int nvmlDeviceGetMemoryInfo(void*, Memory* memory) { *memory = {100, 60, 40}; return 0; }
int nvmlDeviceGetComputeRunningProcesses_v3(void*, unsigned* n, ProcessInfo* all) {
    if (*n < 2) return 7;
    *n = 2;
    all[0] = {1, 7, 0, 0};
    all[1] = {(unsigned)getpid(), 33, 0, 0};
    return 0;
}
}
"#;

#[test]
#[ignore = "needs a C++ compiler: just test-full"]
fn independent_library_is_asked_by_nvmls_names() {
    let scratch = Scratch::new("nvml");
    let source = scratch.write("nvml.cpp", LIBRARY);
    let path = scratch.join("libnvidia-ml.so.1");
    let compiled = Command::new("c++")
        .args(["-std=c++17", "-fPIC", "-shared", "-o"])
        .args([&path, &source])
        .output()
        .expect("a C++ compiler");
    let log = String::from_utf8_lossy(&compiled.stderr);
    assert!(compiled.status.success(), "{log}");
    assert!(Nvml::open(&path, "0000:2C:00.0").is_none(), "no such GPU");
    let nvml = Nvml::open(&path, "0000:1B:00.0").unwrap();
    assert_eq!(nvml.driver.as_deref(), Some("580.1.2"));
    let expected = DeviceSample {
        power_watts: Some(350.5),
        sm_clock_mhz: Some(1755),
        memory_clock_mhz: None,
        utilization: None,
        used_bytes: Some(40),
        process_bytes: Some(33),
    };
    assert_eq!(nvml.sample(), expected);
}
