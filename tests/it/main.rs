//! Integration tests: one binary, so that it links once. Servers listen on port 0, clients are real, nothing sleeps.

#![allow(unreachable_pub)]

mod cli;
mod fuzz;
mod process;
mod server;
mod service;
mod support;
