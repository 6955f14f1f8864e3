//! A repository's files, brought into the cache: what has come of one is kept over broken
//! connections and kills, and goes on where it ended; the whole is checked before it counts.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use indicatif::BinaryBytes;
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::HubError;
use super::cache::{Repository, failed, free_bytes};
use super::client::{Client, Remote};
use super::patience::{Failure, Patience};
use super::progress::Progress;

const BUFFER_BYTES: usize = 1 << 20;

/// What a file's bytes must come to: the hub's etags are checksums.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// Of a large file.
    Sha256(String),
    /// Of a small one, as git names it: with its length in front.
    Git(String),
}

impl Checksum {
    /// An etag is one or the other by its length; a server with others is no hub.
    pub fn of_etag(etag: &str) -> Option<Self> {
        let is_hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
        match (etag.chars().all(is_hex), etag.len()) {
            (true, 64) => Some(Self::Sha256(etag.to_owned())),
            (true, 40) => Some(Self::Git(etag.to_owned())),
            _ => None,
        }
    }

    fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::Git(hex) => hex,
        }
    }
}

enum Hasher {
    Sha256(Sha256),
    Git(Sha1),
}

impl Hasher {
    fn new(remote: &Remote) -> Self {
        match remote.checksum {
            Checksum::Sha256(_) => Self::Sha256(Sha256::new()),
            Checksum::Git(_) => {
                Self::Git(Sha1::new().chain_update(format!("blob {}\0", remote.n_bytes)))
            }
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Git(hasher) => hasher.update(bytes),
        }
    }

    fn hex(self) -> String {
        let digest = match self {
            Self::Sha256(hasher) => hasher.finalize().to_vec(),
            Self::Git(hasher) => hasher.finalize().to_vec(),
        };
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The files of one commit on their way into the cache.
pub struct Download<'a> {
    pub client: &'a Client,
    pub id: &'a str,
    pub commit: &'a str,
    pub repository: &'a Repository,
    pub progress: Progress,
}

impl Download<'_> {
    /// Sizes and checksums of files.
    ///
    /// # Errors
    /// The server does not tell them.
    pub fn look_up(&self, names: &[&str]) -> Result<Vec<Remote>, HubError> {
        let (id, commit) = (self.id, self.commit);
        names
            .iter()
            .map(|name| self.client.describe(id, commit, name, &self.progress))
            .collect()
    }

    /// A small file, brought and read.
    ///
    /// # Errors
    /// As [`Download::all`].
    pub fn small_file(&mut self, name: &str) -> Result<Vec<u8>, HubError> {
        self.repository.make(self.commit)?;
        let remote = self.look_up(&[name])?.remove(0);
        self.bring(&remote)?;
        let path = self.repository.blob(&remote.etag);
        std::fs::read(&path).map_err(failed(&path))
    }

    /// Brings the files in this order.
    ///
    /// # Errors
    /// No room or no permission, a server that fails too often, a wrong checksum.
    pub fn all(&mut self, wanted: &[Remote]) -> Result<(), HubError> {
        self.repository.make(self.commit)?;
        let is_missing = |remote: &&Remote| !self.repository.blob(&remote.etag).is_file();
        let missing: Vec<&Remote> = wanted.iter().filter(is_missing).collect();
        // A server may tell any size.
        let sizes = missing.iter().map(|remote| remote.n_bytes);
        let n_bytes = sizes.fold(0, u64::saturating_add);
        let came = |remote: &&Remote| {
            let part = self.repository.incomplete(&remote.etag).metadata();
            part.map_or(0, |part| part.len().min(remote.n_bytes))
        };
        let n_before = missing.iter().map(came).sum();
        let needed = n_bytes.saturating_sub(n_before);
        if let Some(free) = free_bytes(self.repository.root())
            && free < needed
        {
            return Err(HubError::NoRoom {
                id: self.id.to_owned(),
                path: self.repository.root().to_owned(),
                needed,
                free,
            });
        }
        if !missing.is_empty() {
            let kept = match n_before {
                0 => String::new(),
                _ => format!(", {} of them there already", BinaryBytes(n_before)),
            };
            self.progress.say(&format!(
                "downloading `{}` ({}) into {}: {} in {} files{kept}\nbroken off, the same command goes on",
                self.id,
                &self.commit[..7],
                self.repository.root().display(),
                BinaryBytes(n_bytes),
                missing.len(),
            ));
        }
        self.progress.begin(n_bytes, n_before);
        let brought = wanted.iter().try_for_each(|remote| self.bring(remote));
        self.progress.end();
        brought
    }

    /// Brings one file and gives it its name.
    fn bring(&mut self, remote: &Remote) -> Result<(), HubError> {
        self.progress.file(&remote.name);
        let blob = self.repository.blob(&remote.etag);
        if !blob.is_file() {
            let _lock = self.repository.lock(&remote.etag, || {
                self.progress.say(&format!(
                    "another process downloads `{}`: waiting for it",
                    remote.name
                ));
            })?;
            // It may have come meanwhile.
            if !blob.is_file() {
                self.download(remote, &blob)?;
            }
        }
        self.repository
            .link(self.commit, &remote.name, &remote.etag)
    }

