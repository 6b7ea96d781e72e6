//! Text files to one stream of tokens, and windows of it.

use std::{fs, path::PathBuf};

use rand::{Rng, SeedableRng, rngs::StdRng};
use tokenizers::Tokenizer;

use crate::error::{Error, Result};

/// The documents of some files: their text, split at `separator`; none that is empty.
pub fn read_documents(files: &[PathBuf], separator: &str) -> Result<Vec<String>> {
    let mut documents = Vec::new();
    for file in files {
        let text = fs::read_to_string(file).map_err(|source| Error::io(file, source))?;
        documents.extend(text.split(separator).map(|part| part.trim_matches('\n')).filter(|part| !part.is_empty()).map(str::to_owned));
    }
    Ok(documents)
}

/// Tokens of all documents, each followed by `end`, if there is one.
pub fn tokenize(documents: &[String], tokenizer: &Tokenizer, end: impl Into<Option<u32>>) -> Result<Vec<u32>> {
    let end = end.into();
    let inputs: Vec<&str> = documents.iter().map(String::as_str).collect();
    let encoded = tokenizer.encode_batch(inputs, false).map_err(|error| Error::Internal(format!("tokenising: {error}")))?;
    let mut tokens = Vec::new();
    for encoding in encoded {
        tokens.extend_from_slice(encoding.get_ids());
        tokens.extend(end);
    }
    Ok(tokens)
}

/// Inputs and targets of one step, `batch` windows of `length` tokens at random places.
///
/// A function of its arguments alone: a resumed run sees what an uninterrupted one would.
pub fn windows(tokens: &[u32], batch: usize, length: usize, seed: u64, step: usize) -> (Vec<u32>, Vec<u32>) {
    let mut rng = step_rng(seed, step, Stream::Data);
    let (mut inputs, mut targets) = (Vec::with_capacity(batch * length), Vec::with_capacity(batch * length));
    for _ in 0..batch {
        let start = rng.random_range(0..tokens.len() - length);
        inputs.extend_from_slice(&tokens[start..start + length]);
        targets.extend_from_slice(&tokens[start + 1..start + length + 1]);
    }
    (inputs, targets)
}

/// What a random number is for.
#[derive(Clone, Copy, Debug)]
pub enum Stream {
    /// Places of windows.
    Data = 1,
    /// Routing noise.
    Noise = 2,
    /// Initial weights.
    Init = 3,
}

/// The generator of one step and purpose.
pub fn step_rng(seed: u64, step: usize, stream: Stream) -> StdRng {
    // Distinct inputs give distinct seeds; StdRng mixes them well.
    StdRng::seed_from_u64(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ ((step as u64) << 3) ^ stream as u64)
}
