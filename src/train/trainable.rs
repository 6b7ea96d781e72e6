//! Weights as variables: an ordered registry, and the two views of it that a decoder can be built on.

use std::ops::Range;

use candle_core::{DType, Device, Tensor, Var};
use rand::{Rng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    model::{
        FeedForwardSpec, ModelSpec,
        weights::{AttentionWeights, FeedForwardWeights, LayerWeights, ModelWeights, MoeWeights, SwiGluWeights},
    },
};

/// What a variable belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The router of a layer.
    Router,
    /// The experts of a layer, stacked.
    Experts,
    /// Everything else: embedding, attention, norms, head.
    Body,
}

/// Which parts learn; the others stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Learning {
    /// All.
    #[default]
    All,
    /// All but routers: the control that says what a trained router is worth.
    Experts,
    /// Routers only.
    Router,
}

impl Learning {
    /// Whether variables of a part move.
    pub fn moves(self, part: Part) -> bool {
        match self {
            Self::All => true,
            Self::Experts => part != Part::Router,
            Self::Router => part == Part::Router,
        }
    }
}

/// One variable.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Unique, stable between runs.
    pub name: String,
    /// What it belongs to.
    pub part: Part,
    /// f32.
    pub var: Var,
    /// Whether weight decay applies: matrices yes, norms no.
    pub decay: bool,
}

/// All trainable weights of a model, in one order.
#[derive(Clone, Debug)]
pub struct Trainable {
    parameters: Vec<Parameter>,
    weights: ModelWeights,
    detached: ModelWeights,
}

/// How a fresh tensor is filled.
enum Fill {
    Ones,
    Normal(f64),
}

/// Makes variables in a fixed order.
struct Builder<'a> {
    parameters: Vec<Parameter>,
    rng: &'a mut StdRng,
    device: &'a Device,
}

impl Builder<'_> {
    fn make(&mut self, name: String, shape: &[usize], fill: &Fill) -> Result<Tensor> {
        let part = match name.rsplit('.').next() {
            Some("router") => Part::Router,
            Some("gate_up" | "down") => Part::Experts,
            _ => Part::Body,
        };
        let count = shape.iter().product();
        let values: Vec<f32> = match fill {
            Fill::Ones => vec![1.0; count],
            Fill::Normal(std) => (0..count).map(|_| (normal(self.rng) * std) as f32).collect(),
        };
        let var = Var::from_tensor(&Tensor::from_vec(values, shape, self.device)?)?;
        let tensor = var.as_tensor().clone();
        self.parameters.push(Parameter { name, part, var, decay: shape.len() > 1 });
        Ok(tensor)
    }
}

