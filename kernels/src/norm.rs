//! Embedding and RMSNorm over the residual stream.

use std::{ffi::c_void, ptr};

use half::bf16;

use crate::{
    Result, Stream, View,
    error::{check, expect_len, int},
};

#[repr(C)]
struct EmbedArgs {
    table: *const bf16,
    tokens: *const u32,
    x: *mut f32,
    rows: i32,
    width: i32,
    vocabulary: i32,
}

#[repr(C)]
struct RmsNormArgs {
    x: *const f32,
    pick: *const u32,
    weight: *const f32,
    out: *mut bf16,
    out_f32: *mut f32,
    epsilon: f32,
    rows: i32,
    width: i32,
}

#[repr(C)]
struct AddBiasArgs {
    x: *mut f32,
    bias: *const f32,
    rows: i32,
    width: i32,
}

unsafe extern "C" {
    fn hm_add_bias(args: *const AddBiasArgs, stream: *mut c_void) -> i32;
    fn hm_embed(args: *const EmbedArgs, stream: *mut c_void) -> i32;
    fn hm_rms_norm(args: *const RmsNormArgs, stream: *mut c_void) -> i32;
}

/// Rows of an embedding.
#[derive(Clone, Copy, Debug)]
pub struct Embed<'a> {
    /// `[vocabulary, width]`.
    pub table: View<'a, bf16>,
    /// `[rows]`. What is not below `vocabulary` becomes NaN.
    pub tokens: View<'a, u32>,
    /// `[rows, width]`.
    pub x: View<'a, f32>,
    /// Tokens.
    pub rows: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Rows of the table.
    pub vocabulary: usize,
}

/// `x / sqrt(mean(x²) + epsilon) · weight`, rounded to bf16.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm<'a> {
    /// Rows of `width`.
    pub x: View<'a, f32>,
    /// `[rows]`: which rows of x, each of which has to be there; `None`: the first ones.
    pub pick: Option<View<'a, u32>>,
    /// `[width]`.
    pub weight: View<'a, f32>,
    /// `[rows, width]`.
    pub out: View<'a, bf16>,
    /// `[rows, width]`: what `out` says, widened.
    pub out_f32: Option<View<'a, f32>>,
    /// Of the model.
    pub epsilon: f32,
    /// Rows to make.
    pub rows: usize,
    /// Elements of a row.
    pub width: usize,
}

/// Adds the same to every row.
#[derive(Clone, Copy, Debug)]
pub struct AddBias<'a> {
    /// `[rows, width]`.
    pub x: View<'a, f32>,
    /// `[width]`.
    pub bias: View<'a, f32>,
    /// Rows of x.
    pub rows: usize,
    /// Elements of a row.
    pub width: usize,
}

impl AddBias<'_> {
    /// Launches it.
    pub fn launch(self, stream: Stream) -> Result<()> {
        const KERNEL: &str = "add_bias";
        let Self { x, bias, rows, width } = self;
        if rows == 0 {
            return Ok(());
        }
        expect_len(KERNEL, "x", x.len(), rows * width)?;
        expect_len(KERNEL, "bias", bias.len(), width)?;
        let args =
            AddBiasArgs { x: x.as_mut_ptr(), bias: bias.as_ptr(), rows: int(KERNEL, "rows", rows)?, width: int(KERNEL, "width", width)? };
        // SAFETY: the views are as long as the shapes say.
        check(KERNEL, unsafe { hm_add_bias(&args, stream.raw()) })
    }
}

impl Embed<'_> {
    /// Launches it.
    pub fn launch(self, stream: Stream) -> Result<()> {
        const KERNEL: &str = "embed";
        let Self { table, tokens, x, rows, width, vocabulary } = self;
        if rows == 0 {
            return Ok(());
        }
        expect_len(KERNEL, "table", table.len(), vocabulary * width)?;
        expect_len(KERNEL, "tokens", tokens.len(), rows)?;
        expect_len(KERNEL, "x", x.len(), rows * width)?;
        let args = EmbedArgs {
            table: table.as_ptr(),
            tokens: tokens.as_ptr(),
            x: x.as_mut_ptr(),
            rows: int(KERNEL, "rows", rows)?,
            width: int(KERNEL, "width", width)?,
            vocabulary: int(KERNEL, "vocabulary", vocabulary)?,
        };
        // SAFETY: the views are as long as the shapes say.
        check(KERNEL, unsafe { hm_embed(&args, stream.raw()) })
    }
}

impl RmsNorm<'_> {
    /// Launches it.
    pub fn launch(self, stream: Stream) -> Result<()> {
        const KERNEL: &str = "rms_norm";
        let Self { x, pick, weight, out, out_f32, epsilon, rows, width } = self;
        if rows == 0 {
            return Ok(());
        }
        match pick {
            Some(pick) => expect_len(KERNEL, "pick", pick.len(), rows)?,
            None => expect_len(KERNEL, "x", x.len(), rows * width)?,
        }
        expect_len(KERNEL, "weight", weight.len(), width)?;
        expect_len(KERNEL, "out", out.len(), rows * width)?;
        if let Some(out_f32) = out_f32 {
            expect_len(KERNEL, "out_f32", out_f32.len(), rows * width)?;
        }
        let args = RmsNormArgs {
            x: x.as_ptr(),
            pick: pick.map_or(ptr::null(), View::as_ptr),
            weight: weight.as_ptr(),
            out: out.as_mut_ptr(),
            out_f32: out_f32.map_or(ptr::null_mut(), View::as_mut_ptr),
            epsilon,
            rows: int(KERNEL, "rows", rows)?,
            width: int(KERNEL, "width", width)?,
        };
        // SAFETY: the views are as long as the shapes say.
        check(KERNEL, unsafe { hm_rms_norm(&args, stream.raw()) })
    }
}
