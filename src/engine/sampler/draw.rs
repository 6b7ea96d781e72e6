//! From edited logits to one token, at random: temperature, min-p, top-k, top-p, and the draw.
//!
//! The draw is candle's [`LogitsProcessor`]. It works on tensors and its own top-p sorts the whole row, so it never sees a whole
//! row: the filters narrow it first, without a sort, and what they leave is drawn in two stages where it is long: a block by the
//! blocks' probabilities, then a token of that block. The distribution is the same.
//!
//! Where the model draws what it can, both sides draw as [`model::draw`](crate::model::draw) defines it, with one random number for each
//! token: a seed gives the same text whether or not its rows come here.

use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::{
    super::request::GenerateParams,
    Drawer,
    row::{self, Histogram, Key, RUN},
};
use crate::{error::Result, model::TokenDraw};

/// What is longer is drawn in two stages.
const SINGLE_STAGE: usize = 512;

/// Values of a block; at the vocabularies of today there are a few hundred blocks.
const BLOCK: usize = 256;

/// One in so many runs is looked at first for what top-p keeps.
const TOP_RUNS: usize = 4;

/// A slice of this length is sorted rather than halved.
const SORTED: usize = 64;

/// The filters of a request, and its random numbers.
pub(super) struct Draw {
    chance: Chance,
    temperature: f32,
    /// 0: off.
    top_k: usize,
    /// From 1: off.
    top_p: f32,
    /// 0: off.
    min_p: f32,
}

enum Chance {
    /// Takes as many numbers for a token as it likes.
    Processor(Box<LogitsProcessor>),
    Numbers(Box<Numbers>),
}

/// One random number for each token.
struct Numbers {
    random: StdRng,
    /// Of the next token, in `[0, 1)`.
    next: f32,
}

impl Numbers {
    fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        Self { next: random.random(), random }
    }
}

/// A row `[V]` with what was found on the way over it.
pub(super) struct Row<'a> {
    /// Negative infinity where a token may not be drawn.
    pub(super) values: &'a [f32],
    /// The largest of all; finite.
    pub(super) max: f32,
    /// The largest of each [`RUN`].
    pub(super) maxima: &'a [f32],
}

impl Draw {
    /// `seed` is that of the choice; `params.temperature` is not about 0.
    pub(super) fn new(params: &GenerateParams, seed: u64, drawer: Drawer) -> Self {
        let chance = match drawer {
            // The temperature is in the values that it gets.
            Drawer::Sampler => Chance::Processor(Box::new(LogitsProcessor::from_sampling(seed, Sampling::All { temperature: 1.0 }))),
            Drawer::Model => Chance::Numbers(Box::new(Numbers::new(seed))),
        };
        let &GenerateParams { temperature, top_k, top_p, min_p, .. } = params;
        Self { chance, temperature, top_k, top_p, min_p }
    }

    /// How the model draws the next token; `None` if it is not to.
    pub(super) fn by_model(&self) -> Option<TokenDraw> {
        let Chance::Numbers(numbers) = &self.chance else { return None };
        let &Self { temperature, top_p, min_p, .. } = self;
        // More than can be counted is more than there are.
        let top_k = u32::try_from(self.top_k).unwrap_or(0);
        Some(TokenDraw { temperature, min_p, top_k, top_p, uniform: numbers.next })
    }

    /// A token was drawn, here or by the model: the next one has a number of its own.
    pub(super) fn taken(&mut self) {
        if let Chance::Numbers(numbers) = &mut self.chance {
            numbers.next = numbers.random.random();
        }
    }

    /// A token of the whole vocabulary.
    pub(super) fn of_row(&mut self, row: &Row<'_>) -> Result<u32> {
        let filtered = self.min_p > 0.0 || (1..row.values.len()).contains(&self.top_k) || self.top_p < 1.0;
        if !filtered {
            return Ok(self.pick(row.values, row.max)? as u32);
        }
        let keys = self.filter(row);
        self.pick_key(keys, row.max)
    }

    /// A token of these, the largest value of which is `max`; finite, and not empty.
    pub(super) fn of_keys(&mut self, mut keys: Vec<Key>, max: f32) -> Result<u32> {
        let floor = self.floor();
        keys.retain(|key| key.value() - max >= floor);
        self.narrow(&mut keys, max);
        self.pick_key(keys, max)
    }

    /// What the filters leave, in an order that depends on the row alone. One of them at least is on.
    fn filter(&self, row: &Row<'_>) -> Vec<Key> {
        if self.min_p == 0.0 && self.top_k == 0 {
            return self.nucleus(row);
        }
        let (least, floor) = (row.at_least(self.top_k), self.floor());
        let mut keys = row.keys(|value| value >= least && value - row.max >= floor);
        self.narrow(&mut keys, row.max);
        keys
    }

    /// Top-k and top-p of what min-p left.
    fn narrow(&self, keys: &mut Vec<Key>, max: f32) {
        if (1..keys.len()).contains(&self.top_k) {
            row::select(keys, self.top_k);
            keys.truncate(self.top_k);
        }
        if self.top_p < 1.0 {
            let target = f64::from(self.top_p) * keys.iter().map(|&key| self.weight(key, max)).sum::<f64>();
            self.keep_mass(keys, max, target);
        }
    }

