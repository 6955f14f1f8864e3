//! Points in the stream, and captured sequences of launches.

#![allow(unsafe_code, reason = "calls into the driver")]

use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};

use super::counts::add;
use super::device::{Device, check};
use super::error::CudaError;

/// A point in the stream.
pub struct Event {
    pub(super) device: Arc<Device>,
    pub(super) event: sys::CUevent,
}

// SAFETY: handles may go to another thread.
unsafe impl Send for Event {}

impl Event {
    /// Puts the point behind what is enqueued.
    ///
    /// # Errors
    /// The driver fails.
    pub fn record(&self) -> Result<(), CudaError> {
        self.device.bind()?;
        check(
            // SAFETY: our own event and stream.
            unsafe { sys::cuEventRecord(self.event, self.device.stream) },
            "an event",
        )
    }

    /// Whether the stream has passed the point.
    ///
    /// # Errors
    /// Something enqueued before has failed.
    pub fn is_past(&self) -> Result<bool, CudaError> {
        self.device.bind()?;
        // SAFETY: our own event.
        match unsafe { sys::cuEventQuery(self.event) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => check(other, "the work enqueued").map(|()| true),
        }
    }

    /// Waits until the stream has passed the point.
    ///
    /// # Errors
    /// Something enqueued before has failed.
    pub fn wait(&self) -> Result<(), CudaError> {
        if self.is_past()? {
            return Ok(());
        }
        add(&self.device.counters.waits, 1);
        check(
            // SAFETY: our own event.
            unsafe { sys::cuEventSynchronize(self.event) },
            "the work enqueued",
        )
    }

    /// Milliseconds between two points that are past.
    ///
    /// # Errors
    /// One is not past.
    pub fn ms_since(&self, earlier: &Event) -> Result<f32, CudaError> {
        self.device.bind()?;
        let mut ms = 0.0;
        // SAFETY: writes one number.
        let told = unsafe { sys::cuEventElapsedTime(&mut ms, earlier.event, self.event) };
        check(told, "the time between events").map(|()| ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: our own event.
            let _ = unsafe { sys::cuEventDestroy_v2(self.event) };
        }
    }
}

/// A captured sequence of launches.
pub struct Graph {
    pub(super) device: Arc<Device>,
    pub(super) exec: sys::CUgraphExec,
}

// SAFETY: handles may go to another thread.
unsafe impl Send for Graph {}

impl Graph {
    /// Enqueues it.
    ///
    /// # Errors
    /// The driver fails.
    pub fn launch(&self) -> Result<(), CudaError> {
        self.device.bind()?;
        add(&self.device.counters.graph_launches, 1);
        check(
            // SAFETY: the buffers it names live as long as the backend that holds it.
            unsafe { sys::cuGraphLaunch(self.exec, self.device.stream) },
            "a graph",
        )
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: our own graph.
            let _ = unsafe { sys::cuGraphExecDestroy(self.exec) };
        }
    }
}
