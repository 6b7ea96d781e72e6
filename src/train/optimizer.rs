//! AdamW with a state that can be saved.
//!
//! candle's own keeps its moments private, so a run on it cannot be resumed.
//!
//! Values and moments are f32, whatever products the model makes of the values: an update that is smaller than the last bit of bf16 is kept.
//! On the CPU they are changed in one pass over memory, on a device by candle's operations, a piece at a time and in place.

use std::{collections::BTreeMap, ops::Range};

use candle_core::{D, DType, Device, Tensor};
use rayon::prelude::*;

use super::{
    config::OptimizerConfig,
    gradients::Gradients,
    trainable::{Parameter, Part},
};
use crate::{
    error::{Error, Result},
    ops::{self, cpu_slice},
};

/// AdamW (Loshchilov and Hutter 2019), f32 moments.
#[derive(Debug)]
pub struct AdamW {
    config: OptimizerConfig,
    /// Updates done: the exponent of the bias correction.
    updates: i32,
    /// In the order of the parameters.
    moments: Vec<Moments>,
}

/// Of one parameter, where it is.
#[derive(Debug)]
enum Moments {
    Here {
        first: Vec<f32>,
        second: Vec<f32>,
    },
    /// In the shape of the parameter.
    Device {
        first: Tensor,
        second: Tensor,
    },
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
    /// The experts' learning rate over it.
    pub experts: f64,
}

impl Rates {
    fn of(&self, part: Part) -> f64 {
        match part {
            Part::Router => self.rate * self.router,
            Part::Experts => self.rate * self.experts,
            Part::Body => self.rate,
        }
    }
}

const EPSILON: f64 = 1e-8;

/// Values that are updated at once on a device: what candle's operations make in between is as large, several times.
const PIECE: usize = 1 << 24;

impl AdamW {
    /// Zero moments for `parameters`.
    pub fn new(config: OptimizerConfig, parameters: &[Parameter]) -> Result<Self> {
        let moments = parameters.iter().map(Moments::zeros).collect::<Result<_>>()?;
        Ok(Self { config, updates: 0, moments })
    }

    /// One update of the parameters that have a gradient.
    pub fn step(&mut self, parameters: &[Parameter], gradients: &Gradients, rates: Rates) -> Result<Outcome> {
        let squares = squares(parameters, gradients)?;
        let grad_norm = squares.iter().map(|(_, square)| square).sum::<f64>().sqrt();
        let router_norm = squares.iter().filter(|(part, _)| *part == Part::Router).map(|(_, square)| square).sum::<f64>().sqrt();
        if !grad_norm.is_finite() {
            return Ok(Outcome::Skipped);
        }
        self.updates += 1;
        let clip = (self.config.clip_norm / grad_norm).min(1.0);
        for ((parameter, moments), gradient) in parameters.iter().zip(&mut self.moments).zip(gradients.iter()) {
            let Some(gradient) = gradient else { continue };
            let rate = rates.of(parameter.part);
            let decay = if parameter.decay { rate * self.config.weight_decay } else { 0.0 };
            let rule = Rule::new(&self.config, self.updates, rate, clip);
            match moments {
                Moments::Here { first, second } => {
                    let mut values = parameter.var.flatten_all()?.to_vec1::<f32>()?;
                    cpu_slice::<f32, _>(gradient, |gradient| {
                        rule.apply(&mut values, [first, second], gradient, decay as f32);
                        Ok(())
                    })?;
                    parameter.var.set(&Tensor::from_vec(values, parameter.var.shape(), parameter.var.device())?)?;
                }
                Moments::Device { first, second } => {
                    rule.apply_on_device([&parameter.var.as_detached_tensor(), first, second, gradient], decay)?;
                }
            }
        }
        Ok(Outcome::Updated { grad_norm, router_norm })
    }

    /// Values of the parameter at `index` that were replaced by others of it, as many, start from rest with the scale of
    /// the others' gradients. Without a scale the first steps would be several times the rate: the bias correction counts
    /// all updates.
    pub fn renew(&mut self, index: usize, values: Range<usize>, from: Range<usize>) -> Result<()> {
        match self.moments.get_mut(index) {
            Some(Moments::Here { first, second }) => {
                first[values.clone()].fill(0.0);
                second.copy_within(from, values.start);
            }
            Some(Moments::Device { first, second }) => {
                let (first, second) = (first.flatten_all()?, second.flatten_all()?);
                first.slice_set(&Tensor::zeros(values.len(), DType::F32, first.device())?, 0, values.start)?;
                second.slice_set(&second.narrow(0, from.start, from.len())?.force_contiguous()?, 0, values.start)?;
            }
            None => {}
        }
        Ok(())
    }

