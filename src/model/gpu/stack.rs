//! Stacked weights of experts: bf16 as they were loaded, or 8-bit floats that were made of those.

use candle_core::Tensor;
use hardmax_kernels::{
    Buffer, Stream, View, bf16,
    experts::{Quantize, Weights, scales_len},
    grouped::DequantizeExperts,
};

use super::held::Held;
use crate::error::Result;

/// `[E, n, k]`.
#[derive(Debug)]
pub(super) enum Stack {
    Bf16(Held<bf16>),
    /// e4m3 with a scale for every 128 x 128 weights.
    E4m3 {
        values: Buffer<u8>,
        scales: Buffer<f32>,
        shape: (usize, usize, usize),
    },
}

impl Stack {
    pub(super) fn new(tensor: &Tensor) -> Result<Self> {
        Ok(Self::Bf16(Held::new(tensor)?))
    }

    /// Rounds bf16 to 8 bits.
    pub(super) fn quantized(tensor: &Tensor, stream: Stream) -> Result<Self> {
        let shape @ (experts, n, k) = tensor.dims3()?;
        let weight = Held::new(tensor)?;
        let values = Buffer::new(stream, experts * n * k, "8-bit weights of experts")?;
        let scales = Buffer::new(stream, scales_len(experts, n, k), "scales of 8-bit weights of experts")?;
        Quantize { weight: weight.view(), values: values.view(), scales: scales.view(), experts, n, k }.launch(stream)?;
        Ok(Self::E4m3 { values, scales, shape })
    }

    /// For products that stream weights.
    pub(super) fn weights(&self) -> Weights<'_> {
        match self {
            Self::Bf16(held) => Weights::Bf16(held.view()),
            Self::E4m3 { values, scales, .. } => Weights::E4m3 { values: values.view(), scales: scales.view() },
        }
    }

    /// For products on tiles: 8-bit weights of the experts that have rows are widened into `scratch`.
    pub(super) fn wide<'a>(&'a self, offsets: View<'_, u32>, scratch: View<'a, bf16>, stream: Stream) -> Result<View<'a, bf16>> {
        match self {
            Self::Bf16(held) => Ok(held.view()),
            Self::E4m3 { values, scales, shape: (experts, n, k) } => {
                let (weight, scales, offsets) = (values.view(), scales.view(), Some(offsets));
                DequantizeExperts { weight, scales, offsets, out: scratch, experts: *experts, n: *n, k: *k }.launch(stream)?;
                Ok(scratch.part(..experts * n * k))
            }
        }
    }
}
