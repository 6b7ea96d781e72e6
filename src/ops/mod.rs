//! Tensor operations that have a fast form and a differentiable one.
//!
//! candle's fused softmax, RMSNorm and RoPE drop gradients without an error. Every such call of the crate is here, and
//! picks by [`Tensor::track_op`]: the fused or hand-written form when nothing is tracked, the composed one otherwise.

pub mod cpu;
mod fused;
mod grouped;
mod known;
mod refill;
mod threads;
mod views;

use candle_core::{D, DType, Device, Storage, Tensor, WithDType};
use half::bf16;

use self::cpu::{Arithmetic, AttentionShape, Data, Input, Matrix, Output, Product, Scratch, Store};
pub(crate) use self::refill::refill;
pub use self::threads::{COMPUTE_THREADS, start_compute_threads};
use crate::error::{Error, Result};

/// `x [T, K]` times `weight [N, K]` transposed, in the dtype of `x`: `[T, N]`.
///
/// On the CPU without gradients each row is reduced in an order that does not depend on the batch; bf16 weights are read as they are.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() || x.dtype() != DType::F32 || x.track_op() || weight.track_op() {
        return Ok(x.matmul(&weight.to_dtype(x.dtype())?.t()?)?);
    }
    let ((t, k), n) = (x.dims2()?, weight.dim(0)?);
    if weight.dim(1)? != k {
        return Err(Error::Internal(format!("linear: x {:?} and weight {:?} do not fit", x.shape(), weight.shape())));
    }
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let mut out = vec![0f32; t * n];
    cpu_slice::<f32, _>(&x, |x| match weight.dtype() {
        DType::F32 => cpu_slice::<f32, _>(&weight, |w| host_linear(x, Data::F32(w), k, &mut out, n)),
        DType::BF16 => cpu_slice::<bf16, _>(&weight, |w| host_linear(x, Data::Bf16(w), k, &mut out, n)),
        other => Err(Error::Internal(format!("linear: no {other:?} weights on the CPU"))),
    })?;
    Ok(Tensor::from_vec(out, (t, n), x.device())?)
}

fn host_linear(x: &[f32], weights: Data<'_>, k: usize, out: &mut [f32], n: usize) -> Result<()> {
    let product = Product { weights: Matrix::new(weights, n, k), rows: 0..x.len() / k, column: 0 };
    let output = Output { values: out, stride: n, store: Store::Set };
    Arithmetic::exact().linear(&mut Scratch::default(), Input { x, k, source: None }, &[product], output);
    Ok(())
}

/// RMSNorm over the last dimension, `x / sqrt(mean(x²) + eps) · weight`, in f32, returned in the dtype of `x`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if x.track_op() || weight.track_op() || x.dtype() != weight.dtype() {
        let wide = x.to_dtype(DType::F32)?;
        let scale = (wide.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
        return Ok(wide.broadcast_div(&scale)?.broadcast_mul(&weight.to_dtype(DType::F32)?)?.to_dtype(x.dtype())?);
    }
    #[expect(clippy::disallowed_methods, reason = "nothing is tracked")]
    Ok(candle_nn::ops::rms_norm(&x.contiguous()?, weight, eps as f32)?)
}

/// Softmax over the last dimension.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    if x.track_op() {
        return Ok(candle_nn::ops::softmax(x, D::Minus1)?);
    }
    #[expect(clippy::disallowed_methods, reason = "nothing is tracked")]
    Ok(candle_nn::ops::softmax_last_dim(&x.contiguous()?)?)
}

/// Rotates `x [T, H, hd]` by `cos` and `sin [T, hd / 2]`; the two halves of a head are the two coordinates.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let (cos, sin) = (cos.to_dtype(x.dtype())?.unsqueeze(1)?, sin.to_dtype(x.dtype())?.unsqueeze(1)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Ok(Tensor::cat(&[first, second], D::Minus1)?)
}

