//! Random weights, made where they are used: no file has them, and the host's memory need not.

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Tensor};
use hardmax_kernels::{Stream, View, bf16, fill, linear::Float};

use super::device::stream;
use crate::error::Result;

/// Nearly normal numbers of mean 0 with this deviation, f32 or bf16: the values of [`hardmax_kernels::reference::normal`].
pub fn normal(shape: &[usize], dtype: DType, device: &Device, seed: u64, deviation: f32) -> Result<Tensor> {
    let tensor = Tensor::zeros(shape, dtype, device)?;
    tensor.inplace_op1(&Fill { seed, deviation, stream: stream(device)? })?;
    Ok(tensor)
}

/// Writes over a tensor that has just been made: contiguous, from the first element of its storage on.
struct Fill {
    seed: u64,
    deviation: f32,
    stream: Stream,
}

impl Fill {
    /// # Safety
    /// There are `len` elements at `at`, in memory of the device, which nobody else uses.
    unsafe fn write<T: Float>(&self, at: *mut T, len: usize) -> candle_core::Result<()> {
        // SAFETY: as the caller says.
        let view = unsafe { View::from_raw(at, len) };
        fill::normal(view, self.seed, self.deviation, self.stream).map_err(candle_core::Error::wrap)
    }
}

impl InplaceOp1 for Fill {
    fn name(&self) -> &'static str {
        "normal"
    }

    /// Where kernels are emulated, the memory of the host is that of the device.
    fn cpu_fwd(&self, storage: &mut CpuStorage, _layout: &Layout) -> candle_core::Result<()> {
        match storage {
            // SAFETY: they are the elements of the storage.
            CpuStorage::F32(values) => unsafe { self.write(values.as_mut_ptr(), values.len()) },
            // SAFETY: as above.
            CpuStorage::BF16(values) => unsafe { self.write(values.as_mut_ptr().cast::<bf16>(), values.len()) },
            _ => candle_core::bail!("random weights are f32 or bf16"),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        use candle_core::{backend::BackendStorage as _, cuda_backend::cudarc::driver::DevicePtrMut as _};
        let (stream, len) = (storage.device().cuda_stream(), layout.shape().elem_count());
        match storage.dtype() {
            DType::F32 => {
                let (at, _guard) = storage.as_cuda_slice_mut::<f32>()?.device_ptr_mut(&stream);
                // SAFETY: the storage has the elements of its layout; what reads them is launched later on the same stream.
                unsafe { self.write(at as usize as *mut f32, len) }
            }
            DType::BF16 => {
                let (at, _guard) = storage.as_cuda_slice_mut::<bf16>()?.device_ptr_mut(&stream);
                // SAFETY: as above.
                unsafe { self.write(at as usize as *mut bf16, len) }
            }
            other => candle_core::bail!("random weights are f32 or bf16, not {other:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use hardmax_kernels::reference;

    use super::*;
    use crate::model::load::DeviceKind;

    #[test]
    fn weights_are_a_hash_of_seed_and_place() {
        let device = DeviceKind::Cuda.open().unwrap();
        let expected: Vec<f32> = (0..600).map(|index| 0.5 * reference::normal(9, index)).collect();
        let values = |tensor: Tensor| tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(normal(&[20, 30], DType::F32, &device, 9, 0.5).unwrap()), expected);
        let narrow: Vec<f32> = expected.iter().map(|&value| bf16::from_f32(value).to_f32()).collect();
        assert_eq!(values(normal(&[20, 30], DType::BF16, &device, 9, 0.5).unwrap()), narrow);
        assert!(normal(&[2], DType::F64, &device, 9, 0.5).is_err());
    }
}
