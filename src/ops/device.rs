//! The operations of [`super`] where tensors are on a device: candle's own, whose products are the vendor's library, put together such that
//! the graph keeps inputs and outputs only.
//!
//! **Numbers.** Products are in the element type of the rows, bf16 as a rule, and are summed in f32 by the library; a weight in another
//! type, such as the f32 master of one that learns, is rounded for the product, and its gradient comes back in its own. Whatever else sums
//! or exponentiates does so in f32.
//!
//! **What candle's kernels take.** Factors of a product must be packed, or packed and transposed: a column of a wider matrix is copied
//! first. Indices are u32. Rows are gathered, never scattered: `index_add` there runs one thread for each column, and waits for each row.

use candle_core::{D, DType, Device, Result, Tensor, bail};

use super::{
    attached::{attach1, attach2, attach3},
    cpu::AttentionShape,
};

/// What sums over values of `dtype` are taken in.
fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

fn widened(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(wide(x.dtype()))
}

/// `x [T, K]` times `weight [N, K]` transposed, `[T, N]`.
pub(super) fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let value = x.detach().matmul(&weight.detach().to_dtype(x.dtype())?.t()?)?;
    attach2([x, weight], value, |inputs, grad| {
        let ([x, weight], [of_x, of_weight], grad) = (&inputs.values, inputs.wanted, grad.contiguous()?);
        let d_x = of_x.then(|| grad.matmul(&weight.to_dtype(grad.dtype())?.contiguous()?)).transpose()?;
        let d_weight = of_weight.then(|| grad.t()?.matmul(&x.contiguous()?)?.to_dtype(weight.dtype())).transpose()?;
        Ok([d_x, d_weight])
    })
}

/// Rows sorted by group with one matrix for each: `x [R, K]` and `weight [E, N, K]` to `[R, N]`. A matrix is rounded when its rows come.
pub(super) fn grouped_linear(x: &Tensor, weight: &Tensor, offsets: &[usize]) -> Result<Tensor> {
    let ((rows, inner), (groups, outer, width)) = (x.dims2()?, weight.dims3()?);
    let ascending = offsets.is_sorted() && offsets.first() == Some(&0) && offsets.last() == Some(&rows);
    if width != inner || offsets.len() != groups + 1 || !ascending {
        bail!("grouped linear: x {:?} and weights {:?} do not fit {} groups", x.shape(), weight.shape(), offsets.len().saturating_sub(1));
    }
    let groups: Vec<(usize, usize, usize)> = offsets
        .windows(2)
        .enumerate()
        .filter(|(_, pair)| pair[0] < pair[1])
        .map(|(group, pair)| (group, pair[0], pair[1] - pair[0]))
        .collect();
    let (plain, stack) = (x.detach().contiguous()?, weight.detach());
    let products = groups.iter().map(|&(group, start, count)| {
        let matrix = stack.get(group)?.to_dtype(plain.dtype())?;
        plain.narrow(0, start, count)?.matmul(&matrix.t()?)
    });
    let value = joined(products, (0, outer), &plain)?;
    attach2([x, weight], value, move |inputs, grad| {
        let ([x, weight], [of_x, of_weight], grad) = (&inputs.values, inputs.wanted, grad.contiguous()?);
        let d_x = of_x.then(|| {
            let products = groups.iter().map(|&(group, start, count)| {
                let matrix = weight.get(group)?.to_dtype(grad.dtype())?;
                grad.narrow(0, start, count)?.matmul(&matrix)
            });
            joined(products, (0, x.dim(1)?), &grad)
        });
        let d_weight = of_weight.then(|| -> Result<Tensor> {
            let (sum, x) = (weight.zeros_like()?, x.contiguous()?);
            for &(group, start, count) in &groups {
                let product = grad.narrow(0, start, count)?.t()?.matmul(&x.narrow(0, start, count)?)?;
                sum.slice_set(&product.to_dtype(weight.dtype())?.unsqueeze(0)?, 0, group)?;
            }
            Ok(sum)
        });
        Ok([d_x.transpose()?, d_weight.transpose()?])
    })
}

