//! CPU time of the threads of this process, by what they do: the time that clients take from a server on the same cores can be told
//! apart from the server's own.

use std::{
    fs,
    ops::{Add, Sub},
    path::Path,
    time::Duration,
};

use serde::Serialize;

use crate::{engine::THREAD_NAME as ENGINE_THREAD, ops::COMPUTE_THREADS, server::IO_THREADS};

/// CPU time since the threads began, or of some part of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuTime {
    /// Threads that compute the forward.
    pub compute: Duration,
    /// Their time without a core although they could have run.
    pub compute_waited: Duration,
    /// The engine: scheduling, sampling, metrics.
    pub engine: Duration,
    /// Sockets, HTTP/2, messages.
    pub io: Duration,
    /// The thread that asks, on which the clients of a benchmark live.
    pub clients: Duration,
}

/// CPU seconds of one step, all threads of a kind together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StepCpu {
    /// As in [`CpuTime`].
    pub compute: f64,
    /// As in [`CpuTime`].
    pub compute_waited: f64,
    /// As in [`CpuTime`].
    pub engine: f64,
    /// As in [`CpuTime`].
    pub io: f64,
    /// As in [`CpuTime`].
    pub clients: f64,
}

impl CpuTime {
    /// Of now; `None` where the system does not count it.
    pub fn now() -> Option<Self> {
        let mut time = Self::default();
        let (own, _) = scheduled(Path::new("/proc/thread-self"))?;
        for thread in fs::read_dir("/proc/self/task").ok()?.flatten() {
            // A thread may end while the list is read.
            let Ok(name) = fs::read_to_string(thread.path().join("comm")) else { continue };
            let Some((ran, waited)) = scheduled(&thread.path()) else { continue };
            match name.trim_end() {
                COMPUTE_THREADS => {
                    time.compute += ran;
                    time.compute_waited += waited;
                }
                ENGINE_THREAD => time.engine += ran,
                IO_THREADS => time.io += ran,
                _ => {}
            }
        }
        time.clients = own;
        Some(time)
    }

    /// Shares of one of `steps` steps.
    pub fn per_step(&self, steps: f64) -> StepCpu {
        let share = |time: Duration| time.as_secs_f64() / steps;
        StepCpu {
            compute: share(self.compute),
            compute_waited: share(self.compute_waited),
            engine: share(self.engine),
            io: share(self.io),
            clients: share(self.clients),
        }
    }
}

impl Add for CpuTime {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            compute: self.compute + other.compute,
            compute_waited: self.compute_waited + other.compute_waited,
            engine: self.engine + other.engine,
            io: self.io + other.io,
            clients: self.clients + other.clients,
        }
    }
}

impl Sub for CpuTime {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            compute: self.compute.saturating_sub(earlier.compute),
            compute_waited: self.compute_waited.saturating_sub(earlier.compute_waited),
            engine: self.engine.saturating_sub(earlier.engine),
            io: self.io.saturating_sub(earlier.io),
            clients: self.clients.saturating_sub(earlier.clients),
        }
    }
}

impl StepCpu {
    /// What scheduling, sampling, metrics and sending take, as a share of what the forward takes.
    pub fn serving_share(&self) -> f64 {
        (self.engine + self.io) / self.compute
    }
}

/// How long a thread ran, and how long it waited for a core, from Linux' `schedstat`. Kernels that do not count say 0 of a thread that runs.
fn scheduled(thread: &Path) -> Option<(Duration, Duration)> {
    let text = fs::read_to_string(thread.join("schedstat")).ok()?;
    let mut numbers = text.split_ascii_whitespace().map(str::parse::<u64>);
    let mut next = || Some(Duration::from_nanos(numbers.next()?.ok()?));
    Some((next()?, next()?))
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Instant};

    use super::*;

    /// Whether work of this thread is counted as `kind`. Tried again, since time that others of that name used goes with them when they end, as they do
    /// in tests beside this one; and the system counts once a tick at the latest.
    fn counts(kind: fn(&CpuTime) -> Duration) -> bool {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(10) {
            let before = CpuTime::now().unwrap();
            let tick = Instant::now();
            while tick.elapsed() < Duration::from_millis(10) {
                std::hint::black_box((0..10_000u64).sum::<u64>());
            }
            if kind(&(CpuTime::now().unwrap() - before)) > Duration::ZERO {
                return true;
            }
        }
        false
    }

    #[test]
    fn threads_are_told_apart_by_name() {
        if CpuTime::now().is_none() {
            return;
        }
        assert!(counts(|used| used.clients));
        let engine = thread::Builder::new().name(ENGINE_THREAD.into());
        assert!(engine.spawn(|| counts(|used| used.engine)).unwrap().join().unwrap());
    }

    #[test]
    fn a_step_has_its_share() {
        let time = |ms| Duration::from_millis(ms);
        let earlier = CpuTime { compute: time(100), ..CpuTime::default() };
        let later = CpuTime { compute: time(300), compute_waited: time(8), engine: time(2), io: time(4), clients: time(10) };
        let step = (later - earlier).per_step(2.0);
        assert_eq!((step.compute, step.compute_waited, step.clients), (0.1, 0.004, 0.005));
        assert!((step.serving_share() - 0.03).abs() < 1e-12);
    }
}
