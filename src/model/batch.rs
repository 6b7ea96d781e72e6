//! A ragged batch: prefill, decode and chunked prefill are one shape.

use std::ops::Range;

use super::draw::RowChoice;
use crate::moe::policy::LayerChoices;

/// New tokens of several sequences, one sequence after the other.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Token ids of all spans, concatenated. T = `tokens.len()`.
    pub tokens: Vec<u32>,
    /// In the order of `tokens`.
    pub spans: Vec<Span>,
    /// Block tables of all spans, concatenated: see [`Span::blocks`].
    pub blocks: Vec<u32>,
    /// What is wanted of each of [`Batch::logit_rows`], in their order. Empty: all of them as they are, which is also what a model does
    /// that draws nothing ([`LanguageModel::draws`](super::LanguageModel::draws)).
    pub choices: Vec<RowChoice>,
    /// Somebody reads the routes and the router logits of this forward, not only the load. Where nobody does, a model may leave them out
    /// of [`Forward::layers`](super::Forward::layers).
    pub routes: bool,
}

/// Empty; everything that a forward computes is wanted.
impl Default for Batch {
    fn default() -> Self {
        Self { tokens: Vec::new(), spans: Vec::new(), blocks: Vec::new(), choices: Vec::new(), routes: true }
    }
}

/// The part of a batch that belongs to one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// New tokens, at least 1. Their positions are `past .. past + new`.
    pub new: usize,
    /// Tokens of the sequence already in its blocks.
    pub past: usize,
    /// Routing of these tokens.
    pub routing: LayerChoices,
    /// Which of the new tokens need logits.
    pub logits: LogitRows,
    /// Where the block table of the sequence is in [`Batch::blocks`]: enough blocks for `past + new` tokens. Position p is row
    /// `p % block_tokens` of block `table[p / block_tokens]`. The blocks of new tokens belong to no other span of the batch; those of the
    /// past may be shared. Empty where the forward has no cache.
    pub blocks: Range<usize>,
}

/// Rows of the output that a span asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// None: a prefill chunk that is not the last.
    None,
    /// The last token.
    Last,
    /// Every new token.
    All,
}

impl Batch {
    /// Appends a span of `tokens` with its block table; `past` and `routing` as in [`Span`].
    pub fn push(&mut self, blocks: &[u32], tokens: &[u32], past: usize, routing: impl Into<LayerChoices>, logits: LogitRows) {
        self.tokens.extend_from_slice(tokens);
        let start = self.blocks.len();
        self.blocks.extend_from_slice(blocks);
        self.spans.push(Span { new: tokens.len(), past, routing: routing.into(), logits, blocks: start..self.blocks.len() });
    }

    /// Makes it what [`Batch::default`] is; its memory stays for the next step.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.spans.clear();
        self.blocks.clear();
        self.choices.clear();
        self.routes = true;
    }

    /// The block table of a span of this batch; empty where the span lies about it.
    pub fn table(&self, span: &Span) -> &[u32] {
        self.blocks.get(span.blocks.clone()).unwrap_or_default()
    }

    /// How many [`Batch::logit_rows`] has, R.
    pub fn num_logit_rows(&self) -> usize {
        self.spans.iter().map(Span::num_logit_rows).sum()
    }

    /// Rows of `tokens` that need logits, in order.
    pub fn logit_rows(&self) -> Vec<u32> {
        let mut rows = Vec::new();
        let mut start = 0;
        for span in &self.spans {
            let end = start + span.new;
            match span.logits {
                LogitRows::None => {}
                LogitRows::Last => rows.push(end as u32 - 1),
                LogitRows::All => rows.extend(start as u32..end as u32),
            }
            start = end;
        }
        rows
    }
}

impl Span {
    /// Rows of logits that it asks for.
    pub fn num_logit_rows(&self) -> usize {
        match self.logits {
            LogitRows::None => 0,
            LogitRows::Last => 1,
            LogitRows::All => self.new,
        }
    }
}
