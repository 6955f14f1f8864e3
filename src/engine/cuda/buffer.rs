//! Memory of the device and page-locked memory of the host; both free themselves.

#![allow(unsafe_code, reason = "calls into the driver")]

use std::ffi::c_void;
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::sys;

use super::counts::add;
use super::device::{Device, check};
use super::error::CudaError;

/// Values whose bytes may go to the device and back as they are.
///
/// # Safety
/// No padding, no pointer into the host, every bit pattern is a value.
pub unsafe trait Plain: Copy + Default + 'static {}

// SAFETY: plain numbers.
unsafe impl Plain for u8 {}
// SAFETY: plain numbers.
unsafe impl Plain for u16 {}
// SAFETY: plain numbers.
unsafe impl Plain for u32 {}
// SAFETY: plain numbers.
unsafe impl Plain for u64 {}
// SAFETY: plain numbers.
unsafe impl Plain for f32 {}
// SAFETY: plain numbers.
unsafe impl Plain for [u32; 2] {}

/// Device memory.
pub struct DeviceBuffer<T> {
    pub(super) device: Arc<Device>,
    pub(super) address: sys::CUdeviceptr,
    pub(super) len: usize,
    pub(super) values: PhantomData<T>,
}

impl<T: Plain> DeviceBuffer<T> {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn n_bytes(&self) -> u64 {
        (self.len * size_of::<T>()) as u64
    }

    /// Address of element `start`, for a kernel.
    ///
    /// # Panics
    /// When it is past the end.
    pub fn at(&self, start: usize) -> u64 {
        assert!(start <= self.len, "a kernel's argument lies in its buffer");
        self.address + (start * size_of::<T>()) as u64
    }

    /// Copies `values` to element `start` and on; `values` may be dropped at once.
    ///
    /// # Errors
    /// The driver fails.
    ///
    /// # Panics
    /// When they do not fit.
    pub fn upload(&self, start: usize, values: &[T]) -> Result<(), CudaError> {
        assert!(start + values.len() <= self.len, "uploads fit their buffer");
        if values.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: in range of both; pageable memory is staged before the call returns.
        let copied = unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                self.at(start),
                values.as_ptr().cast::<c_void>(),
                size_of_val(values),
                self.device.stream,
            )
        };
        add(&self.device.counters.bytes_to_device, size_of_val(values));
        check(copied, "a copy to the device")
    }

    /// Copies elements from `start` on to `out` and waits for them.
    ///
    /// # Errors
    /// The driver fails, or something enqueued before has failed.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn download(&self, start: usize, out: &mut [T]) -> Result<(), CudaError> {
        assert!(
            start + out.len() <= self.len,
            "downloads lie in their buffer"
        );
        self.device.bind()?;
        // SAFETY: in range of both; waited for below.
        let copied = unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                out.as_mut_ptr().cast::<c_void>(),
                self.at(start),
                size_of_val(out),
                self.device.stream,
            )
        };
        add(&self.device.counters.bytes_to_host, size_of_val(out));
        check(copied, "a copy from the device")?;
        self.device.synchronize()
    }

    /// Enqueues a copy of the first elements to pinned memory.
    ///
    /// # Errors
    /// The driver fails.
    ///
    /// # Panics
    /// When they do not fit.
    pub fn download_async(&self, n: usize, out: &mut PinnedBuffer<T>) -> Result<(), CudaError> {
        assert!(
            n <= self.len && n <= out.len,
            "downloads lie in their buffer"
        );
        self.device.bind()?;
        // SAFETY: in range of both; `out` is read after an event alone.
        let copied = unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                out.at.cast::<c_void>(),
                self.address,
                n * size_of::<T>(),
                self.device.stream,
            )
        };
        add(&self.device.counters.bytes_to_host, n * size_of::<T>());
        check(copied, "a copy from the device")
    }

    /// Enqueues a copy within the buffer; the ranges do not overlap.
    ///
    /// # Errors
    /// The driver fails.
    ///
    /// # Panics
    /// When a range is past the end.
    pub fn copy_within(&self, from: usize, to: usize, n: usize) -> Result<(), CudaError> {
        assert!(
            from + n <= self.len && to + n <= self.len,
            "copies lie in their buffer"
        );
        self.device.bind()?;
        // SAFETY: in range.
        let copied = unsafe {
            sys::cuMemcpyDtoDAsync_v2(
                self.at(to),
                self.at(from),
                n * size_of::<T>(),
                self.device.stream,
            )
        };
        check(copied, "a copy on the device")
    }

    /// Enqueues filling elements `start..start + n` with bytes of `byte`; their width is a
    /// multiple of two bytes.
    ///
    /// # Errors
    /// The driver fails.
    ///
    /// # Panics
    /// When the range is past the end.
    pub fn fill(&self, start: usize, n: usize, byte: u8) -> Result<(), CudaError> {
        assert!(start + n <= self.len, "fills lie in their buffer");
        if n == 0 {
            return Ok(());
        }
        self.device.bind()?;
        let word = u16::from_le_bytes([byte, byte]);
        let n_words = n * size_of::<T>() / 2;
        // SAFETY: in range.
        let filled =
            unsafe { sys::cuMemsetD16Async(self.at(start), word, n_words, self.device.stream) };
        check(filled, "to fill memory")
    }
}

impl<T> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: our own allocation; freeing waits for kernels that use it.
            let _ = unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

/// Page-locked host memory.
pub struct PinnedBuffer<T> {
    pub(super) device: Arc<Device>,
    pub(super) at: *mut T,
    pub(super) len: usize,
}

// SAFETY: it owns its memory.
unsafe impl<T: Send> Send for PinnedBuffer<T> {}

impl<T: Plain> PinnedBuffer<T> {
    /// The values; an event has told that no copy is under way.
    pub fn values(&self) -> &[T] {
        // SAFETY: `len` values were written when it was made.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }

    /// The values, to write; an event has told that no copy is under way.
    pub fn values_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and nobody else has them.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }
}

impl<T> Drop for PinnedBuffer<T> {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: our own allocation.
            let _ = unsafe { sys::cuMemFreeHost(self.at.cast::<c_void>()) };
        }
    }
}
