//! The effective settings of a run: every value, and where it came from.
//!
//! Typed flags lie over the configuration file, that over the profile, that over the defaults.

use std::collections::BTreeMap;

use crate::cli::eval::Options;
use crate::cli::values::{AutoOr, Device, Seconds, Shard};
use crate::engine::SamplingParams;
use crate::engine::checkpoint::Precision;
use crate::job::nano::NANO;
use crate::profile::Profile;
use crate::prompt::Reasoning;
use crate::submission::manifest::{Origin, Setting};

/// Longest reply where neither a flag nor the profile says: nano's replies are short, gpt-oss
/// thinks long at high effort.
const NANO_MAX_NEW_TOKENS: usize = 512;
const MAX_NEW_TOKENS: usize = 32_768;

/// A value in force, and where it came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Effective<T> {
    pub value: T,
    pub origin: Origin,
}

impl<T: serde::Serialize> Effective<T> {
    /// As `run.json` keeps it.
    fn setting(&self) -> Setting {
        // Our own plain values always have a JSON form.
        let value = serde_json::to_value(&self.value).unwrap_or_default();
        Setting {
            value,
            origin: self.origin,
        }
    }
}

/// Where an option stands: typed, or in the configuration file.
pub struct Layers {
    pub flags: Options,
    pub config: Options,
}

impl Layers {
    /// The model's word, which decides the profile and therefore comes first.
    pub fn model(&self) -> Effective<String> {
        self.pick(|o| o.model.clone(), None, || NANO.to_owned())
    }

    /// The weights' precision, spelled as typed; `stored` when nothing was.
    pub fn precision(&self) -> Effective<String> {
        self.pick(
            |o| o.precision.clone(),
            None,
            || Precision::Stored.name().to_owned(),
        )
    }

    /// The profile's word, if one was given.
    pub fn profile(&self) -> Option<String> {
        self.flags
            .profile
            .clone()
            .or_else(|| self.config.profile.clone())
    }

    fn pick<T>(
        &self,
        option: impl Fn(&Options) -> Option<T>,
        profile: Option<T>,
        default: impl FnOnce() -> T,
    ) -> Effective<T> {
        let found = option(&self.flags)
            .map(|value| (value, Origin::Flag))
            .or_else(|| option(&self.config).map(|value| (value, Origin::Config)))
            .or_else(|| profile.map(|value| (value, Origin::Profile)));
        let (value, origin) = found.unwrap_or_else(|| (default(), Origin::Default));
        Effective { value, origin }
    }
}

/// The settings that do not depend on the data set's tokens.
#[derive(Clone, Debug)]
pub struct Settings {
    pub device: Effective<Device>,
    pub exact: Effective<bool>,
    pub reasoning: Effective<Reasoning>,
    pub date: Effective<Option<String>>,
    pub meta: Effective<Option<Vec<String>>>,
    pub limit: Effective<Option<usize>>,
    pub shard: Effective<Option<Shard>>,
    pub strict: Effective<bool>,
    pub max_new_tokens: Effective<usize>,
    pub answer_headroom: Effective<usize>,
    pub temperature: Effective<f32>,
    pub top_p: Effective<f32>,
    pub top_k: Effective<u32>,
    pub samples: Effective<usize>,
    pub early_stop: Effective<bool>,
    pub seed: Effective<u64>,
    pub batch: Effective<AutoOr>,
    pub context: Effective<AutoOr>,
    pub host_memory: Effective<Option<u64>>,
    pub gpu_memory: Effective<Option<u64>>,
    pub threads: Effective<usize>,
    pub time_limit: Effective<Option<Seconds>>,
    pub refill: Effective<bool>,
    pub prefix_reuse: Effective<bool>,
    pub trace_hash: Effective<bool>,
}

