//! Tensors on disk to [`ModelWeights`].
//!
//! Names, shapes and dtypes are checked before anything is allocated, so the files bound what is allocated. Each weight
//! is then filled once, part by part, through a small buffer: there is no second copy of a stack of experts.

use std::{collections::BTreeSet, io::IsTerminal as _, path::Path};

use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};
use indicatif::{ProgressBar, ProgressStyle};
use safetensors::Dtype;

use super::{
    CheckpointError,
    error::TensorNames,
    names::{ExpertLayout, LayerWeight, Part, Source, Weight, WeightNames, harmless, weights},
    shards::{Location, Reader, Shards},
};
use crate::model::{
    FeedForwardSpec, ModelSpec, QkNorm,
    weights::{
        AttentionWeights, FeedForwardWeights, LayerWeights, ModelWeights, MoeWeights, OuterWeights, SharedExpertWeights, SwiGluWeights,
    },
};

type Result<T> = std::result::Result<T, CheckpointError>;

/// Bytes read at once.
pub(super) const CHUNK: usize = 1 << 20;

pub(super) const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// Where and how weights are held.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Of the large weights: F32, BF16 or F16. Norms, biases and routers are f32 in any case.
    pub dtype: DType,
    /// Where they are held.
    pub device: Device,
    /// Show a progress bar, if stderr is a terminal.
    pub progress: bool,
}

/// Where every weight of a model is on disk; checked.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    spec: &'a ModelSpec,
    names: &'a WeightNames,
    shards: &'a Shards,
    layouts: Vec<ExpertLayout>,
    /// The head is on disk, though it is tied to the embedding.
    pub(super) redundant_head: bool,
}

impl<'a> Plan<'a> {
    /// Checks that every weight has its tensors and every tensor its weight.
    pub(super) fn new(dir: &Path, spec: &'a ModelSpec, names: &'a WeightNames, shards: &'a Shards) -> Result<Self> {
        let exists = |name: &str| shards.tensors.contains_key(name);
        let layouts = (0..spec.layers.len()).map(|layer| names.detect(layer, exists)).collect();
        let redundant_head = spec.tied_head && exists(HEAD);
        let plan = Self { spec, names, shards, layouts, redundant_head };
        let parts: Vec<_> = weights(spec).into_iter().flat_map(|weight| plan.source(weight).parts).collect();
        let missing: Vec<_> = parts.iter().filter(|part| !exists(&part.name)).map(|part| part.name.clone()).collect();
        if !missing.is_empty() {
            return Err(CheckpointError::MissingTensors { dir: dir.into(), names: TensorNames(missing) });
        }
        let wanted: BTreeSet<_> = parts.iter().map(|part| part.name.as_str()).collect();
        let needless = |name: &str| harmless(name) || (redundant_head && name == HEAD);
        let extra: Vec<_> = shards.tensors.keys().filter(|name| !wanted.contains(name.as_str()) && !needless(name)).cloned().collect();
        if !extra.is_empty() {
            return Err(CheckpointError::ExtraTensors { dir: dir.into(), names: TensorNames(extra) });
        }
        parts.iter().try_for_each(|part| plan.check(part))?;
        Ok(plan)
    }

    /// The tensors on disk that make `weight`.
    pub(super) fn source(&self, weight: Weight) -> Source {
        let layout = match weight {
            Weight::Layer(index, _) => self.layouts.get(index).copied(),
            _ => None,
        };
        self.names.source(self.spec, weight, layout.unwrap_or_else(|| self.names.published()))
    }

