//! What experts do: which go together, and which tokens each takes. Memory does not grow with the text.

use std::collections::HashMap;

/// Tokens that an expert keeps count of.
const KEPT: usize = 96;

/// Use of the experts of one layer.
#[derive(Clone, Debug)]
pub struct ExpertUse {
    experts: usize,
    /// `[E, E]`, symmetric, diagonal 0: tokens for which the router put these two first.
    pairs: Vec<u64>,
    /// Tokens for which the router put this one among the first two, `[E]`.
    leading: Vec<u64>,
    /// The most frequent tokens of each expert, `[E]`.
    frequent: Vec<Frequent>,
    /// Places of the followed tokens in `followed`.
    places: HashMap<u32, usize>,
    /// Exact counts of the followed tokens, `[F, E]`.
    followed: Vec<u64>,
}

/// Counts of the most frequent tokens (Misra and Gries 1982): a token that makes up more than 1/[`KEPT`] of the stream is there, and no
/// count is too high.
#[derive(Clone, Debug, Default)]
struct Frequent {
    counts: HashMap<u32, u64>,
}

/// A token that an expert takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenUse {
    /// Its id.
    pub token: u32,
    /// How often the expert took it, at least.
    pub count: u64,
    /// Part of all of its occurrences in the text.
    pub share: f64,
}

impl ExpertUse {
    /// Of a layer with so many experts; `followed` tokens are counted one by one.
    pub fn new(experts: usize, followed: &[u32]) -> Self {
        Self {
            experts,
            pairs: vec![0; experts * experts],
            leading: vec![0; experts],
            frequent: vec![Frequent::default(); experts],
            places: followed.iter().enumerate().map(|(place, &token)| (token, place)).collect(),
            followed: vec![0; followed.len() * experts],
        }
    }

    /// One token with its experts and its router logits.
    pub fn add(&mut self, token: u32, chosen: &[u32], logits: &[f32]) {
        for &expert in chosen {
            self.frequent[expert as usize].add(token);
            if let Some(place) = self.places.get(&token) {
                self.followed[place * self.experts + expert as usize] += 1;
            }
        }
        if let Some((a, b)) = first_two(logits) {
            self.pairs[a * self.experts + b] += 1;
            self.pairs[b * self.experts + a] += 1;
            self.leading[a] += 1;
            self.leading[b] += 1;
        }
    }

    /// How much more often two experts are the first two of a token than if each were drawn on its own, `[E][E]`: 1 is chance. The
    /// diagonal is 0.
    pub fn coactivation(&self) -> Vec<Vec<f64>> {
        let tokens = self.leading.iter().sum::<u64>() as f64 / 2.0;
        let shares: Vec<f64> = self.leading.iter().map(|&n| n as f64 / (2.0 * tokens).max(1.0)).collect();
        // Drawn in turn without putting back, a pair {a, b} has the probability p_a p_b / (1 - p_a) + p_b p_a / (1 - p_b).
        let expected = |a: usize, b: usize| {
            let turn = |first: f64, second: f64| if first < 1.0 { first * second / (1.0 - first) } else { 0.0 };
            tokens * (turn(shares[a], shares[b]) + turn(shares[b], shares[a]))
        };
        let lift = |a: usize, b: usize| {
            let found = self.pairs[a * self.experts + b] as f64;
            if found == 0.0 { 0.0 } else { found / expected(a, b) }
        };
        (0..self.experts).map(|a| (0..self.experts).map(|b| lift(a, b)).collect()).collect()
    }

    /// Shares of the followed tokens, `[F][E]`: how much of a token's routes each expert has.
    pub fn followed(&self) -> Vec<Vec<f64>> {
        let shares = |counts: &[u64]| {
            let all = counts.iter().sum::<u64>().max(1) as f64;
            counts.iter().map(|&n| n as f64 / all).collect()
        };
        self.followed.chunks(self.experts.max(1)).map(shares).collect()
    }

    /// The `most` tokens that speak most for each expert: frequent ones of which it takes more than its fair part. `occurrences` says
    /// how often a token is in the text. By `count · ln(share over fair share)`, descending.
    pub fn typical(&self, most: usize, occurrences: &HashMap<u32, u64>) -> Vec<Vec<TokenUse>> {
        self.frequent.iter().map(|frequent| frequent.typical(self.experts, most, occurrences)).collect()
    }
}

impl Frequent {
    fn add(&mut self, token: u32) {
        if let Some(count) = self.counts.get_mut(&token) {
            *count += 1;
        } else if self.counts.len() < KEPT {
            self.counts.insert(token, 1);
        } else {
            self.counts.retain(|_, count| {
                *count -= 1;
                *count > 0
            });
        }
    }

    fn typical(&self, experts: usize, most: usize, occurrences: &HashMap<u32, u64>) -> Vec<TokenUse> {
        let fair = 1.0 / experts.max(1) as f64;
        let usage = |(&token, &count): (&u32, &u64)| {
            let all = occurrences.get(&token).copied().unwrap_or(count).max(count);
            TokenUse { token, count, share: count as f64 / all as f64 }
        };
        let weight = |token: &TokenUse| token.count as f64 * (token.share / fair).ln();
        let mut typical: Vec<TokenUse> = self.counts.iter().map(usage).filter(|token| token.count > 1 && token.share > fair).collect();
        typical.sort_by(|a, b| weight(b).total_cmp(&weight(a)).then(a.token.cmp(&b.token)));
        typical.truncate(most);
        typical
    }
}

/// Indices of the two largest, the lowest of equals first. `None` of fewer than two, or where one is not finite.
fn first_two(logits: &[f32]) -> Option<(usize, usize)> {
    if logits.len() < 2 || !logits.iter().all(|z| z.is_finite()) {
        return None;
    }
    let best = |but: Option<usize>| (0..logits.len()).filter(|&e| Some(e) != but).reduce(|b, e| if logits[e] > logits[b] { e } else { b });
    let first = best(None)?;
    Some((first, best(Some(first))?))
}
