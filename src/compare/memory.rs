//! Memory of this process, as Linux counts it.

use std::fs;

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

fn status(name: &str) -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/self/status").ok()?, name)
}

fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
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