    fn download(&mut self, remote: &Remote, blob: &Path) -> Result<(), HubError> {
        let part = self.repository.incomplete(&remote.etag);
        let mut was_there = part.metadata().is_ok_and(|part| part.len() > 0);
        loop {
            let found = self.fill(remote, &part)?;
            if found == remote.checksum.hex() {
                // Another tool trusts whatever has a blob's name.
                return std::fs::rename(&part, blob).map_err(failed(blob));
            }
            std::fs::remove_file(&part).map_err(failed(&part))?;
            if !was_there {
                return Err(HubError::Checksum {
                    id: self.id.to_owned(),
                    file: remote.name.clone(),
                    expected: remote.checksum.hex().to_owned(),
                    found,
                });
            }
            // What an earlier process left may be what was wrong: once more, from the start.
            was_there = false;
            self.progress.take_back(remote.n_bytes);
            self.progress.say(&format!(
                "what was there of `{}` is damaged: from the start",
                remote.name
            ));
        }
    }

    /// Completes a file, over as many connections as it takes, and gives its checksum.
    fn fill(&mut self, remote: &Remote, path: &Path) -> Result<String, HubError> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let mut part = Part {
            file: options.open(path).map_err(failed(path))?,
            path,
            n_bytes: 0,
            hasher: Hasher::new(remote),
        };
        part.take_up(remote)?;
        let mut patience = Patience::default();
        while part.n_bytes < remote.n_bytes {
            let before = part.n_bytes;
            if let Err(failure) = self.stream(remote, &mut part) {
                if part.n_bytes > before {
                    patience.renew();
                }
                let url = self.client.file_url(self.id, self.commit, &remote.name);
                patience.wait(failure, &url, &self.progress)?;
            }
        }
        // The name that a blob gets after this is a promise, also after a power cut.
        part.file.sync_data().map_err(failed(path))?;
        Ok(part.hasher.hex())
    }

    /// One connection's worth of a file.
    fn stream(&mut self, remote: &Remote, part: &mut Part) -> Result<(), Failure> {
        let (id, commit) = (self.id, self.commit);
        let (mut body, begin) = self.client.open(id, commit, &remote.name, part.n_bytes)?;
        if begin != part.n_bytes {
            self.progress.take_back(part.n_bytes);
            part.start_over(remote).map_err(Failure::Never)?;
        }
        let mut reader = body.as_reader();
        let mut buffer = vec![0; BUFFER_BYTES];
        while part.n_bytes < remote.n_bytes {
            let read = reader.read(&mut buffer);
            let n = read.map_err(|error| Failure::Again(error.to_string()))?;
            if n == 0 {
                return Err(Failure::Again("the connection ended early".to_owned()));
            }
            // More than the file's length is no part of it, and fails no checksum.
            let rest = usize::try_from(remote.n_bytes - part.n_bytes).unwrap_or(usize::MAX);
            let bytes = &buffer[..n.min(rest)];
            part.append(bytes).map_err(Failure::Never)?;
            self.progress.add(bytes.len());
        }
        Ok(())
    }
}

/// What has come of a file.
struct Part<'a> {
    file: File,
    path: &'a Path,
    n_bytes: u64,
    hasher: Hasher,
}

impl Part<'_> {
    /// Goes on from what is there.
    fn take_up(&mut self, remote: &Remote) -> Result<(), HubError> {
        let n_there = self.file.metadata().map_err(failed(self.path))?.len();
        if n_there > remote.n_bytes {
            return self.start_over(remote);
        }
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            match self.file.read(&mut buffer).map_err(failed(self.path))? {
                0 => return Ok(()),
                n => {
                    self.hasher.update(&buffer[..n]);
                    self.n_bytes += n as u64;
                }
            }
        }
    }

    fn start_over(&mut self, remote: &Remote) -> Result<(), HubError> {
        self.file.set_len(0).map_err(failed(self.path))?;
        let start = self.file.seek(SeekFrom::Start(0));
        start.map_err(failed(self.path))?;
        self.n_bytes = 0;
        self.hasher = Hasher::new(remote);
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), HubError> {
        self.file.write_all(bytes).map_err(failed(self.path))?;
        self.hasher.update(bytes);
        self.n_bytes += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_git_and_of_sha256sum() {
        let of = |etag: &str| {
            let remote = Remote {
                name: "x".to_owned(),
                etag: etag.to_owned(),
                n_bytes: 6,
                checksum: Checksum::of_etag(etag)?,
            };
            let mut hasher = Hasher::new(&remote);
            hasher.update(b"hello\n");
            Some((hasher.hex(), remote.checksum.hex().to_owned()))
        };
        // `git hash-object` and `sha256sum` of a file with the line `hello`.
        for known in [
            "ce013625030ba8dba906f756967f9e9ca394464a",
            "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03",
        ] {
            let (found, expected) = of(known).expect("it is a checksum");
            assert_eq!(found, expected);
        }
        assert_eq!(Checksum::of_etag("../../../etc/passwd"), None);
        assert_eq!(Checksum::of_etag("5d41402abc4b2a76b9719d911017c592"), None);
    }
}
