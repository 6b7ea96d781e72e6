//! Opening a GPU, for candle and for the kernels: both work on one stream.

use candle_core::Device;
use hardmax_kernels as kernels;

use crate::error::{Error, Result};

/// Opens the first GPU.
///
/// candle's device is one real stream for all threads, and nobody records events: what one thread launches runs after what another launched
/// before. Whoever hands tensors from thread to thread has to order the threads, not the stream.
///
/// # Errors
/// `FailedPrecondition` where there is no driver or an older one than this program needs, or where the kernels were compiled for another
/// compute capability: with the numbers, and what to do.
pub fn open() -> Result<Device> {
    let gpu = kernels::Device::open(0)?;
    let properties = gpu.properties();
    let (free, total) = gpu.memory()?;
    let (major, minor) = properties.capability;
    tracing::info!(
        name = properties.name,
        capability = format!("{major}.{minor}"),
        driver = properties.driver,
        cuda = properties.runtime,
        free_mebibytes = free >> 20,
        total_mebibytes = total >> 20,
        "GPU"
    );
    device()
}

#[cfg(feature = "cuda")]
fn device() -> Result<Device> {
    let device = Device::new_cuda_with_stream(0)?;
    if let Device::Cuda(cuda) = &device {
        // SAFETY: there is one stream, so that the order of launches is the order of everything; buffers are freed in it as well.
        unsafe { cuda.disable_event_tracking() };
    }
    Ok(device)
}

/// The host's memory is that of the emulated device.
#[cfg(not(feature = "cuda"))]
fn device() -> Result<Device> {
    Ok(Device::Cpu)
}

/// Bytes that are free on the first GPU, with those that this process has freed and kept. Waits for the device: not for while it serves.
pub fn free_memory() -> Result<u64> {
    let gpu = kernels::Device::open(0)?;
    gpu.release_freed_memory()?;
    Ok(gpu.memory()?.0)
}

/// The stream of a device that [`open`] has opened.
pub(super) fn stream(device: &Device) -> Result<kernels::Stream> {
    match device {
        #[cfg(feature = "cuda")]
        // SAFETY: it is the stream of candle's device. That lives as long as a tensor on it, and decoders hold the weights.
        Device::Cuda(cuda) => Ok(unsafe { kernels::Stream::from_raw(cuda.cuda_stream().cu_stream().cast()) }),
        #[cfg(feature = "cuda-emulated")]
        // SAFETY: null is the stream that always is.
        Device::Cpu => Ok(unsafe { kernels::Stream::from_raw(std::ptr::null_mut()) }),
        _ => Err(Error::Internal("the device is not a GPU".into())),
    }
}

impl From<kernels::Error> for Error {
    fn from(error: kernels::Error) -> Self {
        match error {
            kernels::Error::OutOfMemory { .. } | kernels::Error::Device(_) => Self::FailedPrecondition(error.to_string()),
            kernels::Error::Cuda { .. } if error.is_fatal() => Self::DeviceLost(error.to_string()),
            kernels::Error::Cuda { .. } | kernels::Error::Shape { .. } => Self::Internal(error.to_string()),
        }
    }
}
