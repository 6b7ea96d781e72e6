//! Numbers made on the device: random ones for weights that exist nowhere else, and one number everywhere.

use std::ffi::c_void;

use crate::{Result, Stream, View, error::check, linear::Float};

#[repr(C)]
struct Args {
    out: *mut c_void,
    len: i64,
    seed: i64,
    value: f32,
    narrow: i32,
}

unsafe extern "C" {
    fn hm_fill_normal(args: *const Args, stream: *mut c_void) -> i32;
    fn hm_fill_value(args: *const Args, stream: *mut c_void) -> i32;
}

/// Nearly normal numbers of mean 0: `deviation` times [`reference::normal`](crate::reference::normal) of the seed and of each index, to the bit.
pub fn normal<T: Float>(out: View<'_, T>, seed: u64, deviation: f32, stream: Stream) -> Result<()> {
    if out.is_empty() {
        return Ok(());
    }
    // SAFETY: the view has as many elements.
    check("fill_normal", unsafe { hm_fill_normal(&args(out, seed, deviation), stream.raw()) })
}

/// `value` everywhere.
pub fn value<T: Float>(out: View<'_, T>, value: f32, stream: Stream) -> Result<()> {
    if out.is_empty() {
        return Ok(());
    }
    // SAFETY: the view has as many elements.
    check("fill_value", unsafe { hm_fill_value(&args(out, 0, value), stream.raw()) })
}

fn args<T: Float>(out: View<'_, T>, seed: u64, value: f32) -> Args {
    Args { out: out.as_mut_ptr().cast(), len: out.len() as i64, seed: seed.cast_signed(), value, narrow: (!T::IS_F32).into() }
}
