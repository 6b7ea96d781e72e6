//! Differentiable operations that are one pass over memory where candle's composed forms take ten. CPU, f32.
//!
//! Each has a composed twin that the tests compare it with.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{
    cpu::{AttentionShape, exp, silu},
    views::{Target, View, elements, multiply, with_slices},
};

/// `silu(gate) · up` of `[.., 2F]`: `[.., F]`.
pub(super) struct SiluMul;

impl CustomOp1 for SiluMul {
    fn name(&self) -> &'static str {
        "silu-mul"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = elements(storage, layout)?;
        let mut dims = layout.dims().to_vec();
        let Some(last) = dims.last_mut() else { bail!("silu-mul needs at least one dimension") };
        let f = *last / 2;
        *last = f;
        let mut out = vec![0f32; x.len() / 2];
        out.par_chunks_mut(f).zip(x.par_chunks(2 * f)).with_min_len(32).for_each(|(out, row)| {
            let (gate, up) = row.split_at(f);
            out.iter_mut().zip(gate).zip(up).for_each(|((out, &gate), &up)| *out = silu(gate) * up);
        });
        Ok((CpuStorage::F32(out), Shape::from(dims)))
    }

    fn bwd(&self, arg: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let f = grad.dim(candle_core::D::Minus1)?;
        let mut out = vec![0f32; arg.elem_count()];
        with_slices([arg, grad], |[x, grad]: [&[f32]; 2]| {
            let rows = out.par_chunks_mut(2 * f).zip(x.par_chunks(2 * f)).zip(grad.par_chunks(f));
            rows.with_min_len(32).for_each(|((out, row), grad)| swiglu_backward(row, grad, 1.0, out));
        })?;
        Ok(Some(Tensor::from_vec(out, arg.shape(), arg.device())?))
    }
}

/// Gradient of `scale · silu(gate) · up` with respect to `[gate, up]`.
fn swiglu_backward(row: &[f32], grad: &[f32], scale: f32, out: &mut [f32]) {
    let f = grad.len();
    let ((gate, up), (d_gate, d_up)) = (row.split_at(f), out.split_at_mut(f));
    for i in 0..f {
        let sigmoid = 1.0 / (1.0 + exp(-gate[i]));
        let grad = grad[i] * scale;
        d_gate[i] = grad * up[i] * sigmoid * (1.0 + gate[i] * (1.0 - sigmoid));
        d_up[i] = grad * gate[i] * sigmoid;
    }
}

/// Hidden activations of all experts, weighted: `[T, E, 2F]` and `[T, E]` to `w_te · silu(gate) · up`, `[T, E, F]`.
pub(super) struct WeightedSwiGlu;

impl CustomOp2 for WeightedSwiGlu {
    fn name(&self) -> &'static str {
        "weighted-swiglu"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, weights) = (elements::<f32>(s1, l1)?, elements::<f32>(s2, l2)?);
        let (t, e, two_f) = l1.shape().dims3()?;
        let f = two_f / 2;
        let mut out = vec![0f32; x.len() / 2];
        let rows = out.par_chunks_mut(f).zip(x.par_chunks(two_f)).zip(weights);
        rows.with_min_len(32).for_each(|((out, row), &weight)| {
            let (gate, up) = row.split_at(f);
            out.iter_mut().zip(gate).zip(up).for_each(|((out, &gate), &up)| *out = weight * (silu(gate) * up));
        });
        Ok((CpuStorage::F32(out), Shape::from((t, e, f))))
    }

    fn bwd(&self, x: &Tensor, weights: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let f = grad.dim(2)?;
        let (mut d_x, mut d_weights) = (vec![0f32; x.elem_count()], vec![0f32; weights.elem_count()]);
        with_slices([x, weights, grad], |[x, weights, grad]: [&[f32]; 3]| {
            let rows = d_x.par_chunks_mut(2 * f).zip(&mut d_weights).zip(x.par_chunks(2 * f)).zip(weights).zip(grad.par_chunks(f));
            rows.with_min_len(32).for_each(|((((d_x, d_weight), row), &weight), grad)| {
                swiglu_backward(row, grad, weight, d_x);
                // d_up · up = weight · grad · silu(gate) · up, but the weight may be 0: sum anew.
                let (gate, up) = row.split_at(f);
                *d_weight = gate.iter().zip(up).zip(grad).map(|((&gate, &up), &grad)| silu(gate) * up * grad).sum();
            });
        })?;
        // What is not tracked has no use for its gradient, and would keep it.
        let d_x = x.track_op().then(|| Tensor::from_vec(d_x, x.shape(), x.device())).transpose()?;
        Ok((d_x, Some(Tensor::from_vec(d_weights, weights.shape(), weights.device())?)))
    }
}