/// A standard normal number (Box and Muller).
fn normal(rng: &mut StdRng) -> f64 {
    let u: f64 = 1.0 - rng.random::<f64>();
    let v: f64 = rng.random();
    (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()
}

impl Trainable {
    /// Fresh weights: linear layers N(0, 1/fan_in), those that write to the residual stream scaled by 1/√(2L),
    /// embedding and router N(0, 0.02²), norms 1.
    ///
    /// `spec` must be in the shape that `hardmax train` makes: all layers routed, no bias, no query and key norm. Routers
    /// have `router_width(E)` outputs: one for each expert, or what an estimator reads instead.
    pub fn init(spec: &ModelSpec, router_width: impl Fn(usize) -> usize, rng: &mut StdRng, device: &Device) -> Result<Self> {
        let (d, q, kv) = (spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim);
        let linear = |fan_in: usize| Fill::Normal((1.0 / fan_in as f64).sqrt());
        let residual = |fan_in: usize| Fill::Normal((1.0 / fan_in as f64 / (2 * spec.layers.len()) as f64).sqrt());
        let small = Fill::Normal(0.02);
        let mut b = Builder { parameters: Vec::new(), rng, device };

        let embedding = b.make("embedding".into(), &[spec.vocab_size, d], &small)?;
        let mut layers = Vec::with_capacity(spec.layers.len());
        for (index, layer) in spec.layers.iter().enumerate() {
            let FeedForwardSpec::Moe(moe) = &layer.feed_forward else {
                return Err(Error::FailedPrecondition(format!("layer {index} is not routed: it cannot be trained here")));
            };
            let (e, f) = (moe.num_experts, moe.expert_width);
            let name = |part: &str| format!("layers.{index}.{part}");
            layers.push(LayerWeights {
                attention_norm: b.make(name("attention_norm"), &[d], &Fill::Ones)?,
                attention: AttentionWeights {
                    query: b.make(name("query"), &[q, d], &linear(d))?,
                    key: b.make(name("key"), &[kv, d], &linear(d))?,
                    value: b.make(name("value"), &[kv, d], &linear(d))?,
                    output: b.make(name("output"), &[d, q], &residual(q))?,
                    qkv_bias: None,
                    output_bias: None,
                    qk_norm: None,
                },
                feed_forward_norm: b.make(name("feed_forward_norm"), &[d], &Fill::Ones)?,
                feed_forward: FeedForwardWeights::Moe(MoeWeights {
                    router: b.make(name("router"), &[router_width(e), d], &small)?,
                    gate_up: b.make(name("experts.gate_up"), &[e, 2 * f, d], &linear(d))?,
                    down: b.make(name("experts.down"), &[e, d, f], &residual(f))?,
                    shared: None,
                }),
            });
        }
        let final_norm = b.make("final_norm".into(), &[d], &Fill::Ones)?;
        let head = if spec.tied_head { None } else { Some(b.make("head".into(), &[spec.vocab_size, d], &linear(d))?) };
        let parameters = b.parameters;
        let weights = ModelWeights { embedding, layers, final_norm, head };
        let detached = weights.detached();
        Ok(Self { parameters, weights, detached })
    }

    /// The variables, in a fixed order.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Tracked where `learning` moves them: a forward on it can be differentiated.
    pub fn tracked(&self, learning: Learning) -> ModelWeights {
        let mut weights = if learning.moves(Part::Body) { self.weights.clone() } else { self.detached.clone() };
        for ((layer, tracked), detached) in weights.layers.iter_mut().zip(&self.weights.layers).zip(&self.detached.layers) {
            let of = |part| if learning.moves(part) { &tracked.feed_forward } else { &detached.feed_forward };
            let sources = (&mut layer.feed_forward, of(Part::Router), of(Part::Experts));
            if let (FeedForwardWeights::Moe(moe), FeedForwardWeights::Moe(routers), FeedForwardWeights::Moe(experts)) = sources {
                moe.router = routers.router.clone();
                (moe.gate_up, moe.down) = (experts.gate_up.clone(), experts.down.clone());
            }
        }
        weights
    }

    /// The same storage without gradients: always the present values.
    pub fn detached(&self) -> ModelWeights {
        self.detached.clone()
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.parameters.iter().map(|p| p.var.elem_count()).sum()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.parameters.is_empty()
    }

    /// Sets rows of the router of a decoder layer to 0.
    pub fn zero_router_rows(&self, layer: usize, rows: Range<usize>) -> Result<()> {
        let name = format!("layers.{layer}.router");
        let Some(Parameter { var, .. }) = self.parameters.iter().find(|p| p.name == name) else {
            return Err(Error::Internal(format!("no parameter is named {name}")));
        };
        let (mut values, width) = (var.flatten_all()?.to_vec1::<f32>()?, var.dim(1)?);
        values[rows.start * width..rows.end * width].fill(0.0);
        Ok(var.set(&Tensor::from_vec(values, var.shape(), var.device())?)?)
    }

    /// Overwrites the variable `name`.
    pub fn set(&self, name: &str, value: &Tensor) -> Result<()> {
        let Some(parameter) = self.parameters.iter().find(|p| p.name == name) else {
            return Err(Error::NotFound(format!("no parameter is named {name}")));
        };
        if parameter.var.shape() != value.shape() {
            let (have, found) = (parameter.var.shape().clone(), value.shape());
            return Err(Error::FailedPrecondition(format!("parameter {name} has shape {have:?}, the saved one {found:?}")));
        }
        Ok(parameter.var.set(&value.to_dtype(DType::F32)?)?)
    }
}

impl ModelWeights {
    /// The same tensors without gradients, sharing storage.
    fn detached(&self) -> Self {
        self.map(&mut |tensor| tensor.detach())
    }

    /// A copy with `f` of every tensor.
    pub fn map(&self, f: &mut impl FnMut(&Tensor) -> Tensor) -> Self {
        let swiglu = |w: &SwiGluWeights, f: &mut dyn FnMut(&Tensor) -> Tensor| SwiGluWeights { gate_up: f(&w.gate_up), down: f(&w.down) };
        Self {
            embedding: f(&self.embedding),
            layers: self
                .layers
                .iter()
                .map(|layer| LayerWeights {
                    attention_norm: f(&layer.attention_norm),
                    attention: AttentionWeights {
                        query: f(&layer.attention.query),
                        key: f(&layer.attention.key),
                        value: f(&layer.attention.value),
                        output: f(&layer.attention.output),
                        qkv_bias: layer.attention.qkv_bias.as_ref().map(|[q, k, v]| [f(q), f(k), f(v)]),
                        output_bias: layer.attention.output_bias.as_ref().map(&mut *f),
                        qk_norm: layer.attention.qk_norm.as_ref().map(|[q, k]| [f(q), f(k)]),
                    },
                    feed_forward_norm: f(&layer.feed_forward_norm),
                    feed_forward: match &layer.feed_forward {
                        FeedForwardWeights::Dense(mlp) => FeedForwardWeights::Dense(swiglu(mlp, f)),
                        FeedForwardWeights::Moe(moe) => FeedForwardWeights::Moe(MoeWeights {
                            router: f(&moe.router),
                            gate_up: f(&moe.gate_up),
                            down: f(&moe.down),
                            shared: moe.shared.as_ref().map(|shared| crate::model::weights::SharedExpertWeights {
                                expert: swiglu(&shared.expert, f),
                                gate: f(&shared.gate),
                            }),
                        }),
                    },
                })
                .collect(),
            final_norm: f(&self.final_norm),
            head: self.head.as_ref().map(f),
        }
    }
}
