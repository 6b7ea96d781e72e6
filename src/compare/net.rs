//! The small net of the laboratory: a linear router over experts, f64, gradients by hand.
//!
//! Routing and its gradient are not here: `moe::estimator` gives weights and takes credit, the same code as in training.
//! Legend: T rows, E experts, D features (the last is 1), G router outputs, O outputs, P parameters of an expert.

use std::ops::Range;

use super::{expert::ExpertShape, random::Random};
use crate::moe::estimator::{Combine, Execution, RoutedBatch};

/// Sizes of a net.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// E.
    pub experts: usize,
    /// G.
    pub router_width: usize,
    /// One expert.
    pub expert: ExpertShape,
}

/// Weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Net {
    /// Sizes.
    pub shape: Shape,
    /// `[G, D]`.
    pub router: Vec<f64>,
    /// `[E, P]`.
    pub experts: Vec<f64>,
}

/// Gradients of a net's weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients {
    /// `[G, D]`.
    pub router: Vec<f64>,
    /// `[E, P]`.
    pub experts: Vec<f64>,
    /// Rows whose gradient went into an expert's weights: counted, not derived.
    pub rows: usize,
}

/// Running means of the experts' outputs, which stand in for those that did not run.
#[derive(Clone, Debug, PartialEq)]
pub struct Means {
    /// `[E, O]`.
    pub outputs: Vec<f64>,
    /// Whether an expert has run yet, `[E]`.
    pub seen: Vec<bool>,
}

/// Outputs, and what the backward needs.
#[derive(Clone, Debug)]
pub struct Forward {
    /// `[T, O]`.
    pub y: Vec<f64>,
    /// Rows pushed through an expert: counted, not derived.
    pub executed: usize,
    /// `(token, expert)` of every executed row, R; the expert of a merged row is 0.
    rows: Vec<(usize, usize)>,
    /// `[R, O]`.
    outputs: Vec<f64>,
    /// `[R, H]`.
    active: Vec<f64>,
}

/// Deviation of initial weights times the root of a layer's inputs: that of the usual uniform ones in `±1/√D`.
const INITIAL_STD: f64 = 0.577;

impl Net {
    /// Random weights of `seed`; `handicap [E]` is added to the bias of the router. The first E rows of the router are the
    /// same whatever its width.
    pub fn new(shape: Shape, seed: u64, handicap: &[f64]) -> Self {
        let ExpertShape { features, hidden, outputs } = shape.expert;
        let mut random = Random::new(seed, "router");
        let mut router = random.normals(shape.router_width * features, INITIAL_STD / (features as f64).sqrt());
        for (row, head_start) in router.chunks_exact_mut(features).zip(handicap) {
            row[features - 1] += head_start;
        }
        let mut random = Random::new(seed, "experts");
        let mut experts = Vec::with_capacity(shape.experts * shape.expert.parameters());
        for _ in 0..shape.experts {
            let inner = if hidden == 0 { outputs } else { hidden };
            experts.extend(random.normals(features * inner, INITIAL_STD / (features as f64).sqrt()));
            if hidden > 0 {
                experts.extend(random.normals(hidden * outputs, INITIAL_STD / (hidden as f64).sqrt()));
                experts.extend(vec![0.0; outputs]);
            }
        }
        Self { shape, router, experts }
    }

    /// Sets rows of the router to 0.
    pub fn zero_router_rows(&mut self, rows: Range<usize>) {
        let features = self.shape.expert.features;
        self.router[rows.start * features..rows.end * features].fill(0.0);
    }

