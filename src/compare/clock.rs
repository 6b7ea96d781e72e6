//! CPU time of this process.
//!
//! Cells share the cores, so the time of a step on the wall says how busy the machine was. A cell is a process of which one
//! thread is busy at a time; a product may run on another thread than the one that asks for it, hence all threads count.

use std::time::Duration;

/// CPU time that the threads of this process have taken together; on systems without such a clock, time since the first
/// call.
pub fn cpu_time() -> Duration {
    of_process().unwrap_or_else(since_first_call)
}

#[cfg(unix)]
fn of_process() -> Option<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` may be written to, and nothing else is.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    (failed == 0).then(|| Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32))
}

#[cfg(not(unix))]
fn of_process() -> Option<Duration> {
    None
}

fn since_first_call() -> Duration {
    static FIRST: std::sync::LazyLock<std::time::Instant> = std::sync::LazyLock::new(std::time::Instant::now);
    FIRST.elapsed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(unix)]
    fn sleep_takes_no_cpu_time_and_work_does() {
        // Other tests of this process work meanwhile, so only work can be told: it cannot be missed.
        let before = cpu_time();
        let mut x = 1.0_f64;
        while cpu_time() < before + Duration::from_millis(2) {
            x = (x + 1.0).sqrt();
        }
        assert!(x > 1.0 && cpu_time() >= before + Duration::from_millis(2));
    }
}
