//! Gradients of parameters, of one backward or summed over several, where the parameters are.

use candle_core::{Tensor, backprop::GradStore};

use super::trainable::{Learning, Parameter};
use crate::error::{Error, Result};

/// In the order of the parameters, f32 and in their shape; `None` for those that do not learn.
#[derive(Clone, Debug)]
pub struct Gradients(Vec<Option<Tensor>>);

impl Gradients {
    /// None yet.
    pub fn none(parameters: &[Parameter]) -> Self {
        Self(vec![None; parameters.len()])
    }

    /// Adds what a backward, of all of the model or of a part, left for `parameters`.
    pub fn add(&mut self, parameters: &[Parameter], learning: Learning, mut store: GradStore) -> Result<()> {
        for (parameter, sum) in parameters.iter().zip(&mut self.0).filter(|(parameter, _)| learning.moves(parameter.part)) {
            let Some(grad) = store.remove(parameter.var.as_tensor()) else { continue };
            // What it was made of goes with the graph.
            let grad = grad.detach().contiguous()?;
            *sum = Some(match sum.take() {
                Some(sum) => (sum + grad)?,
                None => grad,
            });
        }
        Ok(())
    }

    /// Whether every parameter that learns has one.
    ///
    /// # Errors
    /// `Internal` otherwise.
    pub fn check(&self, parameters: &[Parameter], learning: Learning) -> Result<()> {
        let missing = parameters.iter().zip(&self.0).find(|(parameter, gradient)| learning.moves(parameter.part) && gradient.is_none());
        missing.map_or(Ok(()), |(parameter, _)| Err(Error::Internal(format!("no gradient reached {}", parameter.name))))
    }

    /// Those of each parameter.
    pub fn iter(&self) -> impl Iterator<Item = Option<&Tensor>> {
        self.0.iter().map(Option::as_ref)
    }
}
