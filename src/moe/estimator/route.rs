//! The forward: from router outputs to weights.

use super::{
    Combine, Estimator, Execution, Noise, NoiseKind, Phase, Relaxation, Scope, Selection, StepContext, Weights, relax, select::Candidates,
};
use crate::moe::{
    RoutingStats,
    capacity::CapacityReport,
    choices::{ChoiceRows, Choices},
    draw::Stream,
    explore::Exploration,
};

/// A routed batch of T rows. Matrices are row-major.
#[derive(Clone, Debug)]
pub struct RoutedBatch {
    /// E.
    pub experts: usize,
    /// T.
    pub tokens: usize,
    /// `[T, E]`, weights of the forward.
    pub weights: Vec<f64>,
    /// `[T + 1]`; the chosen of token t are `chosen[offsets[t] .. offsets[t + 1]]`, after capacity.
    pub offsets: Vec<u32>,
    /// `[R]`, within a token in order of choice. None of a token whose router outputs are not finite.
    pub chosen: Vec<u32>,
    /// Which experts have to run; has no meaning under [`Combine::Merged`].
    pub execution: Execution,
    /// What capacity changed.
    pub capacity: CapacityReport,
    /// Choices before capacity.
    pub(super) wanted: Choices,
    /// `[T, E]`, relaxed weights p.
    pub(super) relaxed: Vec<f64>,
    /// `[T, E]`, where p was evaluated; `[T, G]` under [`Relaxation::SmoothStep`].
    pub(super) point: Vec<f64>,
    /// `[T, E]`, what the choice was made on, without bias.
    seen: Vec<f64>,
    /// `[T, E]`, standard normals times scale; only of learned noise.
    pub(super) normals: Vec<f64>,
    /// Deviation of normal noise, `[T, E]` or `[1]`; empty for other noise or none.
    deviation: Vec<f64>,
    /// `[E]`, bias of the choice; empty for none.
    pub(super) bias: Vec<f64>,
    /// Every expert is chosen everywhere, so that the choice tells nothing about load.
    dense: bool,
}

impl RoutedBatch {
    /// The chosen, as rows.
    pub fn rows(&self) -> ChoiceRows<'_> {
        ChoiceRows { offsets: &self.offsets, chosen: &self.chosen }
    }

    /// What was chosen before capacity took from it: the load that balancing is about.
    pub fn wanted(&self) -> ChoiceRows<'_> {
        self.wanted.rows()
    }

    /// Relaxed weights `[T, E]`.
    pub fn relaxed(&self) -> &[f64] {
        &self.relaxed
    }

    /// Logits `[T, E]` that the choice was made on, with noise and without bias.
    pub fn seen(&self) -> &[f64] {
        &self.seen
    }

    /// Standard deviation of the normal noise in [`RoutedBatch::seen`]: `[1]` for all or `[T, E]`. `None` for other noise
    /// or none.
    pub fn deviation(&self) -> Option<&[f64]> {
        (!self.deviation.is_empty()).then_some(&self.deviation)
    }

    /// Load of the routed batch, from the router outputs `z` it was made of.
    ///
    /// Where all experts are chosen, a token counts for the one with its largest weight, which hard top-1 would choose.
    pub fn stats(&self, z: &[f64]) -> RoutingStats {
        let mut stats = RoutingStats::new(self.experts);
        let width = z.len().checked_div(self.tokens).unwrap_or(0);
        let mut p = vec![0.0; self.experts];
        for (row, z) in z.chunks_exact(width.max(1)).enumerate() {
            stats.tokens += 1;
            if !finite(z) {
                stats.non_finite += 1;
                continue;
            }
            let chosen = self.rows().of(row);
            for &e in if self.dense { chosen.get(..1).unwrap_or(&[]) } else { chosen } {
                stats.routes += 1;
                stats.expert_tokens[e as usize] += 1;
            }
            let weights = &self.weights[row * self.experts..][..self.experts];
            stats.expert_weights.iter_mut().zip(weights).for_each(|(sum, w)| *sum += w);
            // Router outputs that are no logits have no softmax: then it is the entropy of the weights.
            if self.point.len() == self.relaxed.len() {
                relax::softmax(&z[..self.experts], 1.0, &mut p);
            } else {
                p.copy_from_slice(&self.relaxed[row * self.experts..][..self.experts]);
            }
            stats.entropy_sum += p.iter().map(|&p| if p > 0.0 { -p * p.ln() } else { 0.0 }).sum::<f64>();
        }
        stats
    }
}

