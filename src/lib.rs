//! Serves Mixture-of-Experts language models that were **trained soft** and are **served hard**.

pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod compare;
pub mod durable;
pub mod engine;
pub mod error;
pub mod fidelity;
pub mod jobs;
pub mod memory;
pub mod model;
pub mod moe;
pub mod ops;
pub mod plot;
pub mod schedule;
pub mod server;
pub mod service;
pub mod telemetry;
pub mod train;
pub mod tune;

pub use error::{Error, ErrorKind, Result};
