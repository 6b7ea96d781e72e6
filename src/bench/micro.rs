//! Parts of a forward by themselves, for `cargo bench`: what a benchmark outside the crate cannot reach.

use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::{
    error::{Error, Result},
    moe::{
        SparseRouting,
        kernel::{CpuKernel, ExpertKernel as _, Experts},
        plan::DispatchPlan,
    },
    ops::cpu::{Arithmetic, Data, Input, Matrix, Output, Product, Scratch, Store},
};

/// Weight matrices of one shape, together larger than the caches: what a forward reads is not in them either.
#[derive(Debug)]
pub struct Matrices {
    values: Values,
    n: usize,
    k: usize,
}

#[derive(Debug)]
enum Values {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl Matrices {
    /// As many matrices `[n, k]` of f32 or bf16 as fill `bytes`, at least one.
    pub fn new(dtype: DType, (n, k): (usize, usize), bytes: usize) -> Result<Self> {
        let count = (bytes / (n * k * dtype.size_in_bytes())).max(1) * n * k;
        let value = |i: usize| ((i * 7919) % 997) as f32 / 997.0 - 0.5;
        let values = match dtype {
            DType::F32 => Values::F32((0..count).into_par_iter().map(value).collect()),
            DType::BF16 => Values::Bf16((0..count).into_par_iter().map(|i| bf16::from_f32(value(i))).collect()),
            other => return Err(Error::Internal(format!("no matrices of {other:?} to measure"))),
        };
        Ok(Self { values, n, k })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        let values = match &self.values {
            Values::F32(values) => values.len(),
            Values::Bf16(values) => values.len(),
        };
        values / (self.n * self.k)
    }

    /// Multiplies `x [rows, k]` with each matrix in turn, and tells how long one took on average.
    pub fn linear(&self, arithmetic: Arithmetic, x: &[f32]) -> Duration {
        let (rows, count, mut scratch) = (x.len() / self.k, self.count(), Scratch::default());
        let all = match &self.values {
            Values::F32(values) => Matrix::new(Data::F32(values), count * self.n, self.k),
            Values::Bf16(values) => Matrix::new(Data::Bf16(values), count * self.n, self.k),
        };
        let mut out = vec![0f32; rows * self.n];
        let start = Instant::now();
        for index in 0..count {
            let product = Product { weights: all.part(index * self.n, self.n), rows: 0..rows, column: 0 };
            let output = Output { values: &mut out, stride: self.n, store: Store::Set };
            arithmetic.linear(&mut scratch, Input { x, k: self.k, source: None }, &[product], output);
        }
        std::hint::black_box(&out);
        start.elapsed() / count as u32
    }
}

/// Runs `x [T, D]` through the experts of each layer, token t through `k` experts from t on, and tells how long one layer took on average.
pub fn experts(arithmetic: Arithmetic, layers: &[Experts], x_td: &Tensor, k: usize) -> Result<Duration> {
    let kernel = CpuKernel::new(arithmetic);
    let first = layers.first().ok_or_else(|| Error::Internal("no layers to measure".into()))?;
    let (tokens, experts) = (x_td.dim(0)?, first.down.dim(0)?);
    let routing = SparseRouting {
        offsets: (0..=tokens).map(|token| (token * k) as u32).collect(),
        expert_ids: (0..tokens * k).map(|route| ((route / k + route % k) % experts) as u32).collect(),
        weights: vec![1.0 / k as f32; tokens * k],
    };
    let plan = DispatchPlan::new(&routing, experts);
    let start = Instant::now();
    for layer in layers {
        std::hint::black_box(kernel.grouped(x_td, &plan, layer)?);
    }
    Ok(start.elapsed() / layers.len() as u32)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::ops::cpu::Reduction;

    #[test]
    fn matrices_fill_what_they_are_given() {
        let matrices = Matrices::new(DType::BF16, (8, 32), 1600).unwrap();
        assert_eq!(matrices.count(), 3);
        assert!(matrices.linear(Arithmetic::detect(Reduction::Fastest), &[0.5; 64]) > Duration::ZERO);
        assert!(Matrices::new(DType::U8, (8, 32), 1600).is_err());
    }

    #[test]
    fn tokens_are_spread_over_experts() {
        let tensor = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let layer = Experts { gate_up: tensor(&[4, 16, 8]), down: tensor(&[4, 8, 8]) };
        let time = experts(Arithmetic::exact(), &[layer.clone(), layer], &tensor(&[5, 8]), 2).unwrap();
        assert!(time > Duration::ZERO);
        assert!(experts(Arithmetic::exact(), &[], &tensor(&[5, 8]), 2).is_err());
    }
}
