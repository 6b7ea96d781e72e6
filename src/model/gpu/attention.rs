//! Which sequences of a step attend in one launch.

use std::ops::Range;

use hardmax_kernels::attention::{Heads, few, splits, workspace_len};

use super::{
    super::{Batch, CacheShape, Span},
    step::Sizes,
};

/// A launch of attention for sequences that are neighbours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Launch {
    /// Of the step.
    pub(super) sequences: Range<usize>,
    /// Where the tokens of the last of them end.
    pub(super) tokens: usize,
    /// Most new tokens of a sequence.
    pub(super) longest_new: usize,
    /// Parts that the keys and values of a sequence are divided into.
    pub(super) splits: usize,
}

impl Launch {
    /// One token of each sequence, as a recorded step has them: of the longest context that its block tables allow.
    pub(super) fn decoding(heads: Heads, sizes: Sizes, cache: CacheShape, multiprocessors: usize) -> Self {
        let longest = sizes.stride * cache.block_tokens;
        let splits = splits(heads, sizes.sequences, 1, longest, multiprocessors);
        Self { sequences: 0..sizes.sequences, tokens: sizes.tokens, longest_new: 1, splits }
    }

    /// The launches of a step: sequences of few tokens that lead the batch have a launch of their own, since a prompt wants larger tiles, which one
    /// token does not fill, and fewer parts.
    pub(super) fn of(heads: Heads, batch: &Batch, multiprocessors: usize) -> Vec<Self> {
        let leading = batch.spans.iter().take_while(|span| few(heads, span.new)).count();
        let mut tokens = 0;
        let launch = |sequences: Range<usize>| {
            let spans: &[Span] = &batch.spans[sequences.clone()];
            tokens += spans.iter().map(|span| span.new).sum::<usize>();
            let longest_new = spans.iter().map(|span| span.new).max().unwrap_or(1);
            let longest = spans.iter().map(|span| span.past + span.new).max().unwrap_or(1);
            let splits = splits(heads, sequences.len(), longest_new, longest, multiprocessors);
            Self { sequences, tokens, longest_new, splits }
        };
        [0..leading, leading..batch.spans.len()].into_iter().filter(|range| !range.is_empty()).map(launch).collect()
    }

    /// Elements that it needs besides its operands.
    pub(super) fn workspace_len(&self, heads: Heads) -> usize {
        workspace_len(heads, self.tokens, self.splits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::LogitRows, moe::policy::RoutingChoice};

    const HEADS: Heads = Heads { heads: 8, kv_heads: 2, head_dim: 64 };

    /// Of sequences with so many tokens in the cache and so many new ones: sequences, end of tokens, most new ones.
    fn launches(spans: &[(usize, usize)]) -> Vec<(Range<usize>, usize, usize)> {
        let mut batch = Batch::default();
        for &(past, new) in spans {
            batch.push(&[0; 64], &vec![0; new], past, RoutingChoice::Native, LogitRows::Last);
        }
        Launch::of(HEADS, &batch, 4).into_iter().map(|launch| (launch.sequences, launch.tokens, launch.longest_new)).collect()
    }

    #[test]
    fn single_tokens_that_lead_are_apart_from_prompts() {
        assert_eq!(launches(&[(9, 1), (700, 1), (0, 300), (30, 40)]), [(0..2, 2, 1), (2..4, 342, 300)]);
        assert_eq!(launches(&[(9, 1), (700, 4)]), [(0..2, 5, 4)]);
        assert_eq!(launches(&[(0, 5), (9, 1)]), [(0..2, 6, 5)]);
        assert_eq!(launches(&[]), []);
    }

    #[test]
    fn one_token_does_not_hold_a_prompt_back() {
        let mut batch = Batch::default();
        batch.push(&[0; 64], &[0], 900, RoutingChoice::Native, LogitRows::Last);
        batch.push(&[0; 64], &[0; 600], 0, RoutingChoice::Native, LogitRows::Last);
        let [single, prompt] = &Launch::of(HEADS, &batch, 16)[..] else { panic!("two launches") };
        assert!(single.splits > 1 && prompt.splits == 1, "{single:?} {prompt:?}");
        // What the parts are kept in is for the one token.
        assert_eq!(single.workspace_len(HEADS), workspace_len(HEADS, 1, single.splits));
    }
}
