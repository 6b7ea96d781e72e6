//! The model under measurement: a folder or a synthetic shape, loaded once, run as often as needed.

use std::{fmt, fs, path::PathBuf, sync::Arc};

use candle_core::DType;
use tokenizers::Tokenizer;

use super::{
    cost::ElementSizes,
    synthetic::{self, SyntheticSpec},
};
#[cfg(feature = "gpu")]
use crate::model::gpu::{self, GpuDecoder};
use crate::{
    engine::ObservableSource,
    error::{Error, Result},
    model::{
        CacheShape, LanguageModel, ModelSpec,
        load::{self, DeviceKind, ServingModel, ServingOptions, WeightType},
    },
    ops::cpu::Reduction,
};

/// Positions in one block of the cache.
pub const BLOCK_TOKENS: usize = 16;

/// What to measure.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// A checkpoint folder.
    Folder(PathBuf),
    /// Random weights of this shape.
    Synthetic(SyntheticSpec),
}

/// How to hold it in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Where it runs.
    pub device: DeviceKind,
    /// Element type of the large weights.
    pub weights: WeightType,
    /// Order of sums on the CPU.
    pub reduction: Reduction,
    /// Of synthetic weights and of everything else that is drawn.
    pub seed: u64,
}

/// Weights in memory, and how to make a model of them.
#[derive(Debug)]
pub struct Subject {
    /// For people.
    pub name: String,
    /// What the model is.
    pub spec: Arc<ModelSpec>,
    /// As in reports: `f32`, `bf16`, `q8`, `fp8`.
    pub dtype: &'static str,
    /// As given.
    pub device: DeviceKind,
    /// Of what the model reads.
    pub sizes: ElementSizes,
    /// Its tokenizer; of a synthetic model, words for ids.
    pub tokenizer: Arc<Tokenizer>,
    weights: ServingModel,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => path.display().fmt(f),
            Self::Synthetic(spec) => spec.fmt(f),
        }
    }
}

impl Subject {
    /// Loads the folder, or makes the weights.
    ///
    /// Fails where the checkpoint cannot be used, and before anything is allocated where synthetic weights would not fit into memory.
    pub fn load(source: &Source, placement: Placement) -> Result<Self> {
        let options = ServingOptions { device: placement.device, weights: placement.weights, reduction: placement.reduction };
        options.check()?;
        match source {
            Source::Folder(path) => {
                let (checkpoint, weights) = load::load_to_serve(path, options, true)?;
                let tokenizer = checkpoint.tokenizer()?;
                Ok(Self::new(source, placement, weights, tokenizer))
            }
            Source::Synthetic(shape) => {
                let device = placement.device.open()?;
                let (spec, dtype) = (Arc::new(shape.model()), placement.weights.dtype(placement.device));
                let weights = match placement.device {
                    #[cfg(feature = "gpu")]
                    DeviceKind::Cuda => {
                        gpu::check_memory(&spec, placement.weights.footprint())?;
                        if placement.weights == WeightType::Fp8 {
                            let (outer, layers) = synthetic::layers_on_gpu(&spec, dtype, &device, placement.seed)?;
                            ServingModel::by_layer(Arc::clone(&spec), outer, layers, options)?
                        } else {
                            let weights = synthetic::weights_on_gpu(&spec, dtype, &device, placement.seed)?;
                            ServingModel::new(Arc::clone(&spec), weights, options)?
                        }
                    }
                    _ => {
                        check_memory(&spec, dtype)?;
                        let weights = synthetic::weights(&spec, dtype, &device, placement.seed)?;
                        ServingModel::new(Arc::clone(&spec), weights, options)?
                    }
                };
                Ok(Self::new(source, placement, weights, synthetic::tokenizer(spec.vocab_size)?))
            }
        }
    }

