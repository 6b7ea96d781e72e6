//! A ragged batch: prefill, decode and chunked prefill are one shape.

use std::ops::Range;

use crate::moe::policy::LayerChoices;

/// New tokens of several sequences, one sequence after the other.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids of all spans, concatenated. T = `tokens.len()`.
    pub tokens: Vec<u32>,
    /// In the order of `tokens`.
    pub spans: Vec<Span>,
    /// Block tables of all spans, concatenated: see [`Span::blocks`].
    pub blocks: Vec<u32>,
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

    /// Empties it; its memory stays for the next step.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.spans.clear();
        self.blocks.clear();
    }

    /// The block table of a span of this batch; empty where the span lies about it.
    pub fn table(&self, span: &Span) -> &[u32] {
        self.blocks.get(span.blocks.clone()).unwrap_or_default()
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
