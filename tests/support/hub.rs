//! A hub on loopback: the part of its protocol that podium speaks, with large files on a second
//! port as on a content network. It breaks off, stalls and lies where a test says so.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::root;

pub const ID: &str = "owner/nano-split";
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const TOKEN: &str = "hf_of_a_test";

/// A file of the repository; large ones come from the second port.
#[derive(Clone)]
pub struct HubFile {
    pub name: String,
    pub bytes: Vec<u8>,
    pub is_large: bool,
}

impl HubFile {
    pub fn etag(&self) -> String {
        let digest = match self.is_large {
            true => Sha256::digest(&self.bytes).to_vec(),
            false => Sha1::new()
                .chain_update(format!("blob {}\0", self.bytes.len()))
                .chain_update(&self.bytes)
                .finalize()
                .to_vec(),
        };
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// What the server does wrong.
#[derive(Clone, Default)]
pub struct Behaviour {
    /// Large files' answers end after so many bytes, one answer for each number.
    pub break_after: Vec<u64>,
    /// The next answer stops after so many bytes, and goes on when this is nothing again.
    pub stall_after: Option<u64>,
    /// One byte of every large file is another.
    pub wrong: bool,
    /// Ranges are ignored.
    pub whole: bool,
    /// Small and large files need the token.
    pub gated: bool,
    /// Size told of large files, in place of the true one.
    pub size: Option<u64>,
    /// So many requests are answered with 503.
    pub n_busy: usize,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub is_cdn: bool,
    pub method: String,
    pub path: String,
    pub range: Option<String>,
    pub authorization: Option<String>,
}

#[derive(Default)]
struct Shared {
    behaviour: Behaviour,
    seen: Vec<Seen>,
    n_large_bytes: u64,
}

/// The server; its threads end with the test.
pub struct Hub {
    pub endpoint: String,
    pub files: Arc<Vec<HubFile>>,
    shared: Arc<(Mutex<Shared>, Condvar)>,
}

impl Hub {
    pub fn start(behaviour: Behaviour) -> Self {
        let files = Arc::new(files());
        let shared = Arc::new((Mutex::new(Shared::default()), Condvar::new()));
        let bind = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (hub, cdn) = (bind(), bind());
        let address = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let endpoint = address(&hub);
        let cdn_address = address(&cdn);
        for (listener, is_cdn) in [(hub, false), (cdn, true)] {
            let (files, shared, cdn) = (files.clone(), shared.clone(), cdn_address.clone());
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let (files, shared, cdn) = (files.clone(), shared.clone(), cdn.clone());
                    std::thread::spawn(move || {
                        // A client that was killed is no failure of the server's.
                        let _ = answer(stream, is_cdn, &cdn, &files, &shared);
                    });
                }
            });
        }
        let hub = Self {
            endpoint,
            files,
            shared,
        };
        hub.behave(behaviour);
        hub
    }

    pub fn behave(&self, behaviour: Behaviour) {
        self.shared.0.lock().unwrap().behaviour = behaviour;
        self.shared.1.notify_all();
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.shared.0.lock().unwrap().seen.clone()
    }

    /// Bytes of large files sent so far.
    pub fn n_large_bytes(&self) -> u64 {
        self.shared.0.lock().unwrap().n_large_bytes
    }

    /// Bytes of the large files that podium wants.
    pub fn n_wanted_bytes(&self) -> u64 {
        let large = self.files.iter().filter(|file| is_weights(&file.name));
        large.map(|file| file.bytes.len() as u64).sum()
    }

    /// The file of the weights that comes first.
    pub fn first_large(&self) -> &HubFile {
        let mut large = self.files.iter().filter(|file| is_weights(&file.name));
        large.next().unwrap()
    }
}

pub fn is_weights(name: &str) -> bool {
    name.starts_with("model-")
}

