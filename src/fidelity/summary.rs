//! Many values told in few: mean, quantiles, the interval of a perplexity gap. Memory is bounded, whatever the number of tokens.

use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::Serialize;

/// Values that quantiles are taken of. Up to here they are exact.
pub const KEPT: usize = 8192;
/// Blocks of tokens that a bootstrap draws from; twice as many are merged in pairs.
const BLOCKS: usize = 4096;
/// Tokens of a block at first. Neighbouring tokens are not independent, and a block holds them together.
const BLOCK_TOKENS: usize = 32;
/// Resamples of a bootstrap.
const RESAMPLES: usize = 1000;
/// Of the reservoir and of the bootstrap: the same values give the same report.
const SEED: u64 = 0x6861_7264_6d61_7821;

/// Values in the making of a [`Summary`]: exact moments, quantiles of a uniform sample of at most [`KEPT`].
#[derive(Clone, Debug)]
pub struct Values {
    count: u64,
    sum: f64,
    max: f64,
    kept: Vec<f32>,
    rng: StdRng,
}

/// What is told of many values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Values; where it is 0 so is the rest.
    pub count: u64,
    /// Of all.
    pub mean: f64,
    /// Nearest rank: the smallest value that half are not above.
    pub p50: f64,
    /// The same of 95 in 100.
    pub p95: f64,
    /// The same of 99 in 100.
    pub p99: f64,
    /// Of all.
    pub max: f64,
}

impl Default for Values {
    fn default() -> Self {
        Self { count: 0, sum: 0.0, max: f64::NEG_INFINITY, kept: Vec::new(), rng: StdRng::seed_from_u64(SEED) }
    }
}

impl Values {
    /// One more. A NaN is left out.
    pub fn push(&mut self, value: f64) {
        if value.is_nan() {
            return;
        }
        self.count += 1;
        self.sum += value;
        self.max = self.max.max(value);
        if self.kept.len() < KEPT {
            self.kept.push(value as f32);
        } else {
            // Reservoir: every value so far is kept with the same probability.
            let place = self.rng.random_range(0..self.count);
            if let Some(kept) = self.kept.get_mut(usize::try_from(place).unwrap_or(usize::MAX)) {
                *kept = value as f32;
            }
        }
    }

    /// Of those so far.
    pub fn mean(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum / self.count as f64 }
    }

    /// Of those so far.
    pub fn summary(&self) -> Summary {
        if self.count == 0 {
            return Summary::default();
        }
        let mut kept = self.kept.clone();
        let (all, mut below) = (kept.len(), kept.len());
        // From the largest rank down: each is looked for among those below the one before.
        let mut rank = |share: f64| {
            let place = ((share * all as f64).ceil() as usize).clamp(1, all) - 1;
            let (_, value, _) = kept[..below].select_nth_unstable_by(place, f32::total_cmp);
            below = place + 1;
            f64::from(*value)
        };
        let [p99, p95, p50] = [0.99, 0.95, 0.5].map(&mut rank);
        Summary { count: self.count, mean: self.mean(), p50, p95, p99, max: self.max }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Sum of all.
    pub fn sum(&self) -> f64 {
        self.sum
    }

    /// All of them, in order, where they are at most [`KEPT`]; else so many, each with the same probability.
    pub fn kept(&self) -> &[f32] {
        &self.kept
    }
}

/// Negative log-likelihoods of the same tokens under two routings, in blocks of neighbours.
#[derive(Clone, Debug)]
pub struct Paired {
    blocks: Vec<Block>,
    block_tokens: usize,
}

/// Sums over neighbouring tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Block {
    tokens: usize,
    reference: f64,
    served: f64,
}

/// Perplexities of the same text, and how far the second is above the first.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PerplexityGap {
    /// Predicted tokens.
    pub tokens: usize,
    /// Under the reference routing.
    pub reference: f64,
    /// Under the served one.
    pub served: f64,
    /// `served / reference - 1`: below 0 the served routing predicts better.
    pub gap: f64,
    /// The gap lies here with 95 % confidence: a paired bootstrap over blocks of neighbouring tokens, seed fixed. `None` of fewer than
    /// two blocks.
    pub interval: Option<[f64; 2]>,
}

impl Default for Paired {
    fn default() -> Self {
        Self { blocks: Vec::new(), block_tokens: BLOCK_TOKENS }
    }
}

impl Block {
    fn add(&mut self, other: Self) {
        self.tokens += other.tokens;
        self.reference += other.reference;
        self.served += other.served;
    }

    /// Perplexity over perplexity, less 1.
    fn gap(&self) -> f64 {
        ((self.served - self.reference) / self.tokens.max(1) as f64).exp_m1()
    }
}

impl Paired {
    /// The next token.
    pub fn push(&mut self, reference: f64, served: f64) {
        let token = Block { tokens: 1, reference, served };
        match self.blocks.last_mut() {
            Some(block) if block.tokens < self.block_tokens => block.add(token),
            _ => {
                if self.blocks.len() == 2 * BLOCKS {
                    self.merge();
                }
                self.blocks.push(token);
            }
        }
    }

    fn merge(&mut self) {
        let pair = |pair: &[Block]| {
            let mut sum = Block::default();
            pair.iter().for_each(|block| sum.add(*block));
            sum
        };
        self.blocks = self.blocks.chunks(2).map(pair).collect();
        self.block_tokens *= 2;
    }

    /// What they come to.
    pub fn gap(&self) -> PerplexityGap {
        PerplexityGap { interval: self.interval(), ..self.gap_so_far() }
    }

    /// Predicted tokens, and the sums over them in nats: (tokens, reference, served).
    pub fn sums(&self) -> (usize, f64, f64) {
        let all = self.all();
        (all.tokens, all.reference, all.served)
    }

    fn all(&self) -> Block {
        let mut all = Block::default();
        self.blocks.iter().for_each(|block| all.add(*block));
        all
    }

    /// The same without an interval.
    pub fn gap_so_far(&self) -> PerplexityGap {
        let all = self.all();
        let perplexity = |sum: f64| (sum / all.tokens.max(1) as f64).exp();
        PerplexityGap {
            tokens: all.tokens,
            reference: perplexity(all.reference),
            served: perplexity(all.served),
            gap: all.gap(),
            interval: None,
        }
    }

    fn interval(&self) -> Option<[f64; 2]> {
        let n = self.blocks.len();
        if n < 2 {
            return None;
        }
        let mut rng = StdRng::seed_from_u64(SEED);
        let mut resample = || {
            let mut sum = Block::default();
            (0..n).for_each(|_| sum.add(self.blocks[rng.random_range(0..n)]));
            sum.gap()
        };
        let mut gaps: Vec<f64> = (0..RESAMPLES).map(|_| resample()).collect();
        gaps.sort_by(f64::total_cmp);
        Some([gaps[RESAMPLES / 40], gaps[RESAMPLES - 1 - RESAMPLES / 40]])
    }
}
