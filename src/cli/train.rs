//! `hardmax train`: from text to a checkpoint.

use std::path::PathBuf;

use candle_core::DType;

use crate::{
    error::{Error, Result},
    model::load::{DeviceKind, WeightType},
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
    /// Where it is trained. `cuda` needs a build with `--features cuda`; weights, gradients and moments are f32 there too.
    #[arg(long, env = "HARDMAX_DEVICE", value_enum, default_value_t)]
    pub device: DeviceKind,
    /// Element type of what goes into products on a GPU: `auto` is bf16. On the CPU it is f32.
    #[arg(long, value_enum, default_value = "auto")]
    pub dtype: WeightType,
}

/// Trains, evaluates and saves.
pub fn run(args: TrainArgs) -> Result<()> {
    let products = products(args.device, args.dtype)?;
    let config = TrainConfig::read(&args.config)?;
    let trainer = Trainer::on(&args.device.open()?, products, config.clone(), args.resume)?;
    tracing::info!("{}", trainer.summary());
    let trained = trainer.run()?;
    export::export(&config, &trained)?;
    tracing::info!("saved {}", config.output.display());
    Ok(())
}

fn products(device: DeviceKind, dtype: WeightType) -> Result<DType> {
    match (device, dtype) {
        (DeviceKind::Cpu, WeightType::Auto | WeightType::F32) | (DeviceKind::Cuda, WeightType::F32) => Ok(DType::F32),
        (DeviceKind::Cuda, WeightType::Auto | WeightType::Bf16) => Ok(DType::BF16),
        (DeviceKind::Cpu, WeightType::Bf16) => {
            Err(Error::invalid("--dtype", "bf16 is for --device cuda: training on the CPU computes in f32, which --dtype auto is"))
        }
        (_, WeightType::Q8 | WeightType::Fp8) => {
            Err(Error::invalid("--dtype", "8-bit weights do not learn: use f32, or with --device cuda bf16"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_what_the_device_has() {
        let of = |device, dtype| products(device, dtype).ok();
        assert_eq!(of(DeviceKind::Cpu, WeightType::Auto), Some(DType::F32));
        assert_eq!(of(DeviceKind::Cuda, WeightType::Auto), Some(DType::BF16));
        assert_eq!(of(DeviceKind::Cuda, WeightType::F32), Some(DType::F32));
        assert_eq!(of(DeviceKind::Cpu, WeightType::Bf16), None);
        assert!(
            [DeviceKind::Cpu, DeviceKind::Cuda]
                .into_iter()
                .all(|device| of(device, WeightType::Q8).is_none() && of(device, WeightType::Fp8).is_none())
        );
    }
}