/// `parts` one below the other; of none, an empty tensor of this shape that is otherwise like `like`.
fn joined(parts: impl Iterator<Item = Result<Tensor>>, empty: (usize, usize), like: &Tensor) -> Result<Tensor> {
    let parts = parts.collect::<Result<Vec<_>>>()?;
    if parts.is_empty() { Tensor::zeros(empty, like.dtype(), like.device()) } else { Tensor::cat(&parts, 0) }
}

/// `hidden [T, E, F]` and `down [E, D, F]` to the sum over experts, `[T, D]`: one product, so that the sum is its own.
pub(super) fn experts_down(hidden: &Tensor, down: &Tensor) -> Result<Tensor> {
    let ((t, e, f), (groups, d, width)) = (hidden.dims3()?, down.dims3()?);
    if (groups, width) != (e, f) {
        bail!("experts: hidden values {:?} and weights {:?} do not fit", hidden.shape(), down.shape());
    }
    let side_by_side = down.detach().to_dtype(hidden.dtype())?.transpose(1, 2)?.reshape((e * f, d))?;
    let value = hidden.detach().reshape((t, e * f))?.matmul(&side_by_side)?;
    attach2([hidden, down], value, move |inputs, grad| {
        let ([hidden, down], [of_hidden, of_down], grad) = (&inputs.values, inputs.wanted, grad.contiguous()?);
        let d_hidden = of_hidden.then(|| {
            let rows = grad.unsqueeze(0)?.broadcast_as((e, t, d))?;
            rows.matmul(&down.to_dtype(grad.dtype())?.contiguous()?)?.transpose(0, 1)?.contiguous()
        });
        let d_down = of_down.then(|| {
            let columns = grad.t()?.unsqueeze(0)?.broadcast_as((e, d, t))?;
            columns.matmul(&hidden.transpose(0, 1)?.contiguous()?)?.to_dtype(down.dtype())
        });
        Ok([d_hidden.transpose()?, d_down.transpose()?])
    })
}

/// Both halves of the last dimension, wide.
fn halves(gate_up: &Tensor) -> Result<(Tensor, Tensor)> {
    let f = gate_up.dim(D::Minus1)? / 2;
    Ok((widened(&gate_up.narrow(D::Minus1, 0, f)?)?, widened(&gate_up.narrow(D::Minus1, f, f)?)?))
}

/// Gradient of `silu(gate) · up` with respect to `[gate, up]`, in the element type of `gate_up`.
fn swiglu_backward(gate_up: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let (gate, up) = halves(gate_up)?;
    let sigmoid = (gate.neg()?.exp()? + 1.0)?.recip()?;
    let slope = (&sigmoid * ((&gate * (1.0 - &sigmoid)?)? + 1.0)?)?;
    let (d_gate, d_up) = (((grad * up)? * slope)?, ((grad * gate)? * sigmoid)?);
    Tensor::cat(&[d_gate, d_up], D::Minus1)?.to_dtype(gate_up.dtype())
}

/// `silu(gate) · up` of `[.., 2F]`: `[.., F]`.
pub(super) fn silu_mul(gate_up: &Tensor) -> Result<Tensor> {
    let (gate, up) = halves(&gate_up.detach())?;
    let value = (gate.silu()? * up)?.to_dtype(gate_up.dtype())?;
    attach1(gate_up, value, |inputs, grad| {
        let [gate_up] = &inputs.values;
        Ok([Some(swiglu_backward(gate_up, &widened(grad)?)?)])
    })
}

/// `w_te · silu(gate) · up`: `[T, E, 2F]` and `[T, E]` to `[T, E, F]`, in the element type of the first.
pub(super) fn weighted_swiglu(gate_up: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let spread = |weights: &Tensor| widened(weights)?.unsqueeze(D::Minus1);
    let (gate, up) = halves(&gate_up.detach())?;
    let value = (gate.silu()? * up)?.broadcast_mul(&spread(&weights.detach())?)?.to_dtype(gate_up.dtype())?;
    attach2([gate_up, weights], value, move |inputs, grad| {
        let ([gate_up, weights], [of_gate_up, of_weights], grad) = (&inputs.values, inputs.wanted, widened(grad)?);
        let d_gate_up = of_gate_up.then(|| swiglu_backward(gate_up, &grad.broadcast_mul(&spread(weights)?)?)).transpose()?;
        let d_weights = of_weights.then(|| {
            let (gate, up) = halves(gate_up)?;
            ((gate.silu()? * up)? * &grad)?.sum(D::Minus1)?.to_dtype(weights.dtype())
        });
        Ok([d_gate_up, d_weights.transpose()?])
    })
}

