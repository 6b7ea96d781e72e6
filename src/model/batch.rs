//! A ragged batch: prefill, decode and chunked prefill are one shape.

use crate::moe::policy::RoutingChoice;

/// New tokens of several sequences, one sequence after the other.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids of all spans, concatenated. T = `tokens.len()`.
    pub tokens: Vec<u32>,
    /// In the order of `tokens`.
    pub spans: Vec<Span>,
}

/// The part of a batch that belongs to one sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// Cache slot of the sequence; distinct within a batch.
    pub slot: usize,
    /// New tokens, at least 1. Their positions are `past .. past + new`.
    pub new: usize,
    /// Tokens of the sequence already in its slot. 0 starts the slot afresh.
    pub past: usize,
    /// Routing of these tokens.
    pub routing: RoutingChoice,
    /// Which of the new tokens need logits.
    pub logits: LogitRows,
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
    /// Appends a span of `tokens`; `past` and `routing` as in [`Span`].
    pub fn push(&mut self, slot: usize, tokens: &[u32], past: usize, routing: RoutingChoice, logits: LogitRows) {
        self.tokens.extend_from_slice(tokens);
        self.spans.push(Span { slot, new: tokens.len(), past, routing, logits });
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
