//! Weights of a model on a device, in their places.

use std::sync::Arc;

use candle_core::Tensor;
use hardmax_kernels::{Stream, bf16};

use super::{
    super::{
        FeedForwardSpec, LayerSpec, ModelSpec, MoeSpec,
        rope::Rope,
        weights::{AttentionWeights, FeedForwardWeights, LayerWeights, ModelWeights, MoeWeights, OuterWeights, SwiGluWeights},
    },
    held::Held,
    stack::Stack,
};
use crate::{
    error::{Error, Result},
    model::placement::ExpertPlacement,
};

/// The weights of a [`GpuDecoder`](super::GpuDecoder). Decoders may share them.
#[derive(Debug)]
pub struct GpuWeights {
    pub(super) spec: Arc<ModelSpec>,
    pub(super) embedding: Held<bf16>,
    pub(super) layers: Vec<Layer>,
    pub(super) final_norm: Held<f32>,
    /// `None` where it is the embedding.
    head: Option<Held<bf16>>,
    pub(super) rope: Rope,
    placement: ExpertPlacement,
    /// Experts are held in 8 bits.
    pub(super) quantized: bool,
    stream: Stream,
}

#[derive(Debug)]
pub(super) struct Layer {
    pub(super) attention_norm: Held<f32>,
    pub(super) attention: Attention,
    pub(super) feed_forward_norm: Held<f32>,
    pub(super) feed_forward: FeedForward,
}

#[derive(Debug)]
pub(super) struct Attention {
    pub(super) query: Held<bf16>,
    pub(super) key: Held<bf16>,
    pub(super) value: Held<bf16>,
    pub(super) output: Held<bf16>,
    pub(super) qkv_bias: Option<[Held<f32>; 3]>,
    pub(super) output_bias: Option<Held<f32>>,
    pub(super) qk_norm: Option<[Held<f32>; 2]>,
    pub(super) window: Option<usize>,
}

#[derive(Debug)]
pub(super) enum FeedForward {
    Dense { mlp: SwiGlu, width: usize },
    Moe(Box<Moe>),
}

/// `[2F, D]` and `[D, F]`.
#[derive(Debug)]
pub(super) struct SwiGlu {
    pub(super) gate_up: Held<bf16>,
    pub(super) down: Held<bf16>,
}

/// Routed experts of a layer.
#[derive(Debug)]
pub(super) struct ExpertStacks {
    /// `[E, 2F, D]`.
    pub(super) gate_up: Stack,
    /// `[E, D, F]`.
    pub(super) down: Stack,
}

#[derive(Debug)]
pub(super) struct Moe {
    pub(super) spec: MoeSpec,
    /// `[E, D]`.
    pub(super) router: Held<f32>,
    pub(super) experts: ExpertStacks,
    pub(super) shared: Option<Shared>,
}

/// The expert that every token takes.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) expert: SwiGlu,
    pub(super) width: usize,
    /// `[1, D]`.
    pub(super) gate: Held<f32>,
}

impl GpuWeights {
    /// Puts `weights`, bf16 on the device, in their places; with `quantize` their routed experts in e4m3, made here layer by layer. They have the
    /// shapes of `spec`, as those of [`crate::checkpoint`] do.
    ///
    /// # Errors
    /// `FailedPrecondition` where the model has a shape that the kernels are not made for.
    pub fn new(spec: Arc<ModelSpec>, weights: ModelWeights, quantize: bool) -> Result<Self> {
        let ModelWeights { embedding, layers, final_norm, head } = weights;
        Self::by_layer(spec, OuterWeights { embedding, final_norm, head }, layers.into_iter().map(Ok), quantize)
    }

    /// [`GpuWeights::new`] of layers that come one by one: of those that are quantized there is never more than one in bf16.
    ///
    /// # Errors
    /// As there, and the first of `layers`.
    pub fn by_layer(
        spec: Arc<ModelSpec>,
        outer: OuterWeights,
        layers: impl IntoIterator<Item = Result<LayerWeights>>,
        quantize: bool,
    ) -> Result<Self> {
        check_shapes(&spec, quantize)?;
        let stream = super::device::stream(outer.embedding.device())?;
        let quantize_on = quantize.then_some(stream);
        let mut held = Vec::with_capacity(spec.layers.len());
        for layer in layers {
            let layer = layer?;
            let Some(kind) = spec.layers.get(held.len()) else {
                return Err(Error::Internal(format!("more than {} layers of weights", spec.layers.len())));
            };
            held.push(Layer::new(held.len(), kind, &layer, quantize_on)?);
        }
        if held.len() != spec.layers.len() {
            return Err(Error::Internal(format!("{} layers of weights for {} of spec", held.len(), spec.layers.len())));
        }
        Ok(Self {
            layers: held,
            embedding: Held::new(&outer.embedding)?,
            final_norm: Held::new(&outer.final_norm)?,
            head: outer.head.as_ref().map(Held::new).transpose()?,
            rope: Rope::new(&spec.rope, spec.head_dim),
            placement: ExpertPlacement::one_device(&spec),
            quantized: quantize,
            stream,
            spec,
        })
    }

