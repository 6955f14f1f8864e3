//! A backend that loses its device when told to: what a run does then can be tested. A GPU is really
//! lost; a CPU, which cannot be, says that it was.

use std::sync::Arc;

use super::device::AnyBackend;
use crate::engine::cuda::{CudaError, Loaded};
use crate::engine::{
    Backend, BackendInfo, BackendMemory, EngineError, Fork, PageId, SequenceId, SlotStart, Span,
    TokenEvent,
};

/// Passes everything on until the device is lost.
pub struct Faulty<'a> {
    inner: &'a mut dyn Backend,
    gpu: Option<Arc<Loaded>>,
    /// Calls of steps until then; never where there is none.
    n_calls: Option<usize>,
}

impl<'a> Faulty<'a> {
    pub fn new(backend: &'a mut AnyBackend, n_calls: Option<usize>) -> Self {
        let gpu = match backend {
            AnyBackend::Cpu(_) => None,
            AnyBackend::Cuda(backend) => Some(Arc::clone(backend.loaded())),
        };
        Self {
            inner: backend.get(),
            gpu,
            n_calls,
        }
    }
}

impl Backend for Faulty<'_> {
    fn info(&self) -> &BackendInfo {
        self.inner.info()
    }

    fn map_page(&mut self, sequence: SequenceId, index: usize, page: PageId) {
        self.inner.map_page(sequence, index, page);
    }

    fn fork(&mut self, fork: &Fork) -> Result<(), EngineError> {
        self.inner.fork(fork)
    }

    fn prefill(&mut self, spans: &[Span]) -> Result<(), EngineError> {
        self.inner.prefill(spans)
    }

    fn start(&mut self, start: &SlotStart) -> Result<(), EngineError> {
        self.inner.start(start)
    }

    fn decode(&mut self, n_steps: usize) -> Result<(), EngineError> {
        match &mut self.n_calls {
            Some(0) => {
                if let Some(gpu) = &self.gpu {
                    gpu.lose()?;
                }
                return Err(EngineError::from(CudaError::Lost {
                    what: "a step".to_owned(),
                    reason: "an injected fault".to_owned(),
                }));
            }
            Some(left) => *left -= 1,
            None => {}
        }
        self.inner.decode(n_steps)
    }

    fn poll(&mut self, events: &mut Vec<TokenEvent>) -> Result<bool, EngineError> {
        self.inner.poll(events)
    }

    fn clear(&mut self, sequences: &[SequenceId]) {
        self.inner.clear(sequences);
    }

    fn score(
        &mut self,
        span: &Span,
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), EngineError> {
        self.inner.score(span, visit)
    }

    fn memory(&self) -> BackendMemory {
        self.inner.memory()
    }
}
