//! One optimizer step of a decoder under a routing plan, and all that steps leave behind for the next.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::{
    config::OptimizerConfig,
    data::{Stream, step_rng},
    finding::Finding,
    gradients::Gradients,
    objective::{LayerGradients, Objective, Told},
    optimizer::{AdamW, Outcome, Rates},
    recompute::Passes,
    routing::RoutingPlan,
    trainable::{Parameter, Trainable},
    upkeep::{self, Changes, Upkeep},
};
use crate::{
    error::{Error, Result},
    model::{Batch, Decoder, LogitRows, ModelSpec},
    moe::{
        LayerRouting, LayerState, Routing, RoutingMode, RoutingStats, TrainState,
        collapse::Monitor,
        estimator::{Baseline, Estimator, Gradient, Regulariser},
        kernel::{self, ExpertKernel},
        loss::AuxLoss,
        policy::{RoutingChoice, RoutingPolicy},
        remedy::{Action, Treatment},
    },
};

/// A model that learns.
#[derive(Debug)]
pub struct Learner {
    spec: Arc<ModelSpec>,
    plan: RoutingPlan,
    seed: u64,
    model: Trainable,
    /// On the tracked weights.
    decoder: Decoder,
    kernel: Arc<dyn ExpertKernel>,
    optimizer: AdamW,
    memory: Memory,
    /// The learning rate of experts over that of the rest.
    expert_rate: f64,
    /// By decoder layer, for those whose router does not learn: what it routes by. Empty is none.
    served: Arc<[Option<Estimator>]>,
    /// Layers are run again for the backward, instead of being kept.
    pub(super) recompute: bool,
    /// Micro-batches whose gradients have not moved the weights yet.
    pending: Option<Pending>,
}

/// What the micro-batches of a step have left.
#[derive(Debug)]
struct Pending {
    /// Their sum.
    gradients: Gradients,
    micros: Vec<Done>,
}

/// What is left of one forward once backward has run: no graph.
#[derive(Debug)]
struct Done {
    layers: Vec<LayerRouting>,
    gradients: Vec<LayerGradients>,
    told: Told,
}

/// Runs a piece of computing when the machine is the learner's; where that will not be, fails without running it. Tensors of a device are
/// made, used and dropped in such pieces only, while nobody else launches anything.
pub type Turn<'a> = dyn FnMut(&mut dyn FnMut() -> Result<()>) -> Result<()> + 'a;

/// `work` in a turn.
pub fn in_turn<T>(turn: &mut Turn<'_>, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let (mut work, mut done) = (Some(work), None);
    turn(&mut || {
        done = work.take().map(|work| work()).transpose()?;
        Ok(())
    })?;
    done.ok_or_else(|| Error::Internal("a turn that ran nothing, or twice".into()))
}

/// A part of the batch of a step.
#[derive(Clone, Copy, Debug)]
pub struct Micro {
    /// From 0.
    pub step: usize,
    /// Below `of`.
    pub index: usize,
    /// Parts of the step, of one size each.
    pub of: usize,
}

/// What a [`Learner`] on given weights is made of.
#[derive(Debug)]
pub struct Start {
    /// Shape of the model.
    pub spec: Arc<ModelSpec>,
    /// How its routers learn. All variables of `model` do, as far as its `learning` lets them.
    pub plan: RoutingPlan,
    /// AdamW.
    pub optimizer: OptimizerConfig,
    /// The learning rate of experts over that of the rest.
    pub expert_rate: f64,
    /// Of noise.
    pub seed: u64,
    /// The weights, some of them variables.
    pub model: Trainable,
    /// By decoder layer, for those whose router is no variable: what it routes by. Empty is none.
    pub served: Arc<[Option<Estimator>]>,
    /// Keep the inputs of layers only, and run each again for its backward: a third more time for the activations of one layer.
    pub recompute: bool,
}

/// What a [`Learner`] is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Shape of the model.
    pub spec: Arc<ModelSpec>,
    /// How its routers learn.
    pub plan: RoutingPlan,
    /// AdamW.
    pub optimizer: OptimizerConfig,
    /// Of initial weights and noise.
    pub seed: u64,
}

/// What steps leave for the next besides weights and moments.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// By decoder layer: selection bias, running means of the experts' outputs.
    pub layers: Vec<LayerState>,
    /// By MoE layer.
    pub watch: Vec<Watch>,
    /// Moving average of the language model's loss, for the baseline that needs it; none before the first step.
    pub average_loss: Option<f64>,
    /// Weight of a penalty that moves with what it penalises; none before the first step.
    pub penalty: Option<f64>,
}