    fn pick_key(&mut self, mut keys: Vec<Key>, max: f32) -> Result<u32> {
        if let Chance::Numbers(_) = self.chance {
            keys.sort_unstable_by_key(|key| key.index());
        }
        let values: Vec<f32> = keys.iter().map(|key| key.value()).collect();
        let place = self.pick(&values, max)?;
        // `place` is that of one of the values.
        Ok(keys.get(place).map_or(0, |key| key.index()))
    }

    /// Logits further below the largest than this are dropped by min-p.
    fn floor(&self) -> f32 {
        if self.min_p > 0.0 { self.temperature * self.min_p.ln() } else { f32::NEG_INFINITY }
    }

    fn scale(&self) -> f32 {
        // A normal number, not 0, whatever the temperature.
        1.0 / self.temperature.min(1e30)
    }

    fn weight(&self, key: Key, max: f32) -> f64 {
        f64::from(row::exp((key.value() - max) * self.scale()))
    }

    /// What top-p leaves of a whole row.
    fn nucleus(&self, row: &Row<'_>) -> Vec<Key> {
        let scale = self.scale();
        let target = f64::from(self.top_p) * row::mass(row.values, row.max, scale);
        // A model that has learnt something puts the share on few tokens, and these are at the top of their runs.
        let least = row.at_least(row.maxima.len().div_ceil(TOP_RUNS));
        let mut keys = row.keys(|value| value >= least);
        if keys.iter().map(|&key| self.weight(key, row.max)).sum::<f64>() >= target {
            self.keep_mass(&mut keys, row.max, target);
            return keys;
        }
        // The likeliest has mass 1. What has less than the share that top-p drops, divided by the number of tokens, is never kept:
        // all such tokens together have less than that share. So nothing that matters is out of range.
        let range = (row.values.len() as f32).ln() - (1.0 - self.top_p).ln();
        let histogram = Histogram::new(row.values, row.max, scale, range);
        let (bin, before) = histogram.crossing(target);
        let mut kept = row.keys(|value| histogram.bin(value) <= bin);
        let mut open: Vec<Key> = kept.extract_if(.., |key| histogram.bin(key.value()) == bin).collect();
        self.keep_mass(&mut open, row.max, target - before);
        kept.append(&mut open);
        kept
    }

    /// Keeps the likeliest keys, as many as have the mass `target` together, and at least one.
    fn keep_mass(&self, keys: &mut Vec<Key>, max: f32, target: f64) {
        // Those before `kept` are in, with mass `sum`; those from `open` on are out.
        let (mut kept, mut open, mut sum) = (0, keys.len(), 0.0);
        while open - kept > SORTED {
            let half = (open - kept) / 2;
            row::select(&mut keys[kept..open], half);
            let upper: f64 = keys[kept..kept + half].iter().map(|&key| self.weight(key, max)).sum();
            if sum + upper >= target {
                open = kept + half;
            } else {
                (kept, sum) = (kept + half, sum + upper);
            }
        }
        keys[kept..open].sort_unstable_by(|a, b| b.cmp(a));
        while kept < open && sum < target {
            sum += self.weight(keys[kept], max);
            kept += 1;
        }
        keys.truncate(kept.max(1));
    }

    /// The place of one of `values`, the largest of which is `max`.
    fn pick(&mut self, values: &[f32], max: f32) -> Result<usize> {
        let scale = self.scale();
        match &mut self.chance {
            Chance::Processor(processor) => process_row(processor, values, max, scale),
            Chance::Numbers(numbers) => Ok(place(values, max, scale, numbers.next)),
        }
    }
}

/// The place of one of `values`, the largest of which is `max`, at random.
fn process_row(processor: &mut LogitsProcessor, values: &[f32], max: f32, scale: f32) -> Result<usize> {
    if values.len() <= SINGLE_STAGE {
        return process(processor, values.iter().map(|value| (value - max) * scale).collect());
    }
    let masses = values.chunks(BLOCK).map(|block| row::mass(block, max, scale).ln() as f32);
    let start = process(processor, masses.collect())? * BLOCK;
    let block = block_from(values, start);
    Ok(start + process(processor, block.iter().map(|value| (value - max) * scale).collect())?)
}

fn process(processor: &mut LogitsProcessor, logits: Vec<f32>) -> Result<usize> {
    let count = logits.len();
    Ok(processor.sample(&Tensor::from_vec(logits, count, &Device::Cpu)?)? as usize)
}

/// The place of the first of `values`, the largest of which is `max`, with which their mass exceeds the share `number` of it.
fn place(values: &[f32], max: f32, scale: f32, number: f32) -> usize {
    let masses: Vec<f64> = values.chunks(BLOCK).map(|block| row::mass(block, max, scale)).collect();
    let share = f64::from(number) * masses.iter().sum::<f64>();
    let (block, rest) = exceeding(masses.into_iter(), share);
    let start = block * BLOCK;
    let weights = block_from(values, start).iter().map(|value| f64::from(row::exp((value - max) * scale)));
    start + exceeding(weights, rest).0
}

