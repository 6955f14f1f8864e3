//! Weights by name: a hub on loopback, a cache in a scratch folder. Nothing here reaches a network.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use support::hub::{Behaviour, COMMIT, Hub, ID, TOKEN, is_weights};
use support::{Scratch, bits, nano_rows, snapshot};

const MIB: u64 = 1 << 20;
/// Reads, renders and plans, for which the whole checkpoint must be there.
const DRY_RUN: [&str; 6] = ["eval", "rows.jsonl", "--model", ID, "--profile", "nano"];

/// A folder with some rows, in which podium knows the hub.
struct Place {
    scratch: Scratch,
    hub: Hub,
}

impl Place {
    fn new(name: &str, behaviour: Behaviour) -> Self {
        let scratch = Scratch::new(name);
        let rows = nano_rows("mixed.jsonl", 4);
        scratch.write("rows.jsonl", rows.join("\n"));
        let hub = Hub::start(behaviour);
        Self { scratch, hub }
    }

    fn podium(&self, args: &[&str]) -> Command {
        let mut command = support::podium(self.scratch.path());
        command
            .args(args)
            .env_remove("HF_HUB_OFFLINE")
            .env_remove("HF_HUB_CACHE")
            .env("HF_ENDPOINT", &self.hub.endpoint)
            .env("HF_HOME", self.scratch.join("home"));
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.podium(args).output().unwrap()
    }

    /// `eval --dry-run` by the hub's name.
    fn fetch(&self) -> Output {
        self.run(&[&DRY_RUN[..], &["--dry-run"]].concat())
    }

    fn repository(&self) -> PathBuf {
        self.scratch.join("home/hub/models--owner--nano-split")
    }

    /// The blob of the weights' first file, and the same while it is incomplete.
    fn first_blob(&self) -> (PathBuf, PathBuf) {
        let etag = self.hub.first_large().etag();
        let blobs = self.repository().join("blobs");
        (blobs.join(&etag), blobs.join(format!("{etag}.incomplete")))
    }

    /// Every file that podium wants lies in the snapshot with the hub's bytes, and nothing else.
    fn check_cache(&self) {
        let snapshot = self.repository().join("snapshots").join(COMMIT);
        let mut n_files = 0;
        for file in self.hub.files.iter() {
            let path = snapshot.join(&file.name);
            if file.name == "README.md" || file.name.contains('/') {
                assert!(!path.exists(), "{} is of no use", file.name);
                continue;
            }
            n_files += 1;
            assert!(std::fs::read(&path).unwrap() == file.bytes, "{}", file.name);
            let link = std::fs::read_link(&path).unwrap();
            assert_eq!(link, Path::new("../../blobs").join(file.etag()));
        }
        let count = |folder: PathBuf| std::fs::read_dir(folder).unwrap().count();
        assert_eq!(count(snapshot), n_files);
        assert_eq!(count(self.repository().join("blobs")), n_files);
        let main = std::fs::read_to_string(self.repository().join("refs/main"));
        assert_eq!(main.unwrap(), COMMIT);
    }

