//! AdamW with a state that can be saved.
//!
//! candle's own keeps its moments private, so a run on it cannot be resumed.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, backprop::GradStore};
use rayon::prelude::*;

use super::{config::OptimizerConfig, trainable::Parameter};
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
    /// Parameters moved; the global norm of the gradients before clipping.
    Updated {
        /// L2 norm over all parameters.
        grad_norm: f64,
    },
    /// A gradient was not finite: nothing moved.
    Skipped,
}

const EPSILON: f64 = 1e-8;

impl AdamW {
    /// Zero moments for `parameters`.
    pub fn new(config: OptimizerConfig, parameters: &[Parameter]) -> Self {
        let zeros = |p: &Parameter| Moments { first: vec![0.0; p.var.elem_count()], second: vec![0.0; p.var.elem_count()] };
        Self { config, updates: 0, moments: parameters.iter().map(zeros).collect() }
    }

    /// One update at `learning_rate`. Every parameter must have a gradient.
    pub fn step(&mut self, parameters: &[Parameter], grads: &GradStore, learning_rate: f64) -> Result<Outcome> {
        let mut gradients = Vec::with_capacity(parameters.len());
        for parameter in parameters {
            let Some(grad) = grads.get(parameter.var.as_tensor()) else {
                return Err(Error::Internal(format!("no gradient reached {}", parameter.name)));
            };
            gradients.push(grad.flatten_all()?.to_vec1::<f32>()?);
        }
        let square: f64 = gradients.iter().flatten().map(|&g| f64::from(g) * f64::from(g)).sum();
        let grad_norm = square.sqrt();
        if !grad_norm.is_finite() {
            return Ok(Outcome::Skipped);
        }
        self.updates += 1;
        let rule = Rule::new(&self.config, self.updates, learning_rate, (self.config.clip_norm / grad_norm).min(1.0));
        for ((parameter, moments), gradient) in parameters.iter().zip(&mut self.moments).zip(&gradients) {
            let mut values = parameter.var.flatten_all()?.to_vec1::<f32>()?;
            let decay = if parameter.decay { learning_rate * self.config.weight_decay } else { 0.0 };
            rule.apply(&mut values, moments, gradient, decay as f32);
            parameter.var.set(&Tensor::from_vec(values, parameter.var.shape(), parameter.var.device())?)?;
        }
        Ok(Outcome::Updated { grad_norm })
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
