//! The `hardmax` program: reads the command line and runs the command.

use std::process::ExitCode;

use clap::Parser as _;
use hardmax::cli::{Cli, exit_code};

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(exit_code(&error))
        }
    }
}
