//! Training from text: `hardmax train`.
//!
//! The forward is that of serving, on tracked weights, under a soft policy; `evaluate` serves the same weights hard.

pub mod config;
pub mod data;
pub mod evaluate;
pub mod export;
pub mod log;
pub mod optimizer;
pub mod plot;
pub mod state;
pub mod tokenizer;
pub mod trainable;
pub mod trainer;

#[cfg(test)]
mod tests;
