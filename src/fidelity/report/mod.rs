//! The report of a study: numbers as they are written to JSON, a text for the terminal, pictures.

mod plots;
mod text;

use std::{collections::HashMap, path::Path};

use serde::Serialize;

use super::{
    advice::{LayerCost, Plan, mean},
    corpus::CorpusFacts,
    floor::{Floor, FloorForm},
    measure::OutputGap,
    probe::{LayerProbe, Load},
    run::OutputGaps,
    summary::{PerplexityGap, Summary},
    verdict::{LOCAL_L2, Level, MISSED_MASS, Verdict},
};
use crate::{error::Result, model::ModelSpec};

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was measured.
    pub model: ModelFacts,
    /// On what.
    pub corpus: CorpusFacts,
    /// Against what.
    pub reference: ReferenceFacts,
    /// Served routings.
    pub policies: Vec<PolicyReport>,
    /// Noise; `None` where it was not measured.
    pub floor: Option<FloorReport>,
    /// The routing whose experts are told.
    pub watched: String,
    /// The most frequent tokens of the text, to which `experts[].followed` belongs.
    pub followed: Vec<String>,
    /// Of each MoE layer.
    pub experts: Vec<ExpertReport>,
    /// What a k of its own for each layer would buy; `None` where it was not asked for, or hard routing costs nothing.
    pub advice: Option<AdviceReport>,
}

/// A model in a few words.
#[derive(Clone, Debug, Serialize)]
pub struct ModelFacts {
    /// `model_type` of config.json.
    pub family: String,
    /// `train.estimator` of the routing block.
    pub estimator: String,
    /// Element type of the large weights.
    pub dtype: String,
    /// Experts of each MoE layer.
    pub experts: Vec<usize>,
}

/// What the gap is measured against.
#[derive(Clone, Debug, Serialize)]
pub struct ReferenceFacts {
    /// Its routing.
    pub name: String,
    /// Routings that were asked for and are the same.
    pub aliases: Vec<String>,
    /// The checkpoint does not say that it was trained like this.
    pub assumed: bool,
}

/// One served routing.
#[derive(Clone, Debug, Serialize)]
pub struct PolicyReport {
    /// Its routing.
    pub name: String,
    /// Routings that were asked for and are the same.
    pub aliases: Vec<String>,
    /// Experts of a token in each MoE layer.
    pub k: Vec<usize>,
    /// Free-running, at the logits.
    pub output: OutputGaps,
    /// Free-running: share of tokens with other experts than in the reference run, in any layer.
    pub tokens_flipped: f64,
    /// In order of depth.
    pub layers: Vec<LayerReport>,
    /// Two answers.
    pub verdict: Verdict,
}

/// The gap of one layer under one served routing. Outputs are those of the routed experts, without a shared expert.
#[derive(Clone, Debug, Serialize)]
pub struct LayerReport {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// By the 95th percentile of `l2_rel` and the mean of `missed_mass`.
    pub level: Level,
    /// Local: `‖y_ref - y‖ / ‖y_ref‖` per token.
    pub l2_rel: Summary,
    /// Local: `√(Σ‖y_ref - y‖² / Σ‖y_ref‖²)`.
    pub l2_rel_pooled: f64,
    /// Local: `1 - cos(y_ref, y)` per token.
    pub cosine_distance: Summary,
    /// Local: `‖y‖ / ‖y_ref‖` per token.
    pub norm_ratio: Summary,
    /// Per token: reference weight outside the served experts.
    pub missed_mass: Summary,
    /// Per token: last chosen less first refused logit, in units of the temperature. Without values where all experts are served.
    pub margin: Summary,
    /// Share of tokens with a margin below 1.
    pub boundary_mass: f64,
    /// `E‖Y_i - Y_j‖ / E‖Y_i‖` of the two experts that the router puts first.
    pub disagreement: f64,
    /// Free-running: mean share of the served experts that the reference run puts among its first k.
    pub overlap: f64,
    /// Free-running: share of tokens with the same experts.
    pub exact: f64,
    /// Free-running: share of tokens whose first expert is another.
    pub argmax_disagree: f64,
    /// Free-running: pooled relative L2 distance of what the layer is given.
    pub input_drift: f64,
    /// What its experts were given.
    pub load: LoadReport,
}

