//! Tensors by their content, whatever files they lie in.

use safetensors::View;
use sha2::{Digest as _, Sha256};

use super::{Checkpoint, Result, load::CHUNK};
use crate::durable::hex;

/// SHA-256 over tensors, one after the other: name, element type, shape, bytes.
#[derive(Debug, Default)]
pub(super) struct TensorDigest(Sha256);

impl TensorDigest {
    /// The next tensor; its bytes follow.
    pub(super) fn begin(&mut self, name: &str, dtype: &str, shape: &[usize]) {
        // As JSON, so that no two sets of tensors read the same.
        self.0.update(serde_json::json!([name, dtype, shape]).to_string());
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// In hexadecimal.
    pub(super) fn finish(self) -> String {
        hex(&self.0.finalize())
    }

    /// Of tensors in memory.
    pub(super) fn of<'a>(tensors: impl IntoIterator<Item = (&'a String, &'a candle_core::Tensor)>) -> String {
        let mut digest = Self::default();
        for (name, tensor) in tensors {
            digest.begin(name, &View::dtype(&tensor).to_string(), tensor.dims());
            digest.bytes(&View::data(&tensor));
        }
        digest.finish()
    }
}

impl Checkpoint {
    /// SHA-256 of the weights: what a [`Delta`](super::Delta) is for. Reads all of them.
    pub fn digest(&self) -> Result<String> {
        self.check_unchanged()?;
        let (reader, mut digest, mut buffer) = (self.shards.reader()?, TensorDigest::default(), vec![0; CHUNK]);
        for (name, location) in &self.shards.tensors {
            digest.begin(name, &location.dtype.to_string(), &location.shape);
            let mut start = 0;
            while start < location.bytes {
                let piece = &mut buffer[..CHUNK.min(usize::try_from(location.bytes - start).unwrap_or(CHUNK))];
                reader.read(location, start, piece)?;
                digest.bytes(piece);
                start += piece.len() as u64;
            }
        }
        self.check_unchanged()?;
        Ok(digest.finish())
    }
}
