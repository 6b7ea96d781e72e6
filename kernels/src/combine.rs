//! What experts made, back to its tokens.

use std::{ffi::c_void, ptr};

use half::bf16;

use crate::{
    Error, Result, Stream, View,
    error::{check, expect_aligned, expect_len, int},
    linear::Float,
    routing::MAX_EXPERTS,
};

#[repr(C)]
struct CombineArgs {
    x: *mut f32,
    y: *const c_void,
    positions: *const u32,
    weights: *const f32,
    shared: *const c_void,
    gate: *const f32,
    norm: *const f32,
    normed: *mut bf16,
    epsilon: f32,
    tokens: i32,
    slots: i32,
    width: i32,
    y_f32: i32,
}

unsafe extern "C" {
    fn hm_combine(args: *const CombineArgs, stream: *mut c_void) -> i32;
}

/// `x += Σ weight · y[position]` over the slots of each token, in order, and then what a shared expert made.
///
/// A token does not depend on the others. One with NaN for the weight of an unused slot becomes NaN; one without experts stays as it is.
#[derive(Clone, Copy, Debug)]
pub struct Combine<'a, Y: Float> {
    /// `[tokens, width]`, the residual stream.
    pub x: View<'a, f32>,
    /// Sorted rows of `width`; there are as many as tokens have slots.
    pub y: View<'a, Y>,
    /// `[tokens, slots]`.
    pub positions: View<'a, u32>,
    /// `[tokens, slots]`.
    pub weights: View<'a, f32>,
    /// The shared expert.
    pub shared: Option<Shared<'a, Y>>,
    /// The norm that follows.
    pub norm: Option<Norm<'a>>,
    /// Tokens.
    pub tokens: usize,
    /// Slots of a token, up to [`MAX_EXPERTS`].
    pub slots: usize,
    /// Width of the residual stream, a multiple of 4.
    pub width: usize,
}

/// `sigmoid(gate) · y`.
#[derive(Clone, Copy, Debug)]
pub struct Shared<'a, Y: Float> {
    /// `[tokens, width]`.
    pub y: View<'a, Y>,
    /// `[tokens]`.
    pub gate: View<'a, f32>,
}

/// `x / sqrt(mean(x²) + epsilon) · weight`, rounded to bf16.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// `[width]`.
    pub weight: View<'a, f32>,
    /// `[tokens, width]`.
    pub out: View<'a, bf16>,
    /// Of the model.
    pub epsilon: f32,
}

impl<Y: Float> Combine<'_, Y> {
    /// Launches it.
    pub fn launch(self, stream: Stream) -> Result<()> {
        if self.tokens == 0 {
            return Ok(());
        }
        let args = self.args()?;
        // SAFETY: the views are as long as the shapes say.
        check("combine", unsafe { hm_combine(&args, stream.raw()) })
    }

    fn args(&self) -> Result<CombineArgs> {
        const KERNEL: &str = "combine";
        let Self { x, y, positions, weights, shared, norm, tokens, slots, width } = *self;
        if slots > MAX_EXPERTS || !width.is_multiple_of(4) {
            let message = format!("{slots} slots, a width of {width}: up to {MAX_EXPERTS} slots and multiples of 4 are possible");
            return Err(Error::shape(KERNEL, message));
        }
        expect_len(KERNEL, "x", x.len(), tokens * width)?;
        expect_aligned(KERNEL, "x", x)?;
        expect_len(KERNEL, "y", y.len(), tokens * slots * width)?;
        expect_aligned(KERNEL, "y", y)?;
        expect_len(KERNEL, "positions", positions.len(), tokens * slots)?;
        expect_len(KERNEL, "weights", weights.len(), tokens * slots)?;
        if let Some(shared) = shared {
            expect_len(KERNEL, "the shared expert", shared.y.len(), tokens * width)?;
            expect_aligned(KERNEL, "the shared expert", shared.y)?;
            expect_len(KERNEL, "gate", shared.gate.len(), tokens)?;
        }
        if let Some(norm) = norm {
            expect_len(KERNEL, "norm", norm.weight.len(), width)?;
            expect_aligned(KERNEL, "norm", norm.weight)?;
            expect_len(KERNEL, "normed", norm.out.len(), tokens * width)?;
            expect_aligned(KERNEL, "normed", norm.out)?;
        }
        Ok(CombineArgs {
            x: x.as_mut_ptr(),
            y: y.as_ptr().cast(),
            positions: positions.as_ptr(),
            weights: weights.as_ptr(),
            shared: shared.map_or(ptr::null(), |shared| shared.y.as_ptr().cast()),
            gate: shared.map_or(ptr::null(), |shared| shared.gate.as_ptr()),
            norm: norm.map_or(ptr::null(), |norm| norm.weight.as_ptr()),
            normed: norm.map_or(ptr::null_mut(), |norm| norm.out.as_mut_ptr()),
            epsilon: norm.map_or(0.0, |norm| norm.epsilon),
            tokens: int(KERNEL, "tokens", tokens)?,
            slots: int(KERNEL, "slots", slots)?,
            width: int(KERNEL, "width", width)?,
            y_f32: Y::IS_F32.into(),
        })
    }
}
