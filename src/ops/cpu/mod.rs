//! CPU loops over plain slices: what the fast forms of [`crate::ops`] and the expert kernel are made of.

mod attention;
mod exp;
mod matmul;
mod simd;

pub(crate) use self::{
    exp::exp,
    attention::{AttentionShape, KeyValue, attention},
    matmul::{Group, Grouped, Weight, linear, silu},
};
pub use self::simd::Isa;
