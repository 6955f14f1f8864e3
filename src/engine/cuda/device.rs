//! A GPU: context, stream and loaded code, over the driver loaded at run time; what it allocates
//! and captures is in [`super::buffer`] and [`super::graph`].
//!
//! Everything runs on one stream in order. All memory is allocated when a backend opens; a buffer
//! frees itself. Launches are in `launch.rs`.

#![allow(unsafe_code, reason = "calls into the driver")]

use std::ffi::{CStr, CString};
use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys;
use sys::{CUdevice_attribute_enum as Attribute, CUresult};

use super::buffer::{DeviceBuffer, PinnedBuffer, Plain};
use super::counts::{Counters, add};
use super::error::CudaError;
use super::graph::{Event, Graph};

/// An open GPU.
pub struct Device {
    context: sys::CUcontext,
    device: sys::CUdevice,
    pub(super) stream: sys::CUstream,
    pub name: String,
    /// Compute capability.
    pub major: u32,
    pub minor: u32,
    pub n_multiprocessors: u32,
    /// Highest clock of the multiprocessors; 0 where the driver does not say.
    pub clock_khz: u32,
    /// Shared memory that a block may have.
    pub shared_bytes: u32,
    /// What was asked of it so far.
    pub counters: Counters,
}

// SAFETY: driver handles may be used from any thread whose current context is set, which every
// method does.
unsafe impl Send for Device {}
// SAFETY: the driver's calls are thread-safe.
unsafe impl Sync for Device {}

fn reason(result: CUresult) -> String {
    let mut text = ptr::null();
    // SAFETY: the driver writes a pointer to a static string.
    let told = unsafe { sys::cuGetErrorString(result, &mut text) };
    if told != CUresult::CUDA_SUCCESS || text.is_null() {
        return format!("{result:?}");
    }
    // SAFETY: a string of the driver's, ended by zero.
    let text = unsafe { CStr::from_ptr(text) };
    format!("{} ({result:?})", text.to_string_lossy())
}

/// Turns a driver's answer into an error that names the call.
pub(super) fn check(result: CUresult, what: &str) -> Result<(), CudaError> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        other if is_loss(other) => Err(CudaError::Lost {
            what: what.to_owned(),
            reason: reason(other),
        }),
        other => Err(CudaError::Driver {
            what: what.to_owned(),
            reason: reason(other),
        }),
    }
}

/// Answers after which every call fails: the context is of no more use.
fn is_loss(result: CUresult) -> bool {
    matches!(
        result,
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
            | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUresult::CUDA_ERROR_INVALID_PC
            | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUresult::CUDA_ERROR_LAUNCH_FAILED
            | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
            | CUresult::CUDA_ERROR_ASSERT
            | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
            | CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE
            | CUresult::CUDA_ERROR_UNKNOWN
    )
}

/// GPUs that the driver has.
///
/// # Errors
/// No driver, or none that works.
pub fn count() -> Result<u32, CudaError> {
    // SAFETY: opens and closes the driver's library.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    // SAFETY: the library is there.
    let started = unsafe { sys::cuInit(0) };
    if started != CUresult::CUDA_SUCCESS {
        return Err(CudaError::NoDevices {
            reason: reason(started),
        });
    }
    let mut count = 0;
    check(
        // SAFETY: writes one integer.
        unsafe { sys::cuDeviceGetCount(&mut count) },
        "its count of GPUs",
    )?;
    Ok(count.max(0) as u32)
}

