use std::ffi::{CStr, c_char};

use crate::{Element, View};

/// What can go wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A call of CUDA's run time failed, or an earlier kernel did.
    #[error("CUDA: {what}: {text} (error {code})")]
    Cuda {
        /// What was tried.
        what: &'static str,
        /// The `cudaError_t`.
        code: i32,
        /// What CUDA says of it.
        text: String,
    },
    /// There is not as much memory on the device.
    #[error(
        "no GPU memory for {what}: {} MiB asked for, {} MiB of {} MiB are free; give the key-value cache fewer tokens, or use a smaller model or a \
         narrower type of weights",
        bytes >> 20, free >> 20, total >> 20
    )]
    OutOfMemory {
        /// What it was for.
        what: &'static str,
        /// Bytes that were asked for.
        bytes: u64,
        /// Bytes free then.
        free: u64,
        /// Bytes of the device.
        total: u64,
    },
    /// The device, or its driver, cannot run these kernels.
    #[error("{0}")]
    Device(String),
    /// Arguments that do not fit each other, or that no kernel is made for.
    #[error("{kernel}: {message}")]
    Shape {
        /// Which kernel.
        kernel: &'static str,
        /// What does not fit.
        message: String,
    },
}

/// Of everything here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

unsafe extern "C" {
    fn hm_error_text(code: i32) -> *const c_char;
}

impl Error {
    /// Whether nothing can be done on the device any more by this process: an error of a kernel, or of the hardware, which every later call answers with
    /// as well.
    pub fn is_fatal(&self) -> bool {
        // The errors of which CUDA's documentation says that the process must be terminated and relaunched.
        matches!(self, Self::Cuda { code: 214 | 220 | 700 | 702 | 709 | 710 | 714..=719 | 721 | 999, .. })
    }

    pub(crate) fn shape(kernel: &'static str, message: impl Into<String>) -> Self {
        Self::Shape { kernel, message: message.into() }
    }
}

/// `Ok` of code 0.
pub(crate) fn check(what: &'static str, code: i32) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the text is static, and ends with 0.
    let text = unsafe { CStr::from_ptr(hm_error_text(code)) };
    Err(Error::Cuda { what, code, text: text.to_string_lossy().into_owned() })
}

/// Fails unless a view has as many elements as its shape says.
pub(crate) fn expect_len(kernel: &'static str, name: &str, found: usize, expected: usize) -> Result<()> {
    if found >= expected {
        return Ok(());
    }
    Err(Error::shape(kernel, format!("{name} has {found} elements, its shape has {expected}")))
}

/// Fails unless kernels can read 16 bytes at once from a view's beginning on.
pub(crate) fn expect_aligned<T: Element>(kernel: &'static str, name: &str, view: View<'_, T>) -> Result<()> {
    if view.as_ptr().addr().is_multiple_of(16) {
        return Ok(());
    }
    Err(Error::shape(kernel, format!("{name} does not begin at a multiple of 16 bytes")))
}

/// As the 32 bits that kernels count in.
pub(crate) fn int(kernel: &'static str, name: &str, value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::shape(kernel, format!("{name} is {value}: more than 2^31 - 1")))
}
