//! Measures against their definitions, the identity, and studies of small checkpoints.

mod decisions;
mod measures;
mod models;
