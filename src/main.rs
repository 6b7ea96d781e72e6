//! The command line of hardmax.
use clap::Parser;

#[derive(clap::Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Inspect(hardmax::cli::inspect::InspectArgs),
    Forward(hardmax::cli::forward::ForwardArgs),
    Train(hardmax::cli::train::TrainArgs),
}

fn main() -> hardmax::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    match Cli::parse().command {
        Command::Inspect(args) => hardmax::cli::inspect::run(args),
        Command::Forward(args) => hardmax::cli::forward::run(args),
        Command::Train(args) => hardmax::cli::train::run(args),
    }
}