    /// Router outputs `[T, G]`.
    pub fn logits(&self, x: &[f64]) -> Vec<f64> {
        let features = self.shape.expert.features;
        let mut z = Vec::with_capacity(x.len() / features * self.shape.router_width);
        for x in x.chunks_exact(features) {
            z.extend(self.router.chunks_exact(features).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>()));
        }
        z
    }

    /// Outputs of every expert for every row, `[T, E, O]`.
    pub fn all_outputs(&self, x: &[f64]) -> Vec<f64> {
        let ExpertShape { features, hidden, outputs } = self.shape.expert;
        let mut all = vec![0.0; x.len() / features * self.shape.experts * outputs];
        let mut active = vec![0.0; hidden];
        for (x, y) in x.chunks_exact(features).zip(all.chunks_exact_mut(self.shape.experts * outputs)) {
            for (expert, y) in y.chunks_exact_mut(outputs).enumerate() {
                self.shape.expert.forward(self.expert(expert), x, &mut active, y);
            }
        }
        all
    }

    /// Runs what the routing asks for. `means` are read where the estimator combines with means.
    pub fn forward(&self, x: &[f64], routed: &RoutedBatch, combine: Combine, means: &Means) -> Forward {
        let ExpertShape { features, hidden, outputs } = self.shape.expert;
        let rows = rows_to_run(routed, combine);
        let mut forward = Forward {
            y: vec![0.0; routed.tokens * outputs],
            executed: rows.len(),
            outputs: vec![0.0; rows.len() * outputs],
            active: vec![0.0; rows.len() * hidden],
            rows,
        };
        let mut merged = Vec::new();
        for (r, &(t, e)) in forward.rows.iter().enumerate() {
            let weights = &routed.weights[t * routed.experts..][..routed.experts];
            let (parameters, weight) = match combine {
                Combine::Merged => {
                    self.merge(weights, &mut merged);
                    (&merged[..], 1.0)
                }
                Combine::Mixture(_) | Combine::Means { .. } => (self.expert(e), weights[e]),
            };
            let y = &mut forward.outputs[r * outputs..][..outputs];
            let active = &mut forward.active[r * hidden..][..hidden];
            self.shape.expert.forward(parameters, &x[t * features..][..features], active, y);
            add_scaled(&mut forward.y[t * outputs..][..outputs], y, weight);
        }
        if matches!(combine, Combine::Means { .. }) {
            for_stand_ins(routed, |t, e| {
                add_scaled(
                    &mut forward.y[t * outputs..][..outputs],
                    &means.outputs[e * outputs..][..outputs],
                    routed.weights[t * routed.experts + e],
                );
            });
        }
        forward
    }

    /// Adds the experts' gradients for `dy [T, O]` to `gradients`; returns the credit `∂L/∂w [T, E]`, 0 where nothing ran.
    pub fn backward(&self, pass: &Pass<'_>, dy: &[f64], gradients: &mut Gradients) -> Vec<f64> {
        let ExpertShape { features, hidden, outputs } = self.shape.expert;
        let Pass { x, routed, combine, means, forward } = *pass;
        let mut credit = vec![0.0; routed.tokens * routed.experts];
        let size = self.shape.expert.parameters();
        let (mut merged, mut d_merged, mut d_row) = (Vec::new(), vec![0.0; size], vec![0.0; outputs]);
        for (r, &(t, e)) in forward.rows.iter().enumerate() {
            let weights = &routed.weights[t * routed.experts..][..routed.experts];
            let credit = &mut credit[t * routed.experts..][..routed.experts];
            let dy = &dy[t * outputs..][..outputs];
            let active = &forward.active[r * hidden..][..hidden];
            let x = &x[t * features..][..features];
            if combine == Combine::Merged {
                self.merge(weights, &mut merged);
                d_merged.fill(0.0);
                self.shape.expert.backward(&merged, x, active, dy, &mut d_merged);
                gradients.rows += 1;
                let experts = self.experts.chunks_exact(size).zip(gradients.experts.chunks_exact_mut(size));
                for (((parameters, gradient), weight), credit) in experts.zip(weights).zip(credit) {
                    *credit = dot(parameters, &d_merged);
                    add_scaled(gradient, &d_merged, *weight);
                }
                continue;
            }
            credit[e] = dot(dy, &forward.outputs[r * outputs..][..outputs]);
            if weights[e] != 0.0 {
                d_row.iter_mut().zip(dy).for_each(|(d, g)| *d = weights[e] * g);
                self.shape.expert.backward(self.expert(e), x, active, &d_row, &mut gradients.experts[e * size..][..size]);
                gradients.rows += 1;
            }
        }
        if matches!(combine, Combine::Means { .. }) {
            for_stand_ins(routed, |t, e| {
                credit[t * routed.experts + e] = dot(&dy[t * outputs..][..outputs], &means.outputs[e * outputs..][..outputs]);
            });
        }
        credit
    }

    /// Adds the router's gradient for `dz [T, G]` to `gradients`.
    pub fn backward_router(&self, x: &[f64], dz: &[f64], gradients: &mut Gradients) {
        let features = self.shape.expert.features;
        for (x, dz) in x.chunks_exact(features).zip(dz.chunks_exact(self.shape.router_width)) {
            for (row, d) in gradients.router.chunks_exact_mut(features).zip(dz) {
                if *d != 0.0 {
                    add_scaled(row, x, *d);
                }
            }
        }
    }

    /// Parameters of one expert.
    pub fn expert(&self, expert: usize) -> &[f64] {
        let size = self.shape.expert.parameters();
        &self.experts[expert * size..][..size]
    }

    fn merge(&self, weights: &[f64], merged: &mut Vec<f64>) {
        merged.clear();
        merged.resize(self.shape.expert.parameters(), 0.0);
        for (parameters, weight) in self.experts.chunks_exact(self.shape.expert.parameters()).zip(weights) {
            add_scaled(merged, parameters, *weight);
        }
    }
}

