//! Rotary position embedding: inverse frequencies per variant, cos and sin per batch.
//!
//! The formulas are those of Hugging Face transformers (`modeling_rope_utils`), computed in f32 as there.

use std::f64::consts::PI;

use candle_core::{Device, Tensor};

use super::{RopeScaling, RopeSpec};
use crate::error::Result;

/// Frequencies of one model.
#[derive(Clone, Debug)]
pub struct Rope {
    /// `[hd / 2]`.
    inverse_frequencies: Vec<f32>,
    /// Scale of cos and sin.
    scale: f32,
}

impl Rope {
    /// For heads of width `head_dim`.
    pub fn new(spec: &RopeSpec, head_dim: usize) -> Self {
        let half = head_dim / 2;
        let plain: Vec<f64> = (0..half).map(|i| spec.theta.powf(-2.0 * i as f64 / head_dim as f64)).collect();
        let (frequencies, scale) = match spec.scaling {
            RopeScaling::None => (plain, 1.0),
            RopeScaling::Linear { factor } => (plain.iter().map(|f| f / factor).collect(), 1.0),
            RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, attention_factor, truncate } => {
                let range = CorrectionRange::new(spec.theta, head_dim, original_max_position, beta_fast, beta_slow, truncate);
                let mixed = plain.iter().enumerate().map(|(i, f)| {
                    let interpolate = range.ramp(i as f64);
                    f / factor * interpolate + f * (1.0 - interpolate)
                });
                let default = if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
                (mixed.collect(), attention_factor.unwrap_or(default))
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                let original = original_max_position as f64;
                let scaled = plain.iter().map(|&f| {
                    let wavelength = 2.0 * PI / f;
                    if wavelength < original / high_freq_factor {
                        f
                    } else if wavelength > original / low_freq_factor {
                        f / factor
                    } else {
                        let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                });
                (scaled.collect(), 1.0)
            }
        };
        Self { inverse_frequencies: frequencies.into_iter().map(|f| f as f32).collect(), scale: scale as f32 }
    }

    /// `[hd / 2]`.
    #[cfg(feature = "gpu")]
    pub(super) fn inverse_frequencies(&self) -> &[f32] {
        &self.inverse_frequencies
    }

    /// Scale of cos and sin.
    #[cfg(feature = "gpu")]
    pub(super) fn scale(&self) -> f32 {
        self.scale
    }

    /// [`Rope::at`] into buffers, which grow where they are too short.
    pub(super) fn fill(&self, positions: impl Iterator<Item = usize>, cos: &mut Vec<f32>, sin: &mut Vec<f32>) {
        cos.clear();
        sin.clear();
        for position in positions {
            for frequency in &self.inverse_frequencies {
                let angle = position as f32 * frequency;
                cos.push(angle.cos() * self.scale);
                sin.push(angle.sin() * self.scale);
            }
        }
    }

    /// cos and sin `[T, hd / 2]` f32 of the given positions.
    pub fn at(&self, positions: &[u32], device: &Device) -> Result<(Tensor, Tensor)> {
        let angles = || positions.iter().flat_map(|&p| self.inverse_frequencies.iter().map(move |f| p as f32 * f));
        let shape = (positions.len(), self.inverse_frequencies.len());
        let cos = Tensor::from_vec(angles().map(|a| a.cos() * self.scale).collect(), shape, device)?;
        let sin = Tensor::from_vec(angles().map(|a| a.sin() * self.scale).collect(), shape, device)?;
        Ok((cos, sin))
    }
}

/// The dimensions between which YaRN blends from extrapolation to interpolation.
struct CorrectionRange {
    low: f64,
    high: f64,
}

impl CorrectionRange {
    fn new(theta: f64, head_dim: usize, original: usize, beta_fast: f64, beta_slow: f64, truncate: bool) -> Self {
        let dimension = |rotations: f64| head_dim as f64 * (original as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        Self { low, high }
    }

    fn ramp(&self, dimension: f64) -> f64 {
        ((dimension - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }
}