/// Load of the experts of a layer.
#[derive(Clone, Debug, Serialize)]
pub struct LoadReport {
    /// Tokens, `[E]`.
    pub tokens: Vec<u64>,
    /// Sum of weights, `[E]`.
    pub weights: Vec<f64>,
    /// Tokens over fair share, `[E]`.
    pub utilization: Vec<f64>,
    /// Experts without a token.
    pub dead: usize,
}

/// Noise.
#[derive(Clone, Debug, Serialize)]
pub struct FloorReport {
    /// The largest of all forms.
    pub floor: Floor,
    /// Native routing against itself.
    pub forms: Vec<FloorForm>,
}

/// What the experts of a layer do under the watched routing.
#[derive(Clone, Debug, Serialize)]
pub struct ExpertReport {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// Tokens over fair share, `[E]`.
    pub utilization: Vec<f64>,
    /// How much more often two experts lead a token together than by chance, `[E][E]`.
    pub coactivation: Vec<Vec<f64>>,
    /// Shares of the followed tokens, `[F][E]`.
    pub followed: Vec<Vec<f64>>,
    /// Tokens that speak most for each expert, `[E][..]`.
    pub typical: Vec<Vec<TypicalToken>>,
}

/// A token that an expert takes more than its fair part of.
#[derive(Clone, Debug, Serialize)]
pub struct TypicalToken {
    /// Id.
    pub token: u32,
    /// Text.
    pub text: String,
    /// How often, at least.
    pub count: u64,
    /// Part of its occurrences.
    pub share: f64,
}

/// What a k of its own for each layer would buy.
#[derive(Clone, Debug, Serialize)]
pub struct AdviceReport {
    /// Tokens that the choice was made on.
    pub chosen_on: usize,
    /// Tokens that it was run on.
    pub checked_on: usize,
    /// The two are different text.
    pub held_out: bool,
    /// Of each MoE layer.
    pub blame: Vec<LayerBlame>,
    /// The layer that costs most, where it costs more than half as much again as its fair part. Where none does, it hardly matters which
    /// layers get the larger k.
    pub stands_out: Option<usize>,
    /// k = 1 everywhere.
    pub top_1: PlanReport,
    /// k = 2 everywhere.
    pub top_2: PlanReport,
    /// One for each budget.
    pub plans: Vec<PlanReport>,
    /// Each the wrong way round, at the same budget.
    pub opposites: Vec<PlanReport>,
}

/// The part of a layer in the gap of top-1.
#[derive(Clone, Debug, Serialize)]
pub struct LayerBlame {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// Mean KL where only this layer is served at k = 1.
    pub kl_alone: f64,
    /// Of the sum over layers.
    pub share: f64,
    /// Part of the layer's squared local gap at k = 1 that is left at k = 1, 2, ...
    pub left: Vec<f64>,
}

/// A k for each layer: what was expected of it, and what it did.
#[derive(Clone, Debug, Serialize)]
pub struct PlanReport {
    /// Experts of a token in each MoE layer.
    pub k: Vec<usize>,
    /// Mean over layers.
    pub mean_k: f64,
    /// Mean KL that was expected, nats per token.
    pub predicted_kl: f64,
    /// Mean KL when it ran.
    pub measured_kl: f64,
    /// Share of tokens with the same likeliest next token, when it ran.
    pub top1_agree: f64,
    /// When it ran.
    pub perplexity: PerplexityGap,
}

impl Report {
    /// Draws the pictures into `folder`, which exists; the names of their files without extension.
    pub fn draw(&self, folder: &Path) -> Result<Vec<String>> {
        plots::draw(self, folder)
    }
}

impl ModelFacts {
    /// Of a description.
    pub fn new(spec: &ModelSpec, dtype: &str) -> Self {
        Self {
            family: spec.family.clone(),
            estimator: spec.estimator.clone(),
            dtype: dtype.to_owned(),
            experts: spec.moe_layers().map(|(_, moe)| moe.num_experts).collect(),
        }
    }
}

impl PolicyReport {
    /// Mean k over layers.
    pub fn mean_k(&self) -> f64 {
        mean(&self.k)
    }
}

