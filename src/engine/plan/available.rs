//! Memory that this process may still take: the system's and its control group's view of it.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes available to the process: `MemAvailable`, or less where a cgroup (v1 or v2, at any
/// level above the process) limits it. 0 when the system does not say.
pub fn available_memory() -> u64 {
    let system = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| mem_available(&text));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limited = group_folders(&groups, Path::new("/sys/fs/cgroup"))
        .iter()
        .filter_map(|folder| room_in_group(folder))
        .min();
    match (system, limited) {
        (Some(system), Some(limited)) => system.min(limited),
        (Some(bytes), None) | (None, Some(bytes)) => bytes,
        (None, None) => 0,
    }
}

/// The `MemAvailable` line of /proc/meminfo, in bytes.
fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Folders that may hold memory limits of the process, by /proc/self/cgroup: its group and all
/// above it, in each hierarchy. In a container the path may not exist below the mount; its top
/// then is the container's own group.
fn group_folders(cgroups: &str, mount: &Path) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for line in cgroups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let hierarchies = if controllers.is_empty() {
            vec![mount.to_owned(), mount.join("unified")]
        } else if controllers.split(',').any(|name| name == "memory") {
            vec![mount.join(controllers)]
        } else {
            continue;
        };
        for hierarchy in hierarchies {
            let below = Path::new(path.trim_start_matches('/'));
            folders.extend(below.ancestors().map(|group| hierarchy.join(group)));
        }
    }
    folders
}

/// Limit less use of one group; file pages that were not used lately count as free, as they do
/// in `MemAvailable`. `None` without a limit.
fn room_in_group(folder: &Path) -> Option<u64> {
    let number = |name: &str| -> Option<u64> {
        fs::read_to_string(folder.join(name))
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    let statistic = |name: &str| -> u64 {
        let text = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
        text.lines()
            .filter_map(|line| line.split_once(' '))
            .find(|(key, _)| *key == name)
            .and_then(|(_, value)| value.trim().parse().ok())
            .unwrap_or(0)
    };
    let (limit, used, inactive) = match number("memory.max") {
        Some(limit) => (limit, number("memory.current")?, "inactive_file"),
        None => (
            number("memory.limit_in_bytes")?,
            number("memory.usage_in_bytes")?,
            "total_inactive_file",
        ),
    };
    Some(limit.saturating_sub(used.saturating_sub(statistic(inactive))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_some() {
        assert!(available_memory() > 1 << 20);
    }

    #[test]
    fn reads_meminfo() {
        let text = "MemTotal:       24615100 kB\nMemAvailable:   23787260 kB\n";
        assert_eq!(mem_available(text), Some(23_787_260 * 1024));
        assert_eq!(mem_available("MemTotal: 1 kB\n"), None);
        assert_eq!(mem_available("MemAvailable: much\n"), None);
    }

    #[test]
    fn finds_the_groups_of_both_versions() {
        let text = "5:devices:/x\n4:memory:/jobs/a\n0::/user/b\nnonsense\n";
        let mount = Path::new("/cg");
        let folders = group_folders(text, mount);
        let expected = [
            "/cg/memory/jobs/a",
            "/cg/memory/jobs",
            "/cg/memory/",
            "/cg/user/b",
            "/cg/user",
            "/cg/",
            "/cg/unified/user/b",
            "/cg/unified/user",
            "/cg/unified/",
        ];
        let expected: Vec<PathBuf> = expected.iter().map(PathBuf::from).collect();
        assert_eq!(folders, expected);
    }

    #[test]
    fn room_is_limit_less_use_without_idle_file_pages() -> std::io::Result<()> {
        let folder = std::env::temp_dir().join(format!("podium-cgroup-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        assert_eq!(room_in_group(&folder), None);
        fs::write(folder.join("memory.limit_in_bytes"), "5000\n")?;
        fs::write(folder.join("memory.usage_in_bytes"), "3000\n")?;
        fs::write(
            folder.join("memory.stat"),
            "cache 9\ntotal_inactive_file 500\n",
        )?;
        assert_eq!(room_in_group(&folder), Some(2500));
        fs::write(folder.join("memory.max"), "1000\n")?;
        fs::write(folder.join("memory.current"), "1200\n")?;
        assert_eq!(room_in_group(&folder), Some(0));
        fs::write(folder.join("memory.max"), "max\n")?;
        fs::remove_file(folder.join("memory.limit_in_bytes"))?;
        assert_eq!(room_in_group(&folder), None);
        fs::remove_dir_all(&folder)
    }
}
