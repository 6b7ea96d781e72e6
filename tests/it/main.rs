//! Integration tests: one binary, so that it links once. Servers listen on port 0, clients are real, nothing sleeps.

#![allow(unreachable_pub, reason = "modules of one test binary share helpers, and nothing links against it")]

mod bench;
mod checkpoint;
mod cli;
mod compare;
mod demo;
mod fidelity;
mod fuzz;
mod generations;
mod metrics;
mod otlp;
mod page;
mod parity;
mod policy;
mod process;
mod routing;
mod server;
mod service;
mod support;
mod tune;
mod tuning;
