//! Weights as variables: an ordered registry, and the two views of it that a decoder can be built on.
//!
//! One rule for all devices and element types: a variable is the f32 master of a tensor, on the device of the model; a forward rounds it to what
//! goes into products there ([`Trainable::products`]: f32 on the CPU, the type of the large weights on a device), inside the graph, so
//! that its gradient is f32 again. What does not learn is the tensor that is served, as it is, and gets no gradient.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use candle_core::{DType, Device, Tensor, Var};
use rand::{Rng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    model::{
        FeedForwardSpec, ModelSpec,
        weights::{AttentionWeights, FeedForwardWeights, LayerWeights, ModelWeights, MoeWeights},
    },
    ops,
};

/// What a variable belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The router of a layer.
    Router,
    /// The experts of a layer, stacked.
    Experts,
    /// Everything else: embedding, attention, norms, head, what is not routed.
    Body,
}

impl Part {
    /// That of the tensor of a name.
    fn of(name: &str) -> Self {
        match name {
            _ if name.ends_with(".router") => Self::Router,
            _ if name.ends_with(".experts.gate_up") || name.ends_with(".experts.down") => Self::Experts,
            _ => Self::Body,
        }
    }
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
    products: DType,
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
        let count = shape.iter().product();
        let values: Vec<f32> = match fill {
            Fill::Ones => vec![1.0; count],
            Fill::Normal(std) => (0..count).map(|_| (normal(self.rng) * std) as f32).collect(),
        };
        let var = Var::from_tensor(&Tensor::from_vec(values, shape, self.device)?)?;
        let tensor = var.as_tensor().clone();
        self.parameters.push(Parameter::new(name, var));
        Ok(tensor)
    }
}

impl Parameter {
    fn new(name: String, var: Var) -> Self {
        Self { part: Part::of(&name), decay: var.rank() > 1, name, var }
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
        let products = DType::F32;
        Ok(Self { parameters, weights, detached, products })
    }

    /// With this element type in products on a device. The CPU has f32 in any case.
    #[must_use]
    pub fn with_products(self, products: DType) -> Self {
        let here = ops::runs_here(self.detached.embedding.device());
        Self { products: if here { DType::F32 } else { products }, ..self }
    }

    /// Element type of what a forward puts into products.
    pub fn products(&self) -> DType {
        self.products
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        self.detached.embedding.device()
    }

    /// Variables for the tensors of the names in `chosen`, f32 copies of them; the others are the given ones, and share their storage.
    ///
    /// # Errors
    /// `NotFound` on a name that the model does not have.
    pub fn over(weights: &ModelWeights, chosen: &BTreeSet<String>) -> Result<Self> {
        let mut parameters = Vec::with_capacity(chosen.len());
        for (name, tensor) in weights.named().into_iter().filter(|(name, _)| chosen.contains(name)) {
            let wide = tensor.detach().to_dtype(DType::F32)?.contiguous()?;
            parameters.push(Parameter::new(name, Var::from_tensor(&wide)?));
        }
        if let Some(name) = chosen.iter().find(|name| parameters.iter().all(|parameter| parameter.name != **name)) {
            return Err(Error::NotFound(format!("the model has no tensor {name}")));
        }
        let products = weights.products();
        let vars: BTreeMap<&str, &Var> = parameters.iter().map(|parameter| (parameter.name.as_str(), &parameter.var)).collect();
        let weights = weights.map_named(&mut |name, tensor| vars.get(name).map_or_else(|| tensor.detach(), |var| var.as_tensor().clone()));
        let detached = weights.detached();
        Ok(Self { parameters, weights, detached, products })
    }

    /// Whether the tensor `name` is a variable.
    pub fn has(&self, name: &str) -> bool {
        self.parameters.iter().any(|parameter| parameter.name == name)
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
        Ok(parameter.var.set(&value.to_dtype(DType::F32)?.to_device(parameter.var.device())?)?)
    }
}