    /// Updates done and moments by name, `NAME.first` and `NAME.second`, on the host.
    pub fn state(&self, parameters: &[Parameter]) -> Result<(i32, BTreeMap<String, Tensor>)> {
        let mut tensors = BTreeMap::new();
        for (parameter, moments) in parameters.iter().zip(&self.moments) {
            for (part, tensor) in ["first", "second"].into_iter().zip(moments.on_host(parameter)?) {
                tensors.insert(format!("{}.{part}", parameter.name), tensor);
            }
        }
        Ok((self.updates, tensors))
    }

    /// The inverse of [`AdamW::state`].
    pub fn restore(&mut self, parameters: &[Parameter], updates: i32, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        for (parameter, moments) in parameters.iter().zip(&mut self.moments) {
            let saved = |part: &str| saved(tensors, format!("{}.{part}", parameter.name), parameter);
            *moments = Moments::of([saved("first")?, saved("second")?], parameter)?;
        }
        self.updates = updates;
        Ok(())
    }
}

impl Moments {
    fn zeros(parameter: &Parameter) -> Result<Self> {
        let var = &parameter.var;
        if ops::runs_here(var.device()) {
            return Ok(Self::Here { first: vec![0.0; var.elem_count()], second: vec![0.0; var.elem_count()] });
        }
        let zeros = || Tensor::zeros(var.shape(), DType::F32, var.device());
        Ok(Self::Device { first: zeros()?, second: zeros()? })
    }

    /// Copies of saved ones.
    fn of([first, second]: [&Tensor; 2], parameter: &Parameter) -> Result<Self> {
        let device = parameter.var.device();
        if ops::runs_here(device) {
            let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
            return Ok(Self::Here { first: values(first)?, second: values(second)? });
        }
        let placed = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.to_device(device)?.force_contiguous();
        Ok(Self::Device { first: placed(first)?, second: placed(second)? })
    }

    fn on_host(&self, parameter: &Parameter) -> Result<[Tensor; 2]> {
        Ok(match self {
            Self::Here { first, second } => {
                let tensor = |values: &[f32]| Tensor::from_slice(values, parameter.var.shape(), &Device::Cpu);
                [tensor(first)?, tensor(second)?]
            }
            Self::Device { first, second } => [first.to_device(&Device::Cpu)?, second.to_device(&Device::Cpu)?],
        })
    }
}

/// The tensor `name` of a saved state, in the shape of its parameter.
fn saved<'a>(tensors: &'a BTreeMap<String, Tensor>, name: String, parameter: &Parameter) -> Result<&'a Tensor> {
    let tensor = tensors.get(&name).ok_or_else(|| Error::FailedPrecondition(format!("the saved state lacks {name}")))?;
    if tensor.shape() != parameter.var.shape() {
        return Err(Error::FailedPrecondition(format!("the saved {name} has shape {:?}", tensor.shape())));
    }
    Ok(tensor)
}

