//! Memory of this process and of the machine, as Linux counts it.

use std::fs;

/// Blocks from so many bytes on are large.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const LARGE: libc::c_int = 1 << 20;

/// From where growth is counted.
#[derive(Clone, Copy, Debug)]
pub struct Watermark {
    /// Resident when it was set, bytes; `None` where the system does not say.
    resident: Option<u64>,
}

impl Watermark {
    /// Here and now. Forgets what was resident before (proc(5), `clear_refs`); where that cannot be, an earlier peak counts.
    pub fn set() -> Self {
        let _ = fs::write("/proc/self/clear_refs", "5");
        Self { resident: status("VmRSS:") }
    }

    /// Most that was resident since, less what was then; bytes.
    pub fn growth(self) -> Option<u64> {
        Some(status("VmHWM:")?.saturating_sub(self.resident?))
    }
}

/// Bytes that this process may use: of the cgroup, of either version, or of the machine.
pub fn limit() -> Option<u64> {
    let machine = kibibytes(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemTotal:");
    let cgroup = CGROUPS.iter().find_map(|cgroup| number(cgroup.limit));
    cgroup.into_iter().chain(machine).min()
}

/// Bytes that this process could take besides: of the cgroup, or of the machine, cached files not counted.
pub fn available() -> Option<u64> {
    let machine = kibibytes(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemAvailable:");
    let cgroup = CGROUPS.iter().find_map(Cgroup::room);
    cgroup.into_iter().chain(machine).min()
}

/// Where a version of cgroups says what it allows and what is used.
struct Cgroup {
    limit: &'static str,
    usage: &'static str,
    stat: &'static str,
    /// Cached files that can be dropped, in `stat`.
    cached: &'static str,
}

const CGROUPS: [Cgroup; 2] = [
    Cgroup {
        limit: "/sys/fs/cgroup/memory.max",
        usage: "/sys/fs/cgroup/memory.current",
        stat: "/sys/fs/cgroup/memory.stat",
        cached: "inactive_file ",
    },
    Cgroup {
        limit: "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        usage: "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        stat: "/sys/fs/cgroup/memory/memory.stat",
        cached: "total_inactive_file ",
    },
];

impl Cgroup {
    fn room(&self) -> Option<u64> {
        let stat = fs::read_to_string(self.stat).unwrap_or_default();
        let cached = stat.lines().find_map(|line| line.strip_prefix(self.cached)?.trim().parse::<u64>().ok());
        let used = number(self.usage)?.saturating_sub(cached.unwrap_or(0));
        Some(number(self.limit)?.saturating_sub(used))
    }
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// From now on what is large goes back to the system when it is freed. The allocator would otherwise learn from the first large block to
/// keep them, in pieces between smaller ones: a training step frees and makes many, and would take half as much again.
pub fn return_large_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it sets a number of the allocator, under its lock.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    }
}

/// Gives freed memory back to the system. The allocator keeps what a thread has freed for that thread; one that made large things and
/// ends would leave it lying.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it may be called at any time, by any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

fn status(name: &str) -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/self/status").ok()?, name)
}

/// The value of a line `NAME: N kB`, in bytes.
fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib.saturating_mul(1 << 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_lines_are_read() {
        assert_eq!(kibibytes("VmHWM:\t 9 kB\nVmRSS:\t    12 kB\n", "VmRSS:"), Some(12 << 10));
        assert_eq!(kibibytes("VmRSS: many\n", "VmRSS:"), None);
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(limit().is_some_and(|bytes| bytes > 1 << 20));
        assert!(available().zip(limit()).is_some_and(|(room, limit)| room > 0 && room <= limit));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_held_counts() {
        const SIZE: usize = 64 << 20;
        let mark = Watermark::set();
        let held = std::hint::black_box(vec![1_u8; SIZE]);
        // Other tests of this process may give memory back meanwhile.
        assert!(mark.growth().is_some_and(|bytes| bytes > SIZE as u64 / 2));
        drop(held);
    }
}
