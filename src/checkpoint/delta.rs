//! What tuning changed: a few tensors for the weights of one checkpoint, in one small file.
//!
//! A safetensors file with the names of [`ModelWeights::named`](crate::model::weights::ModelWeights::named). Its metadata, under one
//! key so that equal deltas are equal files, says which weights it belongs to ([`Checkpoint::digest`]), how routers were trained, and
//! the SHA-256 of its tensors.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::Path,
};

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use serde_json::{Value, json};

use super::{Checkpoint, RoutingBlock, digest::TensorDigest, fields::Fields};
use crate::{
    durable,
    error::{Error, Result},
};

/// Key of the metadata.
const KEY: &str = "hardmax_delta";
/// Version of the format.
const VERSION: u64 = 1;

/// Other values for some tensors of a checkpoint.
#[derive(Clone, Debug)]
pub struct Delta {
    /// Digest of the weights that it belongs to.
    pub base: String,
    /// How routers were trained, in the place of the checkpoint's own block.
    pub routing: RoutingBlock,
    /// By canonical name; f32 or bf16.
    pub tensors: BTreeMap<String, Tensor>,
}

impl Delta {
    /// Writes the file `path`, whole or not at all.
    pub fn write(&self, path: &Path) -> Result<()> {
        let about = json!({
            "version": VERSION,
            "base": self.base,
            "sha256": TensorDigest::of(&self.tensors),
            "routing": serde_json::to_value(&self.routing).map_err(|error| Error::Internal(format!("the routing block: {error}")))?,
        });
        let metadata = HashMap::from([(KEY.to_owned(), about.to_string())]);
        let bytes = safetensors::serialize(self.tensors.iter(), Some(metadata))
            .map_err(|error| Error::Internal(format!("{}: {error}", path.display())))?;
        durable::write(path, &bytes)
    }

    /// Reads what [`Delta::write`] wrote.
    ///
    /// # Errors
    /// `FailedPrecondition` where the file is something else, or damaged.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(|error| Error::io(path, error))?;
        let bad = |message: String| Error::FailedPrecondition(format!("{}: {message}", path.display()));
        let no_delta = || bad("not a delta that `hardmax tune` wrote".into());
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|_| no_delta())?;
        let about = header.metadata().as_ref().and_then(|metadata| metadata.get(KEY)).ok_or_else(no_delta)?;
        let about: Value = serde_json::from_str(about).map_err(|_| no_delta())?;
        if about["version"] != VERSION {
            return Err(bad(format!("its version is {}, known is {VERSION}; another hardmax reads it", about["version"])));
        }
        let tensors: BTreeMap<String, Tensor> = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)
            .map_err(|error| bad(format!("it is damaged: {error}")))?
            .into_iter()
            .collect();
        if about["sha256"] != TensorDigest::of(&tensors) {
            return Err(bad("it is damaged: its tensors do not have the SHA-256 that it states; take another copy".into()));
        }
        check_values(&tensors).map_err(bad)?;
        let routing = RoutingBlock::read(&Fields::new(path, &about["routing"])?)?;
        let base = about["base"].as_str().ok_or_else(no_delta)?.to_owned();
        Ok(Self { base, routing, tensors })
    }
}

/// What no model can be served with, if any.
fn check_values(tensors: &BTreeMap<String, Tensor>) -> std::result::Result<(), String> {
    for (name, tensor) in tensors {
        if !matches!(tensor.dtype(), DType::F32 | DType::BF16) {
            return Err(format!("{name} is {:?}, expected F32 or BF16", tensor.dtype()));
        }
        let values =
            tensor.to_dtype(DType::F32).and_then(|wide| wide.flatten_all()?.to_vec1::<f32>()).map_err(|error| error.to_string())?;
        if values.iter().any(|value| !value.is_finite()) {
            return Err(format!("{name} has values that are no numbers"));
        }
    }
    Ok(())
}

impl Checkpoint {
    /// Checks that `delta` is for these weights. Reads all of them.
    ///
    /// # Errors
    /// `FailedPrecondition` where it is for others.
    pub fn check_delta(&self, delta: &Delta) -> Result<()> {
        let own = self.digest()?;
        if own == delta.base {
            return Ok(());
        }
        let message = format!(
            "the delta is for weights with the digest {}, {} has {own}: apply it to its own base",
            delta.base,
            self.dir().display()
        );
        Err(Error::FailedPrecondition(message))
    }
}
