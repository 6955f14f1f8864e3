//! A run's manifest as it begins: what it is, where it runs, and each setting with its origin.

use std::collections::BTreeMap;
use std::path::Path;

use super::Run;
use crate::engine::checkpoint::Precision;
use crate::engine::cpu::path::CpuPath;
use crate::job::submit::submission_format;
use crate::submission::environment::{Environment, redact};
use crate::submission::identity::GenerationIdentity;
use crate::submission::manifest::{Origin, RUN_SCHEMA, RunManifest, Setting, Shard};
use crate::telemetry::throughput::ThroughputTotals;

impl Run<'_> {
    /// A new run's manifest.
    pub(super) fn manifest(&self, path: &Path, identity: &GenerationIdentity) -> RunManifest {
        // A file's name need not be UTF-8.
        let arguments = std::env::args_os();
        let arguments = arguments.map(|argument| argument.to_string_lossy().into_owned());
        let mut environment = Environment::read(arguments);
        environment.cpu_path = CpuPath::choose().ok().map(|path| path.name().to_owned());
        environment.n_threads = Some(self.options.n_threads);
        self.engine.describe(&mut environment);
        let dataset_path = self.prepared.dataset.path.to_string_lossy();
        RunManifest {
            schema: RUN_SCHEMA.to_owned(),
            name: path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            generation_hash: identity.hash(),
            scoring_hash: self.scoring_hash(),
            scoring: Some(self.prepared.profile.scoring.clone()),
            generation: identity.clone(),
            dataset_path: redact(&dataset_path),
            model_path: redact(&self.model.name),
            profile: self.prepared.profile.name.clone(),
            config: self.config(),
            submission_format: submission_format(&self.prepared.profile),
            shard: self.shard(),
            n_rows: self.prepared.rows.len(),
            ledger: serde_json::Value::Null,
            memory_plan: serde_json::Value::Null,
            environment,
            sessions: Vec::new(),
            totals: ThroughputTotals::default(),
            tally: None,
        }
    }

    fn config(&self) -> BTreeMap<String, Setting> {
        let mut config = self.settings.config();
        let mut add = |name: &str, value: serde_json::Value, origin| {
            config.insert(name.to_owned(), Setting { value, origin });
        };
        add(
            "model",
            redact(&self.model_word.value).into(),
            self.model_word.origin,
        );
        let precision = self.precision.value;
        let origin = match precision {
            Precision::Stored => Origin::Model,
            _ => self.precision.origin,
        };
        add(
            "precision",
            self.model.effective_precision(precision).name().into(),
            origin,
        );
        let profile = match &self.profile_word {
            Some(word) => (redact(word), Origin::Flag),
            None => (self.prepared.profile.name.clone(), Origin::Default),
        };
        add("profile", profile.0.into(), profile.1);
        config
    }

    pub(super) fn shard(&self) -> Option<Shard> {
        let shard = self.settings.shard.value?;
        Some(Shard {
            index: shard.index,
            count: shard.count,
        })
    }
}
