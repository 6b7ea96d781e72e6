//! AdamW with a state that can be saved.
//!
//! candle's own keeps its moments private, so a run on it cannot be resumed.

use std::{collections::BTreeMap, ops::Range};

use candle_core::{Device, Tensor, backprop::GradStore};
use rayon::prelude::*;

use super::{
    config::OptimizerConfig,
    trainable::{Learning, Parameter, Part},
};
use crate::error::{Error, Result};

/// AdamW (Loshchilov and Hutter 2019), f32 moments.
#[derive(Debug)]
pub struct AdamW {
    config: OptimizerConfig,
    /// Updates done: the exponent of the bias correction.
    updates: i32,
    /// In the order of the parameters.
    moments: Vec<Moments>,
}

#[derive(Debug)]
struct Moments {
    first: Vec<f32>,
    second: Vec<f32>,
}

/// What happened to one set of gradients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    /// Parameters moved; norms of the gradients before clipping.
    Updated {
        /// L2 norm over all parameters that learn.
        grad_norm: f64,
        /// L2 norm over the routers; 0 where they do not learn.
        router_norm: f64,
    },
    /// A gradient was not finite: nothing moved.
    Skipped,
}

/// How far parameters move in one step.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Learning rate.
    pub rate: f64,
    /// The routers' learning rate over it.
    pub router: f64,
    /// What moves at all.
    pub learning: Learning,
}

impl Rates {
    fn of(&self, part: Part) -> f64 {
        if part == Part::Router { self.rate * self.router } else { self.rate }
    }
}

const EPSILON: f64 = 1e-8;

impl AdamW {
    /// Zero moments for `parameters`.
    pub fn new(config: OptimizerConfig, parameters: &[Parameter]) -> Self {
        let zeros = |p: &Parameter| Moments { first: vec![0.0; p.var.elem_count()], second: vec![0.0; p.var.elem_count()] };
        Self { config, updates: 0, moments: parameters.iter().map(zeros).collect() }
    }

    /// One update. Every parameter that learns must have a gradient.
    pub fn step(&mut self, parameters: &[Parameter], grads: &GradStore, rates: Rates) -> Result<Outcome> {
        let mut gradients = Vec::with_capacity(parameters.len());
        for parameter in parameters {
            gradients.push(match (rates.learning.moves(parameter.part), grads.get(parameter.var.as_tensor())) {
                (false, _) => None,
                (true, Some(grad)) => Some(grad.flatten_all()?.to_vec1::<f32>()?),
                (true, None) => return Err(Error::Internal(format!("no gradient reached {}", parameter.name))),
            });
        }
        let square = |gradient: &Vec<f32>| gradient.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
        let squares = || parameters.iter().zip(&gradients).filter_map(|(p, gradient)| Some((p.part, square(gradient.as_ref()?))));
        let grad_norm = squares().map(|(_, square)| square).sum::<f64>().sqrt();
        let router_norm = squares().filter(|(part, _)| *part == Part::Router).map(|(_, square)| square).sum::<f64>().sqrt();
        if !grad_norm.is_finite() {
            return Ok(Outcome::Skipped);
        }
        self.updates += 1;
        let clip = (self.config.clip_norm / grad_norm).min(1.0);
        for ((parameter, moments), gradient) in parameters.iter().zip(&mut self.moments).zip(&gradients) {
            let Some(gradient) = gradient else { continue };
            let rate = rates.of(parameter.part);
            let mut values = parameter.var.flatten_all()?.to_vec1::<f32>()?;
            let decay = if parameter.decay { rate * self.config.weight_decay } else { 0.0 };
            Rule::new(&self.config, self.updates, rate, clip).apply(&mut values, moments, gradient, decay as f32);
            parameter.var.set(&Tensor::from_vec(values, parameter.var.shape(), parameter.var.device())?)?;
        }
        Ok(Outcome::Updated { grad_norm, router_norm })
    }

    /// Values of the parameter at `index` that were replaced by others of it, as many, start from rest with the scale of
    /// the others' gradients. Without a scale the first steps would be several times the rate: the bias correction counts
    /// all updates.
    pub fn renew(&mut self, index: usize, values: Range<usize>, from: Range<usize>) {
        if let Some(moments) = self.moments.get_mut(index) {
            moments.first[values.clone()].fill(0.0);
            moments.second.copy_within(from, values.start);
        }
    }

