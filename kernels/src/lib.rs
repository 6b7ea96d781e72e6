//! CUDA kernels for Mixture-of-Experts models that are served hard: routing, dispatch, experts, attention, sampling.
//!
//! `csrc/` holds them; one module here for each file there, with a wrapper that checks shapes before anything is launched. [`mod@reference`] says in
//! plain f32 what each computes, and [`check`] holds the kernels against it over tables of shapes: on a GPU under the feature `cuda`, on any processor
//! under `emulated`, where the same sources are compiled for it (`csrc/emulator`).
//!
//! Device memory is a [`Buffer`] or a [`View`] of one; everything that is launched on a [`Stream`] runs in order. Nothing waits but what says so.

#[cfg(not(any(feature = "cuda", feature = "emulated")))]
compile_error!("hardmax-kernels: choose what to compile the kernels for, with the feature `cuda` or `emulated`");

pub mod attention;
mod buffer;
pub mod check;
pub mod combine;
mod device;
mod error;
pub mod experts;
pub mod fill;
pub mod grouped;
pub mod limits;
pub mod linear;
pub mod norm;
pub mod plan;
pub mod reference;
pub mod routing;
pub mod sample;

pub use half::bf16;

pub use self::{
    buffer::{Buffer, Element, HostBuffer, View, words},
    device::{Device, Event, Graph, Properties, Stream},
    error::{Error, Result},
};
