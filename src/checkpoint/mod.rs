//! Checkpoint folders in Hugging Face layout.

mod error;

pub use error::CheckpointError;