    fn locate(&self, name: &str) -> Result<&'a Location> {
        self.shards.tensors.get(name).ok_or_else(|| CheckpointError::MissingTensors {
            dir: self.shards.shards.first().map(|shard| shard.path.clone()).unwrap_or_default(),
            names: TensorNames(vec![name.to_string()]),
        })
    }

    fn check(&self, part: &Part) -> Result<()> {
        let location = self.locate(&part.name)?;
        let path = || self.shards.path(location);
        if !matches!(location.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
            return Err(CheckpointError::Dtype { path: path(), tensor: part.name.clone(), found: location.dtype.to_string() });
        }
        if location.shape != part.shape {
            let (tensor, found, expected) = (part.name.clone(), location.shape.clone(), part.shape.clone());
            return Err(CheckpointError::Shape { path: path(), tensor, found, expected });
        }
        Ok(())
    }

    /// Reads everything.
    pub(super) fn load(&self, options: &LoadOptions) -> Result<ModelWeights> {
        self.load_by_layer(options, |OuterWeights { embedding, final_norm, head }, layers| {
            Ok(ModelWeights { embedding, layers: layers.collect::<Result<_>>()?, final_norm, head })
        })
    }

    /// Has `make` read everything: what is in no layer is given, and the layers as it asks for them, in order.
    pub(super) fn load_by_layer<T, E: From<CheckpointError>>(
        &self,
        options: &LoadOptions,
        make: impl FnOnce(OuterWeights, &mut dyn Iterator<Item = Result<LayerWeights>>) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        if !matches!(options.dtype, DType::F32 | DType::BF16 | DType::F16) {
            return Err(CheckpointError::UnsupportedDtype(options.dtype).into());
        }
        let loader = Loader { plan: self, reader: self.shards.reader()?, options, bar: self.progress_bar(options) };
        if self.redundant_head {
            loader.check_head()?;
        }
        let made = make(loader.outer()?, &mut (0..self.spec.layers.len()).map(|index| loader.layer(index)))?;
        loader.bar.finish_and_clear();
        Ok(made)
    }

    fn progress_bar(&self, options: &LoadOptions) -> ProgressBar {
        if !options.progress || !std::io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let bytes = self.shards.tensors.values().map(|location| location.bytes).sum();
        let style = ProgressStyle::with_template("loading {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
        ProgressBar::new(bytes).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
    }
}

/// A load in progress.
struct Loader<'a> {
    plan: &'a Plan<'a>,
    reader: Reader<'a>,
    options: &'a LoadOptions,
    bar: ProgressBar,
}

