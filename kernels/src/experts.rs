//! Experts of a decode step, and dense products with few rows: weights are read once for every 32 rows of an expert.
//!
//! Their rows do not depend on the other rows of the batch.

use std::{ffi::c_void, ptr};

use half::bf16;

use crate::{
    Error, Result, Stream, View,
    error::{check, expect_aligned, expect_len, int},
    linear::{Float, Linear},
};

/// Rows and columns of the weights that share a scale.
pub const SCALE_BLOCK: usize = 128;

/// Rows of an expert for which there are leaner kernels.
const FEW_ROWS: usize = 8;

#[repr(C)]
struct StreamArgs {
    weight: *const c_void,
    scales: *const f32,
    x: *const bf16,
    y: *mut c_void,
    active: *const u32,
    rows: *const u32,
    stride: i64,
    entries: i32,
    row_count: i32,
    slots: i32,
    n: i32,
    k: i32,
    e4m3: i32,
    gated: i32,
    y_f32: i32,
    add: i32,
    few: i32,
}

#[repr(C)]
struct QuantizeArgs {
    weight: *const bf16,
    values: *mut u8,
    scales: *mut f32,
    experts: i32,
    n: i32,
    k: i32,
}

unsafe extern "C" {
    fn hm_experts_stream(args: *const StreamArgs, stream: *mut c_void) -> i32;
    fn hm_stream_linear(args: *const StreamArgs, stream: *mut c_void) -> i32;
    fn hm_quantize_blocks(args: *const QuantizeArgs, stream: *mut c_void) -> i32;
}

/// Weights of all experts of a layer, `[experts, n, k]`.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a> {
    /// As they are.
    Bf16(View<'a, bf16>),
    /// In 8 bits.
    E4m3 {
        /// `[experts, n, k]`.
        values: View<'a, u8>,
        /// [`scales_len`], `[experts, ⌈n / 128⌉, ⌈k / 128⌉]`: what the values of a block are multiplied by.
        scales: View<'a, f32>,
    },
}

/// Scales of `[experts, n, k]` weights.
pub fn scales_len(experts: usize, n: usize, k: usize) -> usize {
    experts * n.div_ceil(SCALE_BLOCK) * k.div_ceil(SCALE_BLOCK)
}

/// Which rows go to which experts, as [`Plan`](crate::plan::Plan) says.
#[derive(Clone, Copy, Debug)]
pub struct Dispatch<'a> {
    /// `[experts, 4]`.
    pub active: View<'a, u32>,
    /// `[tokens · slots]`.
    pub rows: View<'a, u32>,
    /// Tokens.
    pub tokens: usize,
    /// Slots of a token.
    pub slots: usize,
    /// Experts.
    pub experts: usize,
}

/// `hidden = silu(x · gateᵀ) · (x · upᵀ)` of the token of each sorted row, rounded to bf16.
#[derive(Clone, Copy, Debug)]
pub struct GateUp<'a> {
    /// `[tokens, width]`.
    pub x: View<'a, bf16>,
    /// `[experts, 2 expert_width, width]`: rows of the gate, then rows of up.
    pub weights: Weights<'a>,
    /// `[tokens · slots, expert_width]`, sorted; written as far as there are rows.
    pub hidden: View<'a, bf16>,
    /// Of the tokens.
    pub dispatch: Dispatch<'a>,
    /// Columns of x, a multiple of 8; of e4m3 a multiple of 16.
    pub width: usize,
    /// Columns of the result; of e4m3 a multiple of 16.
    pub expert_width: usize,
}

/// `y = hidden · downᵀ`, both sorted.
#[derive(Clone, Copy, Debug)]
pub struct Down<'a, Y: Float> {
    /// `[tokens · slots, expert_width]`.
    pub hidden: View<'a, bf16>,
    /// `[experts, width, expert_width]`.
    pub weights: Weights<'a>,
    /// `[tokens · slots, width]`, written as far as there are rows.
    pub y: View<'a, Y>,
    /// Of the tokens.
    pub dispatch: Dispatch<'a>,
    /// Columns of the result.
    pub width: usize,
    /// Columns of `hidden`, a multiple of 8; of e4m3 a multiple of 16.
    pub expert_width: usize,
}

/// bf16 to e4m3 with a scale for each 128 x 128 block: what is not finite makes its block NaN.
#[derive(Clone, Copy, Debug)]
pub struct Quantize<'a> {
    /// `[experts, n, k]`.
    pub weight: View<'a, bf16>,
    /// `[experts, n, k]`.
    pub values: View<'a, u8>,
    /// [`scales_len`].
    pub scales: View<'a, f32>,
    /// Experts, up to 65,535.
    pub experts: usize,
    /// Rows of each, up to 65,535 · 128.
    pub n: usize,
    /// Columns.
    pub k: usize,
}

