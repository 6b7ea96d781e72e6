//! From a checkpoint folder to a model that can run.

use std::{collections::BTreeMap, fmt, path::Path, str::FromStr, sync::Arc};

use candle_core::{DType, Device, Tensor};

use super::{
    CacheShape, CachedDecoder, Decoder, LanguageModel, ModelSpec, Observable, SharedWeights,
    host::{HostDecoder, HostOptions, HostWeights},
    weights::ModelWeights,
};
#[cfg(feature = "gpu")]
use super::{
    gpu::{Footprint, GpuDecoder, GpuWeights},
    weights::{Changes, LayerWeights, OuterWeights},
};
use crate::{
    checkpoint::{Checkpoint, Delta, LoadOptions},
    error::{Error, Result},
    moe::kernel,
    ops::{cpu::Reduction, runs_here},
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
    /// Routed experts in 8-bit floats (e4m3) with a scale for every 128 x 128 weights, made at load; the rest bfloat16. GPU only.
    Fp8,
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
    /// Opens the device.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            #[cfg(feature = "gpu")]
            Self::Cuda => super::gpu::open(),
            #[cfg(not(feature = "gpu"))]
            Self::Cuda => {
                let message = "this binary was built without CUDA: build it with --features cuda, or use --device cpu";
                Err(Error::FailedPrecondition(message.into()))
            }
        }
    }
}

impl WeightType {
    /// What they take of the memory of a GPU while they are loaded.
    #[cfg(feature = "gpu")]
    pub fn footprint(self) -> Footprint {
        if self == Self::Fp8 { Footprint::Quantized } else { Footprint::Whole(self.dtype(DeviceKind::Cuda)) }
    }