/// A forward as its backward sees it.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// `[T, D]`.
    pub x: &'a [f64],
    /// What was routed.
    pub routed: &'a RoutedBatch,
    /// How outputs became one.
    pub combine: Combine,
    /// As in the forward.
    pub means: &'a Means,
    /// Its result.
    pub forward: &'a Forward,
}

impl Gradients {
    /// Zeros.
    pub fn new(net: &Net) -> Self {
        Self { router: vec![0.0; net.router.len()], experts: vec![0.0; net.experts.len()], rows: 0 }
    }
}

impl Means {
    /// Nothing has run.
    pub fn new(experts: usize, outputs: usize) -> Self {
        Self { outputs: vec![0.0; experts * outputs], seen: vec![false; experts] }
    }

    /// Moves the mean of every expert that ran towards the mean of what it gave; the first time sets it.
    pub fn update(&mut self, forward: &Forward, decay: f64) {
        let outputs = self.outputs.len() / self.seen.len().max(1);
        let mut sums = vec![0.0; self.outputs.len()];
        let mut counts = vec![0.0; self.seen.len()];
        for (&(_, e), y) in forward.rows.iter().zip(forward.outputs.chunks_exact(outputs)) {
            add_scaled(&mut sums[e * outputs..][..outputs], y, 1.0);
            counts[e] += 1.0;
        }
        for (e, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0.0) {
            let keep = if self.seen[e] { decay } else { 0.0 };
            let means = &mut self.outputs[e * outputs..][..outputs];
            means.iter_mut().zip(&sums[e * outputs..][..outputs]).for_each(|(m, s)| *m = keep * *m + (1.0 - keep) * s / count);
            self.seen[e] = true;
        }
    }
}

fn rows_to_run(routed: &RoutedBatch, combine: Combine) -> Vec<(usize, usize)> {
    let chosen = |t: usize| routed.chosen[routed.offsets[t] as usize..routed.offsets[t + 1] as usize].iter();
    match (combine, routed.execution) {
        (Combine::Merged, _) => (0..routed.tokens).map(|t| (t, 0)).collect(),
        (_, Execution::All) => (0..routed.tokens).flat_map(|t| (0..routed.experts).map(move |e| (t, e))).collect(),
        (_, Execution::Chosen) => (0..routed.tokens).flat_map(|t| chosen(t).map(move |&e| (t, e as usize))).collect(),
    }
}

/// Calls `f` for every expert of every token that did not run.
fn for_stand_ins(routed: &RoutedBatch, mut f: impl FnMut(usize, usize)) {
    for t in 0..routed.tokens {
        let chosen = &routed.chosen[routed.offsets[t] as usize..routed.offsets[t + 1] as usize];
        (0..routed.experts).filter(|e| !chosen.contains(&(*e as u32))).for_each(|e| f(t, e));
    }
}

fn add_scaled(to: &mut [f64], from: &[f64], factor: f64) {
    to.iter_mut().zip(from).for_each(|(a, b)| *a += factor * b);
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