impl GateUp<'_> {
    /// Launches it.
    pub fn launch(self, stream: Stream) -> Result<()> {
        const KERNEL: &str = "gate_up";
        let Self { x, weights, hidden, dispatch, width, expert_width } = self;
        expect_len(KERNEL, "x", x.len(), dispatch.tokens * width)?;
        expect_len(KERNEL, "hidden", hidden.len(), dispatch.tokens * dispatch.slots * expert_width)?;
        expect_len(KERNEL, "rows", dispatch.rows.len(), dispatch.tokens * dispatch.slots)?;
        let args = StreamArgs {
            y: hidden.as_mut_ptr().cast(),
            rows: dispatch.rows.as_ptr(),
            gated: 1,
            ..dispatch.args(KERNEL, x, weights, expert_width, 2 * expert_width, width)?
        };
        dispatch.launch(KERNEL, &args, stream)
    }
}

impl<Y: Float> Down<'_, Y> {
    /// Launches it.
    pub fn launch(self, stream: Stream) -> Result<()> {
        const KERNEL: &str = "down";
        let Self { hidden, weights, y, dispatch, width, expert_width } = self;
        let rows = dispatch.tokens * dispatch.slots;
        expect_len(KERNEL, "hidden", hidden.len(), rows * expert_width)?;
        expect_len(KERNEL, "y", y.len(), rows * width)?;
        let args = StreamArgs {
            y: y.as_mut_ptr().cast(),
            y_f32: Y::IS_F32.into(),
            ..dispatch.args(KERNEL, hidden, weights, width, width, expert_width)?
        };
        dispatch.launch(KERNEL, &args, stream)
    }
}

impl Dispatch<'_> {
    /// What both products have in common. `n` columns are made, of `weight_rows` rows of each expert's weights.
    fn args(
        &self,
        kernel: &'static str,
        x: View<'_, bf16>,
        weights: Weights<'_>,
        n: usize,
        weight_rows: usize,
        k: usize,
    ) -> Result<StreamArgs> {
        let Self { active, tokens, slots, experts, .. } = *self;
        expect_len(kernel, "active", active.len(), 4 * experts)?;
        expect_aligned(kernel, "active", active)?;
        expect_rows(kernel, x, tokens * slots, k)?;
        let count = experts * weight_rows * k;
        // Rows of an expert are found by 32 bits.
        int(kernel, "the number of weights of an expert, over 16,", weight_rows * k / 16)?;
        let (weight, scales) = match weights {
            Weights::Bf16(weight) => {
                expect_len(kernel, "weights", weight.len(), count)?;
                expect_aligned(kernel, "weights", weight)?;
                (weight.as_ptr().cast(), ptr::null())
            }
            Weights::E4m3 { values, scales } => {
                if !k.is_multiple_of(16) {
                    return Err(Error::shape(kernel, format!("rows of {k} weights: of e4m3 they have to be multiples of 16")));
                }
                if weight_rows != n && !n.is_multiple_of(16) {
                    return Err(Error::shape(kernel, format!("{n} columns with a gate: of e4m3 they have to be a multiple of 16")));
                }
                expect_len(kernel, "weights", values.len(), count)?;
                expect_aligned(kernel, "weights", values)?;
                expect_len(kernel, "scales", scales.len(), scales_len(experts, weight_rows, k))?;
                int(kernel, "the number of scales", scales_len(experts, weight_rows, k))?;
                (values.as_ptr().cast(), scales.as_ptr())
            }
        };
        Ok(StreamArgs {
            weight,
            scales,
            x: x.as_ptr(),
            y: ptr::null_mut(),
            active: active.as_ptr(),
            rows: ptr::null(),
            stride: i64::from(int(kernel, "columns", n)?),
            entries: int(kernel, "experts", experts.min(tokens * slots))?,
            row_count: 0,
            slots: int(kernel, "slots", slots)?,
            n: int(kernel, "rows of weights", weight_rows)? / if weight_rows == n { 1 } else { 2 },
            k: int(kernel, "columns of weights", k)?,
            e4m3: i32::from(!scales.is_null()),
            gated: 0,
            y_f32: 0,
            add: 0,
            // Routing gives a token an expert once.
            few: i32::from(tokens <= FEW_ROWS),
        })
    }

    fn launch(&self, kernel: &'static str, args: &StreamArgs, stream: Stream) -> Result<()> {
        if args.entries == 0 || args.n == 0 {
            return Ok(());
        }
        // SAFETY: the views are as long as the shapes say.
        check(kernel, unsafe { hm_experts_stream(args, stream.raw()) })
    }
}

/// Fails unless rows of `k` bf16 can be read 8 at a time, and found by 32 bits.
fn expect_rows(kernel: &'static str, x: View<'_, bf16>, rows: usize, k: usize) -> Result<()> {
    if !k.is_multiple_of(8) {
        return Err(Error::shape(kernel, format!("rows of {k}: they have to be multiples of 8")));
    }
    int(kernel, "the number of elements of x, over 8,", rows * k / 8)?;
    expect_aligned(kernel, "x", x)
}

