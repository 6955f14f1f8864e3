//! Checkpoints by name: `owner/name`, or `owner/name@REVISION`.
//!
//! They lie in the cache that all tools of the hub share, one folder a repository (`cache.rs`). What
//! is there is used without a request; what is not is downloaded into it (`download.rs`), over the
//! hub's HTTP protocol (`client.rs`), so that other tools find it in turn. Of a repository only the
//! files that podium reads are taken (`files.rs`).
//!
//! The environment is the one of those tools: `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN` and the token file,
//! `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HUB_DOWNLOAD_TIMEOUT`; for the way there `HTTPS_PROXY`,
//! `NO_PROXY` and `SSL_CERT_FILE`.

mod cache;
mod client;
mod download;
mod error;
mod files;
mod patience;
mod progress;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use cache::Repository;
use client::Client;
use download::Download;
pub use error::HubError;
use progress::Progress;

/// The public hub, where `HF_ENDPOINT` names no other.
const ENDPOINT: &str = "https://huggingface.co";
/// The revision where none is asked for.
const MAIN: &str = "main";
/// Longest silence of a server, where `HF_HUB_DOWNLOAD_TIMEOUT` gives no other.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The longest that one can be, a year: a clock cannot be set to a time too far ahead.
const MAX_TIMEOUT: Duration = Duration::from_secs(365 * 86_400);

/// A repository, and the revision that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelId {
    /// `owner/name`.
    pub repository: String,
    pub revision: Option<String>,
}

impl ModelId {
    /// The id in `word`, unless it cannot be one.
    pub fn parse(word: &str) -> Option<Self> {
        let (repository, revision) = match word.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (word, None),
        };
        let is_part = |part: &str| {
            let of_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && part.chars().all(of_name) && !part.starts_with('.')
        };
        let (owner, name) = repository.split_once('/')?;
        // A revision may be a branch with slashes in it; it names files of the cache, too.
        let is_revision = revision.is_none_or(|revision| revision.split('/').all(is_part));
        (is_part(owner) && is_part(name) && is_revision).then(|| Self {
            repository: repository.to_owned(),
            revision: revision.map(str::to_owned),
        })
    }
}

/// How much of a checkpoint is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Configuration and tokenizer.
    Description,
    /// The weights, too.
    Whole,
}

/// The hub as the environment names it.
pub struct Hub {
    endpoint: String,
    cache: Option<PathBuf>,
    token: Option<String>,
    offline: bool,
    timeout: Duration,
    /// Roots to trust in place of the usual ones.
    certificates: Option<PathBuf>,
}

impl Hub {
    /// What the process's environment says.
    pub fn from_env() -> Self {
        Self::from_variables(|name| std::env::var_os(name).filter(|value| !value.is_empty()))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let path = |name| variable(name).map(PathBuf::from);
        let text = |name| variable(name).and_then(|value| value.into_string().ok());
        let caches = || path("XDG_CACHE_HOME").or_else(|| Some(path("HOME")?.join(".cache")));
        let home = path("HF_HOME").or_else(|| Some(caches()?.join("huggingface")));
        let token_file =
            path("HF_TOKEN_PATH").or_else(|| home.as_ref().map(|home| home.join("token")));
        let from_file = || std::fs::read_to_string(token_file?).ok();
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let seconds = text("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|text| text.parse().ok());
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: text("HF_TOKEN")
                .or_else(from_file)
                .map(|token| token.trim().to_owned())
                .filter(|token| !token.is_empty()),
            cache: path("HF_HUB_CACHE").or_else(|| Some(home?.join("hub"))),
            offline: text("HF_HUB_OFFLINE").is_some_and(|text| {
                ["1", "on", "yes", "true"].contains(&text.to_ascii_lowercase().as_str())
            }),
            timeout: seconds
                .map_or(TIMEOUT, Duration::from_secs)
                .min(MAX_TIMEOUT),
            certificates: path("SSL_CERT_FILE"),
        }
    }

    /// The folder of a checkpoint of which the cache holds this part.
    pub fn find(&self, id: &ModelId, part: Part) -> Option<PathBuf> {
        self.repository(id)?.find(id.revision.as_deref(), part)
    }

