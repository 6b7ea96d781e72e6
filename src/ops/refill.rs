//! Tensors of the CPU that are written again and again.

use std::cell::RefCell;

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Tensor, bail};

use crate::error::Result;

/// Writes what `0` says over a tensor.
struct Refill<F>(RefCell<Option<F>>);

impl<F: FnOnce(&mut [f32])> InplaceOp1 for Refill<F> {
    fn name(&self) -> &'static str {
        "refill"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        match (storage, layout.contiguous_offsets(), self.0.take()) {
            (CpuStorage::F32(values), Some((start, end)), Some(write)) => write(&mut values[start..end]),
            _ => bail!("refill: not a contiguous f32 tensor"),
        }
        Ok(())
    }
}

/// A `[rows, columns]` f32 tensor on the CPU with what `write` puts into it: that of `spare`, where it has this shape, else a new one of
/// zeros. Who else holds `spare` sees it change.
pub(crate) fn refill(spare: Option<Tensor>, (rows, columns): (usize, usize), write: impl FnOnce(&mut [f32])) -> Result<Tensor> {
    let fits = |tensor: &Tensor| {
        tensor.dims() == [rows, columns] && tensor.dtype() == DType::F32 && tensor.device().is_cpu() && tensor.is_contiguous()
    };
    if let Some(tensor) = spare.filter(fits) {
        tensor.inplace_op1(&Refill(RefCell::new(Some(write))))?;
        return Ok(tensor);
    }
    let mut values = vec![0f32; rows * columns];
    write(&mut values);
    Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::{super::cpu_slice, *};

    fn place(tensor: &Tensor) -> *const f32 {
        cpu_slice::<f32, _>(tensor, |values| Ok(values.as_ptr())).unwrap()
    }

    #[test]
    fn a_tensor_of_the_same_shape_keeps_its_place() {
        let first = refill(None, (2, 3), |values| values.fill(1.0)).unwrap();
        let at = place(&first);
        let second = refill(Some(first), (2, 3), |values| values[4] = 5.0).unwrap();
        assert_eq!((second.to_vec2::<f32>().unwrap(), place(&second)), (vec![vec![1.0; 3], vec![1.0, 5.0, 1.0]], at));
        let other = refill(Some(second), (1, 3), |values| values[0] = 2.0).unwrap();
        assert_eq!(other.to_vec2::<f32>().unwrap(), [[2.0, 0.0, 0.0]]);
    }
}
