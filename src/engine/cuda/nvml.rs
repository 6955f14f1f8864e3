//! NVML, the driver's own figures of a GPU, loaded at run time: what telemetry samples. Nothing
//! needs it; where it or one of its functions is missing, figures are absent.

#![allow(unsafe_code, reason = "calls into a shared library")]

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::ptr;

use libloading::Library;

use super::device::Device;
use crate::telemetry::device::{DeviceProbe, DeviceSample};

const SUCCESS: c_int = 0;
/// `nvmlClockType_t`.
const CLOCK_SM: c_uint = 1;
const CLOCK_MEMORY: c_uint = 2;
/// Processes on a GPU that are looked at.
const MAX_PROCESSES: usize = 64;

type Handle = *mut c_void;
/// A function that writes one thing about a GPU.
type Get<T> = unsafe extern "C" fn(Handle, *mut T) -> c_int;
type GetClock = unsafe extern "C" fn(Handle, c_uint, *mut c_uint) -> c_int;
type GetProcesses = unsafe extern "C" fn(Handle, *mut c_uint, *mut Process) -> c_int;

/// `nvmlUtilization_t`: percents.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Utilization {
    gpu: c_uint,
    memory: c_uint,
}

/// `nvmlMemory_t`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

/// `nvmlProcessInfo_v2_t`, which `nvmlDeviceGetComputeRunningProcesses_v3` writes.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Process {
    pid: c_uint,
    /// All ones: not known.
    used_bytes: u64,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

/// One GPU as NVML sees it.
pub struct Nvml {
    library: Library,
    handle: Handle,
    /// The driver's version.
    pub driver: Option<String>,
}

// SAFETY: NVML is thread-safe, and the handle is a number of its own.
unsafe impl Send for Nvml {}
// SAFETY: as above.
unsafe impl Sync for Nvml {}

impl Nvml {
    /// The driver's library and the GPU that an open device is; nothing where there is none.
    pub fn of(device: &Device) -> Option<Self> {
        Self::open(Path::new("libnvidia-ml.so.1"), &device.pci_bus_id()?)
    }

    /// A library, and the GPU in a slot (`0000:1b:00.0`): indices differ from CUDA's.
    pub fn open(path: &Path, pci_bus_id: &str) -> Option<Self> {
        // SAFETY: its initializers are NVIDIA's.
        let library = unsafe { Library::new(path) }.ok()?;
        type Init = unsafe extern "C" fn() -> c_int;
        type ByPci = unsafe extern "C" fn(*const c_char, *mut Handle) -> c_int;
        type Driver = unsafe extern "C" fn(*mut c_char, c_uint) -> c_int;
        let pci_bus_id = CString::new(pci_bus_id).ok()?;
        let mut nvml = Self {
            library,
            handle: ptr::null_mut(),
            driver: None,
        };
        let init: Init = nvml.symbol("nvmlInit_v2")?;
        // SAFETY: takes nothing; undone in `drop`, which may come without it.
        if unsafe { init() } != SUCCESS {
            return None;
        }
        let by_pci: ByPci = nvml.symbol("nvmlDeviceGetHandleByPciBusId_v2")?;
        // SAFETY: a string ended by zero; writes one handle.
        if unsafe { by_pci(pci_bus_id.as_ptr(), &mut nvml.handle) } != SUCCESS {
            return None;
        }
        if let Some(driver) = nvml.symbol::<Driver>("nvmlSystemGetDriverVersion") {
            let mut text = [0u8; 96];
            // SAFETY: writes at most so many bytes, a zero among them.
            if unsafe { driver(text.as_mut_ptr().cast(), text.len() as c_uint) } == SUCCESS {
                let text = text.split(|&byte| byte == 0).next().unwrap_or_default();
                nvml.driver = Some(String::from_utf8_lossy(text).into_owned());
            }
        }
        Some(nvml)
    }

    fn symbol<T: Copy>(&self, name: &str) -> Option<T> {
        // SAFETY: `T` is the symbol's type in nvml.h; a suffix changes with it.
        let found = unsafe { self.library.get::<T>(name.as_bytes()) };
        found.ok().map(|function| *function)
    }

    fn get<T: Default>(&self, name: &str) -> Option<T> {
        let get: Get<T> = self.symbol(name)?;
        let mut value = T::default();
        // SAFETY: the functions named below write one `T`.
        (unsafe { get(self.handle, &mut value) } == SUCCESS).then_some(value)
    }

    fn clock(&self, which: c_uint) -> Option<u32> {
        let get: GetClock = self.symbol("nvmlDeviceGetClockInfo")?;
        let mut mhz = 0;
        // SAFETY: writes one number.
        (unsafe { get(self.handle, which, &mut mhz) } == SUCCESS).then_some(mhz)
    }

    fn processes(&self) -> Option<Vec<Process>> {
        let get: GetProcesses = self.symbol("nvmlDeviceGetComputeRunningProcesses_v3")?;
        let mut processes = vec![Process::default(); MAX_PROCESSES];
        let mut n = MAX_PROCESSES as c_uint;
        // SAFETY: writes at most `n` records, and how many.
        let got = unsafe { get(self.handle, &mut n, processes.as_mut_ptr()) };
        processes.truncate(n as usize);
        (got == SUCCESS).then_some(processes)
    }
}

impl DeviceProbe for Nvml {
    fn sample(&self) -> DeviceSample {
        let milliwatts: Option<c_uint> = self.get("nvmlDeviceGetPowerUsage");
        let utilization: Option<Utilization> = self.get("nvmlDeviceGetUtilizationRates");
        let memory: Option<Memory> = self.get("nvmlDeviceGetMemoryInfo");
        let processes = self.processes().unwrap_or_default();
        DeviceSample {
            power_watts: milliwatts.map(|milliwatts| f64::from(milliwatts) / 1000.0),
            sm_clock_mhz: self.clock(CLOCK_SM),
            memory_clock_mhz: self.clock(CLOCK_MEMORY),
            utilization: utilization.map(|rates| f64::from(rates.gpu) / 100.0),
            used_bytes: memory.map(|memory| memory.used),
            process_bytes: own_bytes(&processes, std::process::id()),
        }
    }
}

/// Bytes of the process with this id. In a container NVML knows processes by other ids than they
/// know themselves: a process that is alone on the GPU is this one all the same.
fn own_bytes(processes: &[Process], pid: u32) -> Option<u64> {
    let own = match processes {
        [alone] => alone,
        several => several.iter().find(|process| process.pid == pid)?,
    };
    (own.used_bytes != u64::MAX).then_some(own.used_bytes)
}

impl Drop for Nvml {
    fn drop(&mut self) {
        if let Some(shutdown) = self.symbol::<unsafe extern "C" fn() -> c_int>("nvmlShutdown") {
            // SAFETY: NVML counts its users; without one it does nothing.
            unsafe { shutdown() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_library_there_are_no_figures() {
        let absent = Path::new("/nonexistent/libnvidia-ml.so.1");
        assert!(Nvml::open(absent, "0000:00:00.0").is_none());
    }

    #[test]
    fn a_process_finds_itself() {
        let process = |pid, used_bytes| Process {
            pid,
            used_bytes,
            ..Process::default()
        };
        assert_eq!(own_bytes(&[], 7), None);
        assert_eq!(own_bytes(&[process(3, 30)], 7), Some(30));
        let two = [process(3, 30), process(7, 70)];
        assert_eq!(own_bytes(&two, 7), Some(70));
        assert_eq!(own_bytes(&two, 8), None);
        assert_eq!(own_bytes(&[process(7, u64::MAX)], 7), None);
    }
}