/// [`Blas::linear`](crate::linear::Blas::linear) for up to about 64 rows: `k` has to be a multiple of 8.
pub fn stream_linear<Y: Float>(product: Linear<'_, bf16, Y>, stream: Stream) -> Result<()> {
    const KERNEL: &str = "stream_linear";
    let Linear { x, weight, y, stride, rows, n, k, add } = product;
    if rows == 0 || n == 0 {
        return Ok(());
    }
    if stride < n {
        return Err(Error::shape(KERNEL, format!("rows of {n} do not fit into a stride of {stride}")));
    }
    expect_rows(KERNEL, x, rows, k)?;
    expect_len(KERNEL, "x", x.len(), rows * k)?;
    expect_len(KERNEL, "weight", weight.len(), n * k)?;
    expect_aligned(KERNEL, "weight", weight)?;
    int(KERNEL, "the number of weights, over 16,", n * k / 16)?;
    expect_len(KERNEL, "y", y.len(), (rows - 1) * stride + n)?;
    let args = StreamArgs {
        weight: weight.as_ptr().cast(),
        scales: ptr::null(),
        x: x.as_ptr(),
        y: y.as_mut_ptr().cast(),
        active: ptr::null(),
        rows: ptr::null(),
        stride: i64::from(int(KERNEL, "the stride", stride)?),
        entries: 1,
        row_count: int(KERNEL, "rows", rows)?,
        slots: 1,
        n: int(KERNEL, "n", n)?,
        k: int(KERNEL, "k", k)?,
        e4m3: 0,
        gated: 0,
        y_f32: Y::IS_F32.into(),
        add: add.into(),
        few: i32::from(rows <= FEW_ROWS),
    };
    // SAFETY: the views are as long as the shapes say.
    check(KERNEL, unsafe { hm_stream_linear(&args, stream.raw()) })
}

impl Quantize<'_> {
    /// Launches it.
    pub fn launch(self, stream: Stream) -> Result<()> {
        const KERNEL: &str = "quantize_blocks";
        let Self { weight, values, scales, experts, n, k } = self;
        if experts == 0 || n == 0 || k == 0 {
            return Ok(());
        }
        if experts > 65_535 || n.div_ceil(SCALE_BLOCK) > 65_535 {
            return Err(Error::shape(KERNEL, format!("{experts} experts of {n} rows: more than a grid has")));
        }
        expect_len(KERNEL, "weight", weight.len(), experts * n * k)?;
        expect_len(KERNEL, "values", values.len(), experts * n * k)?;
        expect_len(KERNEL, "scales", scales.len(), scales_len(experts, n, k))?;
        let args = QuantizeArgs {
            weight: weight.as_ptr(),
            values: values.as_mut_ptr(),
            scales: scales.as_mut_ptr(),
            experts: int(KERNEL, "experts", experts)?,
            n: int(KERNEL, "n", n)?,
            k: int(KERNEL, "k", k)?,
        };
        // SAFETY: the views are as long as the shapes say.
        check(KERNEL, unsafe { hm_quantize_blocks(&args, stream.raw()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Buffer;

    #[test]
    fn what_does_not_fit_is_refused() {
        let stream = Stream::create().unwrap();
        let words = Buffer::<u32>::zeros(stream, 64, "words").unwrap();
        let halves = Buffer::<bf16>::zeros(stream, 4096, "halves").unwrap();
        let (bytes, scales) = (Buffer::<u8>::zeros(stream, 4096, "bytes").unwrap(), Buffer::<f32>::zeros(stream, 64, "scales").unwrap());
        let dispatch = Dispatch { active: words.view(), rows: words.view(), tokens: 2, slots: 2, experts: 4 };
        let (bf16, e4m3) = (Weights::Bf16(halves.view()), Weights::E4m3 { values: bytes.view(), scales: scales.view() });
        let gate_up = |weights, width, expert_width| {
            GateUp { x: halves.view(), weights, hidden: halves.view(), dispatch, width, expert_width }
                .launch(stream)
                .map_err(|e| e.to_string())
        };
        assert_eq!(gate_up(bf16, 16, 16), Ok(()));
        assert_eq!(gate_up(bf16, 24, 24).unwrap_err(), "gate_up: weights has 4096 elements, its shape has 4608");
        assert_eq!(gate_up(bf16, 12, 16).unwrap_err(), "gate_up: rows of 12: they have to be multiples of 8");
        assert_eq!(gate_up(e4m3, 24, 16).unwrap_err(), "gate_up: rows of 24 weights: of e4m3 they have to be multiples of 16");
        assert_eq!(gate_up(e4m3, 16, 24).unwrap_err(), "gate_up: 24 columns with a gate: of e4m3 they have to be a multiple of 16");
        let shifted = Weights::Bf16(halves.view().part(1..));
        assert_eq!(gate_up(shifted, 16, 16).unwrap_err(), "gate_up: weights does not begin at a multiple of 16 bytes");
        let none = Dispatch { tokens: 0, ..dispatch };
        let nothing = GateUp { x: halves.view(), weights: bf16, hidden: halves.view(), dispatch: none, width: 16, expert_width: 16 };
        assert_eq!(nothing.launch(stream), Ok(()));
        assert_eq!((scales_len(2, 128, 129), scales_len(3, 16, 16)), (4, 3));
    }
}
