//! Why a checkpoint could not be had by its name, and how to mend it.

use std::path::PathBuf;

use indicatif::BinaryBytes;

/// What went wrong between the hub, the network and the cache.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error("`{id}` is not in the hub cache, and `HF_HUB_OFFLINE` forbids to download it")]
    Offline { id: String },
    #[error("there is no folder for the hub cache: neither `HF_HOME` nor `HOME` is set")]
    NoCache,
    #[error("`{word}` is no folder here, and {endpoint} knows no such repository")]
    Unknown { word: String, endpoint: String },
    #[error("`{id}` is not open to everybody: {endpoint} answered {status}{}", token_words(*.with_token))]
    Refused {
        id: String,
        endpoint: String,
        status: u16,
        with_token: bool,
    },
    #[error("`{id}` has no revision `{revision}`")]
    Revision { id: String, revision: String },
    #[error("`{id}` is no checkpoint that podium reads: it has no `{missing}`")]
    NoCheckpoint { id: String, missing: &'static str },
    #[error("{url} answered {status}")]
    Status { url: String, status: u16 },
    #[error("{url} did not answer as a hub does: {reason}")]
    Protocol { url: String, reason: String },
    #[error("cannot download {url}: {reason}, after {n_attempts} attempts")]
    Network {
        url: String,
        reason: String,
        n_attempts: u32,
    },
    #[error("{url} is not trusted: {reason}")]
    Certificate { url: String, reason: String },
    #[error("the token holds characters that no token has")]
    Token,
    #[error("no certificates can be read from `{path}`: {reason}")]
    Certificates { path: PathBuf, reason: String },
    #[error("`{file}` of `{id}` came with a wrong checksum: expected {expected}, found {found}")]
    Checksum {
        id: String,
        file: String,
        expected: String,
        found: String,
    },
    #[error("`{id}` needs {} more on the disk of `{path}`, {} are free", BinaryBytes(*.needed), BinaryBytes(*.free))]
    NoRoom {
        id: String,
        path: PathBuf,
        needed: u64,
        free: u64,
    },
    #[error("cannot write `{path}`: {source}")]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
}

fn token_words(with_token: bool) -> &'static str {
    match with_token {
        true => " to the token given",
        false => " and no token was given",
    }
}

impl HubError {
    /// How to mend it.
    pub fn hint(&self) -> String {
        match self {
            Self::Offline { .. } => {
                "unset it, or point `HF_HOME` to the cache that holds the model".to_owned()
            }
            Self::NoCache => "set `HF_HOME` to a folder with room for the model".to_owned(),
            Self::Unknown { .. } => {
                "check the spelling; for a private repository set `HF_TOKEN`".to_owned()
            }
            Self::Refused {
                with_token: false,
                endpoint,
                id,
                ..
            } => format!(
                "accept its terms at {endpoint}/{id} if it has any, and set `HF_TOKEN` to a token of \
                 that account"
            ),
            Self::Refused { endpoint, id, .. } => format!(
                "check `HF_TOKEN` or the token file, and that its account may read {endpoint}/{id}"
            ),
            Self::Revision { .. } => {
                "give a branch, a tag or a whole commit hash after the `@`".to_owned()
            }
            Self::NoCheckpoint { .. } => {
                "give a repository with safetensors, such as `openai/gpt-oss-20b`".to_owned()
            }
            Self::Status { .. } | Self::Protocol { .. } => {
                "check `HF_ENDPOINT`; another tool may fill the cache, podium then uses it".to_owned()
            }
            Self::Network { .. } => {
                "check the network, `HTTPS_PROXY` and `HF_ENDPOINT`; the same command goes on where \
                 it broke off"
                    .to_owned()
            }
            Self::Certificate { .. } => {
                "behind a proxy that opens encrypted traffic, let `SSL_CERT_FILE` name its certificates"
                    .to_owned()
            }
            Self::Token => "check `HF_TOKEN` or the token file".to_owned(),
            Self::Certificates { .. } => {
                "let `SSL_CERT_FILE` name a PEM file, or unset it".to_owned()
            }
            Self::Checksum { .. } => {
                "what came was deleted: try again, and check `HF_ENDPOINT` and any proxy".to_owned()
            }
            Self::NoRoom { .. } => {
                "make room, or set `HF_HOME` to a folder on another disk".to_owned()
            }
            Self::Write { source, .. } => match source.kind() {
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                    "make room, or set `HF_HOME` to a folder on another disk; what has come is kept"
                        .to_owned()
                }
                _ => "set `HF_HOME` to a folder that may be written".to_owned(),
            },
        }
    }
}