    /// Holds an output against a snapshot, the hub's port blanked.
    fn check_output(&self, name: &str, args: &[&str], mut output: Output) {
        for text in [&mut output.stdout, &mut output.stderr] {
            let blanked = String::from_utf8_lossy(text).replace(&self.hub.endpoint, "<hub>");
            *text = blanked.into_bytes();
        }
        snapshot::check_output(name, self.scratch.path(), args, &output);
        assert_eq!(output.status.code(), Some(2));
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn ok(output: Output) -> String {
    assert!(output.status.success(), "{}", stderr(&output));
    stderr(&output)
}

#[test]
fn a_model_by_name_is_downloaded_and_run() {
    let place = Place::new("hub-run", Behaviour::default());
    let rest = ["--max-new-tokens", "32", "--threads", "2", "--out"];
    let by_name = |run| [&DRY_RUN[..], &rest, &[run]].concat();
    let told = ok(place.run(&by_name("run")));
    assert!(
        told.contains("downloading `owner/nano-split` (0123456)"),
        "{told}"
    );
    place.check_cache();
    assert!(
        place
            .hub
            .seen()
            .iter()
            .all(|seen| seen.authorization.is_none())
    );

    let embedded = ["eval", "rows.jsonl", "--model", "nano", "--profile", "nano"];
    ok(place.run(&[&embedded[..], &rest, &["embedded"]].concat()));
    let bits_of = |run| bits(&place.scratch.join(run));
    assert_eq!(bits_of("run"), bits_of("embedded"));

    // Once it is there, no request is made.
    let n_seen = place.hub.seen().len();
    ok(place.run(&by_name("again")));
    assert_eq!(bits_of("again"), bits_of("run"));
    assert_eq!(place.hub.seen().len(), n_seen);
    let mut offline = place.podium(&by_name("offline"));
    ok(offline.env("HF_HUB_OFFLINE", "1").output().unwrap());
    assert_eq!(place.hub.seen().len(), n_seen);
}

#[test]
fn a_broken_connection_goes_on_where_it_ended() {
    let place = Place::new(
        "hub-broken",
        Behaviour {
            // The tokenizer, whole; then the weights' first file in three answers.
            break_after: vec![u64::MAX, MIB, MIB],
            n_busy: 1,
            ..Behaviour::default()
        },
    );
    let told = ok(place.fetch());
    assert!(told.contains("the server answered 503; again in"), "{told}");
    assert_eq!(told.matches("again in").count(), 3, "{told}");
    place.check_cache();
    let etag = place.hub.first_large().etag();
    let seen = place.hub.seen();
    let of_first = seen
        .iter()
        .filter(|seen| seen.is_cdn && seen.path.contains(&etag));
    let ranges: Vec<_> = of_first.map(|seen| seen.range.as_deref()).collect();
    let expected = [None, Some("bytes=1048576-"), Some("bytes=2097152-")];
    assert_eq!(ranges, expected);
    assert_eq!(
        place.hub.n_large_bytes(),
        place.hub.n_wanted_bytes() + tokenizer_bytes(&place)
    );
}

fn tokenizer_bytes(place: &Place) -> u64 {
    let mut files = place.hub.files.iter();
    let found = files.find(|file| file.name == "tokenizer.json");
    found.unwrap().bytes.len() as u64
}

/// Waits until a condition holds, as it must within a while.
fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn killed_twice_the_same_command_goes_on() {
    let stalling = |n| Behaviour {
        stall_after: Some(n),
        ..Behaviour::default()
    };
    let place = Place::new("hub-killed", stalling(MIB));
    let (blob, part) = place.first_blob();
    let length = || part.metadata().map_or(0, |part| part.len());
    for n_bytes in [MIB, 2 * MIB] {
        let args = [&DRY_RUN[..], &["--dry-run"]].concat();
        let mut child = place.podium(&args).stderr(Stdio::null()).spawn().unwrap();
        wait_for("the bytes before the stall are on disk", || {
            length() == n_bytes
        });
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(length(), n_bytes);
        assert!(!blob.exists());
        assert!(!place.repository().join("refs/main").exists());
    }
    place.hub.behave(Behaviour::default());
    let told = ok(place.fetch());
    assert!(told.contains("2.00 MiB of them there already"), "{told}");
    place.check_cache();
    // No byte came twice.
    assert_eq!(
        place.hub.n_large_bytes(),
        place.hub.n_wanted_bytes() + tokenizer_bytes(&place)
    );
    let seen = place.hub.seen();
    let cdn = seen.iter().filter(|seen| seen.is_cdn);
    let ranges: Vec<_> = cdn.filter_map(|seen| seen.range.as_deref()).collect();
    assert_eq!(ranges, ["bytes=1048576-", "bytes=2097152-"]);
}

#[test]
fn a_silent_server_is_asked_again() {
    let place = Place::new(
        "hub-silent",
        Behaviour {
            stall_after: Some(MIB),
            ..Behaviour::default()
        },
    );
    let mut command = place.podium(&[&DRY_RUN[..], &["--dry-run"]].concat());
    let command = command.env("HF_HUB_DOWNLOAD_TIMEOUT", "1");
    let told = ok(command.output().unwrap());
    assert!(told.contains("timeout"), "{told}");
    place.check_cache();
}

#[test]
fn a_server_without_ranges_starts_over() {
    let place = Place::new(
        "hub-whole",
        Behaviour {
            break_after: vec![u64::MAX, MIB],
            whole: true,
            ..Behaviour::default()
        },
    );
    ok(place.fetch());
    place.check_cache();
    let all = place.hub.n_wanted_bytes() + tokenizer_bytes(&place);
    assert_eq!(place.hub.n_large_bytes(), all + MIB);
}

#[test]
fn a_wrong_checksum_is_refused_and_leaves_nothing() {
    let place = Place::new(
        "hub-wrong",
        Behaviour {
            wrong: true,
            ..Behaviour::default()
        },
    );
    let args = [&DRY_RUN[..], &["--dry-run", "--quiet"]].concat();
    place.check_output("hub-wrong-checksum", &args, place.run(&args));
    let blobs = std::fs::read_dir(place.repository().join("blobs")).unwrap();
    let large = blobs.filter(|blob| blob.as_ref().unwrap().file_name().len() >= 64);
    assert_eq!(
        large.count(),
        0,
        "no large file is left, whole or incomplete"
    );
    place.hub.behave(Behaviour::default());
    ok(place.fetch());
    place.check_cache();
}

#[test]
fn a_damaged_part_of_an_earlier_download_starts_over() {
    let place = Place::new("hub-damaged", Behaviour::default());
    let (_, part) = place.first_blob();
    std::fs::create_dir_all(part.parent().unwrap()).unwrap();
    std::fs::write(&part, vec![7; MIB as usize]).unwrap();
    let told = ok(place.fetch());
    assert!(told.contains("is damaged: from the start"), "{told}");
    place.check_cache();
}

#[test]
fn two_processes_download_once() {
    let place = Place::new(
        "hub-two",
        Behaviour {
            stall_after: Some(MIB),
            ..Behaviour::default()
        },
    );
    let args = [&DRY_RUN[..], &["--dry-run"]].concat();
    let spawn = || {
        place
            .podium(&args)
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    };
    let first = spawn();
    let (_, part) = place.first_blob();
    wait_for("the first has begun", || {
        part.metadata().is_ok_and(|part| part.len() == MIB)
    });
    let second = spawn();
    // It has asked for all that it asks before it takes the lock.
    wait_for("the second waits", || {
        let seen = place.hub.seen();
        let weights = seen
            .iter()
            .filter(|seen| seen.method == "HEAD" && seen.path.contains("/model-"));
        weights.count() == 6
    });
    std::thread::sleep(Duration::from_millis(300));
    place.hub.behave(Behaviour::default());
    ok(first.wait_with_output().unwrap());
    let told = ok(second.wait_with_output().unwrap());
    assert!(told.contains("another process downloads"), "{told}");
    place.check_cache();
    assert_eq!(
        place.hub.n_large_bytes(),
        place.hub.n_wanted_bytes() + tokenizer_bytes(&place)
    );
}

#[test]
fn offline_without_a_cache_is_told() {
    let place = Place::new("hub-offline", Behaviour::default());
    let args = [&DRY_RUN[..], &["--dry-run"]].concat();
    let output = place
        .podium(&args)
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    place.check_output("hub-offline", &args, output);
    assert!(place.hub.seen().is_empty());
}

#[test]
fn what_is_not_there_or_not_open_is_told() {
    let place = Place::new(
        "hub-refused",
        Behaviour {
            gated: true,
            ..Behaviour::default()
        },
    );
    let args = |model| ["eval", "rows.jsonl", "--model", model, "--dry-run"];
    let unknown = args("owner/nano-splti");
    place.check_output("hub-unknown", &unknown, place.run(&unknown));
    let revision = args("owner/nano-split@v2");
    place.check_output("hub-unknown-revision", &revision, place.run(&revision));
    let gated = args(ID);
    place.check_output("hub-gated", &gated, place.run(&gated));
    let with = |token| {
        place
            .podium(&gated)
            .env("HF_TOKEN", token)
            .output()
            .unwrap()
    };
    place.check_output("hub-gated-token", &gated, with("hf_of_another"));
    place.check_output("hub-bad-token", &gated, with("hf\u{7f}"));
    assert!(place.hub.seen().iter().all(|seen| !seen.is_cdn));
}

#[test]
fn the_token_goes_to_the_hub_alone() {
    let place = Place::new(
        "hub-token",
        Behaviour {
            gated: true,
            ..Behaviour::default()
        },
    );
    place.scratch.write("home/token", format!("{TOKEN}\n"));
    ok(place.fetch());
    place.check_cache();
    let seen = place.hub.seen();
    let (cdn, hub): (Vec<_>, Vec<_>) = seen.iter().partition(|seen| seen.is_cdn);
    assert!(!cdn.is_empty() && cdn.iter().all(|seen| seen.authorization.is_none()));
    let expected = format!("Bearer {TOKEN}");
    assert!(
        hub.iter()
            .all(|seen| seen.authorization.as_ref() == Some(&expected))
    );
}

#[test]
fn a_cache_of_another_tool_is_used_without_a_request() {
    let place = Place::new("hub-other-tool", Behaviour::default());
    // As another tool lays it out, in a cache of another place, for a tag.
    let root = place.scratch.join("cache/models--owner--nano-split");
    let snapshot = root.join("snapshots").join(COMMIT);
    for folder in [&root.join("blobs"), &root.join("refs"), &snapshot] {
        std::fs::create_dir_all(folder).unwrap();
    }
    for file in place
        .hub
        .files
        .iter()
        .filter(|file| !file.name.contains('/'))
    {
        std::fs::write(root.join("blobs").join(file.etag()), &file.bytes).unwrap();
        let target = Path::new("../../blobs").join(file.etag());
        std::os::unix::fs::symlink(target, snapshot.join(&file.name)).unwrap();
    }
    std::fs::write(root.join("refs/v1"), COMMIT).unwrap();
    let commit = format!("{ID}@{COMMIT}");
    for model in [ID, "owner/nano-split@v1", &commit] {
        let args = ["eval", "rows.jsonl", "--model", model, "--dry-run"];
        let mut command = place.podium(&args);
        ok(command
            .env("HF_HUB_CACHE", place.scratch.join("cache"))
            .output()
            .unwrap());
    }
    assert!(place.hub.seen().is_empty());
}

#[test]
fn plan_and_inspect_take_the_small_files_alone() {
    let place = Place::new("hub-small", Behaviour::default());
    let planned = place.run(&["plan", ID, "--json"]);
    let embedded = place.run(&["plan", "nano", "--json"]);
    let value = |output: &Output| -> serde_json::Value {
        assert!(output.status.success(), "{}", stderr(output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let (planned, embedded) = (value(&planned), value(&embedded));
    assert_eq!(planned["model"], ID);
    assert_eq!(planned["grid"], embedded["grid"]);
    ok(place.run(&["inspect", "rows.jsonl", "--model", ID]));
    let seen = place.hub.seen();
    assert!(
        seen.iter().all(|seen| !seen.path.contains(".safetensors")),
        "{seen:?}"
    );
    // The rest comes when it is needed.
    ok(place.fetch());
    place.check_cache();
}

#[test]
fn a_revision_is_kept_by_its_name() {
    let place = Place::new("hub-revision", Behaviour::default());
    let args = [
        "eval",
        "rows.jsonl",
        "--model",
        "owner/nano-split@v1",
        "--dry-run",
    ];
    ok(place.run(&args));
    let refs = place.repository().join("refs");
    assert_eq!(std::fs::read_to_string(refs.join("v1")).unwrap(), COMMIT);
    assert!(!refs.join("main").exists());
}

#[test]
fn no_room_is_found_out_before_the_download() {
    let place = Place::new(
        "hub-room",
        Behaviour {
            size: Some(1 << 60),
            ..Behaviour::default()
        },
    );
    let output = place.fetch();
    assert_eq!(output.status.code(), Some(2));
    let told = stderr(&output);
    assert!(
        told.contains("4.00 EiB more on the disk of") && told.contains("HF_HOME"),
        "{told}"
    );
    assert_eq!(place.hub.n_large_bytes(), 0);
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let place = Place::new("hub-file", Behaviour::default());
    place
        .scratch
        .write("home", "a file where a folder should be");
    let args = [&DRY_RUN[..], &["--dry-run"]].concat();
    place.check_output("hub-not-writable", &args, place.run(&args));
}

/// A write that fails half-way keeps what has come: the same command goes on from there.
#[test]
fn a_write_that_fails_keeps_what_has_come() {
    use std::os::unix::process::CommandExt;
    let place = Place::new("hub-full", Behaviour::default());
    let args = [&DRY_RUN[..], &["--dry-run"]].concat();
    let mut command = place.podium(&args);
    #[allow(
        unsafe_code,
        reason = "a file size limit can only be set between fork and exec"
    )]
    // SAFETY: signal and setrlimit are async-signal-safe and touch nothing of this process.
    unsafe {
        command.pre_exec(|| {
            // Writes past the limit then fail, as on a full disk, instead of killing.
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            let limit = libc::rlimit {
                rlim_cur: 2 * MIB,
                rlim_max: 2 * MIB,
            };
            libc::setrlimit(libc::RLIMIT_FSIZE, &limit);
            Ok(())
        });
    }
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains(".incomplete`: "),
        "{}",
        stderr(&output)
    );
    let (_, part) = place.first_blob();
    assert_eq!(part.metadata().unwrap().len(), 2 * MIB);
    ok(place.fetch());
    place.check_cache();
    let weights = place.hub.files.iter().filter(|file| is_weights(&file.name));
    assert!(weights.count() == 3);
}
