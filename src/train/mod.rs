//! Training from text: `hardmax train`.
//!
//! The forward is that of serving, on tracked weights, under an estimator of the catalogue; `evaluate` serves the same
//! weights hard. A recipe ([`config`]) says what to train; [`learner`] does one step, [`trainer`] the run around it.

pub mod config;
pub mod data;
mod distill;
pub mod evaluate;
pub mod export;
pub mod finding;
pub mod gradients;
pub mod learner;
pub mod log;
mod objective;
pub mod optimizer;
pub mod plot;
mod recompute;
pub mod routing;
pub mod state;
pub mod tokenizer;
pub mod trainable;
pub mod trainer;
mod upkeep;

#[cfg(test)]
mod tests;
