//! What can be wrong with a checkpoint folder.

/// Placeholder of the skeleton.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {}
