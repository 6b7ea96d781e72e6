//! The loss of a step: that of the language model, auxiliary ones on router outputs, and the score function of a sampled
//! choice.

use std::ops::Range;

use candle_core::Tensor;

use super::{
    distill::distilled,
    evaluate::log_softmax_at,
    learner::{Memory, Text},
    routing::RoutingPlan,
};
use crate::{
    error::{Error, Result},
    model::Forward,
    moe::{
        LayerRouting, Routing,
        advantage::Draws,
        estimator::{Estimator, Gradient, RoutedBatch},
        loss::{AuxLoss, LossInput, LossNoise},
    },
    ops,
};

/// What the loss of a forward is made of.
pub(super) struct Objective<'a> {
    pub(super) plan: &'a RoutingPlan,
    /// In force.
    pub(super) estimator: Estimator,
    pub(super) step: usize,
    /// The data. A forward of several copies has it once for each.
    pub(super) text: Text<'a>,
    pub(super) memory: &'a Memory,
    /// By decoder layer: those that route as served add nothing to the loss.
    pub(super) served: &'a [Option<Estimator>],
}

/// The loss of one forward.
pub(super) struct Losses {
    /// To be differentiated.
    pub(super) total: Tensor,
    /// Its parts.
    pub(super) told: Told,
    /// By MoE layer.
    pub(super) layers: Vec<LayerGradients>,
    /// By MoE layer, `[T, G]`: the gradient of its router outputs that does not pass through its experts; none where it routes as served.
    pub(super) dz: Vec<Option<Vec<f64>>>,
}

/// Parts of a loss, for people.
#[derive(Clone, Debug, Default)]
pub(super) struct Told {
    /// All of it.
    pub(super) loss: f64,
    /// Of the language model, mean over tokens and draws, nats.
    pub(super) lm: f64,
    /// Of distillation, where there is a teacher, with its weight.
    pub(super) distill: Option<f64>,
    /// Auxiliary losses before their weights, means over layers.
    pub(super) auxiliary: Vec<(AuxLoss, f64)>,
}

/// Norms of gradients of a layer's router outputs that do not pass through its experts.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LayerGradients {
    /// From auxiliary losses.
    pub(super) auxiliary: f64,
    /// From the score function: the task's, although not through the weights.
    pub(super) score: f64,
}

impl LayerGradients {
    /// Of a loss that counts one part in `of`.
    pub(super) fn share(self, of: usize) -> Self {
        Self { auxiliary: self.auxiliary / of as f64, score: self.score / of as f64 }
    }

    /// From the task: through the weights, once backward has run, and from the score function.
    pub(super) fn task(&self, layer: &LayerRouting) -> f64 {
        match &layer.routing {
            Routing::Dense { gradient, .. } => gradient.get().copied().unwrap_or(0.0).hypot(self.score),
            Routing::Sparse(_) => self.score,
        }
    }
}

