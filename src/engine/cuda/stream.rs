//! Streams beside the device's own: what is enqueued on one runs in order, streams run side by
//! side. Loading alone uses them.

#![allow(unsafe_code, reason = "calls into the driver")]

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys;

use super::buffer::PinnedBuffer;
use super::device::{Device, Function, check};
use super::error::CudaError;
use super::graph::Event;

/// A stream.
pub struct Stream {
    device: Arc<Device>,
    stream: sys::CUstream,
}

impl Stream {
    /// # Errors
    /// The driver fails.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        device.bind()?;
        let mut stream = ptr::null_mut();
        // 1: does not wait for the default stream.
        // SAFETY: writes one handle, destroyed in `drop`.
        let made = unsafe { sys::cuStreamCreate(&mut stream, 1) };
        check(made, "a stream")?;
        Ok(Self {
            device: Arc::clone(device),
            stream,
        })
    }

    /// Enqueues a copy of the first `n` pinned bytes to a device address. An event tells when the
    /// bytes may be written again.
    ///
    /// # Errors
    /// The driver fails.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn upload(&self, to: u64, from: &PinnedBuffer<u8>, n: usize) -> Result<(), CudaError> {
        let bytes = &from.values()[..n];
        self.device.bind()?;
        // SAFETY: in range of the host's buffer; the caller's address has room for the piece.
        let copied = unsafe {
            sys::cuMemcpyHtoDAsync_v2(to, bytes.as_ptr().cast::<c_void>(), n, self.stream)
        };
        check(copied, "a copy to the device")
    }

    /// Enqueues a kernel.
    ///
    /// # Safety
    /// `args` point to the kernel's own arguments, in order.
    pub(super) unsafe fn launch(
        &self,
        function: Function,
        n_blocks: u32,
        threads: u32,
        args: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: by the caller; the driver copies the arguments before this returns.
        let launched = unsafe {
            sys::cuLaunchKernel(
                function.0,
                n_blocks,
                1,
                1,
                threads,
                1,
                1,
                0,
                self.stream,
                args.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        check(launched, "a launch")
    }

    /// Puts an event behind what is enqueued.
    ///
    /// # Errors
    /// The driver fails.
    pub fn record(&self, event: &Event) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: our own event and stream.
        let recorded = unsafe { sys::cuEventRecord(event.event, self.stream) };
        check(recorded, "an event")
    }

    /// Waits for everything enqueued.
    ///
    /// # Errors
    /// Something enqueued has failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: our own stream.
        let done = unsafe { sys::cuStreamSynchronize(self.stream) };
        check(done, "the work enqueued")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // What it reads and writes may be freed next.
        if self.synchronize().is_ok() {
            // SAFETY: our own stream, last used here.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.stream) };
        }
    }
}
