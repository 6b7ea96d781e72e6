//! Checkpoint folders in Hugging Face layout: config.json, one or many safetensors files, tokenizer.json,
//! generation_config.json.
//!
//! A family is data: a row of [`family`] and names of tensors ([`names`]). [`Checkpoint::open`] reads JSON and
//! safetensors headers, [`Checkpoint::load`] the weights, [`save()`] writes a folder that transformers loads as Mixtral.
//! The one addition to the format is the `routing` object of config.json, [`RoutingBlock`]. A [`Delta`] holds other values for some
//! tensors of a checkpoint, and [`export()`] writes the checkpoint that has them.
//!
//! **A folder that changes meanwhile.** Files are read with positioned reads and never mapped into memory, so a file that
//! somebody truncates is an error and not a SIGBUS. Length, modification time and inode of every file that
//! [`Checkpoint::open`] read are noted, and compared before and after the weights are read; a difference is
//! [`CheckpointError::Changed`]. Two writes of equal length within the resolution of the file system's clock go
//! unnoticed. After the load no file is open: the folder may be replaced under a running server, which does not care.
//!
//! **Trust.** There is no pickle code here. File names in an index must be plain names, links must not leave the folder,
//! sizes are checked against the files before memory is allocated, and nothing in a file can cause a panic.

mod config;
mod delta;
mod digest;
mod error;
mod export;
mod family;
mod fields;
mod generation;
mod load;
mod names;
mod rope;
mod routing_block;
mod save;
mod shards;
mod swap;
#[cfg(test)]
mod tests;

use std::{
    io,
    path::{Path, PathBuf},
};

use serde_json::Value;
use tokenizers::Tokenizer;

use self::{
    config::Config,
    fields::{Fields, read_json, read_optional_json},
    load::Plan,
    shards::{Fingerprint, Shards},
};
pub use self::{
    delta::Delta,
    error::{CheckpointError, TensorNames},
    export::export,
    generation::GenerationDefaults,
    load::LoadOptions,
    routing_block::{
        FidelityRecord, LayerRecord, LossRecord, NoiseRecord, ReferenceMode, ReferenceRecord, RoutingBlock, ServeRecord, TemperatureRecord,
        TrainRecord,
    },
    save::{SaveRequest, save},
    swap::check_target,
};
use crate::model::{
    ModelSpec,
    weights::{LayerWeights, ModelWeights, OuterWeights},
};

type Result<T> = std::result::Result<T, CheckpointError>;

const CONFIG: &str = "config.json";
const GENERATION_CONFIG: &str = "generation_config.json";
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// Key of the routing block in config.json and in the metadata of safetensors files.
const ROUTING: &str = "routing";

/// An opened folder: everything but the weights themselves.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Config,
    generation: GenerationDefaults,
    shards: Shards,
    /// JSON files as they were when they were read.
    fingerprints: Vec<(PathBuf, Fingerprint)>,
}

/// A tensor on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// In the words of safetensors: `F32`, `BF16`, ...
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// File inside the folder.
    pub file: String,
    /// Size of its data.
    pub bytes: u64,
}

impl Checkpoint {
    /// Reads config.json, generation_config.json (if there) and the headers of the weight files.
    ///
    /// Fails where a file is missing or malformed, where config.json asks for something that is not supported, or where
    /// the files do not add up to one model. Tensors are checked against config.json by [`Self::verify`] and [`Self::load`].
    pub fn open(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            let message = if dir.exists() { "not a folder; a checkpoint is a folder with config.json" } else { "no such folder" };
            return Err(CheckpointError::Missing { path: dir.into(), message: message.into() });
        }
        let (config_path, generation_path) = (dir.join(CONFIG), dir.join(GENERATION_CONFIG));
        let mut fingerprints = Vec::new();
        let mut note = |path: &Path| -> Result<()> {
            fingerprints.push((path.to_path_buf(), Fingerprint::of(path)?));
            Ok(())
        };
        let missing = |error| match error {
            CheckpointError::Io { path, source } if source.kind() == io::ErrorKind::NotFound => {
                CheckpointError::Missing { path, message: "no such file; a checkpoint in Hugging Face layout has one".into() }
            }
            other => other,
        };
        note(&config_path).map_err(missing)?;
        let config = Config::parse(&config_path, &read_json(&config_path)?)?;
        let generation = read_optional_json(&generation_path)?;
        if generation.is_some() {
            note(&generation_path)?;
        }
        let generation = GenerationDefaults::read(&generation_path, generation.as_ref(), config.tokens.clone(), config.spec.vocab_size)?;
        let shards = Shards::open(dir)?;
        if let Some(index) = &shards.index {
            note(index)?;
        }
        let checkpoint = Self { dir: dir.into(), config, generation, shards, fingerprints };
        checkpoint.compare_routing();
        Ok(checkpoint)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The model that config.json describes, with the serving routing of the routing block.
    pub fn spec(&self) -> &ModelSpec {
        &self.config.spec
    }

