//! Weights where kernels find them.

use candle_core::{DType, Storage, Tensor};
use hardmax_kernels::{Element, View, bf16};

use crate::error::{Error, Result};

/// A tensor with the address of its elements, which do not move while it lives.
#[derive(Debug)]
pub(super) struct Held<T: Element> {
    view: View<'static, T>,
    _tensor: Tensor,
}

/// What kernels take of candle's types.
pub(super) trait Loaded: Element {
    const DTYPE: DType;
}

impl Loaded for f32 {
    const DTYPE: DType = DType::F32;
}

impl Loaded for bf16 {
    const DTYPE: DType = DType::BF16;
}

impl<T: Loaded> Held<T> {
    /// Of a contiguous tensor of this type, on the device.
    pub(super) fn new(tensor: &Tensor) -> Result<Self> {
        if tensor.dtype() != T::DTYPE || !tensor.is_contiguous() {
            let (dtype, layout) = (tensor.dtype(), tensor.layout());
            return Err(Error::Internal(format!(
                "a weight is {dtype:?} with {layout:?}: {:?} without gaps is what kernels read",
                T::DTYPE
            )));
        }
        let (storage, layout) = tensor.storage_and_layout();
        let at = address(&storage)? + layout.start_offset() * size_of::<T>();
        drop(storage);
        // SAFETY: the storage holds the elements of a contiguous layout from its start on, and lives as long as the tensor, which is kept.
        // Kernels only read it.
        let view = unsafe { View::from_raw(at as *mut T, tensor.elem_count()) };
        Ok(Self { view, _tensor: tensor.clone() })
    }

    pub(super) fn view(&self) -> View<'_, T> {
        self.view
    }
}

/// Of the first element of a storage of f32 or bf16.
fn address(storage: &Storage) -> Result<usize> {
    match storage {
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => {
            use candle_core::{backend::BackendStorage as _, cuda_backend::cudarc::driver::DevicePtr as _};
            let stream = storage.device().cuda_stream();
            // Without events there is nothing to wait for when the guard goes: all is on one stream.
            Ok(match storage.dtype() {
                DType::F32 => storage.as_cuda_slice::<f32>()?.device_ptr(&stream).0 as usize,
                _ => storage.as_cuda_slice::<bf16>()?.device_ptr(&stream).0 as usize,
            })
        }
        // Where kernels are emulated, the memory of the host is that of the device.
        #[cfg(feature = "cuda-emulated")]
        Storage::Cpu(candle_core::CpuStorage::F32(values)) => Ok(values.as_ptr() as usize),
        #[cfg(feature = "cuda-emulated")]
        Storage::Cpu(candle_core::CpuStorage::BF16(values)) => Ok(values.as_ptr() as usize),
        _ => Err(Error::Internal("a weight is not on the device".into())),
    }
}