impl Device {
    /// Opens GPU `index` of those the driver shows.
    ///
    /// # Errors
    /// No driver, no such GPU, or one older than compute capability 8.0.
    pub fn open(index: u32) -> Result<Arc<Self>, CudaError> {
        let count = count()?;
        if count == 0 {
            return Err(CudaError::NoDevices {
                reason: "it shows none".to_owned(),
            });
        }
        if index >= count {
            return Err(CudaError::NoSuchDevice { index, count });
        }
        let mut device = 0;
        check(
            // SAFETY: writes one handle.
            unsafe { sys::cuDeviceGet(&mut device, index as i32) },
            "a GPU",
        )?;
        let mut name = [0; 256];
        check(
            // SAFETY: writes at most 255 bytes and a zero.
            unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), 256, device) },
            "a GPU's name",
        )?;
        // SAFETY: the driver ended it by zero.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) };
        let name = name.to_string_lossy().into_owned();
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: writes one integer.
            let told = unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) };
            check(told, "a GPU's attribute").map(|()| value.max(0) as u32)
        };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if major < 8 {
            return Err(CudaError::TooOld { name, major, minor });
        }
        let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let n_multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let clock_khz = attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE).unwrap_or(0);
        let mut context = ptr::null_mut();
        // SAFETY: writes one handle; it is never given back, see `drop`.
        let retained = unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) };
        check(retained, "a context")?;
        let mut opened = Self {
            context,
            device,
            stream: ptr::null_mut(),
            name,
            major,
            minor,
            n_multiprocessors,
            clock_khz,
            shared_bytes: shared,
            counters: Counters::default(),
        };
        opened.bind()?;
        // 1: does not wait for the default stream.
        check(
            // SAFETY: writes one handle, destroyed in `drop`.
            unsafe { sys::cuStreamCreate(&mut opened.stream, 1) },
            "a stream",
        )?;
        Ok(Arc::new(opened))
    }

    /// Its slot, `0000:1B:00.0`: its name among programs that count GPUs otherwise.
    pub fn pci_bus_id(&self) -> Option<String> {
        let mut text = [0; 32];
        // SAFETY: writes at most so many bytes, a zero among them.
        let told =
            unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr(), text.len() as i32, self.device) };
        check(told, "a GPU's slot").ok()?;
        // SAFETY: the driver ended it by zero.
        let text = unsafe { CStr::from_ptr(text.as_ptr()) };
        Some(text.to_string_lossy().into_owned())
    }

    /// Makes the context this thread's.
    pub(super) fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: the context lives as long as `self`.
        check(unsafe { sys::cuCtxSetCurrent(self.context) }, "its context")
    }

    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Dense bf16 products a second with sums in f32 by the multiprocessors' data sheets, at the
    /// highest clock; nothing for other devices and where the clock is not known.
    pub fn nominal_matrix_flops(&self) -> Option<f64> {
        let a_clock = match (self.major, self.minor) {
            (8, 0) => 2048,
            (9, 0) => 4096,
            _ => return None,
        };
        let a_second = f64::from(self.n_multiprocessors) * f64::from(self.clock_khz) * 1e3;
        (self.clock_khz > 0).then_some(f64::from(a_clock) * a_second)
    }

    /// Free and total device memory.
    ///
    /// # Errors
    /// The driver fails.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        check(
            // SAFETY: writes two integers.
            unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) },
            "its memory's size",
        )?;
        Ok((free as u64, total as u64))
    }

    /// `len` values of device memory, of unknown content.
    ///
    /// # Errors
    /// Out of memory.
    pub fn alloc<T: Plain>(
        self: &Arc<Self>,
        what: &str,
        len: usize,
    ) -> Result<DeviceBuffer<T>, CudaError> {
        self.bind()?;
        let n_bytes = len.saturating_mul(size_of::<T>());
        let mut address = 0;
        // SAFETY: writes one address, freed with the buffer.
        let allocated = unsafe { sys::cuMemAlloc_v2(&mut address, n_bytes.max(16)) };
        if allocated == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(CudaError::OutOfMemory {
                what: what.to_owned(),
                needed: n_bytes as u64,
                free: self.memory()?.0,
            });
        }
        check(allocated, what)?;
        add(&self.counters.allocations, 1);
        Ok(DeviceBuffer {
            device: Arc::clone(self),
            address,
            len,
            values: PhantomData,
        })
    }

    /// Memory of the host that the device copies to and from without a stop.
    ///
    /// # Errors
    /// Out of memory.
    pub fn alloc_pinned<T: Plain>(
        self: &Arc<Self>,
        len: usize,
    ) -> Result<PinnedBuffer<T>, CudaError> {
        self.bind()?;
        let mut at = ptr::null_mut();
        let n_bytes = (len * size_of::<T>()).max(16);
        check(
            // SAFETY: writes one address, freed with the buffer.
            unsafe { sys::cuMemHostAlloc(&mut at, n_bytes, 0) },
            "pinned memory",
        )?;
        add(&self.counters.allocations, 1);
        let at = at.cast::<T>();
        // SAFETY: `len` values fit; a default is a value.
        unsafe {
            for i in 0..len {
                at.add(i).write(T::default());
            }
        }
        Ok(PinnedBuffer {
            device: Arc::clone(self),
            at,
            len,
        })
    }

    /// Waits for everything enqueued.
    ///
    /// # Errors
    /// Something enqueued has failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.bind()?;
        add(&self.counters.waits, 1);
        check(
            // SAFETY: our own stream.
            unsafe { sys::cuStreamSynchronize(self.stream) },
            "the work enqueued",
        )
    }

    /// # Errors
    /// The driver fails.
    pub fn event(self: &Arc<Self>) -> Result<Event, CudaError> {
        self.bind()?;
        let mut event = ptr::null_mut();
        // SAFETY: writes one handle, destroyed with the event.
        check(unsafe { sys::cuEventCreate(&mut event, 0) }, "an event")?;
        Ok(Event {
            device: Arc::clone(self),
            event,
        })
    }

    /// Records what `enqueue` enqueues, instead of running it.
    ///
    /// # Errors
    /// The driver fails, or `enqueue` does.
    pub fn capture<E: From<CudaError>>(
        self: &Arc<Self>,
        enqueue: impl FnOnce() -> Result<(), E>,
    ) -> Result<Graph, E> {
        self.bind()?;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        check(
            // SAFETY: our own stream, which captures nothing yet.
            unsafe { sys::cuStreamBeginCapture_v2(self.stream, mode) },
            "to capture",
        )?;
        let enqueued = enqueue();
        let mut graph = ptr::null_mut();
        // SAFETY: ends the capture begun above, also after an error; writes one handle.
        let ended = unsafe { sys::cuStreamEndCapture(self.stream, &mut graph) };
        enqueued?;
        check(ended, "a captured graph")?;
        let mut exec = ptr::null_mut();
        // SAFETY: a graph just made; writes one handle.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0) };
        // SAFETY: the executable graph does not need it.
        let destroyed = unsafe { sys::cuGraphDestroy(graph) };
        check(made, "an executable graph")?;
        check(destroyed, "to drop a graph")?;
        Ok(Graph {
            device: Arc::clone(self),
            exec,
        })
    }

    /// Loads compiled code.
    ///
    /// # Errors
    /// Code for another GPU, or damaged code.
    pub fn load(self: &Arc<Self>, cubin: &[u8], what: &str) -> Result<Module, CudaError> {
        self.bind()?;
        let mut module = ptr::null_mut();
        // SAFETY: the driver reads the image by the sizes within it; it was compiled by NVRTC.
        let loaded = unsafe { sys::cuModuleLoadData(&mut module, cubin.as_ptr().cast()) };
        check(loaded, what)?;
        Ok(Module {
            device: Arc::clone(self),
            module,
        })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.bind().is_ok() && !self.stream.is_null() {
            // SAFETY: our own stream, last used here.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.stream) };
        }
        // The context stays until the process ends: a run opens its GPU several times, and a new
        // context takes a third of a second.
    }
}

