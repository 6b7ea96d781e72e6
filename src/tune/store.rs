//! The state of a run on disk: enough to go on, after whatever ended it, as if nothing had.
//!
//! A state is one file, named by its step and the beginning of its SHA-256. It is written beside its place, synced and renamed, and the
//! one before stays until then and a state longer: a file whose content is not what its name says is passed over, never loaded.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{config::TuneConfig, evaluate::Figures};
use crate::{
    durable::{self, Lock, hex},
    error::{Error, Result},
    train::learner::{Captured, Memory},
};

/// Key of the metadata.
const KEY: &str = "hardmax_tuning";
/// States that are kept.
const KEPT: usize = 2;
/// Digits of the hash in a name.
const DIGITS: usize = 16;

/// Ending of the names of the best values.
const BEST: &str = ".best";

/// How far a run is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps done.
    pub step: usize,
    /// Of them, skipped.
    pub skipped: usize,
    /// The last so many of them were skipped.
    pub skipped_in_a_row: usize,
    /// That they took.
    pub seconds: f64,
    /// The step that was evaluated last.
    pub evaluated: usize,
    /// Of the model before, once it has been measured.
    pub before: Option<Figures>,
    /// With early stopping, the best so far.
    pub best: Option<Best>,
    /// Evaluations since.
    pub not_better: usize,
}

/// The best evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Steps done then.
    pub step: usize,
    /// Nats per token under the serving routing.
    pub loss: f64,
}

/// A run between two steps.
#[derive(Clone, Debug)]
pub struct Saved {
    /// The learner.
    pub captured: Captured,
    /// How far it is.
    pub progress: Progress,
    /// The tensors of [`Progress::best`], by name.
    pub best: Option<BTreeMap<String, Tensor>>,
}

/// What a run is, as far as its result depends on it: a state is continued by the same recipe only. `base` is the digest of the weights
/// that it starts from, `corpus` that of its text, `dtype` the element type of the model.
///
/// # Errors
/// `Internal` where the settings have no form on disk.
pub fn recipe(config: &TuneConfig, base: &str, corpus: &str, dtype: &str) -> Result<String> {
    let recipe = serde_json::to_vec(&(config.essence(), base, corpus, dtype));
    recipe.map(|recipe| hex(&Sha256::digest(recipe))).map_err(|error| Error::Internal(format!("hashing the recipe: {error}")))
}

/// What is in the metadata.
#[derive(Serialize, Deserialize)]
struct Header {
    progress: Progress,
    memory: Memory,
    updates: i32,
    /// Of settings, text and model: a state is continued only under those that made it.
    recipe: String,
    /// Compute threads: with another number, sums have other last bits.
    threads: usize,
}

/// The folder of the states of one run.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    recipe: String,
    _lock: Lock,
}

impl Store {
    /// States of the run `recipe` in the folder `dir`, which is made if it is not there.
    ///
    /// # Errors
    /// `FailedPrecondition` where another run has the folder.
    pub fn open(dir: &Path, recipe: String) -> Result<Self> {
        fs::create_dir_all(dir).map_err(|source| Error::io(dir, source))?;
        let lock = Lock::take(&dir.join("lock"), "choose another one with --work")?;
        let store = Self { dir: dir.to_owned(), recipe, _lock: lock };
        // Of a run that was killed. Others may be writing files of their own beside them right now.
        for path in store.files(|name| name.starts_with("state-") && name.ends_with(".partial"))? {
            fs::remove_file(&path).map_err(|source| Error::io(&path, source))?;
        }
        Ok(store)
    }

    /// Whether a state is there, whole or not.
    pub fn has_state(&self) -> Result<bool> {
        Ok(!self.states()?.is_empty())
    }