    /// The folder of a checkpoint; what the cache does not hold of it is downloaded.
    ///
    /// # Errors
    /// A repository that is not there, not open to the user or no checkpoint; a server that cannot
    /// be reached; a file with the wrong checksum; no room, or a cache that cannot be written.
    pub fn fetch(&self, id: &ModelId, part: Part, quiet: bool) -> Result<PathBuf, HubError> {
        if let Some(found) = self.find(id, part) {
            return Ok(found);
        }
        if self.offline {
            return Err(HubError::Offline {
                id: id.repository.clone(),
            });
        }
        let repository = self.repository(id).ok_or(HubError::NoCache)?;
        let client = Client::new(self)?;
        let mut progress = Progress::new(quiet);
        let revision = id.revision.as_deref().unwrap_or(MAIN);
        let listing = client.list(&id.repository, revision, &mut progress)?;
        let mut download = Download {
            client: &client,
            id: &id.repository,
            commit: &listing.commit,
            repository: &repository,
            progress,
        };
        let names = files::description(&id.repository, &listing.names)?;
        let mut wanted = download.look_up(&names)?;
        if part == Part::Whole {
            // The list of the weights comes first: without it one of several files would look
            // like all of them.
            let index = match files::index(&listing.names) {
                Some(name) => Some(download.small_file(name)?),
                None => None,
            };
            let names = files::weights(&id.repository, &listing.names, index.as_deref())?;
            wanted.extend(download.look_up(&names)?);
        }
        download.all(&wanted)?;
        repository.set_revision(revision, &listing.commit)?;
        Ok(repository.snapshot(&listing.commit))
    }

    fn repository(&self, id: &ModelId) -> Option<Repository> {
        Some(Repository::new(self.cache.as_ref()?, &id.repository))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn hub(variables: &[(&str, &str)]) -> Hub {
        Hub::from_variables(|name| {
            let found = variables.iter().find(|(other, _)| *other == name);
            found.map(|(_, value)| value.into())
        })
    }

    #[test]
    fn ids_are_told_from_paths() {
        let id = |word| ModelId::parse(word).map(|id| (id.repository, id.revision));
        let named = |name: &str, revision: Option<&str>| {
            Some((name.to_owned(), revision.map(str::to_owned)))
        };
        assert_eq!(id("openai/gpt-oss-20b"), named("openai/gpt-oss-20b", None));
        assert_eq!(id("a/b.c@v1"), named("a/b.c", Some("v1")));
        assert_eq!(id("a/b@refs/pr/1"), named("a/b", Some("refs/pr/1")));
        for word in [
            "gpt-oss", "./model", "../model", "/model", "a/", "a/b/c", "a/..", "a/b@", "a/b@../c",
            "a/b@/c", "a b/c", "~/model", "a/b?c",
        ] {
            assert_eq!(id(word), None, "{word}");
        }
    }

    #[test]
    fn the_environment_is_that_of_other_tools() {
        let home = ("HOME", "/home/x");
        let cache = |variables: &[_]| hub(variables).cache.unwrap_or_default();
        assert_eq!(cache(&[home]), Path::new("/home/x/.cache/huggingface/hub"));
        let xdg = [home, ("XDG_CACHE_HOME", "/c")];
        assert_eq!(cache(&xdg), Path::new("/c/huggingface/hub"));
        assert_eq!(cache(&[home, ("HF_HOME", "/h")]), Path::new("/h/hub"));
        let both = [("HF_HUB_CACHE", "/d"), ("HF_HOME", "/h")];
        assert_eq!(cache(&both), Path::new("/d"));
        assert_eq!(hub(&[]).cache, None);
        assert_eq!(hub(&[]).endpoint, ENDPOINT);
        assert_eq!(hub(&[("HF_ENDPOINT", "http://a/")]).endpoint, "http://a");
        for (word, offline) in [("1", true), ("TRUE", true), ("0", false), ("no", false)] {
            assert_eq!(hub(&[("HF_HUB_OFFLINE", word)]).offline, offline);
        }
        assert_eq!(hub(&[("HF_TOKEN", " t\n")]).token.as_deref(), Some("t"));
        let timeout = |seconds| hub(&[("HF_HUB_DOWNLOAD_TIMEOUT", seconds)]).timeout;
        assert_eq!(timeout("5"), Duration::from_secs(5));
        assert_eq!(timeout("18446744073709551615"), MAX_TIMEOUT);
        assert_eq!(timeout("soon"), TIMEOUT);
    }
}
