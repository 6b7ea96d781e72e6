//! One token for each row of logits.

use std::ffi::c_void;

use crate::{
    Error, Result, Stream, View,
    error::{check, expect_len, int},
};

/// The token of a row that is not finite in all places.
pub const NON_FINITE: u32 = u32::MAX;

/// Longest row for which sums of masses cannot overflow.
pub const MAX_VOCABULARY: usize = 1 << 18;

/// What to draw of one row. Each filter sees what those before left, scaled to sum to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct Choice {
    /// Divides the logits. Below 10⁻⁶ (or no number): the likeliest token, the lowest id of equals, and the filters are not looked at; so it is with a
    /// `top_k` of 1.
    pub temperature: f32,
    /// The largest so many are kept, the lower ids of equals. 0: off.
    pub top_k: u32,
    /// The likeliest are kept, of equals the lower ids first, until they have this share of the mass together: one at least. From 1: off.
    pub top_p: f32,
    /// Kept is, before anything else, a logit with `logit - largest >= temperature · ln(min_p)`. 0: off.
    pub min_p: f32,
    /// The random number, in `[0, 1)`: drawn is the first token, in order of ids, with which the mass of what is kept exceeds this share of all of it.
    pub uniform: f32,
    /// 0: the row is left out, and its token stays what it was.
    pub wanted: u32,
}

impl Choice {
    /// The likeliest token.
    pub const LIKELIEST: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, uniform: 0.0, wanted: 1 };
}

#[repr(C)]
struct Args {
    logits: *const f32,
    choices: *const Choice,
    tokens: *mut u32,
    rows: i32,
    vocabulary: i32,
}

unsafe extern "C" {
    fn hm_sample(args: *const Args, stream: *mut c_void) -> i32;
}

/// Tokens of rows of logits. What is drawn of a row does not depend on the others, and is the same each time.
///
/// The mass of a token is a multiple of 2⁻⁴⁴ of the likeliest one's: what is more than 30 nats less likely is not drawn.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// `[rows, vocabulary]`.
    pub logits: View<'a, f32>,
    /// `[rows]`.
    pub choices: View<'a, Choice>,
    /// `[rows]`; [`NON_FINITE`] where not all logits are finite.
    pub tokens: View<'a, u32>,
    /// Rows.
    pub rows: usize,
    /// Logits of a row, from 1 to [`MAX_VOCABULARY`].
    pub vocabulary: usize,
}

impl Sample<'_> {
    /// Launches it.
    pub fn launch(self, stream: Stream) -> Result<()> {
        const KERNEL: &str = "sample";
        let Self { logits, choices, tokens, rows, vocabulary } = self;
        if rows == 0 {
            return Ok(());
        }
        if !(1..=MAX_VOCABULARY).contains(&vocabulary) {
            return Err(Error::shape(KERNEL, format!("a vocabulary of {vocabulary}: it may have 1 to {MAX_VOCABULARY} tokens")));
        }
        expect_len(KERNEL, "logits", logits.len(), rows * vocabulary)?;
        expect_len(KERNEL, "choices", choices.len(), rows)?;
        expect_len(KERNEL, "tokens", tokens.len(), rows)?;
        let args = Args {
            logits: logits.as_ptr(),
            choices: choices.as_ptr(),
            tokens: tokens.as_mut_ptr(),
            rows: int(KERNEL, "rows", rows)?,
            vocabulary: int(KERNEL, "vocabulary", vocabulary)?,
        };
        // SAFETY: the views are as long as the shapes say.
        check(KERNEL, unsafe { hm_sample(&args, stream.raw()) })
    }
}
