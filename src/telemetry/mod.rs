//! What operators see of a running server.

mod expert_load;
mod exposition;
pub mod http;
pub mod metrics;
pub mod page;