/// Of each parameter that has a gradient: what it belongs to, and the sum of its gradient's squares. Waits for a device once.
fn squares(parameters: &[Parameter], gradients: &Gradients) -> Result<Vec<(Part, f64)>> {
    let given = || parameters.iter().zip(gradients.iter()).filter_map(|(parameter, gradient)| Some((parameter, gradient?)));
    let mut sums = Vec::new();
    let mut squares = Vec::new();
    for (parameter, gradient) in given() {
        if ops::runs_here(gradient.device()) {
            let square = |gradient: &[f32]| Ok(gradient.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>());
            squares.push((parameter.part, cpu_slice::<f32, _>(gradient, square)?));
        } else {
            // Row by row first: a sum of everything is one block's on a device, and its f32 would have to hold millions of values.
            sums.push(gradient.sqr()?.sum(D::Minus1)?.sum_all()?);
        }
    }
    if !sums.is_empty() {
        let sums = Tensor::stack(&sums, 0)?.to_vec1::<f32>()?;
        squares.extend(given().zip(sums).map(|((parameter, _), sum)| (parameter.part, f64::from(sum))));
    }
    Ok(squares)
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

    fn apply(&self, values: &mut [f32], [firsts, seconds]: [&mut Vec<f32>; 2], gradient: &[f32], decay: f32) {
        let Self { beta1, beta2, rate, root, clip } = *self;
        values.par_iter_mut().zip(firsts).zip(seconds).zip(gradient).with_min_len(1 << 14).for_each(
            |(((value, first), second), &gradient)| {
                let gradient = gradient * clip;
                *first = beta1 * *first + (1.0 - beta1) * gradient;
                *second = beta2 * *second + (1.0 - beta2) * gradient * gradient;
                *value -= decay * *value + rate * *first / (second.sqrt() / root + EPSILON as f32);
            },
        );
    }

    /// [`Rule::apply`] to tensors of one shape: values, both moments, gradient. Values and moments are written in place.
    fn apply_on_device(&self, [values, firsts, seconds, gradient]: [&Tensor; 4], decay: f64) -> Result<()> {
        let [beta1, beta2, rate, root, clip] = [self.beta1, self.beta2, self.rate, self.root, self.clip].map(f64::from);
        let rows = values.dim(0)?;
        let step = (PIECE / (values.elem_count() / rows.max(1)).max(1)).max(1);
        for start in (0..rows).step_by(step) {
            let part = |tensor: &Tensor| tensor.narrow(0, start, step.min(rows - start));
            let gradient = (part(gradient)? * clip)?;
            let first = ((part(firsts)? * beta1)? + (&gradient * (1.0 - beta1))?)?;
            let second = ((part(seconds)? * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
            let moved = ((&first * rate)? / ((second.sqrt()? / root)? + EPSILON)?)?;
            let value = part(values)?;
            let value = (&value - ((&value * decay)? + moved)?)?;
            for (whole, part) in [(firsts, first), (seconds, second), (values, value)] {
                whole.slice_set(&part, 0, start)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ops::as_on_a_device, train::trainable::Learning};

    #[test]
    fn renewed_values_take_no_step_beyond_the_rate() {
        check_renewal();
        as_on_a_device(check_renewal);
    }

    fn check_renewal() {
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
        let mut optimizer = AdamW::new(config, &parameters).unwrap();
        let rates = Rates { rate: 0.1, router: 1.0, experts: 1.0 };
        // The gradient is the given one.
        let step = |optimizer: &mut AdamW, gradient: [f32; 3]| {
            let loss = (var.as_tensor() * Tensor::new(&gradient, &Device::Cpu).unwrap()).unwrap().sum_all().unwrap();
            let mut gradients = Gradients::none(&parameters);
            gradients.add(&parameters, Learning::All, loss.backward().unwrap()).unwrap();
            optimizer.step(&parameters, &gradients, rates).unwrap();
            var.to_vec1::<f32>().unwrap()[1]
        };
        (0..500).for_each(|_| _ = step(&mut optimizer, [1.0, 5.0, 2.0]));
        optimizer.renew(0, 1..2, 0..1).unwrap();
        let mut was = var.to_vec1::<f32>().unwrap()[1];
        for _ in 0..50 {
            let now = step(&mut optimizer, [1.0, 1.0, 2.0]);
            assert!(now < was && was - now <= 0.1 + 1e-4, "{}", was - now);
            was = now;
        }
    }

    /// The update of a device is that of the CPU, piece by piece, with decay and clipping.
    #[test]
    fn both_forms_of_the_update_agree() {
        let config = OptimizerConfig {
            learning_rate: 0.1,
            final_ratio: 1.0,
            warmup_steps: 0,
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            clip_norm: 0.5,
        };
        let values = |salt: usize| (0..24).map(|i| ((i * 7 + salt) % 11) as f32 / 5.0 - 1.0).collect::<Vec<f32>>();
        let tensor = |salt: usize| Tensor::from_vec(values(salt), (2, 3, 4), &Device::Cpu).unwrap();
        let run = || {
            let var = candle_core::Var::from_tensor(&tensor(0)).unwrap();
            let parameters = [Parameter { name: "experts".into(), part: Part::Experts, var, decay: true }];
            let mut optimizer = AdamW::new(config.clone(), &parameters).unwrap();
            let mut told = Vec::new();
            for step in 0..5 {
                let loss = (parameters[0].var.as_tensor() * tensor(step + 1)).unwrap().sum_all().unwrap();
                let mut gradients = Gradients::none(&parameters);
                gradients.add(&parameters, Learning::All, loss.backward().unwrap()).unwrap();
                told.push(optimizer.step(&parameters, &gradients, Rates { rate: 1e-2, router: 1.0, experts: 0.5 }).unwrap());
            }
            let nan = (parameters[0].var.as_tensor() * f64::NAN).unwrap().sum_all().unwrap();
            let mut gradients = Gradients::none(&parameters);
            gradients.add(&parameters, Learning::All, nan.backward().unwrap()).unwrap();
            told.push(optimizer.step(&parameters, &gradients, Rates { rate: 1e-2, router: 1.0, experts: 1.0 }).unwrap());
            let (updates, state) = optimizer.state(&parameters).unwrap();
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            (told, updates, flat(&parameters[0].var), state.values().map(flat).collect::<Vec<_>>().concat())
        };
        let (here, there) = (run(), as_on_a_device(run));
        assert_eq!((here.1, there.1, here.0[5], there.0[5]), (5, 5, Outcome::Skipped, Outcome::Skipped));
        let near = |a: &[f32], b: &[f32]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(near(&here.2, &there.2) && near(&here.3, &there.3), "{:?} {:?}", here.2, there.2);
        for pair in here.0.iter().zip(&there.0).take(5) {
            let (Outcome::Updated { grad_norm: a, .. }, Outcome::Updated { grad_norm: b, .. }) = pair else { panic!("{pair:?}") };
            assert!((a - b).abs() < 1e-5 * a, "{a} {b}");
        }
    }
}
