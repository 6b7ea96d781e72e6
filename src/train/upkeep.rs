//! What a step does to routing besides gradients: the selection bias, the watch over the load, and remedies.

use std::{ops::Range, sync::Arc};

use candle_core::Tensor;

use super::{
    finding::Finding,
    learner::{Memory, Watch},
    objective::LayerGradients,
    optimizer::AdamW,
    routing::RoutingPlan,
    trainable::{Parameter, Part, Trainable},
};
use crate::{
    error::{Error, Result},
    model::ModelSpec,
    moe::{
        LayerRouting, Routing, balance_bias,
        collapse::Monitor,
        draw::Draw,
        estimator::{Estimator, Preference, RoutedBatch},
        remedy::{Action, Evidence, Treatment, renewed},
    },
};

/// Tokens over which a monitor forgets.
const WINDOW: usize = 1 << 14;

/// A watch for each MoE layer.
pub(super) fn watches(spec: &ModelSpec, plan: &RoutingPlan) -> Vec<Watch> {
    let k = plan.estimator(0).k();
    let watch = |experts| Watch { monitor: Monitor::new(experts, k, WINDOW), treatment: Treatment::default(), finding: Finding::default() };
    spec.moe_layers().map(|(_, moe)| watch(moe.num_experts)).collect()
}

/// What upkeep found and did, by decoder layer.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// What is new about the routing.
    pub(super) findings: Vec<(usize, Finding)>,
    /// Remedies that acted.
    pub(super) actions: Vec<(usize, Action)>,
}

impl Changes {
    pub(super) fn add(&mut self, other: Self) {
        self.findings.extend(other.findings);
        self.actions.extend(other.actions);
    }
}

/// One step's upkeep of all layers.
pub(super) struct Upkeep<'a> {
    pub(super) plan: &'a RoutingPlan,
    /// By decoder layer: those whose router stays as it is, and is nothing to look after.
    pub(super) served: &'a [Option<Estimator>],
    /// In force.
    pub(super) estimator: Estimator,
    pub(super) step: usize,
    /// Of the noise on an expert that is made anew.
    pub(super) seed: u64,
    pub(super) model: &'a Trainable,
    pub(super) optimizer: &'a mut AdamW,
    pub(super) memory: &'a mut Memory,
}

impl Upkeep<'_> {
    /// After the weights have moved.
    pub(super) fn run(&mut self, layers: &[LayerRouting], gradients: &[LayerGradients]) -> Result<Changes> {
        let mut changes = Changes::default();
        for (index, (layer, gradients)) in layers.iter().zip(gradients).enumerate() {
            let Routing::Dense { routed, z, .. } = &layer.routing else { continue };
            if self.served.get(layer.layer).is_some_and(Option::is_some) {
                continue;
            }
            self.move_bias(layer.layer, routed);
            let preference = self.estimator.preference(z, routed);
            let news = self.observe(index, &preference, [gradients.task(layer), gradients.auxiliary]);
            changes.findings.extend(news.map(|finding| (layer.layer, finding)));
            for action in self.decide(index, layer.layer, &preference) {
                self.apply(layer.layer, routed.experts, action)?;
                tracing::info!(step = self.step, layer = layer.layer, "{action}");
                changes.actions.push((layer.layer, action));
            }
        }
        Ok(changes)
    }

    /// Moves the bias against the load, or what is left of bumps back to 0; and takes the next step's share of it.
    fn move_bias(&mut self, layer: usize, routed: &Arc<RoutedBatch>) {
        let plan = self.plan;
        if !plan.has_bias() {
            return;
        }
        let [share, next] = [self.step, self.step + 1].map(|step| plan.bias_share(step));
        let bias = self.bias(layer, routed.experts);
        if plan.bias_rate == 0.0 {
            balance_bias::fade(bias, balance_bias::FADE);
        } else if next == 1.0 {
            // Later it would make up for what is taken from it.
            balance_bias::update(bias, routed.wanted(), plan.bias_rate);
        }
        balance_bias::fade(bias, if share > 0.0 { next / share } else { 0.0 });
    }

    fn bias(&mut self, layer: usize, experts: usize) -> &mut Vec<f64> {
        if self.memory.layers.len() <= layer {
            self.memory.layers.resize_with(layer + 1, Default::default);
        }
        let bias = &mut self.memory.layers[layer].bias;
        bias.resize(experts, 0.0);
        bias
    }

    /// Takes in what the step says about a layer; returns what is new about it.
    fn observe(&mut self, index: usize, preference: &Preference, [task, auxiliary]: [f64; 2]) -> Option<Finding> {
        let watch = self.memory.watch.get_mut(index)?;
        watch.monitor.observe(preference.choices.rows());
        watch.monitor.observe_gradients(task, auxiliary);
        let before = watch.finding;
        watch.finding = before.next(&watch.monitor, self.plan.learning.moves(Part::Router));
        watch.finding.is_news(before).then_some(watch.finding)
    }

    fn decide(&mut self, index: usize, layer: usize, preference: &Preference) -> Vec<Action> {
        let Some(watch) = self.memory.watch.get_mut(index) else { return Vec::new() };
        let remedies = self.plan.remedies(self.step);
        if remedies.is_empty() {
            return Vec::new();
        }
        let bias = self.memory.layers.get(layer).map_or(&[][..], |layer| &layer.bias);
        let balance_weight = self.plan.balance(self.step).map_or(0.0, |(_, weight)| watch.treatment.balance_weight(weight));
        let evidence = Evidence { scores: &preference.scores, bias, balance_weight };
        remedies.decide(&mut watch.monitor, &evidence, &mut watch.treatment, self.step)
    }

    fn apply(&mut self, layer: usize, experts: usize, action: Action) -> Result<()> {
        if let Some(memory) = self.memory.layers.get_mut(layer) {
            action.apply_to(&mut memory.bias);
        }
        // What raises the balance weight is in force through the watch, which the objective asks.
        if let Action::Reinit { expert, donor, noise } = action {
            let draw = Draw::new(self.seed, self.step, layer);
            for (number, part) in ["router", "experts.gate_up", "experts.down"].into_iter().enumerate() {
                let renew = |values: &[f64]| renewed(values, noise, &draw, number * experts + expert);
                self.replace(&format!("layers.{layer}.{part}"), [donor, expert], renew)?;
            }
        }
        Ok(())
    }

    /// Writes what `renew` makes of one expert's part of a stacked parameter over another's.
    fn replace(&mut self, name: &str, [from, to]: [usize; 2], renew: impl Fn(&[f64]) -> Vec<f64>) -> Result<()> {
        let found = self.model.parameters().iter().enumerate().find(|(_, parameter)| parameter.name == name);
        let Some((index, Parameter { var, .. })) = found else {
            return Err(Error::Internal(format!("no parameter is named {name}")));
        };
        let (width, rest) = (var.elem_count() / var.dim(0)?.max(1), &var.dims()[1..]);
        // A row by itself: a device would send all of the tensor for a part of it.
        let donor = var.as_detached_tensor().narrow(0, from, 1)?.force_contiguous()?.flatten_all()?.to_vec1::<f32>()?;
        let renewed: Vec<f32> =
            renew(&donor.into_iter().map(f64::from).collect::<Vec<_>>()).into_iter().map(|value| value as f32).collect();
        let renewed = Tensor::from_vec(renewed, [&[1][..], rest].concat(), var.device())?;
        var.as_detached_tensor().slice_set(&renewed, 0, to)?;
        let of = |expert: usize| -> Range<usize> { expert * width..(expert + 1) * width };
        self.optimizer.renew(index, of(to), of(from))?;
        Ok(())
    }
}