    /// Writes a state, then removes all but the newest.
    ///
    /// # Errors
    /// `DiskFull`, with the states before in place.
    pub fn save(&self, saved: &Saved) -> Result<()> {
        let Saved { captured: Captured { memory, updates, tensors }, progress, best } = saved;
        let (memory, recipe, threads) = (memory.clone(), self.recipe.clone(), rayon::current_num_threads());
        let header = Header { progress: progress.clone(), memory, updates: *updates, recipe, threads };
        let mut tensors: BTreeMap<String, Tensor> = tensors.clone();
        tensors.extend(best.iter().flatten().map(|(name, tensor)| (format!("{name}{BEST}"), tensor.clone())));
        let internal = |error: String| Error::Internal(format!("the state of a run has no form on disk: {error}"));
        let header = serde_json::to_string(&header).map_err(|error| internal(error.to_string()))?;
        let bytes = safetensors::serialize(&tensors, Some(HashMap::from([(KEY.to_owned(), header)])));
        let bytes = bytes.map_err(|error| internal(error.to_string()))?;
        let name = format!("state-{:08}-{}.safetensors", progress.step, &hash(&bytes));
        durable::write(&self.dir.join(name), &bytes)?;
        for old in self.states()?.into_iter().skip(KEPT) {
            fs::remove_file(&old).map_err(|source| Error::io(&old, source))?;
        }
        Ok(())
    }

    /// The newest state that is whole.
    ///
    /// # Errors
    /// `FailedPrecondition` where it was made by another recipe, from another text or for another model.
    pub fn load(&self) -> Result<Option<Saved>> {
        for path in self.states()? {
            let bytes = fs::read(&path).map_err(|source| Error::io(&path, source))?;
            match self.parse(&path, &bytes)? {
                Some(state) => return Ok(Some(state)),
                None => tracing::warn!("{} is damaged, and passed over", path.display()),
            }
        }
        Ok(None)
    }

    /// `None` of a damaged file.
    fn parse(&self, path: &Path, bytes: &[u8]) -> Result<Option<Saved>> {
        let named = path.file_stem().and_then(|stem| stem.to_str()?.rsplit('-').next());
        if named != Some(hash(bytes).as_str()) {
            return Ok(None);
        }
        let Ok((_, metadata)) = SafeTensors::read_metadata(bytes) else { return Ok(None) };
        let header = metadata.metadata().as_ref().and_then(|metadata| serde_json::from_str::<Header>(metadata.get(KEY)?).ok());
        let Some(Header { progress, memory, updates, recipe, threads }) = header else { return Ok(None) };
        if recipe != self.recipe {
            let message = format!(
                "{}: this run was begun with other settings, text or model: give those again, or another folder with --work",
                self.dir.display()
            );
            return Err(Error::FailedPrecondition(message));
        }
        if threads != rayon::current_num_threads() {
            let now = rayon::current_num_threads();
            tracing::warn!("the run was begun with {threads} threads and goes on with {now}: the result will differ in its last bits");
        }
        let (mut tensors, mut best) = (BTreeMap::new(), BTreeMap::new());
        for (name, tensor) in candle_core::safetensors::load_buffer(bytes, &Device::Cpu)? {
            match name.strip_suffix(BEST) {
                Some(name) => best.insert(name.to_owned(), tensor),
                None => tensors.insert(name, tensor),
            };
        }
        let best = progress.best.is_some().then_some(best);
        Ok(Some(Saved { captured: Captured { memory, updates, tensors }, progress, best }))
    }

    /// Newest first.
    fn states(&self) -> Result<Vec<PathBuf>> {
        let mut states = self.files(|name| name.starts_with("state-") && name.ends_with(".safetensors"))?;
        states.sort();
        states.reverse();
        Ok(states)
    }

    fn files(&self, chosen: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
        let io = |source| Error::io(&self.dir, source);
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(io)? {
            let entry = entry.map_err(io)?;
            if entry.file_name().to_str().is_some_and(&chosen) {
                files.push(entry.path());
            }
        }
        Ok(files)
    }
}

/// The beginning of the SHA-256.
fn hash(bytes: &[u8]) -> String {
    let mut hash = hex(&Sha256::digest(bytes));
    hash.truncate(DIGITS);
    hash
}
