//! The forward: from router outputs to weights.

use super::{
    Combine, Estimator, Execution, Noise, NoiseKind, Phase, Relaxation, RoutedBatch, Scope, Selection, StepContext, Weights,
    batch::{finite, mass},
    relax,
    select::Candidates,
};
use crate::moe::{capacity::CapacityReport, choices::Choices, draw::Stream, explore::Exploration};

impl Estimator {
    /// Routes `z [T, G]`, G as [`Estimator::router_width`] has it. A row that is not finite gets no expert and weight 0.
    pub fn route(&self, z: &[f64], experts: usize, ctx: &StepContext<'_>) -> RoutedBatch {
        let width = self.router_width(experts).max(1);
        let mut pass = Pass { estimator: self, ctx, batch: self.empty(experts, z.len() / width, ctx), hidden: vec![false; experts] };
        z.chunks_exact(width).for_each(|z| pass.row(z));
        let mut batch = pass.batch;
        Choices { offsets: batch.offsets, chosen: batch.chosen } = self.limit(&mut batch, ctx);
        let mut weights = vec![0.0; batch.relaxed.len()];
        for (token, weights) in weights.chunks_exact_mut(experts.max(1)).enumerate() {
            self.weigh(&batch, token, ctx, weights);
        }
        batch.weights = weights;
        batch
    }

    /// What capacity leaves of the choices. Copies of the data are batches of their own: a draw must not be displaced
    /// by another draw of the same token, nor the greedy copy by any.
    fn limit(&self, batch: &mut RoutedBatch, ctx: &StepContext<'_>) -> Choices {
        let (Phase::Train, Some(capacity), Selection::TopK { k }) = (ctx.phase, ctx.capacity, self.selection) else {
            return batch.wanted.clone();
        };
        let mut left = Choices::from_rows::<[u32; 0]>([]);
        for copy in batch.relaxed.chunks(ctx.copy_rows.saturating_mul(batch.experts).max(1)) {
            let from = left.rows().tokens();
            let mut choices = batch.wanted().part(from..from + copy.len() / batch.experts.max(1));
            let report = capacity.apply(&mut choices, copy, batch.experts, k);
            batch.capacity.dropped += report.dropped;
            batch.capacity.rerouted += report.rerouted;
            left.extend(choices.rows());
        }
        left
    }

    fn empty(&self, experts: usize, tokens: usize, ctx: &StepContext<'_>) -> RoutedBatch {
        let row = || Vec::with_capacity(tokens * experts);
        RoutedBatch {
            experts,
            tokens: 0,
            weights: Vec::new(),
            offsets: Vec::new(),
            chosen: Vec::new(),
            execution: match (self.combine, ctx.phase) {
                // Nobody asks for credit.
                (Combine::Mixture(_), Phase::Evaluate) if self.chooses_top_k() && self.weights != Weights::Relaxed => Execution::Chosen,
                (Combine::Mixture(execution), _) => execution,
                (Combine::Means { .. }, _) => Execution::Chosen,
                (Combine::Merged, _) => Execution::All,
            },
            capacity: CapacityReport::default(),
            wanted: Choices { offsets: vec![0], chosen: Vec::new() },
            relaxed: row(),
            point: row(),
            seen: row(),
            normals: Vec::new(),
            deviation: Vec::new(),
            bias: ctx.bias.map(<[f64]>::to_vec).unwrap_or_default(),
            dense: self.selection == Selection::All,
        }
    }

    /// A row sees noise and exploration.
    fn noisy(&self, ctx: &StepContext<'_>, token: usize) -> bool {
        ctx.phase == Phase::Train && token < self.greedy_from(ctx.copy_rows)
    }

    /// Router outputs are not one logit for each expert.
    pub(super) fn reads_columns(&self) -> bool {
        matches!(self.relaxation, Relaxation::SmoothStep { .. })
    }

