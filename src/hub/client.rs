//! The hub's protocol over HTTP: the files of a revision, a file's size and checksum, its bytes from
//! an offset on.
//!
//! `ureq` carries it. The `hf-hub` crate brings an asynchronous runtime and 227 packages in its 1.0; in
//! 0.4 it checks no checksum, knows no `HF_HUB_OFFLINE`, and names what has come of a file in a way of
//! its own, so that other tools start over.
//!
//! The token goes to the endpoint alone. Redirects are therefore followed here: the bytes of large
//! files come from other hosts, which are told nothing but the signed address.

use ureq::http::{HeaderValue, Method, Request, Response, StatusCode, header};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::download::Checksum;
use super::patience::{Failure, Patience};
use super::progress::Progress;
use super::{Hub, HubError};

const MAX_REDIRECTS: usize = 10;
/// A list of files is some kilobytes.
const MAX_LIST_BYTES: u64 = 64 << 20;

/// A revision as the hub lists it.
pub struct Listing {
    pub commit: String,
    pub names: Vec<String>,
}

/// A file as the hub describes it.
pub struct Remote {
    pub name: String,
    /// Its name among the blobs.
    pub etag: String,
    pub n_bytes: u64,
    pub checksum: Checksum,
}

/// A connection to one endpoint.
pub struct Client {
    agent: Agent,
    endpoint: String,
    authorization: Option<HeaderValue>,
}

impl Client {
    /// # Errors
    /// A token or certificates that are none.
    pub fn new(hub: &Hub) -> Result<Self, HubError> {
        let authorization = match &hub.token {
            Some(token) => {
                let value = HeaderValue::from_str(&format!("Bearer {token}"));
                Some(value.map_err(|_| HubError::Token)?)
            }
            None => None,
        };
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            // What begins encrypted is not to be redirected to plain text.
            .https_only(hub.endpoint.starts_with("https:"))
            .user_agent(concat!("podium/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_connect(Some(hub.timeout))
            .timeout_recv_response(Some(hub.timeout))
            .timeout_per_read(Some(hub.timeout));
        if let Some(roots) = roots(hub)? {
            config = config.tls_config(TlsConfig::builder().root_certs(roots).build());
        }
        Ok(Self {
            agent: config.build().new_agent(),
            endpoint: hub.endpoint.clone(),
            authorization,
        })
    }

    /// The commit and the files of a revision.
    ///
    /// # Errors
    /// No such repository or revision, or no answer.
    pub fn list(
        &self,
        id: &str,
        revision: &str,
        progress: &mut Progress,
    ) -> Result<Listing, HubError> {
        let url = format!(
            "{}/api/models/{id}/revision/{}",
            self.endpoint,
            quoted(revision)
        );
        let text = self.patiently(&url, progress, || {
            let response = self.send(Method::GET, &url, 0, false)?;
            let mut response = self.checked(response, &url, id, revision)?;
            let body = response.body_mut().with_config().limit(MAX_LIST_BYTES);
            body.read_to_vec().map_err(again)
        })?;
        read_listing(&text).ok_or_else(|| protocol(&url, "no list of files"))
    }

    /// Size and checksum of a file.
    ///
    /// # Errors
    /// An answer without them, or none.
    pub fn describe(
        &self,
        id: &str,
        commit: &str,
        name: &str,
        progress: &Progress,
    ) -> Result<Remote, HubError> {
        let url = self.file_url(id, commit, name);
        self.patiently(&url, progress, || {
            let response = self.send(Method::HEAD, &url, 0, false)?;
            let response = match response.status().is_redirection() {
                true => response,
                false => self.checked(response, &url, id, commit)?,
            };
            read_remote(name, &response).map_err(|reason| Failure::Never(protocol(&url, reason)))
        })
    }

    /// The bytes of a file from `offset` on, and the offset at which they really begin: 0 from a
    /// server that does not know ranges.
    pub fn open(
        &self,
        id: &str,
        commit: &str,
        name: &str,
        offset: u64,
    ) -> Result<(Body, u64), Failure> {
        let url = self.file_url(id, commit, name);
        let response = self.send(Method::GET, &url, offset, true)?;
        let response = self.checked(response, &url, id, commit)?;
        let begin = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = text(&response, "content-range").unwrap_or_default();
                let begin = range
                    .strip_prefix("bytes ")
                    .and_then(|range| range.split_once('-'));
                begin.and_then(|(begin, _)| begin.trim().parse().ok())
            }
            _ => Some(0),
        };
        match begin {
            Some(begin) if begin == offset || begin == 0 => Ok((response.into_body(), begin)),
            _ => Err(Failure::Never(protocol(
                &url,
                "another range than asked for",
            ))),
        }
    }

