//! From a checkpoint folder to a model that can run.

use std::{fmt, path::Path, str::FromStr, sync::Arc};

use candle_core::{DType, Device};

use super::{
    CacheShape, CachedDecoder, Decoder, LanguageModel, ModelSpec, Observable,
    host::{HostDecoder, HostOptions, HostWeights},
    weights::ModelWeights,
};
use crate::{
    checkpoint::{Checkpoint, LoadOptions},
    error::{Error, Result},
    moe::kernel,
    ops::cpu::Reduction,
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
    /// bfloat16. On the CPU half the memory of f32.
    Bf16,
    /// Blocks of 32 8-bit integers with a scale, made at load: 8.5 bits per weight. CPU only.
    Q8,
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
    /// The dtype that is loaded on `device`. 8-bit blocks are made of bf16.
    pub fn dtype(self, device: &Device) -> DType {
        match self {
            Self::Auto if device.is_cpu() => DType::F32,
            Self::Auto | Self::Bf16 | Self::Q8 => DType::BF16,
            Self::F32 => DType::F32,
        }
    }
}

/// A folder, opened and loaded as tensors: for training, and for comparisons.
#[derive(Debug)]
pub struct Loaded {
    /// Spec, tokenizer, defaults.
    pub checkpoint: Checkpoint,
    /// Weights in their places.
    pub decoder: Decoder,
    /// Of the large weights.
    pub dtype: DType,
}

/// Loads the folder `dir` as tensors. `progress` shows a bar if stderr is a terminal. Tensors have no 8-bit blocks: with those it fails.
pub fn load(dir: &Path, device: DeviceKind, weights: WeightType, progress: bool) -> Result<Loaded> {
    if weights == WeightType::Q8 {
        return Err(Error::FailedPrecondition("8-bit weights are for serving on the CPU".into()));
    }
    let checkpoint = Checkpoint::open(dir)?;
    let device = device.open()?;
    let dtype = weights.dtype(&device);
    let kernel = kernel::for_device(&device);
    let loaded = checkpoint.load(&LoadOptions { dtype, device, progress })?;
    let decoder = Decoder::new(Arc::new(checkpoint.spec().clone()), loaded, &kernel)?;
    Ok(Loaded { checkpoint, decoder, dtype })
}

/// How a model is to be served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServingOptions {
    /// Where it runs.
    pub device: DeviceKind,
    /// Element type of the large weights.
    pub weights: WeightType,
    /// Order of sums on the CPU.
    pub reduction: Reduction,
}

impl ServingOptions {
    fn check(&self, device: &Device) -> Result<()> {
        if !device.is_cpu() && self.weights == WeightType::Q8 {
            return Err(Error::FailedPrecondition("8-bit weights are for the CPU: use --device cpu, or --dtype bf16".into()));
        }
        if !device.is_cpu() && self.reduction == Reduction::BatchInvariant {
            return Err(Error::FailedPrecondition("--deterministic is for the CPU: use --device cpu".into()));
        }
        Ok(())
    }
}

/// Weights that are ready to serve. Cheap to clone: they are shared.
#[derive(Clone, Debug)]
pub struct ServingModel {
    place: Place,
    /// For people, as `f32`.
    dtype: &'static str,
}

#[derive(Clone, Debug)]
enum Place {
    Host(Arc<HostWeights>),
    Device(Box<Decoder>),
}

/// Loads the folder `dir` to serve it. `progress` shows a bar if stderr is a terminal.
pub fn load_to_serve(dir: &Path, options: ServingOptions, progress: bool) -> Result<(Checkpoint, ServingModel)> {
    let checkpoint = Checkpoint::open(dir)?;
    let device = options.device.open()?;
    options.check(&device)?;
    let loaded = checkpoint.load(&LoadOptions { dtype: options.weights.dtype(&device), device, progress })?;
    let model = ServingModel::new(Arc::new(checkpoint.spec().clone()), loaded, options)?;
    Ok((checkpoint, model))
}

impl ServingModel {
    /// Puts `weights`, which are on the device of the options, in their places.
    pub fn new(spec: Arc<ModelSpec>, weights: ModelWeights, options: ServingOptions) -> Result<Self> {
        let device = weights.embedding.device().clone();
        options.check(&device)?;
        if device.is_cpu() {
            let host = HostOptions { quantize: options.weights == WeightType::Q8, reduction: options.reduction };
            let dtype = if host.quantize { "q8" } else { weights.embedding.dtype().as_str() };
            return Ok(Self { place: Place::Host(Arc::new(HostWeights::new(spec, weights, host)?)), dtype });
        }
        let dtype = weights.embedding.dtype().as_str();
        let decoder = Decoder::new(spec, weights, &kernel::for_device(&device))?;
        Ok(Self { place: Place::Device(Box::new(decoder)), dtype })
    }

    /// What the model is.
    pub fn spec(&self) -> &Arc<ModelSpec> {
        match &self.place {
            Place::Host(weights) => weights.spec(),
            Place::Device(decoder) => decoder.spec(),
        }
    }

    /// Element type of the large weights, for people.
    pub fn dtype(&self) -> &'static str {
        self.dtype
    }

    /// Element type of cached keys and values.
    pub fn cache_dtype(&self) -> DType {
        match &self.place {
            Place::Host(_) => DType::F32,
            Place::Device(decoder) => decoder.activations(),
        }
    }

    /// A model over these weights with an empty cache. Fails as [`KvCache::new`](super::kv_cache::KvCache::new) does.
    pub fn start(&self, cache: CacheShape) -> Result<Box<dyn LanguageModel>> {
        Ok(self.start_observable(cache)?)
    }

    /// [`ServingModel::start`] for one who wants to look inside.
    pub fn start_observable(&self, cache: CacheShape) -> Result<Box<dyn Observable>> {
        Ok(match &self.place {
            Place::Host(weights) => Box::new(HostDecoder::new(Arc::clone(weights), cache)?),
            Place::Device(decoder) => Box::new(CachedDecoder::new(Decoder::clone(decoder), cache)?),
        })
    }
}