impl Memory {
    /// The weight in force of what an estimator adds to the loss.
    pub(super) fn weight_of(&self, regulariser: Regulariser) -> f64 {
        match regulariser {
            Regulariser::Sparsity { initial, .. } => self.penalty.unwrap_or(initial),
            other => other.initial_weight(),
        }
    }

    /// Moves the weight of a penalty towards the experts that it wants `active` per token.
    fn adapt(&mut self, regulariser: Regulariser, active: f64) {
        if let Regulariser::Sparsity { .. } = regulariser {
            self.penalty = Some(regulariser.adapt(self.weight_of(regulariser), active));
        }
    }
}

/// A learner between two steps.
#[derive(Clone, Debug)]
pub struct Captured {
    /// What steps left behind.
    pub memory: Memory,
    /// Updates done.
    pub updates: i32,
    /// By name of the parameter: `NAME.value`, and `NAME.first` and `NAME.second` for its moments.
    pub tensors: BTreeMap<String, Tensor>,
}

/// Collapse of one layer: what was seen of it, and done against it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Watch {
    /// Its load.
    pub monitor: Monitor,
    /// What remedies did.
    pub treatment: Treatment,
    /// What is known about it.
    pub finding: Finding,
}

/// The data of one step.
#[derive(Clone, Copy, Debug)]
pub struct Text<'a> {
    /// `[T]` tokens, one window after the other.
    pub inputs: &'a [u32],
    /// `[T]`, the token after each.
    pub targets: &'a [u32],
    /// Tokens of a window.
    pub length: usize,
    /// `[T]`, expert of each token, in the place of the router.
    pub route: Option<&'a [u32]>,
    /// A teacher to stay near.
    pub teacher: Option<Distillation<'a>>,
}

/// `weight · KL(teacher ‖ student)` of next-token distributions, mean over tokens.
#[derive(Clone, Copy, Debug)]
pub struct Distillation<'a> {
    /// `[T, V]` f32, the teacher's, where the student is.
    pub logits: &'a Tensor,
    /// At least 0.
    pub weight: f64,
    /// Of the language model's loss beside it: 1 as without a teacher, 0 for no labels. It counts where `weight` is above 0.
    pub lm_weight: f64,
    /// By MoE layer, `[T, E]`: probabilities of the teacher's routers, for [`AuxLoss::RouterKl`].
    pub routers: &'a [Vec<f64>],
}

/// What one step did.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// In force.
    pub estimator: Estimator,
    /// What was minimised: all losses with their weights.
    pub loss: f64,
    /// Of the language model, nats per token.
    pub lm_loss: f64,
    /// `KL(teacher ‖ student)` of next-token distributions with its weight, where there is a teacher.
    pub distill_loss: Option<f64>,
    /// Auxiliary losses before their weights, means over layers.
    pub losses: Vec<(AuxLoss, f64)>,
    /// Whether weights moved.
    pub outcome: Outcome,
    /// L2 norm of the gradient of all router outputs from the task, auxiliary losses apart.
    pub task_gradient: f64,
    /// By MoE layer.
    pub layers: Vec<RoutingStats>,
    /// Remedies that acted: (decoder layer, what was done).
    pub actions: Vec<(usize, Action)>,
    /// What is new about the routing: (decoder layer, what holds from now on).
    pub findings: Vec<(usize, Finding)>,
}

impl Learner {
    /// Fresh weights on the CPU.
    pub fn new(setup: Setup) -> Result<Self> {
        Self::on(&Device::Cpu, DType::F32, setup)
    }

    /// Fresh weights, f32 on `device`; products there take `products`. The same values on any device.
    pub fn on(device: &Device, products: DType, setup: Setup) -> Result<Self> {
        let Setup { spec, plan, optimizer, seed } = setup;
        let estimator = plan.estimator(0);
        let width = |experts| estimator.router_width(experts);
        let model = Trainable::init(&spec, width, &mut step_rng(seed, 0, Stream::Init), device)?.with_products(products);
        for (layer, moe) in spec.moe_layers() {
            model.zero_router_rows(layer, estimator.noise_outputs(moe.num_experts))?;
        }
        Self::over(Start { spec, plan, optimizer, expert_rate: 1.0, seed, model, served: Arc::default(), recompute: false })
    }

