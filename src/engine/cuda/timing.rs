//! How often kernels ran, and how long each took on the device.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use super::counts::Recorded;
use super::device::Function;
use super::error::CudaError;
use super::graph::Event;
use super::launch::Kernels;

impl Kernels {
    /// Runs of each kernel by name since `before`, for kernels that ran.
    pub(super) fn calls_since(&self, before: &Recorded) -> BTreeMap<String, u64> {
        let mut by_name = BTreeMap::new();
        for (function, n) in self.calls.read() {
            let earlier = before.iter().find(|(known, _)| *known == function);
            let n = n - earlier.map_or(0, |(_, n)| *n);
            let name = self.names.iter().find(|(known, _)| *known == function);
            if let (Some((_, name)), true) = (name, n > 0) {
                by_name.insert(name.clone(), n);
            }
        }
        by_name
    }

    fn profile(&self) -> std::sync::MutexGuard<'_, Option<Vec<(Function, Event, Event)>>> {
        self.profile.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin_timing(&self) -> Result<Option<Event>, CudaError> {
        if self.profile().is_none() {
            return Ok(None);
        }
        let event = self.device.event()?;
        event.record()?;
        Ok(Some(event))
    }

    pub(super) fn end_timing(&self, function: Function, begun: Event) -> Result<(), CudaError> {
        let ended = self.device.event()?;
        ended.record()?;
        if let Some(launches) = self.profile().as_mut() {
            launches.push((function, begun, ended));
        }
        Ok(())
    }

    /// Runs `work` with each launch timed on the device; gives every kernel's launches and
    /// milliseconds, the longest first. Not for captured work.
    ///
    /// # Errors
    /// The driver fails, or `work` does.
    pub fn timed<E: From<CudaError>>(
        &self,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<Vec<(String, usize, f64)>, E> {
        *self.profile() = Some(Vec::new());
        let worked = work();
        let launches = self.profile().take().unwrap_or_default();
        worked?;
        self.device.synchronize()?;
        let mut times: Vec<(String, usize, f64)> = Vec::new();
        for (function, begun, ended) in &launches {
            let ms = f64::from(ended.ms_since(begun)?);
            let name = self.names.iter().find(|(known, _)| known == function);
            let name = name.map_or("", |(_, name)| name);
            match times.iter_mut().find(|(known, ..)| known == name) {
                Some((_, n, sum)) => {
                    *n += 1;
                    *sum += ms;
                }
                None => times.push((name.to_owned(), 1, ms)),
            }
        }
        times.sort_by(|a, b| b.2.total_cmp(&a.2));
        Ok(times)
    }
}
