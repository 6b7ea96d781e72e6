//! The MoE layer: router, policy, dispatch, experts, shared expert.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::{
    Routing, RoutingStats, SparseRouting, SwiGlu,
    kernel::{ExpertKernel, Experts},
    observe::{ExpertOutputs, MoeObserver, ObservedLayer},
    plan::DispatchPlan,
    policy::{LayerChoices, RoutingPolicy},
    route::{RowReport, RowRouter},
    train::{self, TrainState},
};
use crate::{
    error::{Error, Result},
    model::{MoeSpec, ReferenceRouting, weights::MoeWeights},
    ops::{self, OnHost, cpu_slice},
};

/// How the MoE layers of one forward route.
#[derive(Debug)]
pub enum RoutingMode<'a> {
    /// Each token by the choice of its sequence. Experts run sparsely, through the [`ExpertKernel`], without gradients.
    Serve {
        /// (choices, tokens) runs in batch order.
        runs: &'a [(LayerChoices, usize)],
        /// Who is shown every layer.
        observer: Option<&'a mut dyn MoeObserver>,
    },
    /// All tokens by one policy, differentiably; the policy says which experts run.
    Train {
        /// The policy, the same in all layers.
        policy: RoutingPolicy,
        /// What the step adds to it, and what layers remember from step to step.
        state: &'a mut TrainState,
    },
}

/// Routing of one MoE layer in one forward.
#[derive(Clone, Debug)]
pub struct LayerRouting {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// `[T, E]` f32; tracked where the router is trained. `[T, G]` with other router outputs than experts for the few
    /// estimators that have those.
    pub router_logits: Tensor,
    /// What was chosen.
    pub routing: Routing,
    /// Load.
    pub stats: RoutingStats,
}

impl LayerRouting {
    /// The same as numbers: it holds no graph any more.
    pub fn detached(self) -> Self {
        let routing = match self.routing {
            Routing::Dense { weights, routed, z, gradient } => Routing::Dense { weights: weights.detach(), routed, z, gradient },
            sparse @ Routing::Sparse(_) => sparse,
        };
        Self { router_logits: self.router_logits.detach(), routing, ..self }
    }
}

/// One MoE layer.
#[derive(Clone, Debug)]
pub struct MoeLayer {
    /// Decoder layer, from 0.
    pub(super) index: usize,
    spec: MoeSpec,
    reference: ReferenceRouting,
    /// `[E, D]` f32.
    pub(super) router: Tensor,
    pub(super) experts: Experts,
    shared: Option<SharedExpert>,
    kernel: Arc<dyn ExpertKernel>,
    /// What goes into products of experts; routers read f32.
    pub(super) products: DType,
}

/// `sigmoid(gate · x) * swiglu(x)`.
#[derive(Clone, Debug)]
struct SharedExpert {
    expert: SwiGlu,
    /// `[1, D]` f32.
    gate: Tensor,
}

impl MoeLayer {
    /// Layer `index` of the decoder.
    pub fn new(index: usize, spec: MoeSpec, reference: ReferenceRouting, weights: MoeWeights, kernel: Arc<dyn ExpertKernel>) -> Self {
        let shared = weights.shared.map(|shared| SharedExpert { expert: SwiGlu::new(shared.expert), gate: shared.gate });
        let experts = Experts { gate_up: weights.gate_up, down: weights.down };
        Self { index, spec, reference, router: weights.router, experts, shared, kernel, products: DType::F32 }
    }

    /// With this element type in the products of experts.
    pub fn set_products(&mut self, products: DType) {
        self.products = products;
    }

    /// `x [T, D]` f32 to `[T, D]` f32, and what the router did.
    pub fn forward(&self, x_td: &Tensor, mode: &mut RoutingMode<'_>) -> Result<(Tensor, LayerRouting)> {
        let (y_td, routing) = match mode {
            RoutingMode::Serve { runs, observer } => {
                let served = self.serve(x_td, runs)?;
                if let Some(observer) = observer {
                    self.show(x_td, &served.1, *observer)?;
                }
                served
            }
            RoutingMode::Train { policy, state } => train::forward(self, x_td, policy.estimator(), state)?,
        };
        let y_td = match &self.shared {
            Some(shared) => (y_td + shared.forward(x_td, self.products)?)?,
            None => y_td,
        };
        Ok((y_td, routing))
    }

    fn serve(&self, x_td: &Tensor, runs: &[(LayerChoices, usize)]) -> Result<(Tensor, LayerRouting)> {
        let router_logits = ops::linear(&x_td.to_dtype(DType::F32)?, &self.router)?;
        let host = OnHost::copied(&router_logits)?;
        let mut routed = Routed::default();
        let runs = runs.iter().map(|(choices, tokens)| (choices, *tokens));
        cpu_slice::<f32, _>(host.tensor(), |z| routed.fill((self.index, &self.spec), self.reference, z, runs))?;
        let y_td = self.kernel.grouped(&x_td.to_dtype(self.products)?, &routed.plan, &self.experts)?;
        let mut y_td = y_td.to_dtype(x_td.dtype())?;
        if !routed.non_finite().is_empty() {
            y_td = poison(&y_td, routed.non_finite())?;
        }
        let Routed { routing, stats, .. } = routed;
        Ok((y_td, LayerRouting { layer: self.index, router_logits, routing: Routing::Sparse(routing), stats }))
    }

