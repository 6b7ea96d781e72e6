//! Which experts run for which token, before weights: what selection, capacity and the losses pass to one another.

use std::ops::Range;

/// Chosen experts in compressed rows, borrowed: those of token t are `chosen[offsets[t] .. offsets[t + 1]]`, in order of
/// choice.
#[derive(Clone, Copy, Debug)]
pub struct ChoiceRows<'a> {
    /// `[T + 1]`, ascending from 0.
    pub offsets: &'a [u32],
    /// `[R]`, each below the number of experts.
    pub chosen: &'a [u32],
}

/// [`ChoiceRows`], owned. No token: no row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choices {
    /// `[T + 1]`, ascending from 0; empty for no token.
    pub offsets: Vec<u32>,
    /// `[R]`, each below the number of experts.
    pub chosen: Vec<u32>,
}

impl Choices {
    /// One row for each token.
    pub fn from_rows<R: AsRef<[u32]>>(rows: impl IntoIterator<Item = R>) -> Self {
        let mut choices = Self { offsets: vec![0], chosen: Vec::new() };
        rows.into_iter().for_each(|row| choices.push(row.as_ref()));
        choices
    }

    /// Appends the row of the next token.
    pub fn push(&mut self, row: &[u32]) {
        if self.offsets.is_empty() {
            self.offsets.push(0);
        }
        self.chosen.extend_from_slice(row);
        self.offsets.push(self.chosen.len() as u32);
    }

    /// Appends rows of following tokens.
    pub fn extend(&mut self, rows: ChoiceRows<'_>) {
        (0..rows.tokens()).for_each(|token| self.push(rows.of(token)));
    }

    /// Borrows it.
    pub fn rows(&self) -> ChoiceRows<'_> {
        ChoiceRows { offsets: &self.offsets, chosen: &self.chosen }
    }
}

impl<'a> ChoiceRows<'a> {
    /// Tokens, T.
    pub fn tokens(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Experts of a token, in order of choice; none of a token that is not there.
    pub fn of(&self, token: usize) -> &'a [u32] {
        match (self.offsets.get(token), self.offsets.get(token + 1)) {
            (Some(&from), Some(&to)) => self.chosen.get(from as usize..to as usize).unwrap_or(&[]),
            _ => &[],
        }
    }

    /// Rows of a range of tokens.
    pub fn part(&self, tokens: Range<usize>) -> Choices {
        Choices::from_rows(tokens.map(|token| self.of(token)))
    }

    /// Rows that each expert has among the tokens of a range, `[E]`.
    pub fn counts(&self, tokens: Range<usize>, experts: usize) -> Vec<f64> {
        let mut counts = vec![0.0; experts];
        for token in tokens {
            self.of(token).iter().for_each(|&e| counts[e as usize] += 1.0);
        }
        counts
    }

    /// Tokens of a range whose first choice each expert is, `[E]`.
    pub fn first_counts(&self, tokens: Range<usize>, experts: usize) -> Vec<f64> {
        let mut counts = vec![0.0; experts];
        for token in tokens {
            self.of(token).iter().take(1).for_each(|&e| counts[e as usize] += 1.0);
        }
        counts
    }
}