    /// What the model is.
    pub fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    /// Which expert is on which device: all on this one.
    pub fn placement(&self) -> &ExpertPlacement {
        &self.placement
    }

    /// Where it is worked with them.
    pub(super) fn stream(&self) -> Stream {
        self.stream
    }

    /// `[V, D]`.
    pub(super) fn head(&self) -> &Held<bf16> {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

/// Fails where the kernels are not made for a model.
pub(super) fn check_shapes(spec: &ModelSpec, quantize: bool) -> Result<()> {
    let refuse = |what: &str, found: usize, rule: &str| {
        let message = format!("{what} is {found}: the CUDA kernels need {rule}; use --device cpu, or --dtype f32, which does without them");
        Err(Error::FailedPrecondition(message))
    };
    if !spec.hidden_size.is_multiple_of(8) {
        return refuse("hidden_size", spec.hidden_size, "a multiple of 8");
    }
    if !spec.head_dim.is_multiple_of(8) || spec.head_dim > 256 {
        return refuse("head_dim", spec.head_dim, "a multiple of 8 up to 256");
    }
    if quantize && !spec.hidden_size.is_multiple_of(16) {
        return refuse("hidden_size", spec.hidden_size, "a multiple of 16 for --dtype fp8");
    }
    for layer in &spec.layers {
        let widths = match &layer.feed_forward {
            FeedForwardSpec::Dense { width } => vec![*width],
            FeedForwardSpec::Moe(moe) => std::iter::once(moe.expert_width).chain(moe.shared_expert_width).collect(),
        };
        if let Some(width) = widths.into_iter().find(|width| !width.is_multiple_of(8)) {
            return refuse("the width of an expert", width, "a multiple of 8");
        }
        if let FeedForwardSpec::Moe(moe) = &layer.feed_forward
            && moe.num_experts > 1024
        {
            return refuse("the number of experts", moe.num_experts, "1024 at most");
        }
        if let FeedForwardSpec::Moe(moe) = &layer.feed_forward
            && quantize
            && !moe.expert_width.is_multiple_of(16)
        {
            return refuse("the width of an expert", moe.expert_width, "a multiple of 16 for --dtype fp8");
        }
    }
    Ok(())
}

impl Layer {
    fn new(index: usize, spec: &LayerSpec, weights: &LayerWeights, quantize: Option<Stream>) -> Result<Self> {
        let feed_forward = match (&spec.feed_forward, &weights.feed_forward) {
            (FeedForwardSpec::Dense { width }, FeedForwardWeights::Dense(mlp)) => {
                FeedForward::Dense { mlp: SwiGlu::new(mlp)?, width: *width }
            }
            (FeedForwardSpec::Moe(moe), FeedForwardWeights::Moe(weights)) => FeedForward::Moe(Box::new(Moe::new(moe, weights, quantize)?)),
            _ => return Err(Error::Internal(format!("layer {index}: spec and weights disagree on dense or routed"))),
        };
        Ok(Self {
            attention_norm: Held::new(&weights.attention_norm)?,
            attention: Attention::new(&weights.attention, spec.sliding_window)?,
            feed_forward_norm: Held::new(&weights.feed_forward_norm)?,
            feed_forward,
        })
    }
}

impl Attention {
    fn new(weights: &AttentionWeights, window: Option<usize>) -> Result<Self> {
        let biases = weights.qkv_bias.as_ref().map(|[q, k, v]| Ok::<_, Error>([Held::new(q)?, Held::new(k)?, Held::new(v)?]));
        let norms = weights.qk_norm.as_ref().map(|[q, k]| Ok::<_, Error>([Held::new(q)?, Held::new(k)?]));
        Ok(Self {
            query: Held::new(&weights.query)?,
            key: Held::new(&weights.key)?,
            value: Held::new(&weights.value)?,
            output: Held::new(&weights.output)?,
            qkv_bias: biases.transpose()?,
            output_bias: weights.output_bias.as_ref().map(Held::new).transpose()?,
            qk_norm: norms.transpose()?,
            window,
        })
    }
}

impl SwiGlu {
    fn new(weights: &SwiGluWeights) -> Result<Self> {
        Ok(Self { gate_up: Held::new(&weights.gate_up)?, down: Held::new(&weights.down)? })
    }
}

impl Moe {
    fn new(spec: &MoeSpec, weights: &MoeWeights, quantize: Option<Stream>) -> Result<Self> {
        let stack = |tensor: &Tensor| match quantize {
            Some(stream) => Stack::quantized(tensor, stream),
            None => Stack::new(tensor),
        };
        let shared = match (&weights.shared, spec.shared_expert_width) {
            (Some(shared), Some(width)) => Some(Shared { expert: SwiGlu::new(&shared.expert)?, width, gate: Held::new(&shared.gate)? }),
            (None, None) => None,
            _ => return Err(Error::Internal("spec and weights disagree on a shared expert".into())),
        };
        Ok(Self {
            spec: spec.clone(),
            router: Held::new(&weights.router)?,
            experts: ExpertStacks { gate_up: stack(&weights.gate_up)?, down: stack(&weights.down)? },
            shared,
        })
    }
}
