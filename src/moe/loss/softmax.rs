//! Router probabilities of a batch, and the way of a gradient back through them.

use super::LossInput;
use crate::error::{Error, Result};
pub(super) use crate::moe::softmax::softmax;

/// The input with `p = softmax(z / τ)` of every token whose logits are finite.
#[derive(Debug)]
pub(super) struct View<'a> {
    pub(super) input: &'a LossInput<'a>,
    /// Tokens with finite logits: those that losses are sums over.
    pub(super) live: Vec<usize>,
    /// Columns of `z`, G.
    width: usize,
    /// `[T, E]`; 0 for tokens that are not live.
    p: Vec<f64>,
}

/// Where gradients go: `dz [T, G]`, times `scale`.
#[derive(Debug)]
pub(super) struct Sink<'a> {
    pub(super) scale: f64,
    pub(super) dz: &'a mut [f64],
}

impl<'a> View<'a> {
    pub(super) fn new(input: &'a LossInput<'a>) -> Result<Self> {
        let (tokens, experts) = (input.choices.tokens(), input.experts);
        let width = input.z.len().checked_div(tokens).unwrap_or(experts);
        if input.z.len() != tokens * width || width < experts {
            let message = format!("{} logits are not {tokens} rows of at least {experts}", input.z.len());
            return Err(Error::Internal(message));
        }
        let mut view = Self { input, live: Vec::with_capacity(tokens), width, p: vec![0.0; tokens * experts] };
        for t in 0..tokens {
            let z = &input.z[t * width..][..experts];
            if z.iter().all(|z| z.is_finite()) {
                softmax(z, input.temperature, &mut view.p[t * experts..][..experts]);
                view.live.push(t);
            }
        }
        Ok(view)
    }

    pub(super) fn experts(&self) -> usize {
        self.input.experts
    }

    /// Live tokens, as a divisor.
    pub(super) fn tokens(&self) -> f64 {
        self.live.len().max(1) as f64
    }

    pub(super) fn z(&self, token: usize) -> &'a [f64] {
        &self.input.z[token * self.width..][..self.experts()]
    }

    pub(super) fn p(&self, token: usize) -> &[f64] {
        self.row(&self.p, token)
    }

    /// A token's row of some `[T, E]`.
    pub(super) fn row<'b>(&self, te: &'b [f64], token: usize) -> &'b [f64] {
        &te[token * self.experts()..][..self.experts()]
    }

    /// `Σ_t p_t` over the given tokens, `[E]`.
    pub(super) fn sum_p(&self, tokens: &[usize]) -> Vec<f64> {
        let mut sum = vec![0.0; self.experts()];
        for &t in tokens {
            sum.iter_mut().zip(self.p(t)).for_each(|(sum, p)| *sum += p);
        }
        sum
    }
}

impl Sink<'_> {
    /// Adds a gradient with respect to `z` of one token.
    pub(super) fn direct(&mut self, view: &View<'_>, token: usize, gradient: impl Fn(usize) -> f64) {
        let row = &mut self.dz[token * view.width..][..view.experts()];
        row.iter_mut().enumerate().for_each(|(e, dz)| *dz += self.scale * gradient(e));
    }

    /// Adds a gradient `v` with respect to `p` of one token: `p ⊙ (v - <p, v>) / τ`.
    pub(super) fn through_p(&mut self, view: &View<'_>, token: usize, v: impl Fn(usize) -> f64) {
        let p = view.p(token);
        let inner: f64 = p.iter().enumerate().map(|(e, p)| p * v(e)).sum();
        self.direct(view, token, |e| p[e] * (v(e) - inner) / view.input.temperature);
    }
}