/// The place of the first of `masses` with which they exceed `share`, and what those before leave of it. The last that has a mass where
/// rounding keeps all of them from that.
fn exceeding(masses: impl Iterator<Item = f64>, share: f64) -> (usize, f64) {
    let (mut sum, mut found) = (0.0, (0, share));
    for (place, mass) in masses.enumerate().filter(|(_, mass)| *mass > 0.0) {
        found = (place, share - sum);
        sum += mass;
        if sum > share {
            break;
        }
    }
    found
}

fn block_from(values: &[f32], start: usize) -> &[f32] {
    values.get(start..).map_or(&[][..], |rest| &rest[..rest.len().min(BLOCK)])
}

impl Row<'_> {
    /// A value that at least `n` tokens have: no smaller one is among the `n` largest. Finite.
    fn at_least(&self, n: usize) -> f32 {
        if !(1..=self.maxima.len()).contains(&n) {
            return f32::MIN;
        }
        // The n largest maxima are n tokens.
        let mut maxima: Vec<Key> = self.maxima.iter().map(|&max| Key::new(0, max)).collect();
        row::select(&mut maxima, n - 1);
        maxima.get(n - 1).map_or(f32::MIN, |key| key.value()).max(f32::MIN)
    }

    /// The tokens whose value `holds`, which is so for all larger values too; those that may not be drawn are left out.
    fn keys(&self, holds: impl Fn(f32) -> bool) -> Vec<Key> {
        let mut keys = Vec::new();
        // Written always and counted if it holds: chance decides too often for a branch.
        let mut found = [Key::new(0, 0.0); RUN];
        for ((run, values), &max) in self.values.chunks(RUN).enumerate().zip(self.maxima) {
            if !holds(max) {
                continue;
            }
            let mut count = 0;
            for (&value, index) in values.iter().zip(run as u32 * RUN as u32..) {
                found[count % RUN] = Key::new(index, value);
                count += usize::from(holds(value) & (value > f32::NEG_INFINITY));
            }
            keys.extend_from_slice(&found[..count]);
        }
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The filters by their definition, over a sorted row.
    fn sorted(draw: &Draw, values: &[f32]) -> Vec<u32> {
        let mut all: Vec<(u32, f32)> = (0..).zip(values.iter().copied()).filter(|entry| entry.1 > f32::NEG_INFINITY).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let max = all[0].1;
        all.retain(|entry| f64::from(entry.1 - max) >= f64::from(draw.temperature) * f64::from(draw.min_p).ln());
        if draw.top_k > 0 {
            all.truncate(draw.top_k);
        }
        if draw.top_p < 1.0 {
            let weights: Vec<f64> = all.iter().map(|entry| (f64::from(entry.1 - max) / f64::from(draw.temperature)).exp()).collect();
            let target = f64::from(draw.top_p) * weights.iter().sum::<f64>();
            let mut sum = 0.0;
            let kept = weights.iter().take_while(|&&weight| (sum < target, sum += weight).0).count();
            all.truncate(kept.max(1));
        }
        let mut ids: Vec<u32> = all.into_iter().map(|(id, _)| id).collect();
        ids.sort_unstable();
        ids
    }

    #[test]
    fn the_filters_keep_what_sorting_would() {
        let mut random = StdRng::seed_from_u64(3);
        for round in 0..600 {
            let len = random.random_range(1..3000);
            let width = [0.01, 1.0, 5.0, 30.0][round % 4];
            let mut values: Vec<f32> = (0..len).map(|_| random.random_range(-width..=width)).collect();
            for _ in 0..random.random_range(0..len) / 2 {
                values[random.random_range(0..len)] = f32::NEG_INFINITY;
            }
            values[random.random_range(0..len)] = width;
            let mut params = GenerateParams {
                temperature: random.random_range(0.1..2.0),
                top_k: if random.random_bool(0.3) { random.random_range(0..=len + 1) } else { random.random_range(0..60) },
                top_p: if random.random_bool(0.7) { random.random_range(0.001..0.9999) } else { 1.0 },
                min_p: random.random_range(0.0..0.5),
                ..GenerateParams::default()
            };
            match round % 3 {
                // Top-p alone.
                0 => (params.top_k, params.min_p, params.top_p) = (0, 0.0, params.top_p.min(0.999)),
                1 => params.min_p = 0.0,
                _ => {}
            }
            let draw = Draw::new(&params, 1, Drawer::Sampler);
            let (peak, maxima, _) = row::maxima(&values);
            let kept = draw.filter(&Row { values: &values, max: peak.value, maxima: &maxima });
            let mut ids: Vec<u32> = kept.iter().map(|key| key.index()).collect();
            ids.sort_unstable();
            let expected = sorted(&draw, &values);
            // Where the sum comes within rounding of the share, one token more or less is right as well.
            let slack = usize::from(draw.top_p < 1.0);
            let differ = ids.iter().filter(|id| !expected.contains(id)).count() + expected.iter().filter(|id| !ids.contains(id)).count();
            assert!(differ <= slack, "round {round}: {} instead of {} of {len}", ids.len(), expected.len());
        }
    }
}