impl Settings {
    /// Lays flags, configuration, profile and defaults over each other.
    pub fn resolve(layers: &Layers, profile: &Profile, model_is_nano: bool) -> Settings {
        let defaults = &profile.defaults;
        let longest = || {
            if model_is_nano {
                NANO_MAX_NEW_TOKENS
            } else {
                MAX_NEW_TOKENS
            }
        };
        let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
        Settings {
            device: layers.pick(|o| o.device, None, || Device::Auto),
            exact: layers.pick(|o| o.exact, None, || false),
            reasoning: layers.pick(|o| o.reasoning, defaults.reasoning, Reasoning::default),
            date: layers.pick(|o| o.date.clone().map(Some), None, || None),
            meta: layers.pick(|o| o.meta.clone().map(Some), None, || None),
            limit: layers.pick(|o| o.limit.map(Some), None, || None),
            shard: layers.pick(|o| o.shard.map(Some), None, || None),
            strict: layers.pick(|o| o.strict, None, || false),
            max_new_tokens: layers.pick(
                |o| o.max_new_tokens,
                defaults.max_new_tokens.map(|n| n as usize),
                longest,
            ),
            answer_headroom: layers.pick(|o| o.answer_headroom, None, || 0),
            temperature: layers.pick(|o| o.temperature, defaults.temperature, || 0.0),
            top_p: layers.pick(|o| o.top_p, defaults.top_p, || 1.0),
            top_k: layers.pick(|o| o.top_k, defaults.top_k, || 0),
            samples: layers.pick(|o| o.samples, defaults.samples, || 1),
            early_stop: layers.pick(|o| o.early_stop, defaults.early_stop, || false),
            seed: layers.pick(|o| o.seed, None, || 0),
            batch: layers.pick(|o| o.batch, None, AutoOr::default),
            context: layers.pick(|o| o.context, None, AutoOr::default),
            host_memory: layers.pick(|o| o.host_memory.map(|b| Some(b.0)), None, || None),
            gpu_memory: layers.pick(|o| o.gpu_memory.map(|b| Some(b.0)), None, || None),
            threads: layers.pick(|o| o.threads, None, cores),
            time_limit: layers.pick(|o| o.time_limit.map(Some), None, || None),
            refill: layers.pick(|o| o.no_refill.map(|no| !no), None, || true),
            prefix_reuse: layers.pick(|o| o.no_prefix_reuse.map(|no| !no), None, || true),
            trace_hash: layers.pick(|o| o.trace_hash, None, || false),
        }
    }

    /// All values by their option's name, as `run.json` keeps them and `--config` reads them.
    pub fn config(&self) -> BTreeMap<String, Setting> {
        let not = |effective: &Effective<bool>| Effective {
            value: !effective.value,
            origin: effective.origin,
        };
        [
            ("device", self.device.setting()),
            ("exact", self.exact.setting()),
            ("reasoning", self.reasoning.setting()),
            ("date", self.date.setting()),
            ("meta", self.meta.setting()),
            ("limit", self.limit.setting()),
            ("shard", self.shard.setting()),
            ("strict", self.strict.setting()),
            ("max-new-tokens", self.max_new_tokens.setting()),
            ("answer-headroom", self.answer_headroom.setting()),
            ("temperature", self.temperature.setting()),
            ("top-p", self.top_p.setting()),
            ("top-k", self.top_k.setting()),
            ("samples", self.samples.setting()),
            ("early-stop", self.early_stop.setting()),
            ("seed", self.seed.setting()),
            ("batch", self.batch.setting()),
            ("context", self.context.setting()),
            ("host-memory", self.host_memory.setting()),
            ("gpu-memory", self.gpu_memory.setting()),
            ("threads", self.threads.setting()),
            ("time-limit", self.time_limit.setting()),
            ("no-refill", not(&self.refill).setting()),
            ("no-prefix-reuse", not(&self.prefix_reuse).setting()),
            ("trace-hash", self.trace_hash.setting()),
        ]
        .into_iter()
        .map(|(name, setting)| (name.to_owned(), setting))
        .collect()
    }

    pub fn sampling(&self) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature.value,
            top_p: self.top_p.value,
            top_k: self.top_k.value,
            seed: self.seed.value,
        }
    }
}
