//! The command line. Each command is a file: its arguments, and `run`.

pub mod bench;
pub mod cache;
mod client;
pub mod compare;
pub mod compute;
pub mod fidelity;
pub mod forward;
pub mod generate;
#[cfg(feature = "gpu")]
pub mod gpu_check;
pub mod healthcheck;
pub mod inspect;
pub mod otlp;
pub mod series;
pub mod serve;
pub mod train;
pub mod tune;
pub mod tuning;

use std::io::IsTerminal as _;

use clap::{Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;

use crate::error::{Error, ErrorKind, Result};

/// gRPC inference server for Mixture-of-Experts models that were trained soft and are served hard.
#[derive(Debug, Parser)]
#[command(name = "hardmax", version, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    /// How log lines look. They go to standard error.
    #[arg(long, global = true, env = "HARDMAX_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Which log lines are written: `error`, `warn`, `info`, `debug`, `trace`, or a filter such as
    /// `info,hardmax::engine=debug`.
    #[arg(long, global = true, env = "HARDMAX_LOG_LEVEL", value_name = "FILTER", default_value = "info")]
    pub log_level: String,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands. Help shows the documentation of their arguments.
#[allow(missing_docs, reason = "a comment on a variant would replace the help of its arguments")]
#[derive(Debug, Subcommand)]
pub enum Command {
    Serve(Box<serve::ServeArgs>),
    Generate(generate::GenerateArgs),
    Healthcheck(healthcheck::HealthcheckArgs),
    Train(train::TrainArgs),
    Inspect(inspect::InspectArgs),
    Forward(forward::ForwardArgs),
    Bench(Box<bench::BenchArgs>),
    Compare(compare::CompareArgs),
    Fidelity(fidelity::FidelityArgs),
    Tune(Box<tune::TuneArgs>),
    #[cfg(feature = "gpu")]
    GpuCheck(gpu_check::GpuCheckArgs),
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

impl Cli {
    /// Sets up logging and runs the command.
    pub fn run(self) -> Result<()> {
        init_logging(self.log_format, &self.log_level)?;
        match self.command {
            Command::Serve(args) => serve::run(*args),
            Command::Generate(args) => generate::run(args),
            Command::Healthcheck(args) => healthcheck::run(args),
            Command::Inspect(args) => inspect::run(args),
            Command::Forward(args) => forward::run(args),
            Command::Train(args) => train::run(args),
            Command::Bench(args) => bench::run(*args),
            Command::Compare(args) => compare::run(args),
            Command::Fidelity(args) => fidelity::run(args),
            Command::Tune(args) => tune::run(*args),
            #[cfg(feature = "gpu")]
            Command::GpuCheck(args) => gpu_check::run(args),
        }
    }
}

/// The exit status for an error: 2 if the command line was wrong, else 1.
pub fn exit_code(error: &Error) -> u8 {
    if error.kind() == ErrorKind::InvalidArgument { 2 } else { 1 }
}

fn init_logging(format: LogFormat, level: &str) -> Result<()> {
    let filter = EnvFilter::try_new(level).map_err(|error| Error::invalid("--log-level", format!("'{level}': {error}")))?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr);
    let result = match format {
        LogFormat::Text => lines.with_target(false).try_init(),
        LogFormat::Json => lines.json().try_init(),
    };
    result.map_err(|error| Error::Internal(format!("logging is set up twice: {error}")))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_entry_point_of_the_container_knows_which_commands_have_a_device() {
        let cli = Cli::command();
        let with_device = cli.get_subcommands().filter(|command| command.get_arguments().any(|argument| argument.get_id() == "device"));
        let mut names: Vec<&str> = with_device.map(|command| command.get_name()).collect();
        names.sort_unstable();
        let pattern = format!("\n{}) ;;\n", names.join(" | "));
        assert!(include_str!("../../docker/entrypoint.sh").contains(&pattern), "docker/entrypoint.sh has no line {pattern:?}");
    }

    #[test]
    fn every_flag_is_explained_and_every_serve_flag_has_a_variable() {
        let cli = Cli::command();
        for command in cli.get_subcommands() {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {}", command.get_name(), argument.get_id());
                if command.get_name() == "serve" {
                    let variable = argument.get_env().and_then(|name| name.to_str()).unwrap_or_default();
                    // Hidden are the variables that others have named.
                    let named = variable.starts_with(if argument.is_hide_set() { "OTEL_" } else { "HARDMAX_" });
                    assert!(named, "--{} has no variable", argument.get_id());
                }
            }
        }
    }
}
