//! Runs several routings of one model over the same windows of text, side by side, and compares their logits with the first.

use rayon::prelude::*;
use serde::Serialize;

use super::{
    case::Case,
    measure::{LogitCompare, LogitGap, nll},
    probe::Probe,
    summary::{Paired, PerplexityGap, Summary, Values},
};
use crate::{
    error::Result,
    model::{Batch, CacheShape, Forward, LogitRows, Observable, load::ServingModel},
};

const BLOCK_TOKENS: usize = 16;
/// Logits of one forward, all cases together.
const LOGIT_BYTES: usize = 128 << 20;
/// Most new tokens of a case in one forward.
const CHUNK: usize = 512;

/// The gap at the logits, over tokens, in the making.
#[derive(Clone, Debug, Default)]
pub struct OutputValues {
    kl: Values,
    js: Values,
    logit_l2: Values,
    top1_agree: u64,
    top5_overlap: f64,
    paired: Paired,
    tokens: u64,
    non_finite: u64,
}

/// The gap at the logits.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct OutputGaps {
    /// Compared tokens.
    pub tokens: u64,
    /// Tokens left out because a logit was not finite.
    pub non_finite: u64,
    /// `KL(reference ‖ served)` in nats per token.
    pub kl: Summary,
    /// Jensen-Shannon divergence in nats per token.
    pub js: Summary,
    /// Relative L2 distance of the centred logits.
    pub logit_l2: Summary,
    /// Share of tokens with the same likeliest next token.
    pub top1_agree: f64,
    /// Mean share of the five likeliest next tokens that are the same.
    pub top5_overlap: f64,
    /// Perplexity of the text under both.
    pub perplexity: PerplexityGap,
}

/// Logits of one token under two routings, compared.
struct Compared {
    gap: LogitGap,
    /// Of the token that follows, where the window has one.
    nll: Option<(f64, f64)>,
}

/// Runs `cases` over `windows`; the result has the gap of each but the first, which is the reference. `probe` sees the layers, if there
/// is one. `progress` is told how many tokens were added.
///
/// Fails where the model does.
pub fn run(
    model: &ServingModel,
    cases: &[Case],
    windows: &[&[u32]],
    mut probe: Option<&mut Probe>,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<OutputGaps>> {
    let longest = windows.iter().map(|window| window.len()).max().unwrap_or(1);
    let blocks = longest.div_ceil(BLOCK_TOKENS);
    let mut lanes = Lanes {
        model: model.start_observable(CacheShape { block_tokens: BLOCK_TOKENS, num_blocks: blocks * cases.len() })?,
        cases,
        blocks,
    };
    let vocabulary = model.spec().vocab_size;
    let chunk = (LOGIT_BYTES / (4 * vocabulary * cases.len())).clamp(1, CHUNK);
    let mut values = vec![OutputValues::default(); cases.len().saturating_sub(1)];
    for window in windows {
        for start in (0..window.len()).step_by(chunk) {
            let tokens = &window[start..window.len().min(start + chunk)];
            let forward = lanes.forward(tokens, start, probe.as_deref_mut())?;
            let following = &window[start + 1..window.len().min(start + 1 + tokens.len())];
            let compared = forward.read_logits(|logits| compare(logits, vocabulary, tokens.len(), following))?;
            for (values, compared) in values.iter_mut().zip(compared.chunks(tokens.len())) {
                compared.iter().for_each(|compared| values.add(compared.as_ref()));
            }
            lanes.model.recycle(forward);
            progress(tokens.len());
        }
    }
    Ok(values.iter().map(OutputValues::gaps).collect())
}

/// One sequence for each case, in blocks of its own.
struct Lanes<'a> {
    model: Box<dyn Observable>,
    cases: &'a [Case],
    /// Of one case.
    blocks: usize,
}

impl Lanes<'_> {
    fn forward(&mut self, tokens: &[u32], past: usize, probe: Option<&mut Probe>) -> Result<Forward> {
        let mut batch = Batch::default();
        for (lane, case) in self.cases.iter().enumerate() {
            let table: Vec<u32> = (lane * self.blocks..(lane + 1) * self.blocks).map(|block| block as u32).collect();
            batch.push(&table, tokens, past, case.choices.clone(), LogitRows::All);
        }
        let Some(probe) = probe else { return self.model.forward(&batch) };
        probe.begin(tokens);
        let forward = self.model.forward_observed(&batch, probe)?;
        probe.end();
        Ok(forward)
    }
}

/// `logits [P n, V]`: every served case against the first, `[P - 1, n]`. A token that is not finite has none.
fn compare(logits: &[f32], vocabulary: usize, n: usize, following: &[u32]) -> Vec<Option<Compared>> {
    let row = |row: usize| &logits[row * vocabulary..(row + 1) * vocabulary];
    let served = n..logits.len() / vocabulary;
    let compare = |buffers: &mut LogitCompare, at: usize| {
        let (reference, served) = (row(at % n), row(at));
        let gap = buffers.gap(reference, served)?;
        Some(Compared { gap, nll: following.get(at % n).map(|&next| (nll(reference, next), nll(served, next))) })
    };
    served.into_par_iter().map_init(LogitCompare::default, compare).collect()
}

impl OutputValues {
    fn add(&mut self, compared: Option<&Compared>) {
        let Some(Compared { gap, nll }) = compared else {
            self.non_finite += 1;
            return;
        };
        self.add_gap(gap, *nll);
    }

    /// One token: its gap, and (reference, served) negative log-likelihood of the one that follows.
    pub fn add_gap(&mut self, gap: &LogitGap, nll: Option<(f64, f64)>) {
        self.tokens += 1;
        self.kl.push(gap.kl);
        self.js.push(gap.js);
        self.logit_l2.push(gap.logit_l2);
        self.top1_agree += u64::from(gap.top1_agree);
        self.top5_overlap += gap.top5_overlap;
        if let Some((reference, served)) = nll {
            self.paired.push(reference, served);
        }
    }

    /// What they come to.
    pub fn gaps(&self) -> OutputGaps {
        let share = |sum: f64| if self.tokens == 0 { 1.0 } else { sum / self.tokens as f64 };
        OutputGaps {
            tokens: self.tokens,
            non_finite: self.non_finite,
            kl: self.kl.summary(),
            js: self.js.summary(),
            logit_l2: self.logit_l2.summary(),
            top1_agree: share(self.top1_agree as f64),
            top5_overlap: share(self.top5_overlap),
            perplexity: self.paired.gap(),
        }
    }
}
