//! What operators see of a running server.

pub mod catalog;
mod config;
mod expert_load;
mod exposition;
pub mod fidelity;
pub mod http;
mod info;
mod labels;
pub mod metrics;
pub mod otel;
pub mod page;
mod recent;
mod register;
#[cfg(test)]
mod tests;
pub mod tuning;
