//! The elements of tensors as slices, and dense products of matrices that lie inside them.

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, WithDType, bail};

/// The elements of a contiguous storage.
pub(super) fn elements<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<T>()?[start..end]),
        None => bail!("a fused operation needs contiguous tensors"),
    }
}

/// `read` on the elements of `tensors`, made contiguous first.
pub(super) fn with_slices<T: WithDType, R, const N: usize>(tensors: [&Tensor; N], read: impl FnOnce([&[T]; N]) -> R) -> Result<R> {
    let tensors = tensors.iter().map(|tensor| tensor.detach().contiguous()).collect::<Result<Vec<_>>>()?;
    let guards: Vec<_> = tensors.iter().map(Tensor::storage_and_layout).collect();
    let mut slices = [&[][..]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&guards) {
        let Storage::Cpu(storage) = &**storage else { bail!("a fused operation needs CPU tensors") };
        *slice = elements(storage, layout)?;
    }
    Ok(read(slices))
}

/// A matrix inside a larger one.
#[derive(Clone, Copy)]
pub(super) struct View<T> {
    start: *const T,
    row_stride: isize,
    column_stride: isize,
}

impl<T: Copy> View<T> {
    pub(super) fn rows(start: *const T, row_stride: usize) -> Self {
        Self { start, row_stride: row_stride as isize, column_stride: 1 }
    }

    pub(super) fn transposed(self) -> Self {
        Self { row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }
}

/// A matrix to be written.
pub(super) struct Target<T> {
    pub(super) start: *mut T,
    pub(super) row_stride: usize,
    /// Keep what is there and add to it.
    pub(super) add: bool,
}

/// `out [m, n] (+)= scale · a [m, k] · b [k, n]`, on this thread.
///
/// # Safety
/// All three matrices lie inside live buffers, and nobody else touches `out`. `T` is f32 or f64.
pub(super) unsafe fn multiply<T: WithDType>([m, n, k]: [usize; 3], out: Target<T>, scale: T, a: View<T>, b: View<T>) {
    let (start, stride) = (out.start, out.row_stride as isize);
    // SAFETY: the caller's contract.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            start,
            1,
            stride,
            out.add,
            a.start,
            a.column_stride,
            a.row_stride,
            b.start,
            b.column_stride,
            b.row_stride,
            T::from_f64(1.0),
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
