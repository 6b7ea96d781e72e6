//! From a checkpoint folder to a model that can run.

use std::{fmt, path::Path, str::FromStr, sync::Arc};

use candle_core::{DType, Device};

use super::Decoder;
use crate::{
    checkpoint::{Checkpoint, LoadOptions},
    error::{Error, Result},
    moe::kernel,
};

/// Where a model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceKind {
    /// The processor.
    #[default]
    Cpu,
    /// The first NVIDIA GPU; needs a binary built with `--features cuda`.
    Cuda,
}

/// Element type of the large weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum WeightType {
    /// f32 on the CPU, bf16 on CUDA.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16. On the CPU half the memory; activations stay f32.
    Bf16,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        })
    }
}

impl FromStr for DeviceKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            other => Err(Error::invalid("device", format!("'{other}' is neither cpu nor cuda"))),
        }
    }
}

impl DeviceKind {
    /// Opens the device. Call it on the thread that will run the model.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            #[cfg(feature = "cuda")]
            Self::Cuda => Ok(Device::new_cuda_with_stream(0)?),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda => {
                let message = "this binary was built without CUDA: build it with --features cuda, or use --device cpu";
                Err(Error::FailedPrecondition(message.into()))
            }
        }
    }
}

impl WeightType {
    /// The dtype on `device`.
    pub fn dtype(self, device: &Device) -> DType {
        match self {
            Self::Auto if device.is_cpu() => DType::F32,
            Self::Auto | Self::Bf16 => DType::BF16,
            Self::F32 => DType::F32,
        }
    }
}

/// A folder, opened and loaded.
#[derive(Debug)]
pub struct Loaded {
    /// Spec, tokenizer, defaults.
    pub checkpoint: Checkpoint,
    /// Weights in their places.
    pub decoder: Decoder,
    /// Of the large weights.
    pub dtype: DType,
}

/// Loads the folder `dir`. `progress` shows a bar if stderr is a terminal.
pub fn load(dir: &Path, device: DeviceKind, weights: WeightType, progress: bool) -> Result<Loaded> {
    let checkpoint = Checkpoint::open(dir)?;
    let device = device.open()?;
    let dtype = weights.dtype(&device);
    let kernel = kernel::for_device(&device);
    let loaded = checkpoint.load(&LoadOptions { dtype, device, progress })?;
    let decoder = Decoder::new(Arc::new(checkpoint.spec().clone()), loaded, &kernel)?;
    Ok(Loaded { checkpoint, decoder, dtype })
}
