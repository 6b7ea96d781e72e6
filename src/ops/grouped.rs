//! A product of rows with one matrix for each group of them: routed tokens, sorted by expert, with the stacked weights
//! of all experts. Experts without a row cost nothing, forward or backward.

use std::{borrow::Cow, ops::Range};

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, WithDType, bail};
use half::bf16;
use rayon::prelude::*;

use super::views::{Target, View, elements, multiply, with_slices};

/// `x [R, K]` and `weight [E, N, K]` to `[R, N]`: row r is multiplied with the matrix of the group that it is in.
pub(super) struct GroupedLinear {
    /// `[E + 1]`: rows of group e are `offsets[e] .. offsets[e + 1]`.
    pub(super) offsets: Vec<usize>,
}

/// Sizes of one product.
#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    inner: usize,
    outer: usize,
}

impl GroupedLinear {
    /// What keeps the products below inside their buffers.
    fn check(&self, x: &Shape, weight: &Shape) -> Result<Sizes> {
        let ((rows, inner), (groups, outer, width)) = (x.dims2()?, weight.dims3()?);
        let ascending = self.offsets.is_sorted() && self.offsets.first() == Some(&0) && self.offsets.last() == Some(&rows);
        if width != inner || self.offsets.len() != groups + 1 || !ascending {
            bail!("grouped linear: x {x:?} and weights {weight:?} do not fit {} groups", self.offsets.len().saturating_sub(1));
        }
        Ok(Sizes { rows, inner, outer })
    }

    /// `values`, `width` to a row, cut at the groups; empty groups are left out.
    fn parts<'a, T>(&self, mut values: &'a mut [T], width: usize) -> Vec<(usize, Range<usize>, &'a mut [T])> {
        let mut parts = Vec::new();
        for (group, range) in self.groups() {
            let (part, rest) = values.split_at_mut(range.len() * width);
            values = rest;
            if !range.is_empty() {
                parts.push((group, range, part));
            }
        }
        parts
    }

    fn groups(&self) -> impl Iterator<Item = (usize, Range<usize>)> + '_ {
        self.offsets.windows(2).map(|pair| pair[0]..pair[1]).enumerate()
    }

    fn forward<T: WithDType, W: Widen<T>>(&self, sizes: Sizes, x: &[T], weight: &[W]) -> Vec<T> {
        let Sizes { rows, inner, outer } = sizes;
        let mut out = vec![T::zero(); rows * outer];
        self.parts(&mut out, outer).into_par_iter().for_each(|(group, range, part)| {
            let target = Target { start: part.as_mut_ptr(), row_stride: outer, add: false };
            let (x, weight) = (&x[range.start * inner..], W::widen(&weight[group * outer * inner..][..outer * inner]));
            let weight = View::rows(weight.as_ptr(), inner).transposed();
            // SAFETY: `part` holds the rows of this group, x as many rows of `inner`, the weight `outer` of them.
            unsafe { multiply([range.len(), outer, inner], target, T::from_f64(1.0), View::rows(x.as_ptr(), inner), weight) };
        });
        out
    }

    /// `grad · W`, `[R, K]`.
    fn backward_x<T: WithDType, W: Widen<T>>(&self, sizes: Sizes, weight: &[W], grad: &[T]) -> Vec<T> {
        let Sizes { rows, inner, outer } = sizes;
        let mut out = vec![T::zero(); rows * inner];
        self.parts(&mut out, inner).into_par_iter().for_each(|(group, range, part)| {
            let target = Target { start: part.as_mut_ptr(), row_stride: inner, add: false };
            let (grad, weight) = (&grad[range.start * outer..], W::widen(&weight[group * outer * inner..][..outer * inner]));
            let weight = View::rows(weight.as_ptr(), inner);
            // SAFETY: as in `forward`, with the two widths exchanged.
            unsafe { multiply([range.len(), inner, outer], target, T::from_f64(1.0), View::rows(grad.as_ptr(), outer), weight) };
        });
        out
    }

    /// `gradᵀ · x` of each group, `[E, N, K]`.
    fn backward_weight<T: WithDType>(&self, sizes: Sizes, x: &[T], grad: &[T]) -> Vec<T> {
        let Sizes { inner, outer, .. } = sizes;
        let groups: Vec<Range<usize>> = self.groups().map(|(_, range)| range).collect();
        let mut out = vec![T::zero(); groups.len() * outer * inner];
        out.par_chunks_mut((outer * inner).max(1)).zip(groups).filter(|(_, range)| !range.is_empty()).for_each(|(part, range)| {
            let target = Target { start: part.as_mut_ptr(), row_stride: inner, add: false };
            let (x, grad) = (&x[range.start * inner..], &grad[range.start * outer..]);
            let grad = View::rows(grad.as_ptr(), outer).transposed();
            // SAFETY: `part` is one matrix of `outer` rows; x and grad have the rows of this group.
            unsafe { multiply([outer, inner, range.len()], target, T::from_f64(1.0), grad, View::rows(x.as_ptr(), inner)) };
        });
        out
    }

    fn backward_frozen(&self, x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let sizes = self.check(x.shape(), weight.shape())?;
        let of = |weights: &[bf16], grads: &[f32]| self.backward_x(sizes, weights, grads);
        let d_x = with_slices([weight], |[weights]| with_slices([grad], |[grads]| of(weights, grads)))??;
        Tensor::from_vec(d_x, x.shape(), x.device())
    }

    fn backward<T: Widen<T>>(&self, x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let sizes = self.check(x.shape(), weight.shape())?;
        with_slices([x, weight, grad], |[x_values, weights, grads]: [&[T]; 3]| {
            let made = |values: Vec<T>, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
            // What is frozen is not worth the product.
            let d_x = x.track_op().then(|| made(self.backward_x::<T, T>(sizes, weights, grads), x)).transpose()?;
            let d_weight = weight.track_op().then(|| made(self.backward_weight(sizes, x_values, grads), weight)).transpose()?;
            Ok((d_x, d_weight))
        })?
    }
}