/// One row before capacity.
struct Row {
    point: Vec<f64>,
    seen: Vec<f64>,
    relaxed: Vec<f64>,
    normals: Vec<f64>,
    deviation: Vec<f64>,
    chosen: Vec<u32>,
}

impl Estimator {
    /// Routes `z [T, G]`, G as [`Estimator::router_width`] has it. A row that is not finite gets no expert and weight 0.
    pub fn route(&self, z: &[f64], experts: usize, ctx: &StepContext<'_>) -> RoutedBatch {
        let mut batch = self.empty(experts, ctx);
        for (token, z) in z.chunks_exact(self.router_width(experts).max(1)).enumerate() {
            let row = if finite(z) { self.row(z, experts, token, ctx) } else { self.no_route(z, experts) };
            batch.tokens += 1;
            batch.wanted.push(&row.chosen);
            batch.point.extend(row.point);
            batch.seen.extend(row.seen);
            batch.relaxed.extend(row.relaxed);
            batch.normals.extend(row.normals);
            batch.deviation.extend(row.deviation);
        }
        let mut choices = batch.wanted.clone();
        if let (Phase::Train, Some(capacity), Selection::TopK { k }) = (ctx.phase, ctx.capacity, self.selection) {
            batch.capacity = capacity.apply(&mut choices, &batch.relaxed, experts, k);
        }
        Choices { offsets: batch.offsets, chosen: batch.chosen } = choices;
        for token in 0..batch.tokens {
            let weights = self.row_weights(&batch, token, ctx);
            batch.weights.extend(weights);
        }
        batch
    }

