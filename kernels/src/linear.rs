//! Dense products through cuBLAS.

use std::{ffi::c_void, ptr};

use half::bf16;

use crate::{
    Buffer, Element, Error, Result, Stream, View,
    error::{check, expect_len, int},
};

/// What cuBLAS recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

#[repr(C)]
struct Args {
    x: *const c_void,
    weight: *const c_void,
    y: *mut c_void,
    y_stride: i64,
    rows: i32,
    n: i32,
    k: i32,
    input_f32: i32,
    output_f32: i32,
    add: i32,
}

unsafe extern "C" {
    fn hm_blas_create(out: *mut *mut c_void, workspace: *mut c_void, bytes: i64, stream: *mut c_void) -> i32;
    fn hm_blas_set_stream(handle: *mut c_void, workspace: *mut c_void, bytes: i64, stream: *mut c_void) -> i32;
    fn hm_blas_destroy(handle: *mut c_void) -> i32;
    fn hm_linear(handle: *mut c_void, args: *const Args) -> i32;
}

/// cuBLAS on one stream, with a workspace of its own, so that its products can be captured.
#[derive(Debug)]
pub struct Blas {
    raw: *mut c_void,
    workspace: Buffer<u8>,
}

// SAFETY: a handle has no tie to a thread; `&mut` keeps two from using it at once.
unsafe impl Send for Blas {}

/// bf16 or f32.
pub trait Float: Element {
    /// Whether it is f32.
    const IS_F32: bool;
}

impl Float for bf16 {
    const IS_F32: bool = false;
}

impl Float for f32 {
    const IS_F32: bool = true;
}

/// One product: `y [rows, n] = x [rows, k] · weight [n, k]ᵀ`, accumulated in f32.
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a, I: Float, O: Float> {
    /// `[rows, k]`.
    pub x: View<'a, I>,
    /// `[n, k]`.
    pub weight: View<'a, I>,
    /// Rows of `n`, each `stride` behind the one before.
    pub y: View<'a, O>,
    /// At least `n`.
    pub stride: usize,
    /// Rows of x and y.
    pub rows: usize,
    /// Columns of y.
    pub n: usize,
    /// Columns of x.
    pub k: usize,
    /// To what is in y already.
    pub add: bool,
}

impl Blas {
    /// On this stream.
    pub fn new(stream: Stream) -> Result<Self> {
        let workspace = Buffer::<u8>::new(stream, WORKSPACE_BYTES, "the workspace of cuBLAS")?;
        let mut raw = ptr::null_mut();
        // SAFETY: the workspace lives as long as the handle.
        check("making a handle of cuBLAS", unsafe {
            hm_blas_create(&mut raw, workspace.view().as_mut_ptr().cast(), WORKSPACE_BYTES as i64, stream.raw())
        })?;
        Ok(Self { raw, workspace })
    }

    /// From now on on this stream. What was launched before has to have run before what comes now: the two share a workspace.
    pub fn set_stream(&mut self, stream: Stream) -> Result<()> {
        let workspace = self.workspace.view();
        // SAFETY: the workspace lives as long as the handle.
        check("giving cuBLAS another stream", unsafe {
            hm_blas_set_stream(self.raw, workspace.as_mut_ptr().cast(), workspace.len() as i64, stream.raw())
        })
    }

    /// Launches a product.
    pub fn linear<I: Float, O: Float>(&mut self, product: Linear<'_, I, O>) -> Result<()> {
        const KERNEL: &str = "linear";
        let Linear { x, weight, y, stride, rows, n, k, add } = product;
        if rows == 0 || n == 0 {
            return Ok(());
        }
        if stride < n {
            return Err(Error::shape(KERNEL, format!("rows of {n} do not fit into a stride of {stride}")));
        }
        expect_len(KERNEL, "x", x.len(), rows * k)?;
        expect_len(KERNEL, "weight", weight.len(), n * k)?;
        expect_len(KERNEL, "y", y.len(), (rows - 1) * stride + n)?;
        let args = Args {
            x: x.as_ptr().cast(),
            weight: weight.as_ptr().cast(),
            y: y.as_mut_ptr().cast(),
            y_stride: i64::from(int(KERNEL, "the stride", stride)?),
            rows: int(KERNEL, "rows", rows)?,
            n: int(KERNEL, "n", n)?,
            k: int(KERNEL, "k", k)?,
            input_f32: I::IS_F32.into(),
            output_f32: O::IS_F32.into(),
            add: add.into(),
        };
        // SAFETY: the views are as long as the shapes say.
        check(KERNEL, unsafe { hm_linear(self.raw, &args) })
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: it is dropped once.
        unsafe { hm_blas_destroy(self.raw) };
    }
}
