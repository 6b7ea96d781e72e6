//! What a step tells the device: one block of words that is copied at once, and who is where in it.

use std::ops::Range;

use hardmax_kernels::{
    routing::{TokenPolicy, WeightForm as Form},
    sample::Choice,
};

use super::super::{
    Batch, CacheShape, ModelSpec,
    draw::{RowChoice, TokenDraw},
};
use crate::{
    error::Result,
    moe::policy::{LayerChoices, RoutingPolicy, WeightForm},
};

/// Whose token a padding token is.
const NOBODY: u32 = u32::MAX;

/// Sizes that a step is laid out for. Those of a decode step are rounded up, so that steps look alike and a graph fits many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Sizes {
    /// Tokens, T.
    pub(super) tokens: usize,
    /// Sequences, S.
    pub(super) sequences: usize,
    /// Rows of logits, R.
    pub(super) rows: usize,
    /// Blocks in a row of block tables.
    pub(super) stride: usize,
    /// Different lists of policies: one where all layers route alike.
    pub(super) policy_sets: usize,
}

/// Places of a step's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// `[T]`.
    pub(super) tokens: Range<usize>,
    /// `[T]`: the sequence of each token.
    pub(super) sequence: Range<usize>,
    /// `[T]`.
    pub(super) position: Range<usize>,
    /// `[S + 1]`: tokens of each sequence.
    pub(super) query_start: Range<usize>,
    /// `[S]`: tokens of each sequence that are in the cache.
    pub(super) past: Range<usize>,
    /// `[S, stride]`.
    pub(super) tables: Range<usize>,
    /// `[R]`: tokens whose logits are wanted.
    pub(super) rows: Range<usize>,
    /// 0 and T: all tokens, as the rows of one expert.
    pub(super) all_tokens: Range<usize>,
    /// `[policy_sets, T]` policies.
    pub(super) policies: Range<usize>,
    /// `[R]` draws.
    pub(super) draws: Range<usize>,
    /// All of it.
    pub(super) words: usize,
}

/// Words of one policy: see [`policy_words`].
pub(super) const POLICY_WORDS: usize = size_of::<TokenPolicy>() / 4;

/// Words of one draw: see [`draw_words`].
pub(super) const DRAW_WORDS: usize = size_of::<Choice>() / 4;

impl Layout {
    pub(super) fn new(sizes: Sizes) -> Self {
        let mut words = 0;
        // Every list begins at a multiple of 16 bytes.
        let mut next = |len: usize| {
            let start = words;
            words += len.next_multiple_of(4);
            start..start + len
        };
        let Sizes { tokens, sequences, rows, stride, policy_sets } = sizes;
        Self {
            tokens: next(tokens),
            sequence: next(tokens),
            position: next(tokens),
            query_start: next(sequences + 1),
            past: next(sequences),
            tables: next(sequences * stride),
            rows: next(rows),
            all_tokens: next(2),
            policies: next(policy_sets * tokens * POLICY_WORDS),
            draws: next(rows * DRAW_WORDS),
            words,
        }
    }
}

/// How the layers of a batch route on the device.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Policies {
    /// For each set, that of each span.
    pub(super) sets: Vec<Vec<RoutingPolicy>>,
    /// For each MoE layer its set, and most experts of a token.
    pub(super) layers: Vec<(usize, usize)>,
    /// Only the host can tell the experts of a span: it replays them, or an estimator chooses them.
    pub(super) on_host: bool,
}

impl Policies {
    /// Fails as [`MoeSpec::resolve`](super::super::MoeSpec::resolve) does.
    pub(super) fn of(spec: &ModelSpec, batch: &Batch) -> Result<Self> {
        let mut policies =
            Self { on_host: batch.spans.iter().any(|span| matches!(span.routing, LayerChoices::Replay { .. })), ..Self::default() };
        for (layer, moe) in spec.moe_layers() {
            let resolve = |span: &super::super::Span| moe.resolve(span.routing.at(layer), spec.reference);
            let set = batch.spans.iter().map(resolve).collect::<Result<Vec<_>>>()?;
            policies.on_host |= set.iter().any(|policy| matches!(policy, RoutingPolicy::Estimator(_)));
            let most = set.iter().map(|policy| policy.experts_per_token(moe.num_experts)).max().unwrap_or(1);
            // A replay gives as many experts as it likes, whatever the policy of the tokens behind it.
            let given = batch.spans.iter().flat_map(|span| (0..span.new).filter_map(move |token| span.routing.replayed(layer, token)));
            let most = given.map(|replayed| replayed.experts.len()).fold(most, usize::max);
            let known = policies.sets.iter().position(|other| *other == set);
            policies.layers.push((known.unwrap_or(policies.sets.len()), most));
            if known.is_none() {
                policies.sets.push(set);
            }
        }
        Ok(policies)
    }
}