impl Objective<'_> {
    pub(super) fn of(&self, forward: &Forward) -> Result<Losses> {
        let (rows, samples) = (self.text.targets.len(), self.estimator.gradient.samples());
        let drawn = forward.logits.narrow(0, 0, rows * samples)?;
        let lm = ops::cross_entropy(&drawn, &self.text.targets.repeat(samples))?;
        let advantages = self.advantages(forward)?;
        let distilled = self.distilled(&drawn)?;
        let told = Told {
            loss: 0.0,
            lm: scalar(&lm)?,
            distill: distilled.as_ref().map(scalar).transpose()?,
            auxiliary: self.plan.losses.iter().map(|term| (term.loss, 0.0)).collect(),
        };
        let mut losses = Losses { total: self.of_outputs(lm, distilled)?, told, layers: Vec::new(), dz: Vec::new() };
        let learn = forward.layers.iter().filter(|layer| !self.is_served(layer)).count() as f64;
        for (index, layer) in forward.layers.iter().enumerate() {
            match self.is_served(layer) {
                true => {
                    losses.layers.push(LayerGradients::default());
                    losses.dz.push(None);
                }
                false => self.add_layer(layer, index, learn, advantages.as_deref(), &mut losses)?,
            }
        }
        losses.told.loss = scalar(&losses.total)?;
        Ok(losses)
    }

    fn is_served(&self, layer: &LayerRouting) -> bool {
        self.served.get(layer.layer).is_some_and(Option::is_some)
    }

    /// Losses on the router outputs of one layer, as one operation.
    fn add_layer(&self, layer: &LayerRouting, index: usize, layers: f64, advantages: Option<&[f64]>, losses: &mut Losses) -> Result<()> {
        let Routing::Dense { routed, z, .. } = &layer.routing else {
            return Err(Error::Internal("a training forward routed as serving does".into()));
        };
        let mut gradients = LayerGradients::default();
        let (mut value, mut dz) = (0.0, vec![0.0; z.len()]);
        let sequences: Vec<Range<usize>> =
            (0..routed.tokens / self.text.length).map(|i| i * self.text.length..(i + 1) * self.text.length).collect();
        let teacher = self.text.teacher.and_then(|teacher| teacher.routers.get(index)).map(|p| p.repeat(self.estimator.copies()));
        let input = self.input(z, routed, &sequences, teacher.as_deref());
        for (term, (_, sum)) in self.plan.losses.iter().zip(&mut losses.told.auxiliary) {
            let mut weight = term.weight.at(self.step, self.plan.steps);
            if let (true, Some(watch)) = (term.loss.balances(), self.memory.watch.get(index)) {
                weight = watch.treatment.balance_weight(weight);
            }
            let of_layer = term.loss.value_and_grad(&input, weight / layers, &mut dz)?;
            *sum += of_layer / layers;
            value += weight * of_layer / layers;
        }
        let regulariser = self.plan.regulariser(self.step);
        value += regulariser.value_and_grad(self.memory.weight_of(regulariser) / layers, z, routed, &mut dz)?;
        gradients.auxiliary = norm(&dz);
        if let Some(advantages) = advantages {
            let mut of_score = vec![0.0; z.len()];
            self.estimator.score(z, routed, advantages, &mut of_score);
            gradients.score = norm(&of_score);
            dz.iter_mut().zip(of_score).for_each(|(dz, d)| *dz += d);
            value +=
                self.estimator.log_prob(z, routed).iter().zip(advantages).map(|(log_prob, advantage)| log_prob * advantage).sum::<f64>();
        }
        losses.layers.push(gradients);
        losses.total = (&losses.total + ops::known(&layer.router_logits, value, dz.clone())?)?;
        losses.dz.push(Some(dz));
        Ok(())
    }

    /// What it costs to be away from the teacher.
    fn distilled(&self, logits: &Tensor) -> Result<Option<Tensor>> {
        let Some(teacher) = self.text.teacher.filter(|teacher| teacher.weight > 0.0) else { return Ok(None) };
        distilled(logits, teacher.logits, teacher.weight).map(Some)
    }

    /// Of the next tokens, and of the distance from the teacher.
    fn of_outputs(&self, lm: Tensor, distilled: Option<Tensor>) -> Result<Tensor> {
        let Some(distilled) = distilled else { return Ok(lm) };
        // Labels that do not count are not worth their backward.
        Ok(match self.text.teacher.map_or(1.0, |teacher| teacher.lm_weight) {
            0.0 => distilled,
            1.0 => (lm + distilled)?,
            weight => ((lm * weight)? + distilled)?,
        })
    }

    fn input<'a>(&self, z: &'a [f64], routed: &'a RoutedBatch, sequences: &'a [Range<usize>], teacher: Option<&'a [f64]>) -> LossInput<'a> {
        LossInput {
            z,
            experts: routed.experts,
            temperature: self.estimator.temperature(),
            choices: routed.wanted(),
            k: self.estimator.k(),
            sequences,
            global_load: None,
            noise: routed.deviation().map(|std| LossNoise { seen: routed.seen(), std }),
            teacher,
        }
    }

    /// For a score function, what the log-probability of each row's choice is multiplied by.
    ///
    /// Each token's choice is credited with the loss of its own next token. Later tokens see it too, through attention:
    /// what they lose by it is left out, a bias that buys most of the variance.
    fn advantages(&self, forward: &Forward) -> Result<Option<Vec<f64>>> {
        let Gradient::Score { baseline, .. } = self.estimator.gradient else { return Ok(None) };
        let vocabulary = forward.logits.dim(1)?;
        let losses: Vec<f64> = forward.read_logits(|logits| {
            let targets = self.text.targets.iter().cycle();
            logits.chunks(vocabulary).zip(targets).map(|(row, &target)| -log_softmax_at(row, target as usize)).collect()
        })?;
        let draws = Draws { losses: &losses, rows: self.text.targets.len(), samples: self.estimator.gradient.samples() };
        Ok(Some(draws.advantages(baseline, self.memory.average_loss.unwrap_or_else(|| draws.mean()))))
    }
}

fn scalar(tensor: &Tensor) -> Result<f64> {
    Ok(f64::from(tensor.to_scalar::<f32>()?))
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}