impl Loader<'_> {
    fn outer(&self) -> Result<OuterWeights> {
        Ok(OuterWeights {
            embedding: self.take(Weight::Embedding)?,
            final_norm: self.take(Weight::FinalNorm)?,
            head: if self.plan.spec.tied_head { None } else { Some(self.take(Weight::Head)?) },
        })
    }

    fn layer(&self, index: usize) -> Result<LayerWeights> {
        let take = |weight| self.take(Weight::Layer(index, weight));
        Ok(LayerWeights {
            attention_norm: take(LayerWeight::AttentionNorm)?,
            attention: self.attention(&take)?,
            feed_forward_norm: take(LayerWeight::FeedForwardNorm)?,
            feed_forward: match self.plan.spec.layers.get(index).map(|layer| &layer.feed_forward) {
                Some(FeedForwardSpec::Moe(moe)) => FeedForwardWeights::Moe(MoeWeights {
                    router: take(LayerWeight::Router)?,
                    gate_up: take(LayerWeight::ExpertsGateUp)?,
                    down: take(LayerWeight::ExpertsDown)?,
                    shared: match moe.shared_expert_width {
                        Some(_) => Some(SharedExpertWeights {
                            expert: SwiGluWeights { gate_up: take(LayerWeight::SharedGateUp)?, down: take(LayerWeight::SharedDown)? },
                            gate: take(LayerWeight::SharedGate)?,
                        }),
                        None => None,
                    },
                }),
                _ => FeedForwardWeights::Dense(SwiGluWeights {
                    gate_up: take(LayerWeight::DenseGateUp)?,
                    down: take(LayerWeight::DenseDown)?,
                }),
            },
        })
    }

    fn attention(&self, take: &impl Fn(LayerWeight) -> Result<Tensor>) -> Result<AttentionWeights> {
        let spec = self.plan.spec;
        Ok(AttentionWeights {
            query: take(LayerWeight::Query)?,
            key: take(LayerWeight::Key)?,
            value: take(LayerWeight::Value)?,
            output: take(LayerWeight::Output)?,
            qkv_bias: match spec.qkv_bias {
                true => Some([take(LayerWeight::QueryBias)?, take(LayerWeight::KeyBias)?, take(LayerWeight::ValueBias)?]),
                false => None,
            },
            output_bias: if spec.out_bias { Some(take(LayerWeight::OutputBias)?) } else { None },
            qk_norm: match spec.qk_norm {
                QkNorm::None => None,
                QkNorm::PerHead | QkNorm::Full => Some([take(LayerWeight::QueryNorm)?, take(LayerWeight::KeyNorm)?]),
            },
        })
    }

    fn take(&self, weight: Weight) -> Result<Tensor> {
        let source = self.plan.source(weight);
        match if source.f32 { DType::F32 } else { self.options.dtype } {
            DType::BF16 => self.fill::<bf16>(&source),
            DType::F16 => self.fill::<f16>(&source),
            _ => self.fill::<f32>(&source),
        }
    }

    fn fill<T: Element>(&self, source: &Source) -> Result<Tensor> {
        let mut values: Vec<T> = Vec::with_capacity(source.elements());
        for part in &source.parts {
            let first = values.len();
            let location = self.plan.locate(&part.name)?;
            self.chunks(location, |bytes| match location.dtype {
                Dtype::F32 => decode(bytes, f32::from_le_bytes, &mut values),
                Dtype::BF16 => decode(bytes, |b| bf16::from_le_bytes(b).to_f32(), &mut values),
                _ => decode(bytes, |b| f16::from_le_bytes(b).to_f32(), &mut values),
            })?;
            let message = match T::DTYPE {
                _ if source.router => "the router cannot choose experts with it; the checkpoint is damaged, or its training diverged",
                DType::F16 => "too large for f16, or damaged; load with another dtype",
                _ => continue,
            };
            if let Some(index) = values.iter().skip(first).position(|value| !value.to_f64().is_finite()) {
                let (path, tensor) = (self.plan.shards.path(location), part.name.clone());
                return Err(CheckpointError::NonFinite { path, tensor, index, message: message.to_string() });
            }
        }
        let tensor = source.parts.first().map(|part| part.name.clone()).unwrap_or_default();
        Tensor::from_vec(values, source.shape.as_slice(), &self.options.device).map_err(|source| CheckpointError::Tensor { tensor, source })
    }

    /// The bytes of a tensor in pieces of whole elements.
    fn chunks(&self, location: &Location, mut piece: impl FnMut(&[u8])) -> Result<()> {
        let mut buffer = vec![0; CHUNK.min(usize::try_from(location.bytes).unwrap_or(CHUNK))];
        let mut start = 0;
        while start < location.bytes {
            let length = buffer.len().min(usize::try_from(location.bytes - start).unwrap_or(CHUNK));
            let (piece_buffer, _) = buffer.split_at_mut(length);
            self.reader.read(location, start, piece_buffer)?;
            piece(piece_buffer);
            start += length as u64;
            self.bar.inc(length as u64);
        }
        Ok(())
    }

    /// A head that is on disk in spite of being tied must be the embedding.
    fn check_head(&self) -> Result<()> {
        let (head, embedding) = (self.plan.locate(HEAD)?, self.plan.locate(EMBEDDING)?);
        let mut equal = head.dtype == embedding.dtype && head.shape == embedding.shape;
        if equal {
            let (mut left, mut right, mut start) = (vec![0; CHUNK], vec![0; CHUNK], 0);
            while equal && start < head.bytes {
                let length = CHUNK.min(usize::try_from(head.bytes - start).unwrap_or(CHUNK));
                let (left, right) = (left.split_at_mut(length).0, right.split_at_mut(length).0);
                self.reader.read(head, start, left)?;
                self.reader.read(embedding, start, right)?;
                equal = left == right;
                start += length as u64;
            }
        }
        match equal {
            true => Ok(()),
            false => Err(CheckpointError::UntiedHead { path: self.plan.shards.path(head), tensor: HEAD.to_string() }),
        }
    }
}

/// Every format on disk is exact in f32, so one conversion from there serves all.
fn decode<T: Element, const N: usize>(bytes: &[u8], to_f32: impl Fn([u8; N]) -> f32, values: &mut Vec<T>) {
    values.extend(bytes.as_chunks().0.iter().map(|element| T::of(to_f32(*element))));
}

/// An element type of weights in memory.
trait Element: WithDType {
    fn of(value: f32) -> Self;
}

impl Element for f32 {
    fn of(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    fn of(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

impl Element for f16 {
    fn of(value: f32) -> Self {
        f16::from_f32(value)
    }
}
