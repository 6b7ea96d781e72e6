//! Integration tests: one binary, so that it links once. Servers listen on port 0, clients are real, nothing sleeps.

#![allow(unreachable_pub)]

mod bench;
mod checkpoint;
mod cli;
mod demo;
mod fuzz;
mod parity;
mod policy;
mod process;
mod server;
mod service;
mod support;