/// Mean negative log-likelihood of `targets [T]` under `softmax(logits [T, V])`, a scalar.
pub(super) fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let (rows, v) = logits.dims2()?;
    if targets.len() != rows || rows == 0 || targets.iter().any(|&target| target as usize >= v) {
        bail!("cross-entropy: {} targets for {rows} rows of {v}", targets.len());
    }
    let places = Tensor::from_slice(targets, (rows, 1), logits.device())?;
    let (_, sums, shifted) = powers(&logits.detach())?;
    let value = (sums.log()? - shifted.gather(&places, 1)?)?.mean_all()?.to_dtype(logits.dtype())?;
    attach1(logits, value, move |inputs, grad| {
        let [logits] = &inputs.values;
        let (powers, sums, _) = powers(logits)?;
        let minus = Tensor::full(-1f32, (rows, 1), logits.device())?.to_dtype(powers.dtype())?;
        #[expect(clippy::disallowed_methods, reason = "nothing is tracked")]
        let d_logits = powers.broadcast_div(&sums)?.scatter_add(&places, &minus, 1)?;
        let scale = (widened(grad)? / rows as f64)?;
        Ok([Some(d_logits.broadcast_mul(&scale)?.to_dtype(logits.dtype())?)])
    })
}

/// Of each row: `exp(z - maximum)`, their sum `[.., 1]`, and `z - maximum`.
fn powers(logits: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
    let logits = widened(logits)?;
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
    let powers = shifted.exp()?;
    let sums = powers.sum_keepdim(D::Minus1)?;
    Ok((powers, sums, shifted))
}

/// `weight · KL(teacher ‖ student)` of the softmax of rows, mean over those of `student [S · T, V]`; every T of them belong to the rows of
/// `teacher [T, V]`. A scalar.
pub(crate) fn divergence(student: &Tensor, teacher: &Tensor, weight: f64) -> Result<Tensor> {
    let ((rows, v), (t, teacher_v)) = (student.dims2()?, teacher.dims2()?);
    if v != teacher_v || t == 0 || rows == 0 || !rows.is_multiple_of(t) {
        bail!("distillation: logits {:?} of the teacher for {:?} of the student", teacher.shape(), student.shape());
    }
    let teacher = teacher.detach();
    let value = {
        let (student, teacher) = (log_softmax(&student.detach())?.reshape((rows / t, t, v))?, log_softmax(&teacher)?);
        let apart = student.broadcast_sub(&teacher)?.neg()?;
        apart.broadcast_mul(&teacher.exp()?)?.sum(D::Minus1)?.mean_all()?
    };
    attach1(student, (value * weight)?.to_dtype(student.dtype())?, move |inputs, grad| {
        let [student] = &inputs.values;
        let (own, wanted) = (softmax_of(student)?.reshape((rows / t, t, v))?, softmax_of(&teacher)?);
        let scale = (widened(grad)? * (weight / rows as f64))?;
        let d_student = own.broadcast_sub(&wanted)?.broadcast_mul(&scale)?;
        Ok([Some(d_student.reshape((rows, v))?.to_dtype(student.dtype())?)])
    })
}

fn softmax_of(logits: &Tensor) -> Result<Tensor> {
    let (powers, sums, _) = powers(logits)?;
    powers.broadcast_div(&sums)
}

fn log_softmax(logits: &Tensor) -> Result<Tensor> {
    let (_, sums, shifted) = powers(logits)?;
    shifted.broadcast_sub(&sums.log()?)
}