    /// Weights of one row, into zeros.
    fn weigh(&self, batch: &RoutedBatch, token: usize, ctx: &StepContext<'_>, weights: &mut [f64]) {
        let (p, chosen) = (batch.relaxed_row(token), batch.rows().of(token));
        match self.weights {
            Weights::Relaxed => weights.copy_from_slice(p),
            Weights::Chosen => chosen.iter().for_each(|&e| weights[e as usize] = p[e as usize]),
            Weights::Renorm => {
                let sum = mass(p, chosen);
                // All of them underflowed: none is better than another.
                let weight = |e: u32| if sum > 0.0 { p[e as usize] / sum } else { 1.0 / chosen.len() as f64 };
                chosen.iter().for_each(|&e| weights[e as usize] = weight(e));
            }
            Weights::Unit => chosen.iter().for_each(|&e| weights[e as usize] = 1.0 / chosen.len() as f64),
            Weights::Corrected { star } => {
                for draw in self.draws(batch, token) {
                    let coin = ctx.draw.uniform(Stream::Weights, token as u64, draw.slot as u64) < if star { 0.625 } else { 0.25 };
                    let scale = if draw.largest || coin || !self.noisy(ctx, token) { 1.0 } else { 1.0 / 3.0 };
                    weights[draw.expert] = scale * draw.relaxed[draw.expert];
                }
            }
        }
    }

    /// Chosen experts of a token as draws without replacement, each with the relaxation of what was left.
    pub(super) fn draws(&self, batch: &RoutedBatch, token: usize) -> Vec<DrawOf> {
        let (wanted, chosen) = (batch.wanted().of(token), batch.rows().of(token));
        // Capacity may have given a draw to another expert.
        let mut free = (0..wanted.len()).filter(|&slot| !chosen.contains(&wanted[slot]));
        let slots: Vec<usize> = chosen.iter().filter_map(|e| wanted.iter().position(|w| w == e).or_else(|| free.next())).collect();
        let draw = |(&slot, &expert): (&usize, &u32)| {
            let mut point = batch.point_row(token).to_vec();
            wanted[..slot].iter().for_each(|&e| point[e as usize] = f64::NEG_INFINITY);
            let mut relaxed = vec![0.0; batch.experts];
            self.relaxation.value(&point, &mut relaxed);
            let largest = point[expert as usize] == relax::max(&point);
            DrawOf { slot, expert: expert as usize, largest, point, relaxed }
        };
        slots.iter().zip(chosen).map(draw).collect()
    }
}

/// One of the draws of a token.
pub(super) struct DrawOf {
    /// Its place among them.
    pub(super) slot: usize,
    pub(super) expert: usize,
    /// The expert has the largest logit of those left.
    pub(super) largest: bool,
    /// Logits, -inf for those drawn before.
    pub(super) point: Vec<f64>,
    pub(super) relaxed: Vec<f64>,
}

/// A forward under way: rows are appended to the batch one by one.
struct Pass<'a> {
    estimator: &'a Estimator,
    ctx: &'a StepContext<'a>,
    batch: RoutedBatch,
    /// `[E]`, experts left out for the row at hand.
    hidden: Vec<bool>,
}