impl LayerReport {
    /// Of served case `served` after so many tokens.
    pub fn new(probe: &LayerProbe, served: usize, tokens: u64) -> Self {
        let gap = &probe.gaps[served];
        let share = |count: u64, of: u64| count as f64 / of.max(1) as f64;
        let (l2_rel, missed_mass, margin) = (gap.l2_rel.summary(), gap.missed_mass.summary(), gap.margin.summary());
        Self {
            layer: probe.layer,
            level: LOCAL_L2.level(l2_rel.p95).max(MISSED_MASS.level(missed_mass.mean)),
            l2_rel,
            l2_rel_pooled: pooled(&gap.pooled),
            cosine_distance: gap.cosine.summary(),
            norm_ratio: gap.norm_ratio.summary(),
            missed_mass,
            margin,
            boundary_mass: share(gap.boundary, margin.count),
            disagreement: if probe.pair.1 > 0.0 { probe.pair.0 / probe.pair.1 } else { 0.0 },
            overlap: gap.overlap.mean(),
            exact: share(gap.exact, tokens),
            argmax_disagree: share(gap.argmax_disagree, tokens),
            input_drift: pooled(&gap.drift),
            load: LoadReport::new(&probe.loads[served + 1]),
        }
    }
}

fn pooled(gap: &OutputGap) -> f64 {
    gap.l2_rel()
}

impl LoadReport {
    fn new(load: &Load) -> Self {
        Self {
            tokens: load.tokens.clone(),
            weights: load.weights.clone(),
            utilization: load.utilization(),
            dead: load.tokens.iter().filter(|&&tokens| tokens == 0).count(),
        }
    }
}

impl ExpertReport {
    /// Under case `watched`, with so many tokens for each expert.
    pub fn new(probe: &LayerProbe, watched: usize, most: usize, occurrences: &HashMap<u32, u64>, decode: &dyn Fn(u32) -> String) -> Self {
        let typical = |tokens: Vec<super::experts::TokenUse>| {
            let told = |token: super::experts::TokenUse| TypicalToken {
                token: token.token,
                text: decode(token.token),
                count: token.count,
                share: token.share,
            };
            tokens.into_iter().map(told).collect()
        };
        Self {
            layer: probe.layer,
            utilization: probe.loads[watched].utilization(),
            coactivation: probe.usage.coactivation(),
            followed: probe.usage.followed(),
            typical: probe.usage.typical(most, occurrences).into_iter().map(typical).collect(),
        }
    }
}

impl AdviceReport {
    /// The layer that stands out of these.
    pub fn outstanding(blame: &[LayerBlame]) -> Option<usize> {
        let worst = blame.iter().max_by(|a, b| a.share.total_cmp(&b.share))?;
        (blame.len() > 1 && worst.share * blame.len() as f64 > 1.5).then_some(worst.layer)
    }

    /// The cheapest plan that came closer to the reference than k = 2 everywhere, with fewer experts.
    pub fn better_than_top_2(&self) -> Option<&PlanReport> {
        let better = |plan: &&PlanReport| plan.mean_k < self.top_2.mean_k && plan.measured_kl < self.top_2.measured_kl;
        self.plans.iter().filter(better).min_by(|a, b| a.mean_k.total_cmp(&b.mean_k))
    }
}

impl LayerBlame {
    /// Of one of these layers.
    pub fn new(cost: &LayerCost, all: &[LayerCost]) -> Self {
        let sum: f64 = all.iter().map(|cost| cost.alone).sum();
        let first = cost.squared.first().copied().unwrap_or(0.0);
        Self {
            layer: cost.layer,
            kl_alone: cost.alone,
            share: if sum > 0.0 { cost.alone / sum } else { 0.0 },
            left: cost.squared.iter().map(|squared| if first > 0.0 { squared / first } else { 0.0 }).collect(),
        }
    }
}

impl PlanReport {
    /// What was planned, and what came of it.
    pub fn new(plan: &Plan, output: &OutputGaps) -> Self {
        Self {
            k: plan.k.clone(),
            mean_k: plan.mean_k(),
            predicted_kl: plan.predicted_kl,
            measured_kl: output.kl.mean,
            top1_agree: output.top1_agree,
            perplexity: output.perplexity,
        }
    }
}
