//! One optimizer step of a decoder under a routing plan, and all that steps leave behind for the next.

use std::sync::Arc;

use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::{
    config::OptimizerConfig,
    data::{Stream, step_rng},
    finding::Finding,
    objective::{LayerGradients, Losses, Objective},
    optimizer::{AdamW, Outcome, Rates},
    routing::RoutingPlan,
    trainable::Trainable,
    upkeep::{self, Changes, Upkeep},
};
use crate::{
    error::Result,
    model::{Batch, Decoder, Forward, LogitRows, ModelSpec},
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

/// `weight · KL(teacher ‖ student)` of next-token distributions, mean over tokens, beside the language model's loss.
#[derive(Clone, Copy, Debug)]
pub struct Distillation<'a> {
    /// `[T, V]`, the teacher's.
    pub logits: &'a [f64],
    /// At least 0.
    pub weight: f64,
    /// By MoE layer, `[T, E]`: probabilities of the teacher's routers, for [`AuxLoss::RouterKl`].
    pub routers: &'a [Vec<f64>],
}

/// What one step did.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// In force.
    pub estimator: Estimator,
    /// Of the language model, nats per token.
    pub lm_loss: f64,
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
    /// Fresh weights.
    pub fn new(setup: Setup) -> Result<Self> {
        let Setup { spec, plan, optimizer, seed } = setup;
        let device = Device::Cpu;
        let estimator = plan.estimator(0);
        let width = |experts| estimator.router_width(experts);
        let model = Trainable::init(&spec, width, &mut step_rng(seed, 0, Stream::Init), &device)?;
        for (layer, moe) in spec.moe_layers() {
            model.zero_router_rows(layer, estimator.noise_outputs(moe.num_experts))?;
        }
        let kernel = kernel::for_device(&device);
        let decoder = Decoder::new(Arc::clone(&spec), model.tracked(plan.learning), &kernel)?;
        let optimizer = AdamW::new(optimizer, model.parameters());
        let memory = Memory { watch: upkeep::watches(&spec, &plan), ..Memory::default() };
        Ok(Self { spec, plan, seed, model, decoder, kernel, optimizer, memory })
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

    /// The optimizer's state.
    pub fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    /// For loading a saved state: the optimizer and the memory, to be overwritten.
    pub fn restore(&mut self) -> (&Trainable, &mut AdamW, &mut Memory) {
        (&self.model, &mut self.optimizer, &mut self.memory)
    }

    /// Goes on under another plan, from the same weights and moments.
    pub fn change_plan(&mut self, plan: RoutingPlan) -> Result<()> {
        self.decoder = Decoder::new(Arc::clone(&self.spec), self.model.tracked(plan.learning), &self.kernel)?;
        self.memory = Memory { watch: upkeep::watches(&self.spec, &plan), ..Memory::default() };
        self.plan = plan;
        Ok(())
    }

    /// One update at a learning rate; `step` counts from 0.
    pub fn step(&mut self, step: usize, text: Text<'_>, rate: f64) -> Result<StepReport> {
        let estimator = self.plan.estimator(step);
        let mut state = TrainState::new(self.seed);
        self.plan.prepare(&mut state, step);
        state.copy_rows = text.inputs.len();
        state.fixed = text.route.map(|route| route.repeat(estimator.copies()).into());
        state.layers = std::mem::take(&mut self.memory.layers);
        let batch = windows(text, estimator.copies());
        let mode = &mut RoutingMode::Train { policy: RoutingPolicy::Estimator(estimator), state: &mut state };
        let forward = self.decoder.forward(&batch, mode, None)?;
        self.memory.layers = state.layers;

        let objective = Objective { plan: &self.plan, estimator, step, text, memory: &self.memory };
        let losses = objective.of(&forward)?;
        let grads = losses.total.backward()?;
        let rates = Rates { rate, router: self.plan.router_rate, learning: self.plan.learning };
        let outcome = self.optimizer.step(self.model.parameters(), &grads, rates)?;
        let Changes { findings, actions } = match outcome {
            Outcome::Updated { .. } => self.after(step, estimator, &forward, &losses)?,
            Outcome::Skipped => Changes::default(),
        };
        let task = |(layer, gradients): (&LayerRouting, &LayerGradients)| gradients.task(layer).powi(2);
        let task_gradient = forward.layers.iter().zip(&losses.layers).map(task).sum::<f64>().sqrt();
        let layers = forward.layers.into_iter().map(|layer| layer.stats).collect();
        Ok(StepReport { estimator, lm_loss: losses.lm, losses: losses.auxiliary, outcome, task_gradient, layers, actions, findings })
    }

    /// Biases, baselines, findings, remedies.
    fn after(&mut self, step: usize, estimator: Estimator, forward: &Forward, losses: &Losses) -> Result<Changes> {
        if let Gradient::Score { baseline: Baseline::MovingAverage { decay }, .. } = estimator.gradient {
            let average = self.memory.average_loss.get_or_insert(losses.lm);
            *average = decay * *average + (1.0 - decay) * losses.lm;
        }
        let active = forward.layers.iter().filter_map(|layer| match &layer.routing {
            Routing::Dense { routed, z, .. } => Some(routed.active(z)),
            Routing::Sparse(_) => None,
        });
        let active = active.sum::<f64>() / forward.layers.len().max(1) as f64;
        self.memory.adapt(self.plan.regulariser(step), active);
        let Self { plan, seed, model, optimizer, memory, .. } = self;
        let mut upkeep = Upkeep { plan, estimator, step, seed: *seed, model, optimizer, memory };
        upkeep.run(&forward.layers, &losses.layers)
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