    /// From the weights that are there.
    pub fn over(start: Start) -> Result<Self> {
        let Start { spec, plan, optimizer, expert_rate, seed, model, served, recompute } = start;
        let kernel = kernel::for_device(model.device());
        let decoder = Decoder::new(Arc::clone(&spec), model.tracked(plan.learning), &kernel)?.with_products(model.products());
        let optimizer = AdamW::new(optimizer, model.parameters())?;
        let memory = Memory { watch: upkeep::watches(&spec, &plan), ..Memory::default() };
        Ok(Self { spec, plan, expert_rate, served, recompute, seed, model, decoder, kernel, optimizer, memory, pending: None })
    }

    /// The weights.
    pub fn model(&self) -> &Trainable {
        &self.model
    }

    /// What steps left behind.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The plan.
    pub fn plan(&self) -> &RoutingPlan {
        &self.plan
    }

    /// Shape of the model.
    pub fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    /// Runs the experts of a forward that is not differentiated.
    pub fn kernel(&self) -> &Arc<dyn ExpertKernel> {
        &self.kernel
    }

    /// Everything that it needs to go on, on the host. There the values share the storage of the variables: to be written, not to be kept.
    /// From a device they are copied, which waits for it.
    pub fn capture(&self) -> Result<Captured> {
        let parameters = self.model.parameters();
        let (updates, mut tensors) = self.optimizer.state(parameters)?;
        for parameter in parameters {
            tensors.insert(format!("{}.value", parameter.name), parameter.var.as_detached_tensor().to_device(&Device::Cpu)?);
        }
        Ok(Captured { memory: self.memory.clone(), updates, tensors })
    }

    /// Goes on from where another one was.
    ///
    /// # Errors
    /// `FailedPrecondition` where that one learned other tensors.
    pub fn reinstate(&mut self, captured: Captured) -> Result<()> {
        let Captured { memory, updates, tensors } = captured;
        for Parameter { name, .. } in self.model.parameters() {
            let value = tensors.get(&format!("{name}.value"));
            let value = value.ok_or_else(|| Error::FailedPrecondition(format!("the saved state lacks {name}.value")))?;
            self.model.set(name, value)?;
        }
        self.optimizer.restore(self.model.parameters(), updates, &tensors)?;
        self.memory = memory;
        self.pending = None;
        Ok(())
    }

    /// Goes on under another plan, from the same weights and moments.
    pub fn change_plan(&mut self, plan: RoutingPlan) -> Result<()> {
        let decoder = Decoder::new(Arc::clone(&self.spec), self.model.tracked(plan.learning), &self.kernel)?;
        self.decoder = decoder.with_products(self.model.products());
        self.memory = Memory { watch: upkeep::watches(&self.spec, &plan), ..Memory::default() };
        self.plan = plan;
        self.pending = None;
        Ok(())
    }

    /// One update at a learning rate; `step` counts from 0.
    pub fn step(&mut self, step: usize, text: Text<'_>, rate: f64) -> Result<StepReport> {
        self.accumulate(Micro { step, index: 0, of: 1 }, text, &mut |work| work())?;
        self.apply(step, rate)
    }

    /// Forward and backward of one micro-batch: its share of the gradients of a step, added to those before it. All of it is in one
    /// turn, or with recomputation each layer of either pass.
    pub fn accumulate(&mut self, micro: Micro, text: Text<'_>, turn: &mut Turn<'_>) -> Result<()> {
        if micro.index == 0 {
            self.pending = None;
        }
        let (estimator, state) = self.prepared(micro, text);
        let batch = windows(text, estimator.copies());
        let mut pending = self.pending.take().unwrap_or_else(|| Pending::new(self.model.parameters()));
        let done = match self.recompute {
            false => in_turn(turn, || self.whole((micro, text), &batch, estimator, state, &mut pending.gradients)),
            true => self.layerwise((micro, text), &batch, (estimator, state), &mut pending.gradients, turn),
        };
        let done = done.and_then(|done| pending.gradients.check(self.model.parameters(), self.plan.learning).map(|()| done));
        let result = match done {
            Ok(done) => {
                pending.micros.push(done);
                Ok(())
            }
            // The gradients of a step that failed go with the learner, and move nothing.
            Err(error) => {
                pending.micros.clear();
                Err(error)
            }
        };
        self.pending = Some(pending);
        result
    }

