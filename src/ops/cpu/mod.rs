//! CPU loops over plain slices: what the fast forms of [`crate::ops`] and the expert kernel are made of.

#[cfg(target_arch = "x86_64")]
mod amx;
#[expect(clippy::needless_range_loop, reason = "indices name lanes and registers")]
mod attention;
mod dot;
#[cfg(target_arch = "x86_64")]
#[expect(clippy::needless_range_loop, reason = "indices name lanes and registers")]
mod dot_q8;
mod exp;
mod matmul;
mod matrix;
mod pack;
mod panel;
mod simd;
mod sink;

pub(crate) use self::{
    attention::{AttentionShape, KeyLayout, KeyValue, attention},
    exp::exp,
    matmul::{Expert, Input, KEPT_BYTES, Output, Product, Scratch, parallel, trim},
    matrix::{Data, Matrix, Q8_BLOCK, quantize_q8},
    sink::{Disjoint, Store},
};
pub use self::{
    matmul::{Arithmetic, Reduction},
    simd::{Bf16Unit, Isa},
};

/// `x · sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}
