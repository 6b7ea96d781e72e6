//! The loss of a step: that of the language model, auxiliary ones on router outputs, and the score function of a sampled
//! choice.

use std::ops::Range;

use candle_core::{DType, Tensor};

use super::{
    evaluate::log_softmax_at,
    learner::{Distillation, Memory, Text},
    routing::RoutingPlan,
};
use crate::{
    error::{Error, Result},
    model::Forward,
    moe::{
        LayerRouting, Routing,
        advantage::Draws,
        estimator::{Estimator, Gradient, RoutedBatch},
        loss::{AuxLoss, LossInput, LossNoise, distill_kl},
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
}

/// The loss of one forward.
pub(super) struct Losses {
    /// To be differentiated.
    pub(super) total: Tensor,
    /// Of the language model, mean over tokens and draws, nats.
    pub(super) lm: f64,
    /// Auxiliary losses before their weights, means over layers.
    pub(super) auxiliary: Vec<(AuxLoss, f64)>,
    /// By MoE layer.
    pub(super) layers: Vec<LayerGradients>,
}

/// Norms of gradients of a layer's router outputs that do not pass through its experts.
#[derive(Clone, Copy, Default)]
pub(super) struct LayerGradients {
    /// From auxiliary losses.
    pub(super) auxiliary: f64,
    /// From the score function: the task's, although not through the weights.
    pub(super) score: f64,
}

impl LayerGradients {
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
        let mut losses = Losses {
            lm: f64::from(lm.to_scalar::<f32>()?),
            total: self.distilled(lm, &drawn)?,
            auxiliary: self.plan.losses.iter().map(|term| (term.loss, 0.0)).collect(),
            layers: Vec::with_capacity(forward.layers.len()),
        };
        for (index, layer) in forward.layers.iter().enumerate() {
            self.add_layer(layer, index, forward.layers.len() as f64, advantages.as_deref(), &mut losses)?;
        }
        Ok(losses)
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
        for (term, (_, sum)) in self.plan.losses.iter().zip(&mut losses.auxiliary) {
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
        losses.total = (&losses.total + ops::known(&layer.router_logits, value, dz)?)?;
        Ok(())
    }

    /// The loss with what it costs to be away from the teacher.
    fn distilled(&self, lm: Tensor, logits: &Tensor) -> Result<Tensor> {
        let Some(Distillation { logits: teacher, weight, .. }) = self.text.teacher.filter(|teacher| teacher.weight > 0.0) else {
            return Ok(lm);
        };
        let student = logits.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        let teacher = teacher.repeat(self.estimator.gradient.samples());
        if teacher.len() != student.len() {
            return Err(Error::Internal(format!("{} logits of the teacher for {} of the student", teacher.len(), student.len())));
        }
        let mut gradient = vec![0.0; student.len()];
        let value = distill_kl(&teacher, &student, logits.dim(1)?, 1.0, &mut gradient);
        gradient.iter_mut().for_each(|d| *d *= weight);
        Ok((lm + ops::known(logits, weight * value, gradient)?)?)
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

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}