    /// Where a file is asked for.
    pub fn file_url(&self, id: &str, commit: &str, name: &str) -> String {
        format!("{}/{id}/resolve/{commit}/{}", self.endpoint, quoted(name))
    }

    fn patiently<T>(
        &self,
        url: &str,
        progress: &Progress,
        mut attempt: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, HubError> {
        let mut patience = Patience::default();
        loop {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(failure) => patience.wait(failure, url, progress)?,
            }
        }
    }

    /// Sends a request and follows redirects on the endpoint; to other hosts where `leave` says
    /// so, else the redirect is the answer. So is one that describes a file already.
    fn send(
        &self,
        method: Method,
        url: &str,
        offset: u64,
        leave: bool,
    ) -> Result<Response<Body>, Failure> {
        let mut url = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = Request::builder().method(method.clone()).uri(&url);
            if offset > 0 {
                request = request.header(header::RANGE, format!("bytes={offset}-"));
            }
            if let Some(value) = &self.authorization
                && origin(&url) == origin(&self.endpoint)
            {
                request = request.header(header::AUTHORIZATION, value);
            }
            let request = request.body(());
            let request = request.map_err(|_| Failure::Never(protocol(&url, "a bad address")))?;
            let response = self.agent.run(request).map_err(|error| match error {
                // rustls' own error is wrapped where its type cannot be named.
                ureq::Error::Io(error) if error.to_string().contains("certificate") => {
                    Failure::Never(HubError::Certificate {
                        url: url.clone(),
                        reason: error.to_string(),
                    })
                }
                ureq::Error::Io(_)
                | ureq::Error::Timeout(_)
                | ureq::Error::HostNotFound
                | ureq::Error::ConnectionFailed
                | ureq::Error::Protocol(_) => again(error),
                error => Failure::Never(protocol(&url, &error.to_string())),
            })?;
            let location = match response.status().is_redirection() {
                true => text(&response, "location").and_then(|to| join(&url, to)),
                false => None,
            };
            let is_description = method == Method::HEAD && text(&response, LINKED_ETAG).is_some();
            match location {
                Some(to) if !is_description && (leave || origin(&to) == origin(&self.endpoint)) => {
                    url = to;
                }
                _ => return Ok(response),
            }
        }
        Err(Failure::Never(protocol(&url, "too many redirects")))
    }

    /// The answer, unless it is a refusal.
    fn checked(
        &self,
        response: Response<Body>,
        url: &str,
        id: &str,
        revision: &str,
    ) -> Result<Response<Body>, Failure> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let endpoint = self.endpoint.clone();
        let status = status.as_u16();
        let error = match (status, text(&response, "x-error-code")) {
            (_, Some("RevisionNotFound")) => HubError::Revision {
                id: id.to_owned(),
                revision: revision.to_owned(),
            },
            (401 | 404, Some("RepoNotFound")) | (404, None) => HubError::Unknown {
                word: id.to_owned(),
                endpoint,
            },
            (401 | 403, _) => HubError::Refused {
                id: id.to_owned(),
                endpoint,
                status,
                with_token: self.authorization.is_some(),
            },
            (408 | 429 | 500.., _) => {
                return Err(Failure::Again(format!("the server answered {status}")));
            }
            _ => HubError::Status {
                url: url.to_owned(),
                status,
            },
        };
        Err(Failure::Never(error))
    }
}

const LINKED_ETAG: &str = "x-linked-etag";
const LINKED_SIZE: &str = "x-linked-size";

/// Size and checksum out of an answer's headers. A large file's stand in headers of their own:
/// the usual ones are the redirect's.
fn read_remote(name: &str, response: &Response<Body>) -> Result<Remote, &'static str> {
    let etag = text(response, LINKED_ETAG).or_else(|| text(response, "etag"));
    let etag = etag.ok_or("no etag")?;
    let etag = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"');
    let n_bytes = text(response, LINKED_SIZE)
        .or_else(|| text(response, "content-length"))
        .and_then(|n| n.parse().ok());
    Ok(Remote {
        name: name.to_owned(),
        etag: etag.to_owned(),
        n_bytes: n_bytes.ok_or("no size of the file")?,
        checksum: Checksum::of_etag(etag).ok_or("an etag that is no checksum")?,
    })
}