/// Causal attention of `count` sequences of one length: q `[count · S, H, hd]`, k and v `[count · (past + S), KV, hd]` to the shape of q.
/// `mask` is [`causal_mask`] of S, past and the window. The query heads of a key head are rows of one product, so no key is copied.
pub(crate) fn attention([q, k, v]: [&Tensor; 3], mask: &Tensor, count: usize, shape: AttentionShape) -> Result<Tensor> {
    let (rows, (new, total)) = (q.dim(0)?, mask.dims2()?);
    let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
    let divides = kv_heads > 0 && heads.is_multiple_of(kv_heads) && rows > 0 && rows == count * new;
    let keys = [count * total, kv_heads, head_dim];
    if !divides || q.dims() != [rows, heads, head_dim] || k.dims() != keys || v.dims() != keys {
        bail!("attention: {:?} do not fit {shape:?} and {count} sequences of {new}", [q.shape(), k.shape(), v.shape()]);
    }
    let heads = Heads { count, new, total, shape };
    let value = {
        let [q, k, v] = [heads.queries(&q.detach())?, heads.keys(&k.detach())?, heads.keys(&v.detach())?];
        heads.rows(&heads.weights(&q, &k, mask)?.matmul(&v)?)?
    };
    let mask = mask.clone();
    attach3([q, k, v], value.to_dtype(q.dtype())?, move |inputs, grad| {
        let ([q, k, v], [of_q, of_k, of_v]) = (&inputs.values, inputs.wanted);
        let dtypes = [q, k, v].map(Tensor::dtype);
        let [q, k, v, grad] = [heads.queries(q)?, heads.keys(k)?, heads.keys(v)?, heads.queries(grad)?];
        let weights = heads.weights(&q, &k, &mask)?;
        let d_v = of_v.then(|| heads.keys_back(&weights.transpose(1, 2)?.matmul(&grad)?)?.to_dtype(dtypes[2])).transpose()?;
        let d_weights = grad.matmul(&v.transpose(1, 2)?)?;
        let inner = (&weights * &d_weights)?.sum_keepdim(D::Minus1)?;
        let d_scores = ((weights * d_weights.broadcast_sub(&inner)?)? * heads.scale())?;
        let d_q = of_q.then(|| heads.rows(&d_scores.matmul(&k)?)?.to_dtype(dtypes[0])).transpose()?;
        let d_k = of_k.then(|| heads.keys_back(&d_scores.transpose(1, 2)?.matmul(&q)?)?.to_dtype(dtypes[1])).transpose()?;
        Ok([d_q, d_k, d_v])
    })
}

/// Sizes of an attention, and how its tensors lie in batched products: one matrix for each key head of each sequence.
#[derive(Clone, Copy)]
struct Heads {
    count: usize,
    new: usize,
    total: usize,
    shape: AttentionShape,
}

impl Heads {
    /// Query heads of a key head.
    fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    fn scale(&self) -> f64 {
        1.0 / (self.shape.head_dim as f64).sqrt()
    }

    /// `[count · S, H, hd]` to `[count · KV, G · S, hd]`, wide.
    fn queries(&self, x: &Tensor) -> Result<Tensor> {
        let Self { count, new, shape: AttentionShape { kv_heads, head_dim, .. }, .. } = *self;
        let x = widened(x)?.reshape((count, new, kv_heads, self.group(), head_dim))?.permute((0, 2, 3, 1, 4))?;
        x.contiguous()?.reshape((count * kv_heads, self.group() * new, head_dim))
    }

    /// The inverse of [`Heads::queries`].
    fn rows(&self, x: &Tensor) -> Result<Tensor> {
        let Self { count, new, shape: AttentionShape { heads, kv_heads, head_dim, .. }, .. } = *self;
        let x = x.reshape((count, kv_heads, self.group(), new, head_dim))?.permute((0, 3, 1, 2, 4))?;
        x.contiguous()?.reshape((count * new, heads, head_dim))
    }

    /// `[count · total, KV, hd]` to `[count · KV, total, hd]`, wide.
    fn keys(&self, x: &Tensor) -> Result<Tensor> {
        let Self { count, total, shape: AttentionShape { kv_heads, head_dim, .. }, .. } = *self;
        let x = widened(x)?.reshape((count, total, kv_heads, head_dim))?.transpose(1, 2)?;
        x.contiguous()?.reshape((count * kv_heads, total, head_dim))
    }

    /// The inverse of [`Heads::keys`].
    fn keys_back(&self, x: &Tensor) -> Result<Tensor> {
        let Self { count, total, shape: AttentionShape { kv_heads, head_dim, .. }, .. } = *self;
        let x = x.reshape((count, kv_heads, total, head_dim))?.transpose(1, 2)?;
        x.contiguous()?.reshape((count * total, kv_heads, head_dim))
    }