    fn show(&self, x_td: &Tensor, served: &LayerRouting, observer: &mut dyn MoeObserver) -> Result<()> {
        let Routing::Sparse(routing) = &served.routing else {
            return Err(Error::Internal("a serving forward routed densely".into()));
        };
        let host = |tensor: &Tensor| Ok::<_, Error>(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?);
        let (x, router_logits) = (host(x_td)?, host(&served.router_logits)?);
        let experts = LayerExperts { layer: self, x_td };
        observer.layer(&ObservedLayer {
            layer: self.index,
            spec: &self.spec,
            x: &x,
            router_logits: &router_logits,
            routing,
            computed: None,
            experts: &experts,
        })
    }
}

/// The experts of a layer with the rows that they read.
struct LayerExperts<'a> {
    layer: &'a MoeLayer,
    x_td: &'a Tensor,
}

impl ExpertOutputs for LayerExperts<'_> {
    /// Kernels sum the experts of a token: here each route is a token of its own.
    fn outputs(&self, routing: &SparseRouting) -> Result<Vec<f32>> {
        let routes = routing.expert_ids.len();
        let tokens: Vec<u32> =
            (0..routing.num_tokens()).flat_map(|token| std::iter::repeat_n(token as u32, routing.routes(token).len())).collect();
        let x_rd = self.x_td.index_select(&Tensor::from_slice(&tokens, routes, self.x_td.device())?, 0)?;
        let single =
            SparseRouting { offsets: (0..=routes as u32).collect(), expert_ids: routing.expert_ids.clone(), weights: vec![1.0; routes] };
        let plan = DispatchPlan::new(&single, self.layer.spec.num_experts);
        let y_rd = self.layer.kernel.grouped(&x_rd.to_dtype(self.layer.products)?, &plan, &self.layer.experts)?;
        Ok(y_rd.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }
}

/// The routing of one layer for one forward, ready to be dispatched. Used again, it keeps its memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Routed {
    pub(crate) routing: SparseRouting,
    pub(crate) plan: DispatchPlan,
    pub(crate) stats: RoutingStats,
    report: RowReport,
}

impl Routed {
    /// Routes `logits [T, E]` of a decoder layer by the choices of their sequences: (choices, tokens) runs in order.
    pub(crate) fn fill<'a>(
        &mut self,
        (layer, spec): (usize, &MoeSpec),
        reference: ReferenceRouting,
        logits: &[f32],
        runs: impl Iterator<Item = (&'a LayerChoices, usize)>,
    ) -> Result<()> {
        let Self { routing, plan, stats, report } = self;
        let (mut router, mut rows) = (RowRouter::new(routing, report), logits.chunks_exact(spec.num_experts));
        for (choices, tokens) in runs {
            let policy = spec.resolve(choices.at(layer), reference)?;
            for (token, row) in rows.by_ref().take(tokens).enumerate() {
                match choices.replayed(layer, token) {
                    None => router.route(row, policy),
                    Some(replayed) => router.replay(row, replayed, replayed.weight_form.unwrap_or(spec.weight_form)),
                }
            }
        }
        plan.fill(routing, spec.num_experts);
        plan.load_into(stats);
        stats.entropy_sum = report.entropy_sum;
        stats.non_finite = report.non_finite.len() as u64;
        stats.near_ties = report.near_ties;
        Ok(())
    }

    /// Tokens whose router logits are not finite: they have no route.
    pub(crate) fn non_finite(&self) -> &[u32] {
        &self.report.non_finite
    }
}

impl SharedExpert {
    fn forward(&self, x_td: &Tensor, products: DType) -> Result<Tensor> {
        let gate = candle_nn::ops::sigmoid(&ops::linear(&x_td.to_dtype(DType::F32)?, &self.gate)?)?;
        let y_td = self.expert.forward(&x_td.to_dtype(products)?)?.to_dtype(x_td.dtype())?;
        Ok(y_td.broadcast_mul(&gate.to_dtype(x_td.dtype())?)?)
    }
}

/// NaN in the given rows, so that their logits say what happened.
fn poison(y_td: &Tensor, rows: &[u32]) -> Result<Tensor> {
    let rows = Tensor::from_slice(rows, rows.len(), y_td.device())?;
    let nan = (Tensor::ones((rows.elem_count(), y_td.dim(1)?), y_td.dtype(), y_td.device())? * f64::NAN)?;
    Ok(y_td.index_add(&rows, &nan, 0)?)
}