/// `silu(gate) · up` of `[.., 2F]`, whose last dimension is F of gate, then F of up: `[.., F]`. Differentiable.
pub fn silu_mul(gate_up: &Tensor) -> Result<Tensor> {
    let f = gate_up.dim(D::Minus1)? / 2;
    if gate_up.device().is_cpu() && gate_up.dtype() == DType::F32 {
        return Ok(gate_up.contiguous()?.apply_op1(fused::SiluMul)?);
    }
    Ok((gate_up.narrow(D::Minus1, 0, f)?.silu()? * gate_up.narrow(D::Minus1, f, f)?)?)
}

/// `w_te · silu(gate) · up` of all experts: `[T, E, 2F]` and `[T, E]` to `[T, E, F]`. Differentiable in both.
pub fn weighted_swiglu(gate_up: &Tensor, weights: &Tensor) -> Result<Tensor> {
    if gate_up.device().is_cpu() && gate_up.dtype() == DType::F32 && weights.dtype() == DType::F32 {
        return Ok(gate_up.contiguous()?.apply_op2(&weights.contiguous()?, fused::WeightedSwiGlu)?);
    }
    Ok(silu_mul(gate_up)?.broadcast_mul(&weights.to_dtype(gate_up.dtype())?.unsqueeze(D::Minus1)?)?)
}

/// Mean negative log-likelihood of `targets [T]` under `softmax(logits [T, V])`, a scalar. Differentiable.
pub fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    if logits.device().is_cpu() && logits.dtype() == DType::F32 {
        return Ok(logits.contiguous()?.apply_op1(fused::CrossEntropy { targets: targets.to_vec() })?);
    }
    let targets = Tensor::from_slice(targets, targets.len(), logits.device())?;
    Ok(candle_nn::loss::cross_entropy(logits, &targets)?)
}

/// Rows sorted by group with one matrix for each group: `x [R, K]` and `weight [E, N, K]` to `[R, N]`, rows of group e
/// being `offsets[e] .. offsets[e + 1]` (`offsets [E + 1]`). Differentiable in both.
pub fn grouped_linear(x: &Tensor, weight: &Tensor, offsets: &[usize]) -> Result<Tensor> {
    if x.device().is_cpu() && matches!(x.dtype(), DType::F32 | DType::F64) && weight.dtype() == x.dtype() {
        let op = grouped::GroupedLinear { offsets: offsets.to_vec() };
        return Ok(x.contiguous()?.apply_op2(&weight.contiguous()?, op)?);
    }
    Ok(grouped::composed(x, weight, offsets)?)
}

/// A scalar function of `x` that was computed outside: its `value`, and its `gradient` in the order of the elements of x.
pub fn known(x: &Tensor, value: f64, gradient: Vec<f64>) -> Result<Tensor> {
    // To the host and back is differentiable.
    let on_host = x.to_device(&Device::Cpu)?.contiguous()?.apply_op1(known::Known { value, gradient })?;
    Ok(on_host.to_device(x.device())?)
}

/// Causal attention of `count` sequences of one length: q `[T, H, hd]`, k and v `[T, KV, hd]` to `[T, H, hd]`, f32 on
/// the CPU. Differentiable.
pub(crate) fn causal_attention(q: &Tensor, k: &Tensor, v: &Tensor, count: usize, shape: AttentionShape) -> Result<Tensor> {
    Ok(q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, fused::CausalAttention { shape, count })?)
}

/// Lends the elements of a contiguous CPU tensor.
pub(crate) fn cpu_slice<T: WithDType, R>(tensor: &Tensor, read: impl FnOnce(&[T]) -> Result<R>) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        return Err(Error::Internal("a CPU kernel met a tensor on another device".into()));
    };
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(Error::Internal("a CPU kernel met a strided tensor".into()));
    };
    read(&storage.as_slice::<T>()?[start..end])
}

#[cfg(test)]
mod tests;