/// nano's checkpoint with its weights in three files, beside files that podium has no use for.
fn files() -> Vec<HubFile> {
    let nano = root().join("models/nano");
    let file = |name: &str, bytes: Vec<u8>, is_large| HubFile {
        name: name.to_owned(),
        bytes,
        is_large,
    };
    let mut files: Vec<HubFile> = [
        "README.md",
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
    ]
    .into_iter()
    .map(|name| file(name, std::fs::read(nano.join(name)).unwrap(), false))
    .collect();
    let tokenizer = std::fs::read(nano.join("tokenizer.json")).unwrap();
    files.push(file("tokenizer.json", tokenizer, true));
    let weights = std::fs::read(nano.join("model.safetensors")).unwrap();
    let mut map = serde_json::Map::new();
    for (i, (names, bytes)) in split(&weights, 3).into_iter().enumerate() {
        let name = format!("model-{:05}-of-00003.safetensors", i + 1);
        for tensor in names {
            map.insert(tensor, json!(name));
        }
        files.push(file(&name, bytes, true));
    }
    let index = json!({"metadata": {}, "weight_map": map}).to_string();
    files.push(file(
        "model.safetensors.index.json",
        index.into_bytes(),
        false,
    ));
    for name in ["original/model.safetensors", "metal/model.bin"] {
        files.push(file(name, weights.clone(), true));
    }
    files
}

/// The tensors of a safetensors file, in `n` of them by turns: their names and the file.
fn split(bytes: &[u8], n: usize) -> Vec<(Vec<String>, Vec<u8>)> {
    let n_header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let (header, data) = bytes[8..].split_at(n_header);
    let header: Value = serde_json::from_slice(header).unwrap();
    let tensors = header.as_object().unwrap();
    let tensors = tensors.iter().filter(|(name, _)| *name != "__metadata__");
    let mut parts = vec![(serde_json::Map::new(), Vec::new()); n];
    for (i, (name, info)) in tensors.enumerate() {
        let (map, part) = &mut parts[i % n];
        let at = |i: usize| info["data_offsets"][i].as_u64().unwrap() as usize;
        let start = part.len();
        part.extend(&data[at(0)..at(1)]);
        let mut info = info.clone();
        info["data_offsets"] = json!([start, part.len()]);
        map.insert(name.clone(), info);
    }
    let file = |(map, data): (serde_json::Map<String, Value>, Vec<u8>)| {
        let names = map.keys().cloned().collect();
        let mut header = Value::Object(map).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        bytes.extend(data);
        (names, bytes)
    };
    parts.into_iter().map(file).collect()
}

/// Reads one request and answers it; each connection is for one.
fn answer(
    mut stream: TcpStream,
    is_cdn: bool,
    cdn: &str,
    files: &[HubFile],
    shared: &(Mutex<Shared>, Condvar),
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (Some(method), Some(path)) = (words.next(), words.next()) else {
        return Ok(());
    };
    let mut seen = Seen {
        is_cdn,
        method,
        path,
        range: None,
        authorization: None,
    };
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').unwrap();
        let value = Some(value.trim().to_owned());
        match name.to_ascii_lowercase().as_str() {
            "range" => seen.range = value,
            "authorization" => seen.authorization = value,
            _ => {}
        }
    }
    let is_busy = {
        let mut shared = shared.0.lock().unwrap();
        shared.seen.push(seen.clone());
        let n_busy = &mut shared.behaviour.n_busy;
        let is_busy = *n_busy > 0;
        *n_busy = n_busy.saturating_sub(1);
        is_busy
    };
    if is_busy {
        return reply(&mut stream, "503 Service Unavailable", &[], b"", &seen);
    }
    match is_cdn {
        true => large(&mut stream, files, &seen, shared),
        false => small(&mut stream, cdn, files, &seen, shared),
    }
}

