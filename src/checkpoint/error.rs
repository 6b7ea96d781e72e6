//! What can be wrong with a checkpoint folder. Every message names the file, tensor or field, what was found there,
//! what was expected, and where it is not obvious, what to do.

use std::{fmt, io, path::PathBuf};

/// Why a checkpoint cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A file or folder that a checkpoint needs is not there.
    #[error("{path}: {message}", path = path.display())]
    Missing {
        /// The file or folder.
        path: PathBuf,
        /// What is missing and how to come by it.
        message: String,
    },
    /// The operating system refused.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Its answer.
        source: io::Error,
    },
    /// A file is not what its name says: broken JSON, a broken safetensors header.
    #[error("{path}: {message}", path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        message: String,
    },
    /// A field of a JSON file has a value that can never be right.
    #[error("{path}: {field} is {found}, expected {expected}", path = path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// JSON path of the field, for example `routing.serve.k`.
        field: String,
        /// The value found, as JSON.
        found: String,
        /// What would be right.
        expected: String,
    },
    /// A field is well formed and asks for something that hardmax does not do.
    #[error("{path}: {field} is {found}, which is not supported: {supported}", path = path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// JSON path of the field.
        field: String,
        /// The value found, as JSON.
        found: String,
        /// What is supported instead.
        supported: String,
    },
    /// A safetensors file ends before the data that its header announces.
    #[error("{path}: truncated: the header announces a file of {expected} bytes, found {found}; download or copy it again", path = path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that the header announces, itself included.
        expected: u64,
        /// Bytes in the file.
        found: u64,
    },
    /// A weights file that lies outside the checkpoint folder, by its name or through a symbolic link.
    #[error("{path}: '{name}' leads outside the checkpoint folder; weights must be plain files inside it", path = path.display())]
    Outside {
        /// The index file, or the folder where the name was found by itself.
        path: PathBuf,
        /// The offending file name.
        name: String,
    },
    /// The same tensor in two shards.
    #[error("tensor '{tensor}' is in both {first} and {second}; expected once", first = first.display(), second = second.display())]
    DuplicateTensor {
        /// Its name.
        tensor: String,
        /// One shard.
        first: PathBuf,
        /// The other shard.
        second: PathBuf,
    },
    /// Index and shards disagree about where a tensor is.
    #[error("{path}: tensor '{tensor}' {message}", path = path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What the index says and what the shards say.
        message: String,
    },
    /// Tensors that config.json calls for are not there.
    #[error("{dir}: the safetensors files lack {names}, expected by config.json", dir = dir.display())]
    MissingTensors {
        /// The checkpoint folder.
        dir: PathBuf,
        /// Which.
        names: TensorNames,
    },
    /// Tensors that config.json has no place for.
    #[error("{dir}: the safetensors files hold {names}, not expected by config.json", dir = dir.display())]
    ExtraTensors {
        /// The checkpoint folder.
        dir: PathBuf,
        /// Which.
        names: TensorNames,
    },
    /// A tensor has another shape than config.json calls for.
    #[error("{path}: tensor '{tensor}' has shape {found:?}, expected {expected:?} from config.json", path = path.display())]
    Shape {
        /// The shard.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that the configuration gives.
        expected: Vec<usize>,
    },
    /// A tensor is not in a floating-point format that can be loaded.
    #[error("{path}: tensor '{tensor}' has dtype {found}, expected one of F32, BF16, F16", path = path.display())]
    Dtype {
        /// The shard.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype, in the words of safetensors.
        found: String,
    },
    /// A tensor holds NaN or infinity where it must not.
    #[error("{path}: tensor '{tensor}' has a value that is not finite at element {index}: {message}", path = path.display())]
    NonFinite {
        /// The shard, or the folder being written.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Flat index of the first such value.
        index: usize,
        /// Why that matters.
        message: String,
    },
    /// config.json says that the head is the embedding, and the files hold another head.
    #[error(
        "{path}: tie_word_embeddings is true, but '{tensor}' differs from the embedding; set tie_word_embeddings to false to use it, or remove it",
        path = path.display()
    )]
    UntiedHead {
        /// The shard.
        path: PathBuf,
        /// The head.
        tensor: String,
    },
    /// A file is not the one that was there when the checkpoint was opened.
    #[error("{path}: changed while loading; wait until whatever writes the checkpoint has finished, then try again", path = path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// tokenizer.json has ids for which there is no row in the embedding.
    #[error(
        "{path}: the tokenizer is larger than the embedding: token '{token}' has id {id}, expected ids below vocab_size {vocab_size}",
        path = path.display()
    )]
    TokenizerTooLarge {
        /// tokenizer.json.
        path: PathBuf,
        /// The token with the largest id.
        token: String,
        /// That id.
        id: u32,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// The model cannot be written in the Mixtral layout.
    #[error("cannot save: {field} is {found}, the Mixtral layout needs {expected}")]
    NotSavable {
        /// What of the model.
        field: String,
        /// What it is.
        found: String,
        /// What it would have to be.
        expected: String,
    },
    /// A dtype was asked for in which weights cannot be held or written.
    #[error("dtype {0:?} is not one of F32, BF16, F16")]
    UnsupportedDtype(candle_core::DType),
    /// The device cannot hold the weights, or a bug.
    #[error("tensor operation failed on {tensor}: {source}")]
    Tensor {
        /// The weight in question.
        tensor: String,
        /// candle's answer.
        source: candle_core::Error,
    },
}

impl CheckpointError {
    pub(super) fn io(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    pub(super) fn malformed(path: impl Into<PathBuf>, message: impl fmt::Display) -> Self {
        Self::Malformed { path: path.into(), message: message.to_string() }
    }
}

/// Names of tensors, shown up to a limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorNames(pub Vec<String>);

impl TensorNames {
    /// Names that a message shows.
    pub const SHOWN: usize = 8;
}

impl fmt::Display for TensorNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, plural) = (self.0.len(), if self.0.len() == 1 { "" } else { "s" });
        let shown = self.0.iter().take(Self::SHOWN).map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ");
        match count.saturating_sub(Self::SHOWN) {
            0 => write!(f, "{count} tensor{plural} ({shown})"),
            more => write!(f, "{count} tensor{plural} ({shown} and {more} more)"),
        }
    }
}
