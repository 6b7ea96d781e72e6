//! Serves Mixture-of-Experts language models that were **trained soft** and are **served hard**.
#![doc = ""]

pub mod checkpoint;
pub mod engine;
pub mod error;
pub mod model;
pub mod moe;
pub mod telemetry;
