//! Runs several routings of one model over the same windows of text, side by side, and compares their logits with the first.

use std::fmt;

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
    let mut sides = SideBySide::new(model.start_observable(SideBySide::cache(cases.len(), longest))?, cases.to_vec());
    for window in windows {
        loop {
            let chunk = sides.step(window, CHUNK, probe.as_deref_mut())?;
            progress(chunk.tokens);
            if chunk.done {
                break;
            }
        }
    }
    Ok(sides.values().iter().map(OutputValues::gaps).collect())
}

/// Several routings of one model, each with a hidden state and cache blocks of its own, driven chunk by chunk. It can rest between two
/// chunks for as long as it likes.
pub struct SideBySide {
    model: Box<dyn Observable>,
    /// The reference first.
    cases: Vec<Case>,
    /// Cache blocks of one case.
    blocks: usize,
    /// Most new tokens of a case in one forward.
    most: usize,
    /// Tokens of the window that were read.
    past: usize,
    /// Of each served case.
    values: Vec<OutputValues>,
}

impl fmt::Debug for SideBySide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SideBySide").field("cases", &self.cases).field("past", &self.past).finish_non_exhaustive()
    }
}

/// What one forward of a [`SideBySide`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Tokens of the window that it read, in every case.
    pub tokens: usize,
    /// They were the last ones.
    pub done: bool,
}

impl SideBySide {
    /// The cache for so many cases and windows of at most `longest` tokens.
    pub fn cache(cases: usize, longest: usize) -> CacheShape {
        CacheShape { block_tokens: BLOCK_TOKENS, num_blocks: longest.div_ceil(BLOCK_TOKENS).max(1) * cases.max(1) }
    }

    /// Runs `cases`, the reference first, on a model whose cache is [`SideBySide::cache`] or larger.
    pub fn new(model: Box<dyn Observable>, cases: Vec<Case>) -> Self {
        let vocabulary = model.spec().vocab_size;
        Self {
            blocks: model.cache().num_blocks / cases.len().max(1),
            most: (LOGIT_BYTES / (4 * vocabulary * cases.len()).max(1)).max(1),
            past: 0,
            values: vec![OutputValues::default(); cases.len().saturating_sub(1)],
            model,
            cases,
        }
    }

    /// The next tokens of `window`, at most `most` of them, in every case. After the last ones the next window begins, from an empty
    /// context; until then the window must stay the same.
    ///
    /// Fails where the model does; what was measured until then stays, and the next step begins a window.
    pub fn step(&mut self, window: &[u32], most: usize, probe: Option<&mut Probe>) -> Result<Chunk> {
        let start = std::mem::take(&mut self.past).min(window.len());
        let tokens = &window[start..window.len().min(start + most.clamp(1, self.most))];
        if tokens.is_empty() {
            return Ok(Chunk { tokens: 0, done: true });
        }
        let forward = self.forward(tokens, start, probe)?;
        let end = start + tokens.len();
        let following = &window[start + 1..window.len().min(end + 1)];
        let vocabulary = self.model.spec().vocab_size;
        let compared = forward.read_logits(|logits| compare(logits, vocabulary, tokens.len(), following))?;
        for (values, compared) in self.values.iter_mut().zip(compared.chunks(tokens.len())) {
            compared.iter().for_each(|compared| values.add(compared.as_ref()));
        }
        self.model.recycle(forward);
        let done = end == window.len();
        self.past = if done { 0 } else { end };
        Ok(Chunk { tokens: tokens.len(), done })
    }

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

    /// The gap of each served case so far.
    pub fn values(&self) -> &[OutputValues] {
        &self.values
    }

    /// The model, for other cases.
    pub fn into_model(self) -> Box<dyn Observable> {
        self.model
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

    /// Compared tokens.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// [`LogitGap::kl`] per token.
    pub fn kl(&self) -> &Values {
        &self.kl
    }

    /// [`LogitGap::js`] per token.
    pub fn js(&self) -> &Values {
        &self.js
    }

    /// [`LogitGap::logit_l2`] per token.
    pub fn logit_l2(&self) -> &Values {
        &self.logit_l2
    }

    /// Tokens whose likeliest next token is another.
    pub fn top1_disagreements(&self) -> u64 {
        self.tokens - self.top1_agree
    }

    /// Negative log-likelihoods of the tokens that follow.
    pub fn paired(&self) -> &Paired {
        &self.paired
    }

    /// What they come to.
    pub fn gaps(&self) -> OutputGaps {
        self.told(self.paired.gap())
    }

    /// The same without the interval of the perplexity gap, which takes a while: for whoever asks often.
    pub fn gaps_so_far(&self) -> OutputGaps {
        self.told(self.paired.gap_so_far())
    }

    fn told(&self, perplexity: PerplexityGap) -> OutputGaps {
        let share = |sum: f64| if self.tokens == 0 { 1.0 } else { sum / self.tokens as f64 };
        OutputGaps {
            tokens: self.tokens,
            non_finite: self.non_finite,
            kl: self.kl.summary(),
            js: self.js.summary(),
            logit_l2: self.logit_l2.summary(),
            top1_agree: share(self.top1_agree as f64),
            top5_overlap: share(self.top5_overlap),
            perplexity,
        }
    }
}
