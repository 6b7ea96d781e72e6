//! The state of a run on disk: enough to continue as if it had never stopped.
//!
//! Written to a temporary folder beside its place, synced, then renamed in two steps, with the old state under another
//! name in between: [`StateDir::recover`] takes it back where the process was killed there. A run holds the lock of its work folder.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

use super::{
    config::TrainConfig,
    learner::{Captured, Learner, Memory},
};
use crate::{
    durable::hex,
    error::{Error, Result},
};

const TOKENIZER: &str = "tokenizer.json";

/// Counters of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps done.
    pub step: usize,
    /// Of them, skipped for non-finite gradients.
    pub skipped: usize,
    /// The last so many were all skipped.
    pub skipped_in_a_row: usize,
}

/// What `state.json` holds.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    progress: Progress,
    memory: Memory,
    updates: i32,
    /// Of recipe and text: a state is continued only under those that made it.
    recipe: String,
}

/// Folder of the state of a run.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
    recipe: String,
}

impl StateDir {
    /// The state of `config` on the text `documents`, in its work folder.
    pub fn new(config: &TrainConfig, documents: &[String]) -> Result<Self> {
        let mut recipe = config.clone();
        // Where things lie does not matter, nor how often they are looked at, nor when the run is given up.
        recipe.output = PathBuf::new();
        recipe.data.train.iter_mut().chain(&mut recipe.data.heldout).for_each(|file| *file = file.file_name().unwrap_or_default().into());
        (recipe.run.eval_every, recipe.run.eval_tokens, recipe.run.save_every, recipe.run.skip_limit) = (0, 0, 0, 0);
        let text = serde_json::to_string(&recipe).map_err(|error| Error::Internal(format!("hashing the recipe: {error}")))?;
        let mut hash = Sha256::new_with_prefix(text);
        documents.iter().for_each(|document| {
            hash.update(document);
            hash.update([0xFF]); // In no UTF-8 text.
        });
        Ok(Self { path: config.work.join("training-state"), recipe: hex(&hash.finalize()) })
    }

    /// Takes back the old state of a [`StateDir::save`] that was killed between its renames.
    pub fn recover(&self) -> Result<()> {
        let old = self.old();
        if self.exists() || !old.join("state.json").exists() {
            return Ok(());
        }
        fs::rename(&old, &self.path).map_err(|source| Error::io(&old, source))
    }

    /// Where the old state is while the new one takes its place.
    fn old(&self) -> PathBuf {
        self.path.with_extension("old")
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a state is there.
    pub fn exists(&self) -> bool {
        self.path.join("state.json").exists()
    }

    /// Replaces the saved state.
    pub fn save(&self, progress: Progress, tokenizer: &Tokenizer, learner: &Learner) -> Result<()> {
        let temporary = self.path.with_extension("partial");
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::io(path, source)
        };
        if temporary.exists() {
            fs::remove_dir_all(&temporary).map_err(io(&temporary))?;
        }
        fs::create_dir_all(&temporary).map_err(io(&temporary))?;
        let Captured { memory, updates, tensors } = learner.capture()?;
        let file = temporary.join("tensors.safetensors");
        safetensors::serialize_to_file(tensors.iter(), None, &file)
            .map_err(|error| Error::Internal(format!("{}: {error}", file.display())))?;
        let file = temporary.join(TOKENIZER);
        tokenizer.save(&file, false).map_err(|error| Error::Internal(format!("{}: {error}", file.display())))?;
        let header = Header { progress, memory, updates, recipe: self.recipe.clone() };
        let text = serde_json::to_string_pretty(&header).map_err(|error| Error::Internal(format!("writing the state: {error}")))?;
        let file = temporary.join("state.json");
        fs::write(&file, text).map_err(io(&file))?;
        for name in ["tensors.safetensors", TOKENIZER, "state.json"] {
            let file = temporary.join(name);
            fs::File::open(&file).and_then(|file| file.sync_all()).map_err(io(&file))?;
        }
        let old = self.old();
        if old.exists() {
            fs::remove_dir_all(&old).map_err(io(&old))?;
        }
        if self.path.exists() {
            fs::rename(&self.path, &old).map_err(io(&self.path))?;
        }
        fs::rename(&temporary, &self.path).map_err(io(&temporary))?;
        if old.exists() {
            fs::remove_dir_all(&old).map_err(io(&old))?;
        }
        Ok(())
    }

    /// The saved tokenizer.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let file = self.path.join(TOKENIZER);
        Tokenizer::from_file(&file).map_err(|error| Error::invalid(file.display().to_string(), error.to_string()))
    }

    /// Puts the saved state into `learner`.
    pub fn load(&self, learner: &mut Learner) -> Result<Progress> {
        let file = self.path.join("state.json");
        let text = fs::read_to_string(&file).map_err(|source| Error::io(&file, source))?;
        let header: Header = serde_json::from_str(&text).map_err(|error| Error::invalid(file.display().to_string(), error.to_string()))?;
        if header.recipe != self.recipe {
            let message = format!(
                "{} was made by another recipe, or from another text: restore it, or remove the folder to begin anew",
                self.path.display()
            );
            return Err(Error::FailedPrecondition(message));
        }
        let file = self.path.join("tensors.safetensors");
        let tensors: BTreeMap<String, Tensor> = candle_core::safetensors::load(&file, &Device::Cpu)?.into_iter().collect();
        learner.reinstate(Captured { memory: header.memory, updates: header.updates, tensors })?;
        Ok(header.progress)
    }
}
