//! Shape of the model, its optimizer, and how an arm routes: what the cell's specification comes to for the decoder.

use super::text::{LENGTH, VOCABULARY};
use crate::{
    compare::{
        arm::Arm,
        spec::{CellSpec, Mode},
    },
    error::Result,
    model::{FeedForwardSpec, LayerSpec, ModelSpec, MoeSpec, QkNorm, ReferenceRouting, RopeScaling, RopeSpec},
    moe::{estimator::Purpose, policy::WeightForm},
    schedule::learning_rate,
    train::{
        config::OptimizerConfig,
        routing::{RoutingPlan, RunShape},
    },
};

/// Width of the residual stream.
const HIDDEN: usize = 32;
/// Hidden width of an expert.
const EXPERT_WIDTH: usize = 64;
/// Decoder layers.
const LAYERS: usize = 2;
/// One step in so many is warm-up.
const WARM_UP: usize = 20;

/// Learning rate at a step: a short warm-up, then half a cosine to 0.
pub(super) fn rate(spec: &CellSpec, step: usize) -> f64 {
    learning_rate(step, spec.size.steps, spec.size.steps / WARM_UP, spec.size.rate, 0.0)
}

pub(super) fn model_spec(spec: &CellSpec) -> ModelSpec {
    let moe = MoeSpec {
        num_experts: spec.task.experts(),
        expert_width: EXPERT_WIDTH,
        top_k: 1,
        weight_form: WeightForm::Renorm,
        shared_expert_width: None,
    };
    ModelSpec {
        family: "mixtral".into(),
        vocab_size: VOCABULARY,
        hidden_size: HIDDEN,
        num_heads: 2,
        num_kv_heads: 2,
        head_dim: HIDDEN / 2,
        qkv_bias: false,
        out_bias: false,
        qk_norm: QkNorm::None,
        clip_qkv: None,
        rms_norm_eps: 1e-5,
        rope: RopeSpec { theta: 10_000.0, scaling: RopeScaling::None },
        max_context: LENGTH,
        tied_head: false,
        layers: vec![LayerSpec { sliding_window: None, feed_forward: FeedForwardSpec::Moe(moe) }; LAYERS],
        reference: ReferenceRouting::OwnTopK { assumed: false },
        estimator: spec.arm.estimator.name.clone(),
    }
}

pub(super) fn optimizer(spec: &CellSpec) -> OptimizerConfig {
    OptimizerConfig {
        learning_rate: spec.size.rate,
        final_ratio: 0.0,
        warmup_steps: spec.size.steps / WARM_UP,
        weight_decay: 0.0,
        beta1: 0.9,
        beta2: 0.95,
        clip_norm: 1.0,
    }
}

pub(super) fn plan(spec: &CellSpec, arm: &Arm) -> Result<RoutingPlan> {
    let teacher = spec.mode == Mode::Tune;
    let run = RunShape { experts: spec.task.experts(), steps: spec.size.steps, purpose: Purpose::Laboratory, teacher };
    arm.routing(spec.router_share()).plan(run)
}