/// A matrix in the element type of the product.
trait Widen<T: Clone>: WithDType {
    fn widen(matrix: &[Self]) -> Cow<'_, [T]>;
}

impl Widen<f32> for f32 {
    fn widen(matrix: &[f32]) -> Cow<'_, [f32]> {
        Cow::Borrowed(matrix)
    }
}

impl Widen<f64> for f64 {
    fn widen(matrix: &[f64]) -> Cow<'_, [f64]> {
        Cow::Borrowed(matrix)
    }
}

impl Widen<f32> for bf16 {
    fn widen(matrix: &[bf16]) -> Cow<'_, [f32]> {
        Cow::Owned(matrix.iter().map(|value| value.to_f32()).collect())
    }
}

impl CustomOp2 for GroupedLinear {
    fn name(&self) -> &'static str {
        "grouped-linear"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let sizes = self.check(l1.shape(), l2.shape())?;
        let out = match (s1, s2) {
            (CpuStorage::F32(_), CpuStorage::F32(_)) => {
                CpuStorage::F32(self.forward::<_, f32>(sizes, elements(s1, l1)?, elements(s2, l2)?))
            }
            (CpuStorage::F32(_), CpuStorage::BF16(_)) => {
                CpuStorage::F32(self.forward::<_, bf16>(sizes, elements(s1, l1)?, elements(s2, l2)?))
            }
            (CpuStorage::F64(_), CpuStorage::F64(_)) => {
                CpuStorage::F64(self.forward::<_, f64>(sizes, elements(s1, l1)?, elements(s2, l2)?))
            }
            _ => bail!("grouped linear: x and weights must both be f32 or both f64, or f32 and bf16"),
        };
        Ok((out, Shape::from((sizes.rows, sizes.outer))))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        match (x.dtype(), weight.dtype()) {
            (DType::F64, _) => self.backward::<f64>(x, weight, grad),
            (_, DType::BF16) => Ok((Some(self.backward_frozen(x, weight, grad)?), None)),
            _ => self.backward::<f32>(x, weight, grad),
        }
    }
}
