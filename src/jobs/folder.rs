//! The files of `--tuning-dir`, each of which is there whole or not at all.
//!
//! | path | what |
//! |---|---|
//! | `lock` | held by the server that has the folder |
//! | `base.json` | the weights that all of it belongs to |
//! | `current.json` | the generation in force, and the next number |
//! | `audit.jsonl` | who did what |
//! | `jobs/tN/job.json` | a job; without it the rest of the folder is what a killed start left |
//! | `jobs/tN/tokens.bin`, `state-*`, `progress.jsonl` | its text, its state, its history |
//! | `jobs/tN/candidate.safetensors` | what it made, over the checkpoint |
//! | `generations/N/generation.json` | a generation; without it the rest of the folder is what a killed publish left |
//! | `generations/N/delta.safetensors` | its tensors, over the checkpoint |
//! | `generations/N/guard.json` | how long it is watched, and against what; not there where it is not |
//! | `exports/` | generations for use elsewhere |

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::job::{Job, JobId, Who};
use crate::{
    engine::FIRST_GENERATION,
    error::{Error, Result},
};

/// Version of all files here.
const VERSION: u32 = 1;

/// Stands for [`VERSION`] in a file, of which no other can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "u32", try_from = "u32")]
struct Version;

/// Paths below a tuning folder.
#[derive(Clone, Debug)]
pub(super) struct Folder(PathBuf);

/// The weights that a folder belongs to.
#[derive(Serialize, Deserialize)]
pub(super) struct BaseFile {
    version: Version,
    pub(super) digest: String,
    /// For people.
    pub(super) checkpoint: String,
}

/// The generation in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Current {
    version: Version,
    pub(super) generation: u64,
    /// Has never named anything: it is raised before a number is used.
    pub(super) next: u64,
    /// A number whose folder is being made.
    pub(super) pending: Option<u64>,
}

/// A job, with what only the server needs of it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct JobFile {
    version: Version,
    pub(super) who: Who,
    pub(super) job: Job,
}

// === impl Folder ===

impl Folder {
    /// Makes what is not there.
    pub(super) fn make(root: &Path) -> Result<Self> {
        let folder = Self(root.to_owned());
        for dir in [folder.jobs(), folder.generations(), folder.exports()] {
            make_dir(&dir)?;
        }
        Ok(folder)
    }

    pub(super) fn root(&self) -> &Path {
        &self.0
    }

    pub(super) fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }

    pub(super) fn base(&self) -> PathBuf {
        self.0.join("base.json")
    }

    pub(super) fn current(&self) -> PathBuf {
        self.0.join("current.json")
    }

    pub(super) fn audit(&self) -> PathBuf {
        self.0.join("audit.jsonl")
    }

    pub(super) fn exports(&self) -> PathBuf {
        self.0.join("exports")
    }

    fn jobs(&self) -> PathBuf {
        self.0.join("jobs")
    }

    fn generations(&self) -> PathBuf {
        self.0.join("generations")
    }

    pub(super) fn job(&self, id: JobId) -> PathBuf {
        self.jobs().join(id.to_string())
    }

    pub(super) fn generation(&self, number: u64) -> PathBuf {
        self.generations().join(number.to_string())
    }

    pub(super) fn delta(&self, number: u64) -> PathBuf {
        self.generation(number).join("delta.safetensors")
    }

    /// The jobs that have a folder, oldest first.
    pub(super) fn list_jobs(&self) -> Result<Vec<JobId>> {
        let mut jobs: Vec<JobId> = names(&self.jobs())?.iter().filter_map(|name| name.parse().ok()).collect();
        jobs.sort();
        Ok(jobs)
    }

    /// The generations that have a folder, oldest first.
    pub(super) fn list_generations(&self) -> Result<Vec<u64>> {
        let mut generations: Vec<u64> = names(&self.generations())?.iter().filter_map(|name| name.parse().ok()).collect();
        generations.sort_unstable();
        Ok(generations)
    }
}

// === impl Version, BaseFile, Current, JobFile ===

impl From<Version> for u32 {
    fn from(_: Version) -> Self {
        VERSION
    }
}

impl TryFrom<u32> for Version {
    type Error = String;

    fn try_from(version: u32) -> std::result::Result<Self, String> {
        if version == VERSION { Ok(Self) } else { Err(format!("version {version} is not known, {VERSION} is")) }
    }
}

