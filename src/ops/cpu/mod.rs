//! CPU loops over plain slices: what the fast forms of [`crate::ops`] and the expert kernel are made of.

mod attention;
mod exp;
mod matmul;
mod simd;

pub use self::simd::Isa;
pub(crate) use self::{
    attention::{AttentionShape, KeyLayout, KeyValue, attention},
    exp::exp,
    matmul::{Group, Grouped, Weight, linear, silu},
};