    fn new(source: &Source, placement: Placement, weights: ServingModel, tokenizer: Tokenizer) -> Self {
        let bytes_per_weight = match weights.dtype() {
            "f32" => 4.0,
            "q8" => 17.0 / 16.0,
            _ => 2.0,
        };
        // A scale of 4 bytes for every 128 x 128.
        let experts = if weights.dtype() == "fp8" { 1.0 + 4.0 / 16384.0 } else { bytes_per_weight };
        let cache = if placement.device == DeviceKind::Cpu { 4.0 } else { bytes_per_weight };
        Self {
            name: source.to_string(),
            spec: Arc::clone(weights.spec()),
            dtype: weights.dtype(),
            device: placement.device,
            sizes: ElementSizes { weights: bytes_per_weight, experts, cache },
            tokenizer: Arc::new(tokenizer),
            weights,
        }
    }

    /// Where an engine gets models to measure the fidelity gap with.
    pub fn observables(&self) -> Box<dyn ObservableSource> {
        Box::new(self.weights.clone())
    }

    /// A model over the weights, with an empty cache. The only place that decides which implementation is measured.
    ///
    /// Models of one subject share its weights.
    pub fn model(&self, cache: CacheShape) -> Result<Box<dyn LanguageModel>> {
        self.weights.start(cache)
    }

    /// [`Subject::model`] as what it is where it is one of kernels.
    #[cfg(feature = "gpu")]
    pub(super) fn gpu_model(&self, cache: CacheShape) -> Result<Option<GpuDecoder>> {
        self.weights.start_on_gpu(cache)
    }
}

/// The cache for `sequences` sequences of at most `tokens` tokens each.
pub fn cache_for(sequences: usize, tokens: usize) -> CacheShape {
    CacheShape { block_tokens: BLOCK_TOKENS, num_blocks: sequences.saturating_mul(tokens.div_ceil(BLOCK_TOKENS)).max(1) }
}

fn check_memory(spec: &ModelSpec, dtype: DType) -> Result<()> {
    let needed = spec.parameters().0 as f64 * dtype.size_in_bytes() as f64;
    match available_memory() {
        Some(available) if needed > available as f64 => {
            let message = format!(
                "{:.1} GB of {} weights do not fit into the {:.1} GB of memory that are free",
                needed / 1e9,
                dtype.as_str(),
                available as f64 / 1e9
            );
            Err(Error::invalid("--synthetic", message))
        }
        _ => Ok(()),
    }
}

/// Bytes that can be allocated without swapping, as Linux estimates them.
fn available_memory() -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

/// Bytes of this process in memory; `None` where the system does not tell.
pub fn resident_memory() -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

fn kibibytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACEMENT: Placement = Placement { device: DeviceKind::Cpu, weights: WeightType::Bf16, reduction: Reduction::Fastest, seed: 0 };

    #[test]
    fn too_large_is_said_before_memory_is_asked_for() {
        let huge = "layers=1024,experts=4096,hidden=131072,expert-width=131072".parse().unwrap();
        let error = Subject::load(&Source::Synthetic(huge), PLACEMENT).unwrap_err();
        assert!(error.to_string().contains("do not fit into"), "{error}");
    }

    #[test]
    fn models_of_a_subject_share_weights_and_not_caches() {
        let subject = Subject::load(&Source::Synthetic("tiny".parse().unwrap()), PLACEMENT).unwrap();
        assert_eq!(subject.sizes, ElementSizes { weights: 2.0, experts: 2.0, cache: 4.0 });
        let model = |blocks| subject.model(CacheShape { block_tokens: BLOCK_TOKENS, num_blocks: blocks }).unwrap().cache().num_blocks;
        assert_eq!((model(1), model(7)), (1, 7));
    }

    #[test]
    fn caches_are_sized_in_whole_blocks() {
        assert_eq!(cache_for(3, 17).num_blocks, 6);
        assert_eq!(cache_for(0, 0).num_blocks, 1);
    }

    #[test]
    fn linux_tells_memory_in_kibibytes() {
        assert_eq!(kibibytes("VmPeak:\t 9 kB\nVmRSS:\t    12 kB\n", "VmRSS:"), Some(12 << 10));
        assert_eq!(kibibytes("VmRSS: many\n", "VmRSS:"), None);
        assert!(resident_memory().is_none_or(|bytes| bytes > 1 << 20));
    }
}
