use super::*;
use crate::submission::lock::{LockError, RunLock};
use crate::submission::test_rows::{cut_off, row};
use crate::telemetry::test_dir::TestDir;

fn line(row: &ResultRow) -> Vec<u8> {
    let mut line = serde_json::to_vec(row).expect("a row is JSON");
    line.push(b'\n');
    line
}

fn write_log(dir: &TestDir, bytes: &[u8]) {
    std::fs::write(dir.path().join(RESULTS_FILE), bytes).expect("the test folder is writable");
}

fn log_bytes(dir: &TestDir) -> Vec<u8> {
    std::fs::read(dir.path().join(RESULTS_FILE)).expect("the log is there")
}

#[test]
fn rows_come_back_as_written() {
    let dir = TestDir::new("log");
    let rows = [row("q-1", 0), row("q-2\n\"ü\"", 0), row("q-1", 1)];
    let (mut log, recovered) = ResultLog::open(dir.path()).expect("a new log");
    assert!(recovered.rows.is_empty());
    for row in &rows {
        log.append(row).expect("the test folder is writable");
    }
    log.close().expect("the test folder is writable");
    let recovered = read(dir.path()).expect("a whole log");
    assert_eq!(recovered.rows, rows);
    assert_eq!(recovered.repaired_bytes, 0);
}

/// Lines of versions that kept neither channel nor lenient verdict.
#[test]
fn older_lines_are_read() {
    let dir = TestDir::new("older");
    let older = |row: &ResultRow| {
        let mut line = serde_json::to_value(row).expect("a row is JSON");
        let fields = line.as_object_mut().expect("a row is an object");
        fields.remove("lenient");
        if let Some(answer) = fields["answer"].as_object_mut() {
            assert_eq!(answer.remove("channel"), Some("final".into()));
        }
        format!("{line}\n")
    };
    let lines = [older(&row("q-1", 0)), older(&cut_off("q-2", 0))];
    write_log(&dir, lines.concat().as_bytes());
    let [answered, unanswered] = &read(dir.path()).expect("a whole log").rows[..] else {
        panic!("two lines, two rows");
    };
    assert_eq!(answered, &row("q-1", 0));
    assert!(answered.has_lenient() && !unanswered.has_lenient());
}

/// Promise 3: wherever a kill or a power cut ends the file, every whole line is kept, the rest is
/// cut off, and the log goes on.
#[test]
fn a_log_cut_at_any_byte_recovers_every_whole_row() {
    let rows = [row("q-1", 0), row("q-2 é", 0), row("q-3", 0)];
    let lines: Vec<Vec<u8>> = rows.iter().map(line).collect();
    let bytes = lines.concat();
    let ends: Vec<usize> = lines
        .iter()
        .scan(0, |end, line| {
            *end += line.len();
            Some(*end)
        })
        .collect();
    let dir = TestDir::new("cut");
    for cut in ends[0]..=bytes.len() {
        write_log(&dir, &bytes[..cut]);
        // A line without its newline is whole.
        let n_whole = ends.iter().filter(|&&end| cut + 1 >= end).count();
        let seen = read(dir.path()).expect("a torn tail is no error");
        assert_eq!(seen.rows, rows[..n_whole], "cut at {cut}");
        assert_eq!(log_bytes(&dir), bytes[..cut], "reading touches nothing");

        let (mut log, recovered) = ResultLog::open(dir.path()).expect("a torn tail is repaired");
        assert_eq!(recovered.rows, rows[..n_whole], "cut at {cut}");
        let torn = if ends.iter().any(|&end| cut == end || cut + 1 == end) {
            0
        } else {
            cut - ends[n_whole - 1]
        };
        assert_eq!(recovered.repaired_bytes, torn as u64, "cut at {cut}");
        log.append(&rows[2]).expect("the test folder is writable");
        log.close().expect("the test folder is writable");
        let expected = [lines[..n_whole].concat(), lines[2].clone()].concat();
        assert_eq!(log_bytes(&dir), expected, "cut at {cut}");
    }
}

#[test]
fn an_invalid_line_in_the_middle_is_an_error_with_its_number() {
    let dir = TestDir::new("middle");
    let whole = line(&row("q-1", 0));
    write_log(&dir, &[&whole[..], b"{\"key\": \0\0\n", &whole].concat());
    let error = ResultLog::open(dir.path()).err().expect("line 2 is broken");
    assert!(matches!(error, LogError::InvalidLine { line: 2, .. }));
    assert!(error.hint().contains("line 2"));
    assert_eq!(log_bytes(&dir).len(), 2 * whole.len() + 11, "untouched");
}