impl BaseFile {
    pub(super) fn new(digest: String, checkpoint: String) -> Self {
        Self { version: Version, digest, checkpoint }
    }
}

impl Current {
    /// The checkpoint, as it was loaded.
    pub(super) fn first() -> Self {
        Self { version: Version, generation: FIRST_GENERATION, next: FIRST_GENERATION + 1, pending: None }
    }

    /// The next number is taken, for a generation that is about to be made.
    pub(super) fn reserved(self) -> Self {
        Self { next: self.next + 1, pending: Some(self.next), ..self }
    }

    /// This generation is in force. Another one that is pending still is: its folder may be there.
    pub(super) fn at(self, generation: u64) -> Self {
        Self { generation, pending: self.pending.filter(|pending| *pending != generation), ..self }
    }

    /// As it is to be written where it is lost, to begin again with the checkpoint.
    pub(super) fn after(last: u64) -> Self {
        Self { next: last + 1, ..Self::first() }
    }
}

impl JobFile {
    pub(super) fn new(who: Who, job: Job) -> Self {
        Self { version: Version, who, job }
    }
}

// === files ===

/// In the folder of a job.
pub(super) fn job_json(dir: &Path) -> PathBuf {
    dir.join("job.json")
}

/// In the folder of a job.
pub(super) fn tokens(dir: &Path) -> PathBuf {
    dir.join("tokens.bin")
}

/// In the folder of a job.
pub(super) fn progress(dir: &Path) -> PathBuf {
    dir.join("progress.jsonl")
}

/// In the folder of a job.
pub(super) fn candidate(dir: &Path) -> PathBuf {
    dir.join("candidate.safetensors")
}

/// In the folder of a generation.
pub(super) fn generation_json(dir: &Path) -> PathBuf {
    dir.join("generation.json")
}

/// In the folder of a generation.
pub(super) fn guard_json(dir: &Path) -> PathBuf {
    dir.join("guard.json")
}

/// Reads a file that [`durable::write_json`] wrote; `None` if it is not there.
///
/// # Errors
/// `FailedPrecondition` where it is damaged.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path, error)),
    };
    let damaged = |error| Error::FailedPrecondition(format!("{} cannot be read: {error}", path.display()));
    serde_json::from_slice(&text).map(Some).map_err(damaged)
}

/// Makes a folder, and those above it, and waits until the disk has its name.
pub(super) fn make_dir(path: &Path) -> Result<()> {
    let above = path.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let made = fs::create_dir_all(path).and_then(|()| File::open(above)?.sync_all());
    made.map_err(|error| match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::DiskFull { path: path.into() },
        _ => Error::io(path, error),
    })
}

/// Removes the folder `dir`, and first the file `mark`, without which it counts as nothing: whoever is killed meanwhile leaves no half of it.
pub(super) fn remove(dir: &Path, mark: &Path) -> Result<()> {
    remove_file(mark)?;
    gone(dir, fs::remove_dir_all(dir))
}

/// Removes a file, if it is there.
pub(super) fn remove_file(path: &Path) -> Result<()> {
    gone(path, fs::remove_file(path))
}

fn gone(path: &Path, removed: io::Result<()>) -> Result<()> {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io(path, error)),
        _ => Ok(()),
    }
}

/// Removes what an ended job needs no more: its text and its states.
pub(super) fn sweep(dir: &Path) -> Result<()> {
    let kept = [job_json(dir), progress(dir), candidate(dir)];
    let others = names(dir)?.into_iter().map(|name| dir.join(name)).filter(|path| !kept.contains(path));
    others.into_iter().try_for_each(|path| remove_file(&path))
}

/// Removes what a job can go on without: all states but the newest.
pub(super) fn make_room(dir: &Path) -> Result<()> {
    let mut states: Vec<String> = names(dir)?.into_iter().filter(|name| name.starts_with("state-")).collect();
    states.sort();
    states.pop();
    states.into_iter().try_for_each(|name| remove_file(&dir.join(name)))
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let io = |source| Error::io(dir, source);
    let entries = fs::read_dir(dir).map_err(io)?.map(|entry| Ok(entry.map_err(io)?.file_name().into_string().unwrap_or_default()));
    entries.collect()
}
