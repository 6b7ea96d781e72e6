//! What a step tells the host: the tokens that were drawn, and the load of every MoE layer. One block of words.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use hardmax_kernels::{plan::report_len, sample::NON_FINITE};

use super::{
    super::{
        Batch, ModelSpec,
        draw::{Drawn, RowChoice},
    },
    watch::Watch,
};
use crate::{
    error::Result,
    moe::{LayerRouting, Routing, RoutingStats, SparseRouting},
};

/// Places in the report of a step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Report {
    /// `[R]`.
    pub(super) drawn: Range<usize>,
    /// Of each MoE layer, in order of depth, one for each part of its tokens.
    pub(super) loads: Vec<Vec<Range<usize>>>,
    words: usize,
}

impl Report {
    /// For `rows` rows of logits and MoE layers with so many experts, whose tokens go through them in so many parts.
    pub(super) fn new(rows: usize, layers: impl Iterator<Item = (usize, usize)>) -> Self {
        let mut words = 0;
        let mut next = |len: usize| {
            let start = words;
            words += len.next_multiple_of(4);
            start..start + len
        };
        let drawn = next(rows);
        let loads = layers.map(|(experts, parts)| (0..parts).map(|_| next(report_len(experts))).collect()).collect();
        Self { drawn, loads, words }
    }

    /// All of it.
    pub(super) fn words(&self) -> usize {
        self.words.max(1)
    }

    /// What became of the rows of logits; empty where all of them are handed out.
    pub(super) fn drawn(&self, words: &[u32], choices: &[RowChoice]) -> Vec<Drawn> {
        let of = |(choice, &token): (&RowChoice, &u32)| match choice {
            RowChoice::Logits => Drawn::Row,
            RowChoice::Token(_) if token == NON_FINITE => Drawn::NonFinite,
            RowChoice::Token(_) => Drawn::Token(token),
        };
        choices.iter().zip(&words[self.drawn.clone()]).map(of).collect()
    }

    /// What the MoE layers did; with their routes where somebody watched.
    pub(super) fn layers(&self, words: &[u32], spec: &ModelSpec, tokens: usize, watch: Watch<'_>) -> Result<Vec<LayerRouting>> {
        let mut seen = watch.into_layers();
        let layer = |((layer, moe), parts): ((usize, &super::super::MoeSpec), &Vec<Range<usize>>)| {
            let mut stats = RoutingStats::new(moe.num_experts);
            parts.iter().for_each(|part| add_load(&mut stats, &words[part.clone()], moe.num_experts));
            stats.tokens = tokens as u64;
            let seen = seen.next();
            let (logits, routing, on_host) = seen.map_or_else(Default::default, |seen| (seen.router_logits, seen.routing, seen.stats));
            let rows = logits.len() / moe.num_experts;
            let router_logits = match rows {
                0 => Tensor::zeros((0, moe.num_experts), DType::F32, &Device::Cpu)?,
                rows => Tensor::from_vec(logits, (rows, moe.num_experts), &Device::Cpu)?,
            };
            let routing = if rows == 0 { SparseRouting { offsets: vec![0], ..SparseRouting::default() } } else { routing };
            Ok(LayerRouting { layer, router_logits, routing: Routing::Sparse(routing), stats: on_host.unwrap_or(stats) })
        };
        spec.moe_layers().zip(&self.loads).map(layer).collect()
    }
}

/// Adds what the plan of some tokens reports: see [`hardmax_kernels::routing`].
fn add_load(stats: &mut RoutingStats, words: &[u32], experts: usize) {
    let (tokens, rest) = words.split_at(experts);
    let (weights, notes) = rest.split_at(experts);
    stats.expert_tokens.iter_mut().zip(tokens).for_each(|(sum, &tokens)| *sum += u64::from(tokens));
    stats.expert_weights.iter_mut().zip(weights).for_each(|(sum, &weight)| *sum += f64::from(f32::from_bits(weight)));
    stats.routes += tokens.iter().map(|&tokens| u64::from(tokens)).sum::<u64>();
    if let &[entropy, non_finite, near_ties, ..] = notes {
        stats.entropy_sum += f64::from(f32::from_bits(entropy));
        stats.non_finite += u64::from(non_finite);
        stats.near_ties += u64::from(near_ties);
    }
}

/// Rows of logits that are not drawn.
pub(super) fn rows_handed_out(batch: &Batch) -> usize {
    if batch.choices.is_empty() {
        return batch.num_logit_rows();
    }
    batch.choices.iter().filter(|choice| matches!(choice, RowChoice::Logits)).count()
}
