//! `hardmax train`: from text to a checkpoint.

use std::path::PathBuf;

use crate::{
    error::Result,
    train::{config::TrainConfig, export, trainer::Trainer},
};

/// Train a model from text files under soft routing and save it for hard serving.
///
/// Writes the checkpoint to `output` of the recipe; log (`training-log.jsonl`), curves and the state that `--resume`
/// continues from go to `work`. One seed gives one result on one machine and number of threads.
#[derive(clap::Args, Debug)]
pub struct TrainArgs {
    /// The recipe, a TOML file; see models/demo/train.toml.
    #[arg(long)]
    pub config: PathBuf,
    /// Continue from the saved state of an interrupted run. A finished run is only evaluated and saved again.
    #[arg(long)]
    pub resume: bool,
}

/// Trains, evaluates and saves.
pub fn run(args: TrainArgs) -> Result<()> {
    let config = TrainConfig::read(&args.config)?;
    let trainer = Trainer::new(config.clone(), args.resume)?;
    tracing::info!("{}", trainer.summary());
    let trained = trainer.run()?;
    export::export(&config, &trained)?;
    tracing::info!("saved {}", config.output.display());
    Ok(())
}