/// The hub itself.
fn small(
    stream: &mut TcpStream,
    cdn: &str,
    files: &[HubFile],
    seen: &Seen,
    shared: &(Mutex<Shared>, Condvar),
) -> std::io::Result<()> {
    let behaviour = shared.0.lock().unwrap().behaviour.clone();
    let is_known = seen.authorization == Some(format!("Bearer {TOKEN}"));
    if let Some(rest) = seen.path.strip_prefix("/api/models/") {
        let Some(revision) = rest.strip_prefix(&format!("{ID}/revision/")) else {
            // To those without a token the hub does not say whether a repository is there.
            let status = if is_known {
                "404 Not Found"
            } else {
                "401 Unauthorized"
            };
            return reply(
                stream,
                status,
                &[("X-Error-Code", "RepoNotFound")],
                b"",
                seen,
            );
        };
        if !["main", "v1", COMMIT].contains(&revision) {
            let code = [("X-Error-Code", "RevisionNotFound")];
            return reply(stream, "404 Not Found", &code, b"", seen);
        }
        let names = files.iter().map(|file| json!({"rfilename": file.name}));
        let list = json!({"id": ID, "sha": COMMIT, "siblings": names.collect::<Vec<_>>()});
        return reply(stream, "200 OK", &[], list.to_string().as_bytes(), seen);
    }
    let name = seen.path.strip_prefix(&format!("/{ID}/resolve/{COMMIT}/"));
    let Some(file) = files.iter().find(|file| Some(file.name.as_str()) == name) else {
        let code = [("X-Error-Code", "EntryNotFound")];
        return reply(stream, "404 Not Found", &code, b"", seen);
    };
    if behaviour.gated && !is_known {
        let status = match seen.authorization {
            Some(_) => "403 Forbidden",
            None => "401 Unauthorized",
        };
        return reply(stream, status, &[("X-Error-Code", "GatedRepo")], b"", seen);
    }
    let etag = format!("\"{}\"", file.etag());
    if !file.is_large {
        let headers = [("ETag", etag.as_str()), ("X-Repo-Commit", COMMIT)];
        return reply(stream, "200 OK", &headers, &file.bytes, seen);
    }
    let n_bytes = behaviour
        .size
        .unwrap_or(file.bytes.len() as u64)
        .to_string();
    let location = format!("{cdn}/{}?signature=x", file.etag());
    let headers = [
        ("Location", location.as_str()),
        ("X-Linked-Etag", etag.as_str()),
        ("X-Linked-Size", n_bytes.as_str()),
        ("X-Repo-Commit", COMMIT),
        ("ETag", "\"of-the-redirect\""),
    ];
    reply(stream, "302 Found", &headers, b"Found", seen)
}

/// The content network.
fn large(
    stream: &mut TcpStream,
    files: &[HubFile],
    seen: &Seen,
    shared: &(Mutex<Shared>, Condvar),
) -> std::io::Result<()> {
    let etag = seen.path.trim_start_matches('/').split('?').next();
    let file = files.iter().find(|file| Some(file.etag().as_str()) == etag);
    let mut bytes = file.unwrap().bytes.clone();
    let behaviour = shared.0.lock().unwrap().behaviour.clone();
    if behaviour.wrong {
        bytes[100] ^= 1;
    }
    let asked = seen.range.as_deref().and_then(|range| {
        let start = range.strip_prefix("bytes=")?.strip_suffix('-')?;
        start.parse::<usize>().ok()
    });
    let (n_all, mut begin, mut status) = (bytes.len(), 0, "200 OK");
    let mut range = String::new();
    if let (Some(start), false) = (asked, behaviour.whole) {
        (begin, status) = (start, "206 Partial Content");
        range = format!("Content-Range: bytes {start}-{}/{n_all}\r\n", n_all - 1);
    }
    let body = &bytes[begin..];
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\n{range}Connection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    let breaks = {
        let mut shared = shared.0.lock().unwrap();
        let breaks = &mut shared.behaviour.break_after;
        (!breaks.is_empty()).then(|| breaks.remove(0))
    };
    let end = breaks.map_or(body.len(), |n| body.len().min(n as usize));
    let pause = behaviour.stall_after.map_or(end, |n| end.min(n as usize));
    let send = |stream: &mut TcpStream, bytes: &[u8]| {
        stream.write_all(bytes)?;
        stream.flush()?;
        shared.0.lock().unwrap().n_large_bytes += bytes.len() as u64;
        std::io::Result::Ok(())
    };
    send(stream, &body[..pause])?;
    if behaviour.stall_after.is_some() && pause < end {
        let state = shared.0.lock().unwrap();
        let is_stalled = |shared: &mut Shared| shared.behaviour.stall_after.is_some();
        drop(shared.1.wait_while(state, is_stalled).unwrap());
        // Where the client is gone the first write may still go well: nobody counts it.
        if is_gone(stream) {
            return Ok(());
        }
    }
    send(stream, &body[pause..end])
}

/// Whether the other side has closed.
fn is_gone(stream: &TcpStream) -> bool {
    let _ = stream.set_nonblocking(true);
    let gone =
        !matches!(stream.peek(&mut [0]), Err(e) if e.kind() == std::io::ErrorKind::WouldBlock);
    let _ = stream.set_nonblocking(false);
    gone
}

fn reply(
    stream: &mut TcpStream,
    status: &str,
    headers: &[(&str, &str)],
    body: &[u8],
    seen: &Seen,
) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n", body.len());
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += "Connection: close\r\n\r\n";
    stream.write_all(head.as_bytes())?;
    if seen.method != "HEAD" {
        stream.write_all(body)?;
    }
    stream.flush()
}