/// Writes the step of `batch` to `words`, which a [`Layout`] of `sizes` describes.
///
/// Tokens, sequences and rows beyond those of the batch are padding: tokens of nobody, which are routed nowhere; sequences without tokens; rows
/// that are not drawn.
pub(super) fn write(words: &mut [u32], layout: &Layout, sizes: Sizes, batch: &Batch, policies: &Policies) {
    words[..layout.words].fill(0);
    let count = batch.tokens.len();
    words[layout.tokens.clone()][..count].copy_from_slice(&batch.tokens);
    words[layout.sequence.clone()].fill(NOBODY);
    let mut start = 0;
    for (index, span) in batch.spans.iter().enumerate() {
        words[layout.sequence.start + start..][..span.new].fill(index as u32);
        let positions = words[layout.position.start + start..][..span.new].iter_mut();
        positions.zip(span.past as u32..).for_each(|(word, position)| *word = position);
        words[layout.past.start + index] = span.past as u32;
        let table = batch.table(span);
        let table = &table[..table.len().min(sizes.stride)];
        words[layout.tables.start + index * sizes.stride..][..table.len()].copy_from_slice(table);
        for (set, of_spans) in policies.sets.iter().enumerate() {
            let policy = policy_words(of_spans[index]);
            let places = words[layout.policies.start + (set * sizes.tokens + start) * POLICY_WORDS..].chunks_exact_mut(POLICY_WORDS);
            places.take(span.new).for_each(|place| place.copy_from_slice(&policy));
        }
        start += span.new;
        words[layout.query_start.start + index + 1] = start as u32;
    }
    words[layout.query_start.clone()][batch.spans.len() + 1..].fill(start as u32);
    words[layout.all_tokens.start + 1] = sizes.tokens as u32;
    let rows = batch.logit_rows();
    words[layout.rows.clone()][..rows.len()].copy_from_slice(&rows);
    for (place, choice) in words[layout.draws.clone()].chunks_exact_mut(DRAW_WORDS).zip(&batch.choices) {
        if let RowChoice::Token(draw) = choice {
            place.copy_from_slice(&draw_words(*draw));
        }
    }
}

/// As [`TokenPolicy`] lies in memory; all zero is a padding token.
fn policy_words(policy: RoutingPolicy) -> [u32; POLICY_WORDS] {
    let form = |form: WeightForm| match form {
        WeightForm::Raw => Form::Raw,
        WeightForm::Renorm => Form::Renorm,
        WeightForm::Unit => Form::Unit,
    };
    let policy = match policy {
        RoutingPolicy::TopK { k, weight_form } => TokenPolicy::top_k(k, form(weight_form)),
        RoutingPolicy::Mass { threshold, max_k, weight_form } => TokenPolicy::mass(threshold, max_k, form(weight_form)),
        RoutingPolicy::Soft { temperature } => TokenPolicy::soft(temperature),
        // The host routes by it.
        RoutingPolicy::Estimator(_) => TokenPolicy::NONE,
    };
    hardmax_kernels::words(policy)
}

/// As [`Choice`] lies in memory; all zero is a row that is not drawn.
fn draw_words(draw: TokenDraw) -> [u32; DRAW_WORDS] {
    let TokenDraw { temperature, min_p, top_k, top_p, uniform } = draw;
    hardmax_kernels::words(Choice { temperature, top_k, top_p, min_p, uniform, wanted: 1 })
}

/// Rounds the sizes of a decode step up: tokens to one of [`BUCKETS`], block tables to a power of two.
pub(super) fn decode_sizes(batch: &Batch, cache: CacheShape, policy_sets: usize) -> Option<Sizes> {
    let tokens = *BUCKETS.iter().find(|&&bucket| bucket >= batch.tokens.len())?;
    Some(Sizes { tokens, sequences: tokens, rows: tokens, stride: stride(batch, cache).next_power_of_two(), policy_sets })
}

/// The sizes of `batch` as it is.
pub(super) fn exact_sizes(batch: &Batch, cache: CacheShape, policy_sets: usize) -> Sizes {
    Sizes {
        tokens: batch.tokens.len(),
        sequences: batch.spans.len(),
        rows: batch.num_logit_rows(),
        stride: stride(batch, cache),
        policy_sets,
    }
}

/// Decode steps that look alike. Between two of them less than a third of the tokens are padding, from 8 on.
pub(super) const BUCKETS: [usize; 17] = [1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 96, 128, 160, 192, 256];

fn stride(batch: &Batch, cache: CacheShape) -> usize {
    batch.spans.iter().map(|span| cache.blocks_for(span.past + span.new)).max().unwrap_or(1)
}