    /// Updates done and moments by name, `NAME.first` and `NAME.second`.
    pub fn state(&self, parameters: &[Parameter]) -> Result<(i32, BTreeMap<String, Tensor>)> {
        let mut tensors = BTreeMap::new();
        for (parameter, moments) in parameters.iter().zip(&self.moments) {
            for (part, values) in [("first", &moments.first), ("second", &moments.second)] {
                let tensor = Tensor::from_slice(values, parameter.var.shape(), &Device::Cpu)?;
                tensors.insert(format!("{}.{part}", parameter.name), tensor);
            }
        }
        Ok((self.updates, tensors))
    }

    /// The inverse of [`AdamW::state`].
    pub fn restore(&mut self, parameters: &[Parameter], updates: i32, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        for (parameter, moments) in parameters.iter().zip(&mut self.moments) {
            for (part, values) in [("first", &mut moments.first), ("second", &mut moments.second)] {
                let name = format!("{}.{part}", parameter.name);
                let tensor = tensors.get(&name).ok_or_else(|| Error::FailedPrecondition(format!("the saved state lacks {name}")))?;
                if tensor.shape() != parameter.var.shape() {
                    return Err(Error::FailedPrecondition(format!("the saved {name} has shape {:?}", tensor.shape())));
                }
                *values = tensor.flatten_all()?.to_vec1::<f32>()?;
            }
        }
        self.updates = updates;
        Ok(())
    }
}

/// The numbers of one update.
struct Rule {
    beta1: f32,
    beta2: f32,
    /// Learning rate over the bias correction of the first moment.
    rate: f32,
    /// Bias correction of the root of the second moment.
    root: f32,
    clip: f32,
}

impl Rule {
    fn new(config: &OptimizerConfig, updates: i32, learning_rate: f64, clip: f64) -> Self {
        Self {
            beta1: config.beta1 as f32,
            beta2: config.beta2 as f32,
            rate: (learning_rate / (1.0 - config.beta1.powi(updates))) as f32,
            root: (1.0 - config.beta2.powi(updates)).sqrt() as f32,
            clip: clip as f32,
        }
    }

    fn apply(&self, values: &mut [f32], moments: &mut Moments, gradient: &[f32], decay: f32) {
        let Self { beta1, beta2, rate, root, clip } = *self;
        values.par_iter_mut().zip(&mut moments.first).zip(&mut moments.second).zip(gradient).with_min_len(1 << 14).for_each(
            |(((value, first), second), &gradient)| {
                let gradient = gradient * clip;
                *first = beta1 * *first + (1.0 - beta1) * gradient;
                *second = beta2 * *second + (1.0 - beta2) * gradient * gradient;
                *value -= decay * *value + rate * *first / (second.sqrt() / root + EPSILON as f32);
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewed_values_take_no_step_beyond_the_rate() {
        let config = OptimizerConfig {
            learning_rate: 0.1,
            final_ratio: 1.0,
            warmup_steps: 0,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            clip_norm: 1e9,
        };
        let var = candle_core::Var::zeros(3, candle_core::DType::F32, &Device::Cpu).unwrap();
        let parameters = [Parameter { name: "experts".into(), part: Part::Experts, var, decay: false }];
        let var = &parameters[0].var;
        let mut optimizer = AdamW::new(config, &parameters);
        let rates = Rates { rate: 0.1, router: 1.0, learning: Learning::All };
        // The gradient is the given one.
        let step = |optimizer: &mut AdamW, gradient: [f32; 3]| {
            let loss = (var.as_tensor() * Tensor::new(&gradient, &Device::Cpu).unwrap()).unwrap().sum_all().unwrap();
            optimizer.step(&parameters, &loss.backward().unwrap(), rates).unwrap();
            var.to_vec1::<f32>().unwrap()[1]
        };
        (0..500).for_each(|_| _ = step(&mut optimizer, [1.0, 5.0, 2.0]));
        optimizer.renew(0, 1..2, 0..1);
        let mut was = var.to_vec1::<f32>().unwrap()[1];
        for _ in 0..50 {
            let now = step(&mut optimizer, [1.0, 1.0, 2.0]);
            assert!(now < was && was - now <= 0.1 + 1e-4, "{}", was - now);
            was = now;
        }
    }
}