    /// Attention weights `[count · KV, G · S, total]`.
    fn weights(&self, q: &Tensor, k: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let Self { count, new, total, shape: AttentionShape { kv_heads, .. } } = *self;
        let scores = (q.matmul(&k.transpose(1, 2)?)? * self.scale())?;
        let seen = scores.reshape((count * kv_heads, self.group(), new, total))?.broadcast_add(&mask.to_dtype(q.dtype())?)?;
        softmax_of(&seen)?.reshape((count * kv_heads, self.group() * new, total))
    }
}

/// `[new, past + new]` f32: 0 where the query may look, negative infinity elsewhere.
pub(crate) fn causal_mask(new: usize, past: usize, window: Option<usize>, device: &Device) -> Result<Tensor> {
    let allowed = |query: usize, key: usize| key <= query && window.is_none_or(|window| query - key < window);
    let rows =
        (past..past + new).flat_map(|query| (0..past + new).map(move |key| if allowed(query, key) { 0f32 } else { f32::NEG_INFINITY }));
    Tensor::from_vec(rows.collect(), (new, past + new), device)
}

/// The way between tokens and the rows that they were copied to, each for another expert.
#[derive(Clone, Debug)]
pub(crate) struct RowIndex {
    /// `[R]`: token of each row.
    tokens: Tensor,
    /// For each place of a token, `[T]`: its row, or R where it has fewer.
    slots: Vec<Tensor>,
    /// Some token has fewer rows than others.
    ragged: bool,
}

impl RowIndex {
    /// Of `tokens [R]`, the token of each row, and the rows of each of T tokens, in order.
    pub(crate) fn new(tokens: &[u32], rows: &[Vec<u32>], device: &Device) -> Result<Self> {
        let most = rows.iter().map(Vec::len).max().unwrap_or(0);
        let slot = |place: usize| {
            let rows = rows.iter().map(|rows| rows.get(place).copied().unwrap_or(tokens.len() as u32)).collect::<Vec<u32>>();
            let count = rows.len();
            Tensor::from_vec(rows, count, device)
        };
        Ok(Self {
            tokens: Tensor::from_slice(tokens, tokens.len(), device)?,
            slots: (0..most).map(slot).collect::<Result<_>>()?,
            ragged: rows.iter().any(|rows| rows.len() < most),
        })
    }

    /// `x [T, D]` to the rows `[R, D]`, as `dtype`.
    pub(crate) fn spread(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        let (index, value) = (self.clone(), self.picked(&x.detach(), dtype)?);
        attach1(x, value, move |inputs, grad| Ok([Some(index.summed(grad, inputs.values[0].dims2()?, inputs.values[0].dtype())?)]))
    }

    /// Rows `[R, D]` to their sums `[T, D]`, wide.
    pub(crate) fn collect(&self, rows: &Tensor, tokens: usize) -> Result<Tensor> {
        let (index, value) = (self.clone(), self.summed(&rows.detach(), (tokens, rows.dim(1)?), wide(rows.dtype()))?);
        attach1(rows, value, move |inputs, grad| Ok([Some(index.picked(grad, inputs.values[0].dtype())?)]))
    }

    fn picked(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        if self.tokens.elem_count() == 0 {
            return Tensor::zeros((0, x.dim(1)?), dtype, x.device());
        }
        x.contiguous()?.index_select(&self.tokens, 0)?.to_dtype(dtype)
    }

    /// Place after place, in the order of a token's rows: no row waits for another token's.
    fn summed(&self, rows: &Tensor, shape: (usize, usize), dtype: DType) -> Result<Tensor> {
        let rows = match self.ragged {
            true => Tensor::cat(&[rows, &Tensor::zeros((1, shape.1), rows.dtype(), rows.device())?], 0)?,
            false => rows.contiguous()?,
        };
        let mut sum = Tensor::zeros(shape, dtype, rows.device())?;
        for slot in &self.slots {
            sum = (sum + rows.index_select(slot, 0)?.to_dtype(dtype)?)?;
        }
        Ok(sum)
    }
}