/// Mean negative log-likelihood of `targets [T]` under `softmax(logits [T, V])`, a scalar.
pub(super) struct CrossEntropy {
    pub(super) targets: Vec<u32>,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, v) = layout.shape().dims2()?;
        if self.targets.len() != rows || self.targets.iter().any(|&target| target as usize >= v) {
            bail!("cross-entropy: {} targets for {rows} rows of {v}", self.targets.len());
        }
        let logits = elements(storage, layout)?;
        let losses: Vec<f64> = logits
            .par_chunks(v)
            .zip(&self.targets)
            .map(|(row, &target)| {
                let (max, sum) = max_and_sum(row);
                f64::from(sum.ln() + max - row[target as usize])
            })
            .collect();
        let mean = losses.iter().sum::<f64>() / losses.len() as f64;
        Ok((CpuStorage::F32(vec![mean as f32]), Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let v = logits.dim(1)?;
        let scale = grad.to_scalar::<f32>()? / self.targets.len() as f32;
        let mut out = vec![0f32; logits.elem_count()];
        with_slices([logits], |[logits]: [&[f32]; 1]| {
            out.par_chunks_mut(v).zip(logits.par_chunks(v)).zip(&self.targets).for_each(|((out, row), &target)| {
                let (max, sum) = max_and_sum(row);
                let scale_over_sum = scale / sum;
                out.iter_mut().zip(row).for_each(|(out, &z)| *out = exp(z - max) * scale_over_sum);
                out[target as usize] -= scale;
            });
        })?;
        Ok(Some(Tensor::from_vec(out, logits.shape(), logits.device())?))
    }
}

/// Maximum of a row, and the sum of `exp(z - maximum)`.
fn max_and_sum(row: &[f32]) -> (f32, f32) {
    let mut maxima = [f32::NEG_INFINITY; 8];
    let mut sums = [0f32; 8];
    let chunks = row.chunks_exact(8);
    let rest = chunks.remainder();
    chunks.for_each(|chunk| (0..8).for_each(|i| maxima[i] = if chunk[i] > maxima[i] { chunk[i] } else { maxima[i] }));
    let max = maxima.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    row.chunks_exact(8).for_each(|chunk| (0..8).for_each(|i| sums[i] += exp(chunk[i] - max)));
    (max, sums.iter().sum::<f32>() + rest.iter().map(|&z| exp(z - max)).sum::<f32>())
}

/// Causal attention of `count` sequences of one length, without a past: q `[T, H, hd]`, k and v `[T, KV, hd]`.
pub(super) struct CausalAttention {
    pub(super) shape: AttentionShape,
    pub(super) count: usize,
}

/// A buffer of which threads write disjoint parts.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

// SAFETY: used only with the (sequence, head) partition below, in which no two threads write one element.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Shared {
    fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

impl CausalAttention {
    /// Elements of a token in q, and in k and v.
    fn strides(&self) -> (usize, usize) {
        (self.shape.heads * self.shape.head_dim, self.shape.kv_heads * self.shape.head_dim)
    }

    /// Attention weights `[S, S]` of one head: softmax over what each query may see, 0 elsewhere.
    fn weights(&self, s: usize, q: View<f32>, k: View<f32>, weights: &mut [f32]) {
        let scale = 1.0 / (self.shape.head_dim as f32).sqrt();
        // SAFETY: q and k are views of whole sequences; `weights` is this thread's own.
        unsafe {
            multiply(
                [s, s, self.shape.head_dim],
                Target { start: weights.as_mut_ptr(), row_stride: s, add: false },
                scale,
                q,
                k.transposed(),
            )
        };
        for (query, row) in weights.chunks_mut(s).enumerate() {
            let first = self.shape.window.map_or(0, |window| (query + 1).saturating_sub(window));
            let (before, rest) = row.split_at_mut(first);
            let (seen, after) = rest.split_at_mut(query + 1 - first);
            let (max, sum) = max_and_sum(seen);
            let scale = 1.0 / sum;
            seen.iter_mut().for_each(|z| *z = exp(*z - max) * scale);
            before.fill(0.0);
            after.fill(0.0);
        }
    }

    /// Tokens in all, and in a sequence. What makes the pointers below stay inside: every head of every token is there.
    fn check(&self, [q, k, v]: [&Layout; 3]) -> Result<(usize, usize)> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let (t, _, _) = q.shape().dims3()?;
        let fits = |layout: &Layout, heads: usize| layout.dims() == [t, heads, head_dim];
        let divides = kv_heads > 0 && heads.is_multiple_of(kv_heads) && self.count > 0 && t > 0 && t.is_multiple_of(self.count);
        if !divides || !fits(q, heads) || !fits(k, kv_heads) || !fits(v, kv_heads) {
            let shapes = [q.shape(), k.shape(), v.shape()];
            bail!("attention: {shapes:?} do not fit {:?} and {} sequences", self.shape, self.count);
        }
        Ok((t, t / self.count))
    }
}

