//! The noise floor: how far the *same* routing is from itself in another form of arithmetic. Hard routing is discontinuous, so rounding
//! alone moves tokens to other experts, and no gap below that says anything about the routing.

use serde::Serialize;

use super::{
    case::Case,
    measure::{LogitCompare, RouteAgreement, nll},
    run::{OutputGaps, OutputValues},
};
use crate::{
    error::{Error, Result},
    model::{Batch, CacheShape, LogitRows, Observable, load::ServingModel},
    moe::Routing,
};

const BLOCK_TOKENS: usize = 16;
/// New tokens of one forward.
const CHUNK: usize = 256;
/// New tokens of one forward of the other form.
const OTHER_CHUNK: usize = 7;

/// The gap between two forms of one routing.
#[derive(Clone, Debug, Serialize)]
pub struct FloorForm {
    /// What the other form is, for people.
    pub form: String,
    /// At the logits.
    pub output: OutputGaps,
    /// Share of tokens with other experts in any layer.
    pub tokens_flipped: f64,
}

/// Noise of each measure: the largest over all forms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Floor {
    /// Mean KL in nats per token.
    pub kl: f64,
    /// Share of tokens with another likeliest token.
    pub top1_disagree: f64,
    /// Size of the perplexity gap.
    pub perplexity_gap: f64,
    /// Share of tokens with other experts in any layer.
    pub tokens_flipped: f64,
}

impl Floor {
    /// The largest of each; zeros of none.
    pub fn of(forms: &[FloorForm]) -> Self {
        let most = |value: fn(&FloorForm) -> f64| forms.iter().map(value).fold(0.0, f64::max);
        Self {
            kl: most(|form| form.output.kl.mean),
            top1_disagree: most(|form| 1.0 - form.output.top1_agree),
            perplexity_gap: most(|form| form.output.perplexity.gap.abs()),
            tokens_flipped: most(|form| form.tokens_flipped),
        }
    }
}

/// Compares `case` on `model` with the same on `other`, which may be the same weights in another form; the other gets its tokens in
/// small pieces, as a busy server would give them.
pub fn floor(model: &ServingModel, other: (&ServingModel, &str), case: &Case, windows: &[&[u32]]) -> Result<FloorForm> {
    let mut sides = [Side::new(model, CHUNK, windows)?, Side::new(other.0, OTHER_CHUNK, windows)?];
    let vocabulary = model.spec().vocab_size;
    let (mut values, mut compare) = (OutputValues::default(), LogitCompare::default());
    let (mut tokens, mut flipped) = (0u64, 0u64);
    for window in windows {
        for start in (0..window.len()).step_by(CHUNK) {
            let piece = &window[start..window.len().min(start + CHUNK)];
            let [one, two] = &mut sides;
            let (one, two) = (one.run(case, piece, start)?, two.run(case, piece, start)?);
            for (at, rows) in one.logits.chunks_exact(vocabulary).zip(two.logits.chunks_exact(vocabulary)).enumerate() {
                let following = window.get(start + at + 1);
                let Some(gap) = compare.gap(rows.0, rows.1) else { continue };
                values.add_gap(&gap, following.map(|&next| (nll(rows.0, next), nll(rows.1, next))));
            }
            tokens += piece.len() as u64;
            flipped += (0..piece.len()).filter(|&token| one.parts_from(&two, token)).count() as u64;
        }
    }
    Ok(FloorForm { form: other.1.to_owned(), output: values.gaps(), tokens_flipped: flipped as f64 / tokens.max(1) as f64 })
}

struct Side {
    model: Box<dyn Observable>,
    table: Vec<u32>,
    chunk: usize,
}

/// What a side made of a piece.
#[derive(Default)]
struct Made {
    /// `[n, V]`.
    logits: Vec<f32>,
    /// Experts of each token in each MoE layer, `[n][L]`.
    experts: Vec<Vec<Vec<u32>>>,
}

impl Side {
    fn new(model: &ServingModel, chunk: usize, windows: &[&[u32]]) -> Result<Self> {
        let longest = windows.iter().map(|window| window.len()).max().unwrap_or(1);
        let shape = CacheShape { block_tokens: BLOCK_TOKENS, num_blocks: longest.div_ceil(BLOCK_TOKENS) };
        Ok(Self { model: model.start_observable(shape)?, table: (0..shape.num_blocks as u32).collect(), chunk })
    }

    fn run(&mut self, case: &Case, tokens: &[u32], past: usize) -> Result<Made> {
        let mut made = Made::default();
        for (index, part) in tokens.chunks(self.chunk).enumerate() {
            let mut batch = Batch::default();
            batch.push(&self.table, part, past + index * self.chunk, case.choices.clone(), LogitRows::All);
            let forward = self.model.forward(&batch)?;
            forward.read_logits(|logits| made.logits.extend_from_slice(logits))?;
            let first = made.experts.len();
            made.experts.resize(first + part.len(), Vec::new());
            for layer in &forward.layers {
                let Routing::Sparse(routing) = &layer.routing else {
                    return Err(Error::Internal("a serving forward routed densely".into()));
                };
                for (token, experts) in made.experts[first..].iter_mut().enumerate() {
                    experts.push(routing.expert_ids[routing.routes(token)].to_vec());
                }
            }
            self.model.recycle(forward);
        }
        Ok(made)
    }
}

impl Made {
    fn parts_from(&self, other: &Self, token: usize) -> bool {
        self.experts[token].iter().zip(&other.experts[token]).any(|(a, b)| !RouteAgreement::new(a, b).exact)
    }
}
