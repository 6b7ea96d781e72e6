//! Products with weights that do not learn. candle's product computes and keeps the gradient of both factors, and wants
//! them in one element type: a frozen weight would cost a gradient of its own size, and one of bf16 a copy in f32.
//!
//! Here the operation holds the weight, the graph knows of x only, and of bf16 weights a strip of rows is widened at a time.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Storage, Tensor, backend::BackendStorage as _, bail};
use half::bf16;
use rayon::prelude::*;

use super::views::{Target, View, elements, multiply, with_slices};

/// Rows of a bf16 weight that are widened at once: with 4096 columns 1 MiB, which stays in the cache of a core.
const STRIP: usize = 64;

/// Fewest rows of x that a task is made for.
const TASK: usize = 32;

/// `x [T, E · K]` to `Σ_e x_e W_eᵀ`, `[T, N]`: x is f32, `weight [E, N, K]` f32 or bf16, contiguous and on the CPU.
///
/// With one matrix that is a linear layer; with the hidden values of E experts side by side it is their weighted sum.
pub(super) struct Frozen {
    pub(super) weight: Tensor,
}

/// Sizes of the product.
#[derive(Clone, Copy)]
struct Sizes {
    t: usize,
    e: usize,
    n: usize,
    k: usize,
}

/// The elements of the weight.
#[derive(Clone, Copy)]
enum Elements<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl Elements<'_> {
    /// Calls `use_strip` with (matrix, first row, rows in f32) of all of the weight, in order.
    fn strips(self, Sizes { e, n, k, .. }: Sizes, mut use_strip: impl FnMut(usize, usize, &[f32])) {
        match self {
            Self::F32(values) => (0..e).for_each(|matrix| use_strip(matrix, 0, &values[matrix * n * k..][..n * k])),
            Self::Bf16(values) => {
                let mut wide = Vec::with_capacity(STRIP.min(n) * k);
                for (matrix, rows) in values.chunks_exact((n * k).max(1)).enumerate() {
                    for (strip, rows) in rows.chunks((STRIP * k).max(1)).enumerate() {
                        wide.clear();
                        wide.extend(rows.iter().map(|value| value.to_f32()));
                        use_strip(matrix, strip * STRIP, &wide);
                    }
                }
            }
        }
    }
}

impl Frozen {
    /// What keeps the products below inside their buffers.
    fn sizes(&self, rows: &Shape, width: impl Fn(usize, usize, usize) -> usize) -> Result<Sizes> {
        let ((t, found), (e, n, k)) = (rows.dims2()?, self.weight.dims3()?);
        if found != width(e, n, k) {
            bail!("frozen: rows {rows:?} and weights {:?} do not fit", self.weight.shape());
        }
        Ok(Sizes { t, e, n, k })
    }

    fn with_elements<R>(&self, read: impl FnOnce(Elements<'_>) -> Result<R>) -> Result<R> {
        let (storage, layout) = self.weight.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { bail!("frozen: the weight is not on the CPU") };
        match self.weight.dtype() {
            DType::F32 => read(Elements::F32(elements(storage, layout)?)),
            DType::BF16 => read(Elements::Bf16(elements(storage, layout)?)),
            other => bail!("frozen: no {other:?} weights"),
        }
    }

    /// The product of candle, which has the bits of a weight that is tracked.
    fn plain(&self, Sizes { t, n, k, .. }: Sizes, x: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
        let weight = self.weight.get(0)?;
        let (storage, weight_layout) = weight.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { bail!("frozen: the weight is not on the CPU") };
        x.matmul(storage, (1, t, n, k), layout, &weight_layout.transpose(0, 1)?)
    }

    fn forward(&self, sizes: Sizes, x: &[f32]) -> Result<Vec<f32>> {
        let Sizes { t, e, n, k } = sizes;
        let mut out = vec![0f32; t * n];
        self.with_elements(|weight| {
            tasks(&mut out, n, x, e * k, t, |out, x, rows| {
                weight.strips(sizes, |matrix, first, strip| {
                    let target = Target { start: out[first..].as_mut_ptr(), row_stride: n, add: matrix > 0 };
                    let (x, strip_rows) = (View::rows(x[matrix * k..].as_ptr(), e * k), strip.len() / k);
                    // SAFETY: columns `first ..` of this task's rows of `out`; matrix `matrix` of its rows of x; the strip.
                    unsafe { multiply([rows, strip_rows, k], target, 1.0, x, View::rows(strip.as_ptr(), k).transposed()) };
                });
            });
            Ok(())
        })?;
        Ok(out)
    }

    /// `grad [T, N]` to `grad W_e` side by side, `[T, E · K]`.
    fn backward(&self, sizes: Sizes, grad: &[f32]) -> Result<Vec<f32>> {
        let Sizes { t, e, n, k } = sizes;
        let mut out = vec![0f32; t * e * k];
        self.with_elements(|weight| {
            tasks(&mut out, e * k, grad, n, t, |out, grad, rows| {
                weight.strips(sizes, |matrix, first, strip| {
                    let target = Target { start: out[matrix * k..].as_mut_ptr(), row_stride: e * k, add: first > 0 };
                    let (grad, strip_rows) = (View::rows(grad[first..].as_ptr(), n), strip.len() / k);
                    // SAFETY: as in `forward`, with out and grad in each other's places.
                    unsafe { multiply([rows, k, strip_rows], target, 1.0, grad, View::rows(strip.as_ptr(), k)) };
                });
            });
            Ok(())
        })?;
        Ok(out)
    }
}

/// `work` on rows of `out` and as many of `rows`, and how many they are, in parallel.
fn tasks(out: &mut [f32], width: usize, rows: &[f32], row_width: usize, t: usize, work: impl Fn(&mut [f32], &[f32], usize) + Sync) {
    if t == 0 || width == 0 || row_width == 0 {
        return;
    }
    let each = t.div_ceil(rayon::current_num_threads()).max(TASK);
    let parts = out.par_chunks_mut(each * width).zip(rows.par_chunks(each * row_width));
    parts.for_each(|(out, rows)| work(out, rows, rows.len() / row_width));
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "frozen"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let sizes = self.sizes(layout.shape(), |e, _, k| e * k)?;
        let out = match (sizes.e, self.weight.dtype()) {
            (1, DType::F32) => self.plain(sizes, storage, layout)?,
            _ => CpuStorage::F32(self.forward(sizes, elements(storage, layout)?)?),
        };
        Ok((out, Shape::from((sizes.t, sizes.n))))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let sizes = self.sizes(grad.shape(), |_, n, _| n)?;
        if sizes.e == 1 && self.weight.dtype() == DType::F32 {
            return Ok(Some(grad.matmul(&self.weight.get(0)?)?));
        }
        let values = with_slices([grad], |[grad]: [&[f32]; 1]| self.backward(sizes, grad))??;
        Ok(Some(Tensor::from_vec(values, x.shape(), x.device())?))
    }
}