/// Bytes read and written a second by a large copy on the device: the median of five.
///
/// # Errors
/// Too little free memory for two buffers of 1 GiB, or the driver fails.
pub fn copy_bandwidth(device: &Arc<Device>) -> Result<f64, CudaError> {
    const N_BYTES: usize = 1 << 30;
    const N_COPIES: usize = 8;
    let buffer: DeviceBuffer<u8> = device.alloc("a copy's buffers", 2 * N_BYTES)?;
    buffer.fill(0, 2 * N_BYTES, 0x5A)?;
    let (begun, ended) = (device.event()?, device.event()?);
    let mut rates = Vec::new();
    for _ in 0..5 {
        begun.record()?;
        for _ in 0..N_COPIES {
            buffer.copy_within(0, N_BYTES, N_BYTES)?;
        }
        ended.record()?;
        ended.wait()?;
        let seconds = f64::from(ended.ms_since(&begun)?) / 1000.0;
        rates.push((2 * N_BYTES * N_COPIES) as f64 / seconds);
    }
    rates.sort_by(f64::total_cmp);
    Ok(rates[2])
}

/// Loaded code.
pub struct Module {
    device: Arc<Device>,
    module: sys::CUmodule,
}

// SAFETY: handles may be used from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// A kernel of a module, which outlives it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Function(pub(super) sys::CUfunction);

// SAFETY: handles may be used from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Module {
    /// The kernel of this name; it may then take `shared_bytes` of dynamic shared memory.
    ///
    /// # Errors
    /// No such kernel, or more shared memory than a block may have.
    pub fn function(&self, name: &str, shared_bytes: u32) -> Result<Function, CudaError> {
        self.device.bind()?;
        let c_name = CString::new(name).unwrap_or_default();
        let mut function = ptr::null_mut();
        // SAFETY: writes one handle.
        let got = unsafe { sys::cuModuleGetFunction(&mut function, self.module, c_name.as_ptr()) };
        check(got, &format!("the kernel `{name}`"))?;
        // Up to 48 KB need no leave, arrays of fixed size among them.
        if shared_bytes > 40 << 10 {
            let which =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a kernel just found.
            let set = unsafe { sys::cuFuncSetAttribute(function, which, shared_bytes as i32) };
            check(
                set,
                &format!("{shared_bytes} bytes of shared memory to `{name}`"),
            )?;
        }
        Ok(Function(function))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: our own module; the stream is done with it when its backend drops.
            let _ = unsafe { sys::cuModuleUnload(self.module) };
        }
    }
}
