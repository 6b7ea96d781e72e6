//! Random numbers of training, by counter: a number is a hash of where it is used.
//!
//! There is no generator and so no state: the backward pass sees the draw of the forward pass, a resumed run sees what
//! an uninterrupted one would have seen, and the order in which rows are handled does not matter.

use std::f64::consts::TAU;

/// What a number is for. Numbers of different streams are independent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Noise on router logits.
    Select,
    /// Coins that decide about a weight once the experts are chosen.
    Weights,
    /// Noise on the router's input.
    Jitter,
    /// Exploration: whether, and which experts.
    Epsilon,
    /// Experts left out of a token's choice.
    Dropout,
    /// Noise on the weights of an expert that is made anew.
    Reinit,
}

/// The random numbers of one layer in one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    key: u64,
}

impl Draw {
    /// Numbers of `layer` at `step` in the run seeded with `seed`.
    pub fn new(seed: u64, step: usize, layer: usize) -> Self {
        Self { key: mix(mix(mix(seed) ^ step as u64) ^ layer as u64) }
    }

    /// Uniform in (0, 1), without either end.
    pub fn uniform(&self, stream: Stream, row: u64, column: u64) -> f64 {
        self.unit(stream as u64, row, column)
    }

    /// Standard Gumbel: `-ln(-ln u)`.
    pub fn gumbel(&self, stream: Stream, row: u64, column: u64) -> f64 {
        -(-self.uniform(stream, row, column).ln()).ln()
    }

    /// Standard normal (Box and Muller 1958), independent of [`Draw::uniform`] of the same stream.
    pub fn normal(&self, stream: Stream, row: u64, column: u64) -> f64 {
        let stream = stream as u64 + 0x100;
        let [radius, angle] = [2 * column, 2 * column + 1].map(|column| self.unit(stream, row, column));
        (-2.0 * radius.ln()).sqrt() * (TAU * angle).cos()
    }

    fn unit(&self, stream: u64, row: u64, column: u64) -> f64 {
        let bits = mix(mix(mix(self.key ^ stream) ^ row) ^ column);
        // 52 bits and a half: exact in f64, so that no value is rounded to 0 or 1.
        ((bits >> 12) as f64 + 0.5) / (1u64 << 52) as f64
    }
}

/// One step of SplitMix64 (Steele, Lea and Flood 2014): every bit of the result depends on every bit of `x`.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const N: u64 = 100_000;

    /// Mean and variance over rows and a few columns.
    fn moments(value: impl Fn(u64, u64) -> f64) -> (f64, f64) {
        let values: Vec<f64> = (0..N).map(|i| value(i / 4, i % 4)).collect();
        let mean = values.iter().sum::<f64>() / N as f64;
        (mean, values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / N as f64)
    }

    #[test]
    fn distributions_have_their_moments() {
        let draw = Draw::new(7, 3, 1);
        // Four standard errors each; the variance's error from the fourth moment.
        for (name, (mean, variance), expected_mean, expected_variance, error) in [
            ("uniform", moments(|r, c| draw.uniform(Stream::Select, r, c)), 0.5, 1.0 / 12.0, 1e-3),
            ("normal", moments(|r, c| draw.normal(Stream::Select, r, c)), 0.0, 1.0, 0.018),
            ("gumbel", moments(|r, c| draw.gumbel(Stream::Select, r, c)), 0.577_215_664_9, 1.644_934, 0.044),
        ] {
            let allowed = 4.0 * (expected_variance / N as f64).sqrt();
            assert!((mean - expected_mean).abs() < allowed, "{name}: mean {mean}");
            assert!((variance - expected_variance).abs() < error, "{name}: variance {variance}");
        }
    }

    #[test]
    fn every_coordinate_counts_and_nothing_else_does() {
        let value = Draw::new(1, 2, 3).uniform(Stream::Select, 4, 5);
        assert_eq!(value, Draw::new(1, 2, 3).uniform(Stream::Select, 4, 5));
        for other in [
            Draw::new(0, 2, 3).uniform(Stream::Select, 4, 5),
            Draw::new(1, 0, 3).uniform(Stream::Select, 4, 5),
            Draw::new(1, 2, 0).uniform(Stream::Select, 4, 5),
            Draw::new(1, 3, 2).uniform(Stream::Select, 4, 5),
            Draw::new(1, 2, 3).uniform(Stream::Weights, 4, 5),
            Draw::new(1, 2, 3).uniform(Stream::Select, 5, 4),
        ] {
            assert_ne!(value, other);
        }
    }

    #[test]
    fn neighbouring_rows_are_uncorrelated() {
        let draw = Draw::new(0, 0, 0);
        let product: f64 =
            (0..N).map(|row| draw.normal(Stream::Select, row, 0) * draw.normal(Stream::Select, row + 1, 0)).sum::<f64>() / N as f64;
        assert!(product.abs() < 4.0 / (N as f64).sqrt(), "{product}");
    }
}
