//! Text to windows of the context length.

use std::{collections::HashMap, fs, path::PathBuf};

use serde::Serialize;
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

use crate::error::{Error, Result};

/// Tokens in windows: each is read alone, from position 0.
#[derive(Clone, Debug)]
pub struct Corpus {
    tokens: Vec<u32>,
    /// Ends of documents in `tokens`, ascending.
    ends: Vec<usize>,
    window: usize,
    hash: Sha256,
    files: Vec<String>,
}

/// What the measures rest on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CorpusFacts {
    /// As they were given.
    pub files: Vec<String>,
    /// Of their bytes, one after the other.
    pub sha256: String,
    /// Tokens that were measured.
    pub tokens: usize,
    /// Windows that they are in.
    pub windows: usize,
    /// Tokens of the longest.
    pub window: usize,
}

impl Corpus {
    /// Nothing yet, to be cut into windows of at most so many tokens.
    pub fn new(window: usize) -> Self {
        Self { tokens: Vec::new(), ends: Vec::new(), window: window.max(2), hash: Sha256::new(), files: Vec::new() }
    }

    /// Adds UTF-8 text files, a document each.
    pub fn add_text(&mut self, files: &[PathBuf], tokenizer: &Tokenizer) -> Result<()> {
        for file in files {
            let text = fs::read_to_string(file).map_err(|source| Error::io(file, source))?;
            self.hash.update(text.as_bytes());
            let encoding =
                tokenizer.encode(text, true).map_err(|error| Error::invalid("--text", format!("{}: {error}", file.display())))?;
            self.add(encoding.get_ids());
            self.files.push(file.display().to_string());
        }
        Ok(())
    }

    /// Adds files of token ids, a document each: numbers with spaces, commas or brackets between them.
    pub fn add_token_ids(&mut self, files: &[PathBuf]) -> Result<()> {
        for file in files {
            let text = fs::read_to_string(file).map_err(|source| Error::io(file, source))?;
            self.hash.update(text.as_bytes());
            let numbers = text.split(|c: char| c.is_whitespace() || matches!(c, ',' | '[' | ']')).filter(|part| !part.is_empty());
            let id = |part: &str| {
                part.parse().map_err(|_| Error::invalid("--token-ids", format!("{}: '{part}' is no token id", file.display())))
            };
            let ids: Vec<u32> = numbers.map(id).collect::<Result<_>>()?;
            self.add(&ids);
            self.files.push(file.display().to_string());
        }
        Ok(())
    }

    fn add(&mut self, ids: &[u32]) {
        self.tokens.extend_from_slice(ids);
        self.ends.push(self.tokens.len());
    }

    /// The windows of the first `most` tokens, in order. A window of one token predicts nothing and is left out.
    pub fn windows(&self, most: usize) -> Vec<&[u32]> {
        let (mut windows, mut start, mut left) = (Vec::new(), 0, most);
        for &end in &self.ends {
            for window in self.tokens[start..end].chunks(self.window) {
                let window = &window[..window.len().min(left)];
                if window.len() > 1 {
                    left -= window.len();
                    windows.push(window);
                }
            }
            start = end;
        }
        windows
    }

    /// What `windows` are.
    pub fn facts(&self, windows: &[&[u32]]) -> CorpusFacts {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        CorpusFacts {
            files: self.files.clone(),
            sha256: hex(&self.hash.clone().finalize()),
            tokens: windows.iter().map(|window| window.len()).sum(),
            windows: windows.len(),
            window: windows.iter().map(|window| window.len()).max().unwrap_or(0),
        }
    }
}

/// How often each token is in the windows.
pub fn occurrences(windows: &[&[u32]]) -> HashMap<u32, u64> {
    let mut counts = HashMap::new();
    windows.iter().flat_map(|window| window.iter()).for_each(|&token| *counts.entry(token).or_default() += 1);
    counts
}

/// The most frequent tokens, descending, the lowest id of equals first.
pub fn most_frequent(occurrences: &HashMap<u32, u64>, most: usize) -> Vec<u32> {
    let mut tokens: Vec<(u32, u64)> = occurrences.iter().map(|(&token, &count)| (token, count)).collect();
    tokens.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
    tokens.into_iter().take(most).map(|(token, _)| token).collect()
}