impl CustomOp3 for CausalAttention {
    fn name(&self) -> &'static str {
        "causal-attention"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, s) = self.check([l1, l2, l3])?;
        let (q, k, v) = (elements(s1, l1)?, elements(s2, l2)?, elements(s3, l3)?);
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let (q_row, kv_row) = self.strides();
        let mut out = vec![0f32; q.len()];
        let target = Shared(out.as_mut_ptr());
        (0..self.count * heads).into_par_iter().for_each_init(
            || vec![0f32; s * s],
            |weights, index| {
                let (sequence, head) = (index / heads, index % heads);
                let q_at = sequence * s * q_row + head * head_dim;
                let kv_at = sequence * s * kv_row + head / (heads / kv_heads) * head_dim;
                self.weights(s, View::rows(q[q_at..].as_ptr(), q_row), View::rows(k[kv_at..].as_ptr(), kv_row), weights);
                let (weights, v) = (View::rows(weights.as_ptr(), s), View::rows(v[kv_at..].as_ptr(), kv_row));
                // SAFETY: rows of this head of this sequence only; inside `out`, which has the shape of q.
                unsafe { multiply([s, head_dim, s], Target { start: target.at(q_at), row_stride: q_row, add: false }, 1.0, weights, v) };
            },
        );
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let s = q.dim(0)? / self.count;
        let (q_row, kv_row) = self.strides();
        let scale = 1.0 / (head_dim as f32).sqrt();
        let mut grads = [vec![0f32; q.elem_count()], vec![0f32; k.elem_count()], vec![0f32; v.elem_count()]];
        let [d_q, d_k, d_v] = &mut grads;
        let (d_q, d_k, d_v) = (Shared(d_q.as_mut_ptr()), Shared(d_k.as_mut_ptr()), Shared(d_v.as_mut_ptr()));
        with_slices([q, k, v, grad], |[q, k, v, grad]: [&[f32]; 4]| {
            // A task is a key head with all its query heads: only it writes that head's d_k and d_v.
            (0..self.count * kv_heads).into_par_iter().for_each_init(
                || (vec![0f32; s * s], vec![0f32; s * s]),
                |(weights, d_scores), index| {
                    let (sequence, kv_head) = (index / kv_heads, index % kv_heads);
                    let kv_at = sequence * s * kv_row + kv_head * head_dim;
                    let (k, v) = (View::rows(k[kv_at..].as_ptr(), kv_row), View::rows(v[kv_at..].as_ptr(), kv_row));
                    for head in kv_head * (heads / kv_heads)..(kv_head + 1) * (heads / kv_heads) {
                        let q_at = sequence * s * q_row + head * head_dim;
                        let (q, grad) = (View::rows(q[q_at..].as_ptr(), q_row), View::rows(grad[q_at..].as_ptr(), q_row));
                        self.weights(s, q, k, weights);
                        let own = View::rows(weights.as_ptr(), s);
                        // SAFETY: all views are of this sequence and head; outputs are this task's own, see above.
                        unsafe {
                            multiply(
                                [s, head_dim, s],
                                Target { start: d_v.at(kv_at), row_stride: kv_row, add: true },
                                1.0,
                                own.transposed(),
                                grad,
                            );
                            multiply(
                                [s, s, head_dim],
                                Target { start: d_scores.as_mut_ptr(), row_stride: s, add: false },
                                1.0,
                                grad,
                                v.transposed(),
                            );
                        }
                        for (row, d_row) in weights.chunks(s).zip(d_scores.chunks_mut(s)) {
                            let inner: f32 = row.iter().zip(d_row.iter()).map(|(w, d)| w * d).sum();
                            row.iter().zip(d_row).for_each(|(w, d)| *d = w * (*d - inner) * scale);
                        }
                        let d_scores = View::rows(d_scores.as_ptr(), s);
                        // SAFETY: as above.
                        unsafe {
                            multiply([s, head_dim, s], Target { start: d_q.at(q_at), row_stride: q_row, add: false }, 1.0, d_scores, k);
                            multiply(
                                [s, head_dim, s],
                                Target { start: d_k.at(kv_at), row_stride: kv_row, add: true },
                                1.0,
                                d_scores.transposed(),
                                q,
                            );
                        }
                    }
                },
            );
        })?;
        let [d_q, d_k, d_v] = grads;
        let made = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device()).map(Some);
        Ok((made(d_q, q)?, made(d_k, k)?, made(d_v, v)?))
    }
}