#[test]
fn a_torn_last_line_may_end_in_a_newline() {
    let dir = TestDir::new("zeros");
    let whole = line(&row("q-1", 0));
    write_log(&dir, &[&whole[..], &[0; 512], b"\n"].concat());
    let (_, recovered) = ResultLog::open(dir.path()).expect("zeros are a torn line");
    assert_eq!((recovered.rows.len(), recovered.repaired_bytes), (1, 513));
    assert_eq!(log_bytes(&dir), whole);
}

#[test]
fn a_last_line_of_another_schema_is_not_cut_off() {
    let dir = TestDir::new("schema");
    let newer = ResultRow {
        schema: "podium.result/2".to_owned(),
        ..row("q-1", 0)
    };
    write_log(&dir, &line(&newer));
    let error = ResultLog::open(dir.path()).err().expect("a newer schema");
    assert!(error.to_string().contains("podium.result/2"));
    assert_eq!(log_bytes(&dir), line(&newer));
}

#[test]
fn a_number_that_no_run_writes_is_an_error_with_its_field() {
    let dir = TestDir::new("numbers");
    let sample = row("q-1", u32::MAX);
    let gold = ResultRow {
        gold: Some(Gold::Option(usize::MAX)),
        ..row("q-1", 0)
    };
    for (bad, field) in [
        (sample, "`sample` is 4294967295"),
        (gold, "`gold` is option"),
    ] {
        write_log(&dir, &[line(&row("q-0", 0)), line(&bad)].concat());
        let error = read(dir.path()).expect_err(field);
        assert!(matches!(error, LogError::InvalidLine { line: 2, .. }));
        assert!(error.to_string().contains(field), "{error}");
    }
}

/// A disk of `room` bytes that takes at most `chunk` bytes a write.
struct SmallDisk {
    bytes: Mutex<Vec<u8>>,
    room: Mutex<usize>,
    chunk: usize,
    n_syncs: Mutex<usize>,
}

impl LogFile for SmallDisk {
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut held = self.bytes.lock().expect("no test panics while holding it");
        let room = *self.room.lock().expect("no test panics while holding it");
        let n_taken = bytes.len().min(self.chunk).min(room - held.len());
        if n_taken == 0 {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        held.extend_from_slice(&bytes[..n_taken]);
        Ok(n_taken)
    }

    fn sync(&self) -> io::Result<()> {
        *self
            .n_syncs
            .lock()
            .expect("no test panics while holding it") += 1;
        Ok(())
    }

    fn set_len(&self, n_bytes: u64) -> io::Result<()> {
        let mut held = self.bytes.lock().expect("no test panics while holding it");
        held.truncate(n_bytes as usize);
        Ok(())
    }
}

fn small_disk(room: usize, chunk: usize) -> (Arc<SmallDisk>, ResultLog) {
    let disk = Arc::new(SmallDisk {
        bytes: Mutex::default(),
        room: Mutex::new(room),
        chunk,
        n_syncs: Mutex::default(),
    });
    let path = PathBuf::from("small-disk");
    let file: Arc<dyn LogFile> = Arc::clone(&disk) as Arc<dyn LogFile>;
    let log = ResultLog {
        syncer: Syncer::start(&path, Arc::clone(&file)).expect("a thread starts"),
        path,
        file,
        n_bytes: 0,
        torn: false,
    };
    (disk, log)
}

#[test]
fn a_full_disk_takes_the_partial_line_back_and_room_lets_it_go_on() {
    let whole = line(&row("q-1", 0));
    let (disk, mut log) = small_disk(whole.len() + 100, 64);
    log.append(&row("q-1", 0)).expect("one line fits");
    let error = log.append(&row("q-1", 0)).expect_err("two do not");
    assert!(matches!(error, LogError::NoSpace { .. }));
    assert_eq!(*disk.bytes.lock().expect("no panic"), whole);
    *disk.room.lock().expect("no panic") = 1 << 20;
    log.append(&row("q-1", 0)).expect("there is room again");
    log.close().expect("this disk syncs");
    assert_eq!(*disk.bytes.lock().expect("no panic"), whole.repeat(2));
}

#[test]
fn many_rows_share_a_sync_and_a_lone_row_gets_its_own() {
    let (disk, mut log) = small_disk(1 << 20, usize::MAX);
    for _ in 0..100 {
        log.append(&row("q", 0)).expect("there is room");
    }
    std::thread::sleep(SYNC_PERIOD);
    let n_syncs = *disk.n_syncs.lock().expect("no panic");
    assert!((1..10).contains(&n_syncs), "{n_syncs} syncs for 100 rows");
    log.append(&row("q", 0)).expect("there is room");
    std::thread::sleep(SYNC_PERIOD);
    assert!(*disk.n_syncs.lock().expect("no panic") > n_syncs);
}