    /// The dtype that is loaded for `device`. 8-bit blocks are made of bf16.
    pub fn dtype(self, device: DeviceKind) -> DType {
        match self {
            Self::Auto if device == DeviceKind::Cpu => DType::F32,
            Self::Auto | Self::Bf16 | Self::Q8 | Self::Fp8 => DType::BF16,
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
    if matches!(weights, WeightType::Q8 | WeightType::Fp8) {
        return Err(Error::FailedPrecondition("8-bit weights are for serving: use --dtype f32 or bf16".into()));
    }
    let checkpoint = Checkpoint::open(dir)?;
    let dtype = weights.dtype(device);
    let device = device.open()?;
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
    /// Fails where the device does not have what is asked for.
    pub fn check(&self) -> Result<()> {
        let on_cpu = self.device == DeviceKind::Cpu;
        if !on_cpu && self.weights == WeightType::Q8 {
            return Err(Error::FailedPrecondition("8-bit weights are for the CPU: use --device cpu, or --dtype bf16".into()));
        }
        if on_cpu && self.weights == WeightType::Fp8 {
            return Err(Error::FailedPrecondition("8-bit floats are for GPUs: use --device cuda, or --dtype q8".into()));
        }
        if !on_cpu && self.reduction == Reduction::BatchInvariant {
            return Err(Error::FailedPrecondition("--deterministic is for the CPU: use --device cpu".into()));
        }
        Ok(())
    }
}

/// Weights that are ready to serve. Cheap to clone: they are shared.
#[derive(Clone, Debug)]
pub struct ServingModel {
    place: Place,
    options: ServingOptions,
    /// As they were given; the place holds the same storage. `None` where it holds blocks that were made of them.
    weights: Option<Arc<ModelWeights>>,
    /// For people, as `f32`.
    dtype: &'static str,
}

#[derive(Clone, Debug)]
enum Place {
    Host(Arc<HostWeights>),
    Device(Arc<Decoder>),
    #[cfg(feature = "gpu")]
    Gpu(Arc<GpuWeights>),
}

/// Loads the folder `dir` to serve it. `progress` shows a bar if stderr is a terminal.
pub fn load_to_serve(dir: &Path, options: ServingOptions, progress: bool) -> Result<(Checkpoint, ServingModel)> {
    load_tuned(dir, None, options, progress)
}

/// [`load_to_serve`] with the tensors of the file `delta` in their places.
///
/// Fails besides where the delta is for another checkpoint.
pub fn load_tuned(dir: &Path, delta: Option<&Path>, options: ServingOptions, progress: bool) -> Result<(Checkpoint, ServingModel)> {
    let checkpoint = Checkpoint::open(dir)?;
    options.check()?;
    let (dtype, device) = (options.weights.dtype(options.device), options.device.open()?);
    let load = LoadOptions { dtype, device, progress };
    #[cfg(feature = "gpu")]
    if options.device == DeviceKind::Cuda {
        super::gpu::check_memory(checkpoint.spec(), options.weights.footprint())?;
        if options.weights == WeightType::Fp8 {
            let model = quantize_by_layer(&checkpoint, delta, &load, options)?;
            return Ok((checkpoint, model));
        }
    }
    let weights = load_weights(&checkpoint, delta, &load)?;
    let model = ServingModel::new(Arc::new(checkpoint.spec().clone()), weights, options)?;
    Ok((checkpoint, model))
}

/// Experts in 8 bits, a layer after the other: there need not be memory for all of them in bf16.
#[cfg(feature = "gpu")]
fn quantize_by_layer(checkpoint: &Checkpoint, delta: Option<&Path>, load: &LoadOptions, options: ServingOptions) -> Result<ServingModel> {
    let delta = delta.map(Delta::read).transpose()?;
    delta.iter().try_for_each(|delta| checkpoint.check_delta(delta))?;
    let tensors = delta.map(|delta| delta.tensors).unwrap_or_default();
    checkpoint.load_by_layer(load, |outer, layers| {
        let mut changes = Changes::new(&tensors);
        let outer = changes.outer(outer)?;
        let layers = layers.enumerate().map(|(index, layer)| changes.layer(index, layer?));
        let model = ServingModel::by_layer(Arc::new(checkpoint.spec().clone()), outer, layers, options)?;
        changes.finish()?;
        Ok(model)
    })
}

/// The weights of `checkpoint`, with the tensors of the file `delta` in their places.
///
/// Fails besides where the delta is for another checkpoint.
pub fn load_weights(checkpoint: &Checkpoint, delta: Option<&Path>, options: &LoadOptions) -> Result<ModelWeights> {
    let Some(path) = delta else { return Ok(checkpoint.load(options)?) };
    let delta = Delta::read(path)?;
    checkpoint.check_delta(&delta)?;
    checkpoint.load(options)?.with(&delta.tensors)
}

impl ServingModel {
    /// Puts `weights`, which are on the device of the options, in their places.
    pub fn new(spec: Arc<ModelSpec>, weights: ModelWeights, options: ServingOptions) -> Result<Self> {
        options.check()?;
        let device = weights.embedding.device().clone();
        let quantize = options.weights == WeightType::Q8;
        let dtype = match options.weights {
            WeightType::Q8 => "q8",
            WeightType::Fp8 => "fp8",
            _ => weights.embedding.dtype().as_str(),
        };
        let kept = (!matches!(options.weights, WeightType::Q8 | WeightType::Fp8)).then(|| Arc::new(weights.clone()));
        let place = match options.device {
            DeviceKind::Cpu if runs_here(&device) => {
                let host = HostOptions { quantize, reduction: options.reduction };
                Place::Host(Arc::new(HostWeights::new(spec, weights, host)?))
            }
            #[cfg(feature = "gpu")]
            DeviceKind::Cuda if weights.embedding.dtype() == DType::BF16 => {
                Place::Gpu(Arc::new(GpuWeights::new(spec, weights, options.weights == WeightType::Fp8)?))
            }
            _ => Place::Device(Arc::new(Decoder::new(spec, weights, &kernel::for_device(&device))?)),
        };
        Ok(Self { place, options, weights: kept, dtype })
    }

    /// [`ServingModel::new`] of experts in 8 bits on a GPU, with layers that come one by one: of those there is never more than one in bf16.
    ///
    /// # Errors
    /// Those of [`GpuWeights::by_layer`]; `FailedPrecondition` where the options are not those.
    #[cfg(feature = "gpu")]
    pub fn by_layer(
        spec: Arc<ModelSpec>,
        outer: OuterWeights,
        layers: impl IntoIterator<Item = Result<LayerWeights>>,
        options: ServingOptions,
    ) -> Result<Self> {
        options.check()?;
        if (options.device, options.weights) != (DeviceKind::Cuda, WeightType::Fp8) {
            return Err(Error::FailedPrecondition("layers are taken one by one for --device cuda and --dtype fp8 alone".into()));
        }
        let place = Place::Gpu(Arc::new(GpuWeights::by_layer(spec, outer, layers, true)?));
        Ok(Self { place, options, weights: None, dtype: "fp8" })
    }

    /// The weights as tensors. `None` of 8-bit ones.
    pub fn weights(&self) -> Option<&Arc<ModelWeights>> {
        self.weights.as_ref()
    }

    /// The same model with other values for some tensors, by the names of [`ModelWeights::named`]; the rest is shared.
    ///
    /// # Errors
    /// Those of [`ModelWeights::with`]; `FailedPrecondition` with 8-bit weights.
    pub fn with_tensors(&self, changed: &BTreeMap<String, Tensor>) -> Result<Self> {
        let Some(weights) = &self.weights else {
            let message = "8-bit weights cannot be replaced one by one: load the model with --dtype f32 or bf16";
            return Err(Error::FailedPrecondition(message.into()));
        };
        Self::new(Arc::clone(self.spec()), weights.with(changed)?, self.options)
    }

    /// Whether its tensors are on a device: see [`ModelWeights::on_device`].
    pub fn on_device(&self) -> bool {
        self.weights.as_ref().is_some_and(|weights| weights.on_device())
    }

    /// Waits until the device has done what was launched there.
    pub fn synchronize(&self) -> Result<()> {
        Ok(self.weights.as_ref().map_or(Ok(()), |weights| weights.embedding.device().synchronize())?)
    }

    /// What the model is.
    pub fn spec(&self) -> &Arc<ModelSpec> {
        match &self.place {
            Place::Host(weights) => weights.spec(),
            Place::Device(decoder) => decoder.spec(),
            #[cfg(feature = "gpu")]
            Place::Gpu(weights) => weights.spec(),
        }
    }

    /// Where it runs.
    pub fn device(&self) -> DeviceKind {
        self.options.device
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
            #[cfg(feature = "gpu")]
            Place::Gpu(_) => DType::BF16,
        }
    }

    /// For a model that already runs, one that was started over other weights of the same options.
    pub fn shared(&self) -> SharedWeights {
        match &self.place {
            Place::Host(weights) => SharedWeights::new(Arc::clone(weights)),
            Place::Device(decoder) => SharedWeights::new(Arc::clone(decoder)),
            #[cfg(feature = "gpu")]
            Place::Gpu(weights) => SharedWeights::new(Arc::clone(weights)),
        }
    }

    /// A model over these weights with an empty cache. Fails as [`KvCache::new`](super::kv_cache::KvCache::new) does.
    pub fn start(&self, cache: CacheShape) -> Result<Box<dyn LanguageModel>> {
        Ok(self.start_observable(cache)?)
    }

    /// [`ServingModel::start`] as what it is where it is one of kernels.
    #[cfg(feature = "gpu")]
    pub fn start_on_gpu(&self, cache: CacheShape) -> Result<Option<GpuDecoder>> {
        match &self.place {
            Place::Gpu(weights) => GpuDecoder::new(Arc::clone(weights), cache).map(Some),
            _ => Ok(None),
        }
    }

    /// [`ServingModel::start`] for one who wants to look inside.
    pub fn start_observable(&self, cache: CacheShape) -> Result<Box<dyn Observable>> {
        Ok(match &self.place {
            Place::Host(weights) => Box::new(HostDecoder::new(Arc::clone(weights), cache)?),
            Place::Device(decoder) => Box::new(CachedDecoder::new(Arc::clone(decoder), cache)?),
            #[cfg(feature = "gpu")]
            Place::Gpu(weights) => Box::new(GpuDecoder::new(Arc::clone(weights), cache)?),
        })
    }
}