    /// Defaults for generation.
    pub fn generation(&self) -> &GenerationDefaults {
        &self.generation
    }

    /// The routing block, where config.json has one.
    pub fn routing(&self) -> Option<&RoutingBlock> {
        self.config.routing.as_ref()
    }

    /// All tensors on disk, by name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo> {
        self.shards.tensors.iter().map(|(name, location)| TensorInfo {
            name: name.clone(),
            dtype: location.dtype.to_string(),
            shape: location.shape.clone(),
            file: self.shards.file_name(location),
            bytes: location.bytes,
        })
    }

    /// The tokenizer. Fails where tokenizer.json is missing or malformed, or has ids without a row in the embedding.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let path = self.dir.join(TOKENIZER);
        let bytes = std::fs::read(&path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => CheckpointError::Missing {
                path: path.clone(),
                message: "no such file; other tokenizer formats are not read: save the tokenizer with a fast class of transformers".into(),
            },
            _ => CheckpointError::io(&path, e),
        })?;
        let tokenizer = Tokenizer::from_bytes(&bytes).map_err(|e| CheckpointError::malformed(&path, format!("not a tokenizer: {e}")))?;
        check_tokenizer(&path, &tokenizer, self.spec().vocab_size)?;
        Ok(tokenizer)
    }

    /// Checks that the tensors on disk are exactly those that config.json calls for, by name, shape and dtype.
    pub fn verify(&self) -> Result<()> {
        self.plan().map(drop)
    }

    /// Reads the weights.
    ///
    /// Fails as [`Self::verify`] does, where a router weight is not finite, where a file is not the one that was
    /// opened, or where the device cannot hold the weights.
    pub fn load(&self, options: &LoadOptions) -> Result<ModelWeights> {
        let plan = self.plan()?;
        self.check_unchanged()?;
        let weights = plan.load(options)?;
        self.check_unchanged()?;
        Ok(weights)
    }

    /// Has `make` read the weights: it is given what is in no layer, and the layers in order, each read when it is asked for. For who makes something
    /// else of a layer before there is memory for the next.
    ///
    /// Fails as [`Self::load`] does, and as `make` does.
    pub fn load_by_layer<T>(
        &self,
        options: &LoadOptions,
        make: impl FnOnce(OuterWeights, &mut dyn Iterator<Item = crate::Result<LayerWeights>>) -> crate::Result<T>,
    ) -> crate::Result<T> {
        let plan = self.plan()?;
        self.check_unchanged()?;
        let made = plan.load_by_layer(options, |outer, layers| make(outer, &mut layers.map(|layer| Ok(layer?))))?;
        self.check_unchanged()?;
        Ok(made)
    }

    fn plan(&self) -> Result<Plan<'_>> {
        Plan::new(&self.dir, self.spec(), &self.config.family.names, &self.shards)
    }

    fn check_unchanged(&self) -> Result<()> {
        let shards = self.shards.shards.iter().map(|shard| (&shard.path, &shard.fingerprint));
        let files = self.fingerprints.iter().map(|(path, fingerprint)| (path, fingerprint)).chain(shards);
        files.into_iter().try_for_each(|(path, fingerprint)| fingerprint.check(path))
    }

    /// Weights that carry a routing block of their own should carry that of config.json, which is the one that counts.
    fn compare_routing(&self) {
        for shard in &self.shards.shards {
            let Some(text) = shard.metadata.get(ROUTING) else { continue };
            let value: Value = serde_json::from_str(text).unwrap_or_default();
            let block = Fields::new(&shard.path, &value).and_then(|block| RoutingBlock::read(&block));
            if block.ok().as_ref() != self.routing() {
                tracing::warn!(file = %shard.path.display(), "the routing block in the weights is not that of config.json, which is used");
            }
        }
    }
}

/// Fails where a token has no row in the embedding.
fn check_tokenizer(path: &Path, tokenizer: &Tokenizer, vocab_size: usize) -> Result<()> {
    let largest = tokenizer.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
    match largest {
        Some((token, id)) if id as usize >= vocab_size => {
            Err(CheckpointError::TokenizerTooLarge { path: path.into(), token, id, vocab_size })
        }
        _ => Ok(()),
    }
}
