//! A cell as a process of its own: one thread, its specification on standard input, and no longer life than ours.

use std::{
    io::Write as _,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
};

use super::spec::CellSpec;
use crate::error::{Error, Result};

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// The last of what it wrote to standard error.
    pub said: String,
}

/// Sets threads of a child to one.
const ONE_THREAD: [&str; 2] = ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"];
/// What is kept of a child's last words.
const LAST_WORDS: usize = 400;

/// Runs one cell by `program compare --cell <cells>` and waits for its end.
pub fn run(program: &Path, cells: &Path, spec: &CellSpec) -> Result<Ended> {
    let error = |error| Error::io(program, error);
    let json = serde_json::to_vec(spec).map_err(|error| Error::Internal(format!("a cell has no JSON form: {error}")))?;
    let mut command = Command::new(program);
    command.arg("compare").arg("--cell").arg(cells).envs(ONE_THREAD.map(|name| (name, "1"))).env("RUST_BACKTRACE", "0");
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = spawn(&mut command).map_err(error)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A child that died before reading says why on its standard error.
        let _ = stdin.write_all(&json);
    }
    let output = child.wait_with_output().map_err(error)?;
    let said = String::from_utf8_lossy(&output.stderr);
    let said: String = said.chars().skip(said.chars().count().saturating_sub(LAST_WORDS)).collect();
    Ok(Ended { status: output.status, said: said.trim().to_owned() })
}

/// Spawns a child that is killed when the thread that calls this ends, however that comes about: nobody would wait for it.
#[cfg(target_os = "linux")]
fn spawn(command: &mut Command) -> std::io::Result<Child> {
    use std::{io, os::unix::process::CommandExt as _};

    let parent = std::process::id();
    let die_with_parent = move || {
        // SAFETY: these system calls take numbers only; both may be called between fork and exec (signal-safety(7)).
        let (failed, now) = unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL), libc::getppid()) };
        if failed != 0 {
            return Err(io::Error::last_os_error());
        }
        // The parent ended before the child asked to be told.
        if now.unsigned_abs() == parent { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
    };
    // SAFETY: the closure allocates nothing and takes no lock.
    unsafe { command.pre_exec(die_with_parent) }.spawn()
}

#[cfg(not(target_os = "linux"))]
fn spawn(command: &mut Command) -> std::io::Result<Child> {
    command.spawn()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn a_child_ends_with_the_thread_that_waits_for_it() {
        let spawned = std::thread::spawn(|| spawn(Command::new("sleep").arg("600")).expect("there is a sleep"));
        let mut child = spawned.join().expect("no panic");
        let status = child.wait().expect("it can be waited for");
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL));
    }
}
