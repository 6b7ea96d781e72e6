//! Tensor operations that have a fast form and a differentiable one.
//!
//! candle's fused softmax, RMSNorm and RoPE drop gradients without an error. Every such call of the crate is here, and
//! picks by [`Tensor::track_op`]: the fused or hand-written form when nothing is tracked, the composed one otherwise.
//!
//! Where operations run on the CPU ([`place`]) they are loops over slices, in f32; on a device those of [`device`].

mod attached;
pub mod cpu;
pub(crate) mod device;
mod frozen;
mod fused;
mod grouped;
mod known;
mod place;
mod refill;
mod threads;
mod views;

use candle_core::{D, DType, Storage, Tensor, WithDType};
use half::bf16;

use self::cpu::{Arithmetic, AttentionShape, Data, Input, Matrix, Output, Product, Scratch, Store};
#[cfg(test)]
pub(crate) use self::place::as_on_a_device;
pub use self::threads::{COMPUTE_THREADS, start_compute_threads};
pub(crate) use self::{
    place::{OnHost, runs_here},
    refill::refill,
};
use crate::error::{Error, Result};

/// `x [T, K]` times `weight [N, K]` transposed, in the dtype of `x`: `[T, N]`.
///
/// On the CPU without gradients each row is reduced in an order that does not depend on the batch; bf16 weights are read as they are.
/// A weight that is not tracked gets no gradient.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if !runs_here(x.device()) {
        return Ok(device::linear(x, weight)?);
    }
    if x.dtype() != DType::F32 || weight.track_op() {
        return Ok(x.matmul(&weight.to_dtype(x.dtype())?.t()?)?);
    }
    if x.track_op() {
        let weight = weight.contiguous()?.unsqueeze(0)?;
        return OnHost::here(x)?.apply(frozen::Frozen { weight });
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
    if runs_here(gate_up.device()) && gate_up.dtype() == DType::F32 {
        return OnHost::here(gate_up)?.apply(fused::SiluMul);
    }
    Ok(device::silu_mul(gate_up)?)
}

/// `w_te · silu(gate) · up` of all experts: `[T, E, 2F]` and `[T, E]` to `[T, E, F]`. Differentiable in both.
pub fn weighted_swiglu(gate_up: &Tensor, weights: &Tensor) -> Result<Tensor> {
    if runs_here(gate_up.device()) && gate_up.dtype() == DType::F32 && weights.dtype() == DType::F32 {
        return OnHost::here(gate_up)?.apply2(&OnHost::here(weights)?, fused::WeightedSwiGlu);
    }
    Ok(device::weighted_swiglu(gate_up, weights)?)
}

/// Mean negative log-likelihood of `targets [T]` under `softmax(logits [T, V])`, a scalar. Differentiable.
pub fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    if runs_here(logits.device()) && logits.dtype() == DType::F32 {
        return OnHost::here(logits)?.apply(fused::CrossEntropy { targets: targets.to_vec() });
    }
    Ok(device::cross_entropy(logits, targets)?)
}

/// Rows sorted by group with one matrix for each group: `x [R, K]` and `weight [E, N, K]` to `[R, N]`, rows of group e
/// being `offsets[e] .. offsets[e + 1]` (`offsets [E + 1]`). Differentiable in both; a weight in another element type is converted
/// a matrix at a time.
pub fn grouped_linear(x: &Tensor, weight: &Tensor, offsets: &[usize]) -> Result<Tensor> {
    let frozen_bf16 = x.dtype() == DType::F32 && weight.dtype() == DType::BF16 && !weight.track_op();
    if runs_here(x.device()) && matches!(x.dtype(), DType::F32 | DType::F64) && (weight.dtype() == x.dtype() || frozen_bf16) {
        let op = grouped::GroupedLinear { offsets: offsets.to_vec() };
        return OnHost::here(x)?.apply2(&OnHost::here(weight)?, op);
    }
    Ok(device::grouped_linear(x, weight, offsets)?)
}

/// All experts on all rows: `x [T, D]` and `gate_up [E, 2F, D]` to `[T, E, 2F]`. Differentiable in both.
pub fn experts_in(x: &Tensor, gate_up: &Tensor) -> Result<Tensor> {
    let ((t, d), (e, two_f, _)) = (x.dims2()?, gate_up.dims3()?);
    let flat = gate_up.reshape((e * two_f, d))?;
    let alone = x.track_op() && !flat.track_op();
    let y = match alone || flat.dtype() != x.dtype() || !runs_here(x.device()) {
        true => linear(x, &flat)?,
        false => x.matmul(&flat.t()?)?,
    };
    Ok(y.reshape((t, e, two_f))?)
}

/// What comes of the weighted hidden values of all experts: `hidden [T, E, F]` and `down [E, D, F]` to the sum over experts,
/// `[T, D]`. Differentiable in both.
pub fn experts_down(hidden: &Tensor, down: &Tensor) -> Result<Tensor> {
    if !runs_here(hidden.device()) {
        return Ok(device::experts_down(hidden, down)?);
    }
    let ((t, e, f), d) = (hidden.dims3()?, down.dim(1)?);
    let hidden = hidden.reshape((t, e * f))?;
    let alone = hidden.track_op() && !down.track_op();
    if hidden.dtype() == DType::F32 && (alone || down.dtype() != DType::F32) {
        return OnHost::here(&hidden)?.apply(frozen::Frozen { weight: down.detach().contiguous()? });
    }
    Ok(hidden.matmul(&down.transpose(1, 2)?.reshape((e * f, d))?)?)
}

/// A scalar function of `x` that was computed outside: its `value`, and its `gradient` in the order of the elements of x.
pub fn known(x: &Tensor, value: f64, gradient: Vec<f64>) -> Result<Tensor> {
    // To the host and back is differentiable.
    Ok(OnHost::copied(x)?.apply(known::Known { value, gradient })?.to_device(x.device())?)
}

/// Causal attention of `count` sequences of one length: q `[T, H, hd]`, k and v `[T, KV, hd]` to `[T, H, hd]`, f32 on
/// the CPU. Differentiable.
pub(crate) fn causal_attention(q: &Tensor, k: &Tensor, v: &Tensor, count: usize, shape: AttentionShape) -> Result<Tensor> {
    OnHost::here(q)?.apply3([&OnHost::here(k)?, &OnHost::here(v)?], fused::CausalAttention { shape, count })
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