/// The same with a real file: a process that may write 4 KiB a file gets `EFBIG` in the middle of
/// a line. Runs itself as a child, because the limit holds for a whole process.
#[test]
fn a_file_size_limit_leaves_whole_lines() {
    const CHILD: &str = "PODIUM_TEST_LIMITED_LOG";
    if let Ok(folder) = std::env::var(CHILD) {
        limit_file_size(4096);
        let (mut log, _) = ResultLog::open(Path::new(&folder)).expect("a new log");
        let error = (0..100)
            .find_map(|_| log.append(&row("q", 0)).err())
            .expect("100 rows are more than 4 KiB");
        assert!(matches!(error, LogError::NoSpace { .. }), "{error}");
        return;
    }
    let dir = TestDir::new("limit");
    let child = std::process::Command::new(std::env::current_exe().expect("this test's binary"))
        .args([
            "--exact",
            "submission::log::tests::a_file_size_limit_leaves_whole_lines",
        ])
        .env(CHILD, dir.path())
        .output()
        .expect("this binary starts");
    assert!(
        child.status.success(),
        "{}",
        String::from_utf8_lossy(&child.stdout)
    );
    let n_line = line(&row("q", 0)).len();
    assert_eq!(log_bytes(&dir).len(), 4096 / n_line * n_line);
    let recovered = read(dir.path()).expect("whole lines");
    assert_eq!(recovered.rows.len(), 4096 / n_line);
    assert_eq!(recovered.repaired_bytes, 0);
}

#[allow(
    unsafe_code,
    reason = "std has no resource limits; only this test sets one"
)]
fn limit_file_size(n_bytes: u64) {
    let limit = libc::rlimit {
        rlim_cur: n_bytes,
        rlim_max: n_bytes,
    };
    // SAFETY: both calls take plain values; the pointer is to a live local.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
    }
}

#[test]
fn the_probe_finds_a_folder_that_cannot_be_written() {
    let dir = TestDir::new("probe");
    let inner = dir.path().join("a/b");
    probe_writable(&inner).expect("it is made");
    assert_eq!(std::fs::read_dir(&inner).expect("it was made").count(), 0);
    // A file where the folder should be fails for root, too; permission bits do not.
    let file = dir.path().join("file");
    std::fs::write(&file, b"").expect("the test folder is writable");
    assert!(probe_writable(&file.join("run")).is_err());
}

/// Promise 3 with a real kill: a child appends rows and tells of each one; it is killed at some
/// instant, and every row it told of is in the log. Its lock is gone with it.
#[test]
fn a_killed_process_loses_no_row_it_had_finished_and_leaves_no_lock() {
    const CHILD: &str = "PODIUM_TEST_KILLED_LOG";
    if let Ok(folder) = std::env::var(CHILD) {
        let folder = Path::new(&folder);
        let _lock = RunLock::acquire(folder).expect("nobody holds it");
        let (mut log, _) = ResultLog::open(folder).expect("a new log");
        for sample in 0.. {
            log.append(&row("q", sample)).expect("there is room");
            // Past libtest's capture of `print!`, straight into the pipe.
            let mut out = io::stdout();
            writeln!(out, "appended {sample}").expect("the parent reads");
            out.flush().expect("the parent reads");
        }
    }
    let dir = TestDir::new("killed");
    let mut child = std::process::Command::new(
        std::env::current_exe().expect("this test's binary"),
    )
    .args(["--exact", "--nocapture"])
    .arg("submission::log::tests::a_killed_process_loses_no_row_it_had_finished_and_leaves_no_lock")
    .env(CHILD, dir.path())
    .stdout(std::process::Stdio::piped())
    .spawn()
    .expect("this binary starts");
    let told = BufReader::new(child.stdout.take().expect("it is piped"));
    let n_told = told
        .lines()
        .map_while(Result::ok)
        .filter(|line| line.contains("appended"))
        .take(500)
        .count();
    assert!(matches!(
        RunLock::acquire(dir.path()),
        Err(LockError::Held { .. })
    ));
    child.kill().expect("it still runs");
    child.wait().expect("it was killed");
    let _lock = RunLock::acquire(dir.path()).expect("a killed run leaves no lock");
    let (_, recovered) = ResultLog::open(dir.path()).expect("a torn tail is repaired");
    assert!(n_told == 500 && recovered.rows.len() >= n_told);
    for (sample, found) in (0..).zip(&recovered.rows) {
        assert_eq!(found, &row("q", sample));
    }
}
