//! Memory of this process, as Linux counts it.

use std::fs;

/// Resident memory now, bytes; `None` where the system does not say.
pub fn resident() -> Option<u64> {
    status("VmRSS:")
}

/// Most resident memory since the process began, bytes; `None` where the system does not say.
pub fn peak() -> Option<u64> {
    status("VmHWM:")
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
}