    /// The estimator in force, and the state of its forward.
    fn prepared(&self, micro: Micro, text: Text<'_>) -> (Estimator, TrainState) {
        let estimator = self.plan.estimator(micro.step);
        let mut state = TrainState::new(self.seed);
        self.plan.prepare(&mut state, micro.step);
        state.step = micro.draw();
        state.copy_rows = text.inputs.len();
        state.fixed = text.route.map(|route| route.repeat(estimator.copies()).into());
        state.layers = self.memory.layers.clone();
        state.served = Arc::clone(&self.served);
        (estimator, state)
    }

    /// The graph of all layers at once.
    fn whole(
        &mut self,
        (micro, text): (Micro, Text<'_>),
        batch: &Batch,
        estimator: Estimator,
        mut state: TrainState,
        gradients: &mut Gradients,
    ) -> Result<Done> {
        let mode = &mut RoutingMode::Train { policy: RoutingPolicy::Estimator(estimator), state: &mut state };
        let forward = self.decoder.forward(batch, mode, None)?;
        self.memory.layers = state.layers;
        let losses = self.objective(micro.step, estimator, text).of(&forward)?;
        let store = micro.share(&losses.total)?.backward()?;
        let layers = forward.layers.into_iter().map(LayerRouting::detached).collect();
        // The graph goes before the gradients are added up.
        drop((forward.logits, losses.total));
        let done = Done::new(layers, (losses.layers, losses.told), micro.of);
        gradients.add(self.model.parameters(), self.plan.learning, store)?;
        Ok(done)
    }

    /// One layer's graph at a time: forward to keep the input of each, then again from the last, each with its backward.
    fn layerwise(
        &mut self,
        (micro, text): (Micro, Text<'_>),
        batch: &Batch,
        (estimator, mut state): (Estimator, TrainState),
        gradients: &mut Gradients,
        turn: &mut Turn<'_>,
    ) -> Result<Done> {
        let mut again = state.clone();
        let passes = Passes {
            layers: in_turn(turn, || self.decoder.layerwise(batch))?,
            policy: RoutingPolicy::Estimator(estimator),
            parameters: self.model.parameters(),
            learning: self.plan.learning,
        };
        let kept = passes.forward(&mut state, turn)?;
        let (numbers, dz, above) = in_turn(turn, || {
            let forward = kept.forward(passes.layers.logits(kept.top())?);
            let losses = self.objective(micro.step, estimator, text).of(&forward)?;
            let store = micro.share(&losses.total)?.backward()?;
            drop((forward, losses.total));
            let above = passes.taken(store, Some(kept.top()), gradients)?;
            let share = |dz: &Vec<f64>| dz.iter().map(|d| d / micro.of as f64).collect();
            let dz = losses.dz.iter().map(|dz| dz.as_ref().map(share)).collect();
            Ok(((losses.layers, losses.told), dz, above))
        })?;
        let layers = passes.backward(kept, (above, dz), &mut again, gradients, turn)?;
        self.memory.layers = state.layers;
        Ok(Done::new(layers, numbers, micro.of))
    }

    fn objective<'a>(&'a self, step: usize, estimator: Estimator, text: Text<'a>) -> Objective<'a> {
        Objective { plan: &self.plan, estimator, step, text, memory: &self.memory, served: &self.served }
    }

    /// Of the micro-batches since the last step.
    #[cfg(test)]
    pub(super) fn gradients(&self) -> Option<&Gradients> {
        self.pending.as_ref().map(|pending| &pending.gradients)
    }

    /// Moves the weights by what the micro-batches of `step` have left; each counts as a batch for what goes by the load.
    pub fn apply(&mut self, step: usize, rate: f64) -> Result<StepReport> {
        let Some(Pending { gradients, micros }) = self.pending.take_if(|pending| !pending.micros.is_empty()) else {
            return Err(Error::Internal("a step without a micro-batch".into()));
        };
        let estimator = self.plan.estimator(step);
        let rates = Rates { rate, router: self.plan.router_rate, experts: self.expert_rate };
        let outcome = self.optimizer.step(self.model.parameters(), &gradients, rates)?;
        let Changes { findings, actions } = match outcome {
            Outcome::Updated { .. } => self.after(step, estimator, &micros)?,
            Outcome::Skipped => Changes::default(),
        };
        let Told { loss, lm, distill, auxiliary } = Done::told(&micros);
        let task_gradient = micros.iter().flat_map(Done::task_gradients).map(|norm| norm.powi(2)).sum::<f64>().sqrt();
        let layers = Done::stats(micros);
        Ok(StepReport {
            estimator,
            loss,
            lm_loss: lm,
            distill_loss: distill,
            losses: auxiliary,
            outcome,
            task_gradient,
            layers,
            actions,
            findings,
        })
    }

    /// Experts of a token, of a layer whose router learns.
    fn active(&self, layer: &LayerRouting) -> Option<f64> {
        match &layer.routing {
            Routing::Dense { routed, z, .. } if self.served.get(layer.layer).is_none_or(Option::is_none) => Some(routed.active(z)),
            Routing::Dense { .. } | Routing::Sparse(_) => None,
        }
    }

    /// Biases, baselines, findings, remedies.
    fn after(&mut self, step: usize, estimator: Estimator, micros: &[Done]) -> Result<Changes> {
        if let Gradient::Score { baseline: Baseline::MovingAverage { decay }, .. } = estimator.gradient {
            let lm = Done::told(micros).lm;
            let average = self.memory.average_loss.get_or_insert(lm);
            *average = decay * *average + (1.0 - decay) * lm;
        }
        let mut changes = Changes::default();
        for Done { layers, gradients, .. } in micros {
            let active: Vec<f64> = layers.iter().filter_map(|layer| self.active(layer)).collect();
            self.memory.adapt(self.plan.regulariser(step), active.iter().sum::<f64>() / active.len().max(1) as f64);
            let Self { plan, served, seed, model, optimizer, memory, .. } = self;
            let mut upkeep = Upkeep { plan, served, estimator, step, seed: *seed, model, optimizer, memory };
            changes.add(upkeep.run(layers, gradients)?);
        }
        Ok(changes)
    }
}

impl Micro {
    /// In the place of the step where noise is drawn: no two micro-batches of a run have the same.
    fn draw(self) -> usize {
        self.step * self.of + self.index
    }

    /// Its part of the loss of the step.
    fn share(self, total: &Tensor) -> Result<Tensor> {
        Ok(if self.of == 1 { total.clone() } else { (total / self.of as f64)? })
    }
}

impl Pending {
    fn new(parameters: &[Parameter]) -> Self {
        Self { gradients: Gradients::none(parameters), micros: Vec::new() }
    }
}

impl Done {
    /// Of one micro-batch in `of`.
    fn new(layers: Vec<LayerRouting>, (gradients, told): (Vec<LayerGradients>, Told), of: usize) -> Self {
        Self { layers, gradients: gradients.into_iter().map(|layer| layer.share(of)).collect(), told }
    }

    /// Means over micro-batches.
    fn told(micros: &[Self]) -> Told {
        let mean = |of: &dyn Fn(&Told) -> f64| micros.iter().map(|micro| of(&micro.told)).sum::<f64>() / micros.len().max(1) as f64;
        let mut told = micros.first().map(|first| first.told.clone()).unwrap_or_default();
        for (index, (_, value)) in told.auxiliary.iter_mut().enumerate() {
            *value = mean(&|told| told.auxiliary[index].1);
        }
        told.distill = told.distill.map(|_| mean(&|told| told.distill.unwrap_or(0.0)));
        Told { loss: mean(&|told| told.loss), lm: mean(&|told| told.lm), ..told }
    }

    /// Norms of the task's gradients of the router outputs, layer by layer.
    fn task_gradients(&self) -> impl Iterator<Item = f64> {
        self.layers.iter().zip(&self.gradients).map(|(layer, gradients)| gradients.task(layer))
    }

    /// Load of each layer, all micro-batches together.
    fn stats(micros: Vec<Self>) -> Vec<RoutingStats> {
        let mut micros = micros.into_iter().map(|micro| micro.layers.into_iter().map(|layer| layer.stats).collect::<Vec<_>>());
        let mut sums = micros.next().unwrap_or_default();
        micros.for_each(|stats| sums.iter_mut().zip(&stats).for_each(|(sum, stats)| sum.add(stats)));
        sums
    }
}

/// Windows as sequences, all of them `copies` times.
pub(crate) fn windows(text: Text<'_>, copies: usize) -> Batch {
    let mut batch = Batch::default();
    for window in (0..copies).flat_map(|_| text.inputs.chunks(text.length)) {
        batch.push(&[], window, 0, RoutingChoice::Native, LogitRows::All);
    }
    batch
}