fn read_listing(text: &[u8]) -> Option<Listing> {
    let value: serde_json::Value = serde_json::from_slice(text).ok()?;
    let commit = value.get("sha")?.as_str()?;
    // It becomes a folder's name.
    let is_hash = commit.len() >= 7 && commit.chars().all(|c| c.is_ascii_hexdigit());
    let files = value.get("siblings")?.as_array()?;
    is_hash.then(|| Listing {
        commit: commit.to_owned(),
        names: files
            .iter()
            .filter_map(|file| Some(file.get("rfilename")?.as_str()?.to_owned()))
            .collect(),
    })
}

/// The certificates of `SSL_CERT_FILE`, in place of the usual ones: a company's proxy has its own.
fn roots(hub: &Hub) -> Result<Option<RootCerts>, HubError> {
    let Some(path) = &hub.certificates else {
        return Ok(None);
    };
    let bad = |reason: String| HubError::Certificates {
        path: path.clone(),
        reason,
    };
    let text = std::fs::read(path).map_err(|error| bad(error.to_string()))?;
    let mut found = Vec::new();
    for item in parse_pem(&text) {
        if let PemItem::Certificate(certificate) = item.map_err(|e| bad(e.to_string()))? {
            found.push(certificate);
        }
    }
    match found.is_empty() {
        true => Err(bad("there are none in it".to_owned())),
        false => Ok(Some(RootCerts::new_with_certs(&found))),
    }
}

fn text<'a>(response: &'a Response<Body>, name: &str) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

fn again(error: ureq::Error) -> Failure {
    Failure::Again(error.to_string())
}

fn protocol(url: &str, reason: &str) -> HubError {
    HubError::Protocol {
        url: url.to_owned(),
        reason: reason.to_owned(),
    }
}

/// Scheme, host and port.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find(['/', '?', '#']);
    &url[..end.map_or(url.len(), |end| host + end)]
}

/// Where a redirect from `url` leads.
fn join(url: &str, location: &str) -> Option<String> {
    let origin = origin(url);
    match location {
        to if to.starts_with("http://") || to.starts_with("https://") => Some(to.to_owned()),
        to if to.starts_with("//") => Some(format!("{}:{to}", origin.split_once("://")?.0)),
        to if to.starts_with('/') => Some(format!("{origin}{to}")),
        _ => None,
    }
}

/// With all but letters, digits and `-._~` as `%XX`.
fn quoted(part: &str) -> String {
    part.bytes()
        .map(|byte| match byte {
            b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
            byte if byte.is_ascii_alphanumeric() => char::from(byte).to_string(),
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_resolved() {
        let from = "https://hub.test:8443/a/b?x=1";
        assert_eq!(origin(from), "https://hub.test:8443");
        assert_eq!(origin("http://h"), "http://h");
        let to = |location| join(from, location).unwrap_or_default();
        assert_eq!(to("/c"), "https://hub.test:8443/c");
        assert_eq!(to("//cdn.test/c"), "https://cdn.test/c");
        assert_eq!(to("http://cdn.test/c"), "http://cdn.test/c");
        assert_eq!(join(from, "c"), None);
        // A host whose name begins with the endpoint's is another host.
        assert_ne!(origin("https://hub.test:84430/"), origin(from));
        assert_ne!(origin("https://hub.test:8443@evil.test/"), origin(from));
    }

    #[test]
    fn a_listing_names_a_commit() {
        let files = r#"[{"rfilename": "a"}, {"rfilename": "b/c"}]"#;
        let read = |commit: &str| {
            let text = format!(r#"{{"sha": "{commit}", "siblings": {files}}}"#);
            read_listing(text.as_bytes()).map(|listing| listing.names)
        };
        assert_eq!(read("0123abcd"), Some(vec!["a".into(), "b/c".into()]));
        assert_eq!(read("../../../x"), None);
        assert_eq!(quoted("refs/pr/1"), "refs%2Fpr%2F1");
    }
}