impl Pass<'_> {
    fn row(&mut self, z: &[f64]) {
        if !finite(z) {
            return self.no_route(z);
        }
        self.hide();
        if self.estimator.reads_columns() {
            self.relax_columns(z);
        } else {
            self.relax_logits(z);
        }
        let chosen = self.choose();
        self.batch.wanted.push(&chosen);
        self.batch.tokens += 1;
    }

    fn noisy(&self) -> bool {
        self.estimator.noisy(self.ctx, self.batch.tokens)
    }

    fn uniform(&self, stream: Stream, column: usize) -> f64 {
        self.ctx.draw.uniform(stream, self.batch.tokens as u64, column as u64)
    }

    fn no_route(&mut self, z: &[f64]) {
        let Self { estimator, batch, .. } = self;
        let zeros = std::iter::repeat_n(0.0, batch.experts);
        if estimator.reads_columns() {
            batch.point.extend(z);
        } else {
            batch.point.extend(zeros.clone());
        }
        if estimator.noise.kind == NoiseKind::Learned {
            batch.normals.extend(zeros.clone());
            batch.deviation.extend(zeros.clone().filter(|_| self.ctx.phase == Phase::Train));
        }
        batch.seen.extend(zeros.clone());
        batch.relaxed.extend(zeros);
        batch.wanted.push(&[]);
        batch.tokens += 1;
    }

    /// Draws who is left out, by the method or by the run.
    fn hide(&mut self) {
        let Self { estimator, ctx, batch, hidden } = self;
        let dropout = 1.0 - (1.0 - estimator.noise.dropout) * (1.0 - ctx.explore.dropout);
        if dropout > 0.0 {
            let dropout = if estimator.noisy(ctx, batch.tokens) { dropout } else { 0.0 };
            let uniform = |e| ctx.draw.uniform(Stream::Dropout, batch.tokens as u64, e as u64);
            Exploration { dropout, ..ctx.explore }.hide(hidden, estimator.k(), uniform);
        }
    }

    /// Nothing is hidden here: [`ChoiceChange::Dropout`](super::ChoiceChange) is refused.
    fn relax_columns(&mut self, z: &[f64]) {
        let Self { estimator, batch, .. } = self;
        batch.point.extend(z);
        let from = batch.relaxed.len();
        batch.relaxed.resize(from + batch.experts, 0.0);
        estimator.relaxation.value(z, &mut batch.relaxed[from..]);
        batch.seen.extend_from_slice(&batch.relaxed[from..]);
    }

    /// Noise on a logit of the row, before a learned deviation. Columns from E on are further draws for the same experts.
    fn noise(&self, column: usize) -> f64 {
        let Noise { kind, scale, .. } = self.estimator.noise;
        let (token, column) = (self.batch.tokens as u64, column as u64);
        match kind {
            _ if scale == 0.0 || !self.noisy() => 0.0,
            NoiseKind::None => 0.0,
            NoiseKind::Gumbel => scale * self.ctx.draw.gumbel(Stream::Select, token, column),
            NoiseKind::Learned => scale * self.ctx.draw.normal(Stream::Select, token, column),
        }
    }

    fn relax_logits(&mut self, z: &[f64]) {
        let Noise { kind, scale, scope, .. } = self.estimator.noise;
        let noise: Vec<f64> = (0..self.batch.experts).map(|e| self.noise(e)).collect();
        let Self { estimator, ctx, batch, hidden } = self;
        let experts = batch.experts;
        for ((e, &hidden), noise) in hidden.iter().enumerate().zip(noise) {
            let deviation = if kind == NoiseKind::Learned { relax::deviation(z[experts + e]) } else { 1.0 };
            let clean = if hidden { f64::NEG_INFINITY } else { z[e] };
            let seen = clean + deviation * noise;
            batch.seen.push(seen);
            batch.point.push(if scope == Scope::Both { seen } else { clean });
            if kind == NoiseKind::Learned {
                batch.normals.push(noise);
                if ctx.phase == Phase::Train && scale > 0.0 {
                    batch.deviation.push(scale * deviation);
                }
            }
        }
        let from = batch.relaxed.len();
        batch.relaxed.resize(from + experts, 0.0);
        estimator.relaxation.value(&batch.point[from..], &mut batch.relaxed[from..]);
    }

    /// Experts of the row whose relaxation was appended last.
    fn choose(&self) -> Vec<u32> {
        let Self { estimator, ctx, batch, hidden } = self;
        let from = batch.relaxed.len() - batch.experts;
        if let (true, Selection::TopK { k }) = (self.noisy() && ctx.explore.epsilon > 0.0, estimator.selection) {
            // Hidden experts come last.
            let place = |e: usize| if hidden[e] { 2.0 } else { self.uniform(Stream::Epsilon, 1 + e) };
            if let Some(chosen) = ctx.explore.draw(batch.experts, k, self.uniform(Stream::Epsilon, 0), place) {
                return chosen;
            }
        }
        // Under columns there is no logit, and the score is the weight.
        let point = if estimator.reads_columns() { &batch.seen[from..] } else { &batch.point[from..] };
        let row = Candidates { point, seen: &batch.seen[from..], relaxed: &batch.relaxed[from..], bias: ctx.bias };
        estimator.choose(&row, |draw, expert| self.noise(draw * batch.experts + expert))
    }
}