    fn empty(&self, experts: usize, ctx: &StepContext<'_>) -> RoutedBatch {
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
            relaxed: Vec::new(),
            point: Vec::new(),
            seen: Vec::new(),
            normals: Vec::new(),
            deviation: match self.noise {
                Noise { kind: NoiseKind::Gaussian, scale, .. } if ctx.phase == Phase::Train && scale > 0.0 => vec![scale],
                _ => Vec::new(),
            },
            bias: ctx.bias.map(<[f64]>::to_vec).unwrap_or_default(),
            dense: self.selection == Selection::All,
        }
    }

    fn no_route(&self, z: &[f64], experts: usize) -> Row {
        let learned = if self.noise.kind == NoiseKind::Learned { experts } else { 0 };
        Row {
            point: if self.reads_columns() { z.to_vec() } else { vec![0.0; experts] },
            seen: vec![0.0; experts],
            relaxed: vec![0.0; experts],
            normals: vec![0.0; learned],
            deviation: vec![0.0; learned],
            chosen: Vec::new(),
        }
    }

    fn row(&self, z: &[f64], experts: usize, token: usize, ctx: &StepContext<'_>) -> Row {
        let noisy = ctx.phase == Phase::Train && token < ctx.greedy_from;
        let uniform = |stream, column: usize| ctx.draw.uniform(stream, token as u64, column as u64);
        let mut hidden = vec![false; experts];
        if noisy {
            // Left out by the method or by the run.
            let dropout = 1.0 - (1.0 - self.noise.dropout) * (1.0 - ctx.explore.dropout);
            Exploration { dropout, ..ctx.explore }.hide(&mut hidden, self.k(), |e| uniform(Stream::Dropout, e));
        }
        let mut row = if self.reads_columns() { self.columns_row(z, &hidden) } else { self.logits_row(z, token, noisy, &hidden, ctx) };
        let clean: Vec<f64> = hidden.iter().zip(z).map(|(&hidden, &z)| if hidden { f64::NEG_INFINITY } else { z }).collect();
        let clean = if self.reads_columns() { &row.seen } else { &clean };
        row.chosen = self.choose(&Candidates { clean, seen: &row.seen, relaxed: &row.relaxed, bias: ctx.bias });
        if let (true, Selection::TopK { k }) = (noisy, self.selection) {
            // Hidden experts come last.
            let place = |e: usize| if hidden[e] { 2.0 } else { uniform(Stream::Epsilon, 1 + e) };
            if let Some(chosen) = ctx.explore.draw(experts, k, uniform(Stream::Epsilon, 0), place) {
                row.chosen = chosen;
            }
        }
        row
    }

    /// Router outputs are not one logit for each expert.
    pub(super) fn reads_columns(&self) -> bool {
        matches!(self.relaxation, Relaxation::SmoothStep { .. })
    }

    fn columns_row(&self, z: &[f64], hidden: &[bool]) -> Row {
        let mut relaxed = vec![0.0; hidden.len()];
        self.relaxation.value(z, &mut relaxed);
        relaxed.iter_mut().zip(hidden).filter(|(_, hidden)| **hidden).for_each(|(p, _)| *p = 0.0);
        let seen = relaxed.iter().zip(hidden).map(|(&p, &hidden)| if hidden { f64::NEG_INFINITY } else { p }).collect();
        Row { point: z.to_vec(), seen, relaxed, normals: Vec::new(), deviation: Vec::new(), chosen: Vec::new() }
    }

    fn logits_row(&self, z: &[f64], token: usize, noisy: bool, hidden: &[bool], ctx: &StepContext<'_>) -> Row {
        let experts = hidden.len();
        let Noise { kind, scale, scope, .. } = self.noise;
        let mut row = Row {
            point: Vec::with_capacity(experts),
            seen: Vec::with_capacity(experts),
            relaxed: vec![0.0; experts],
            normals: Vec::new(),
            deviation: Vec::new(),
            chosen: Vec::new(),
        };
        for (e, &hidden) in hidden.iter().enumerate() {
            let at = (Stream::Select, token as u64, e as u64);
            let scale = if noisy { scale } else { 0.0 };
            let noise = match kind {
                _ if scale == 0.0 => 0.0,
                NoiseKind::None => 0.0,
                NoiseKind::Gumbel => scale * ctx.draw.gumbel(at.0, at.1, at.2),
                NoiseKind::Gaussian | NoiseKind::Learned => scale * ctx.draw.normal(at.0, at.1, at.2),
            };
            let deviation = if kind == NoiseKind::Learned { relax::softplus(z[experts + e]) } else { 1.0 };
            let clean = if hidden { f64::NEG_INFINITY } else { z[e] };
            let seen = clean + deviation * noise;
            row.seen.push(seen);
            row.point.push(if scope == Scope::Both { seen } else { clean });
            if kind == NoiseKind::Learned {
                row.normals.push(noise);
                row.deviation.push(scale * deviation);
            }
        }
        self.relaxation.value(&row.point, &mut row.relaxed);
        row
    }

    fn row_weights(&self, batch: &RoutedBatch, token: usize, ctx: &StepContext<'_>) -> Vec<f64> {
        let (p, chosen) = (batch.relaxed_row(token), batch.rows().of(token));
        let mut weights = vec![0.0; batch.experts];
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
                    let scale = if draw.largest || coin { 1.0 } else { 1.0 / 3.0 };
                    weights[draw.expert] = scale * draw.relaxed[draw.expert];
                }
            }
        }
        weights
    }

    /// Chosen experts of a token as draws without replacement, each with the relaxation of what was left.
    pub(super) fn draws(&self, batch: &RoutedBatch, token: usize) -> Vec<DrawOf> {
        let (wanted, chosen) = (batch.wanted().of(token), batch.rows().of(token));
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

impl RoutedBatch {
    pub(super) fn relaxed_row(&self, token: usize) -> &[f64] {
        &self.relaxed[token * self.experts..][..self.experts]
    }

    pub(super) fn weights_row(&self, token: usize) -> &[f64] {
        &self.weights[token * self.experts..][..self.experts]
    }

    pub(super) fn point_row(&self, token: usize) -> &[f64] {
        let width = self.point.len().checked_div(self.tokens).unwrap_or(0);
        &self.point[token * width..][..width]
    }
}

/// Relaxed weight of the chosen together.
pub(super) fn mass(p: &[f64], chosen: &[u32]) -> f64 {
    chosen.iter().map(|&e| p[e as usize]).sum()
}

pub(super) fn finite(z: &[f64]) -> bool {
    z.iter().all(|z| z.is_finite())
}
