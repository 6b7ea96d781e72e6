//! Expert execution: the one place where CPU and CUDA differ.

pub mod cpu;
mod reference;

use std::{fmt::Debug, sync::Arc};

use candle_core::{Device, Tensor};

pub use self::{cpu::CpuKernel, reference::ReferenceKernel};
use super::plan::DispatchPlan;
use crate::{error::Result, ops::runs_here};

/// Stacked experts of one layer.
#[derive(Clone, Debug)]
pub struct Experts {
    /// `[E, 2F, D]`: in each expert F rows of gate, then F rows of up.
    pub gate_up: Tensor,
    /// `[E, D, F]`.
    pub down: Tensor,
}

/// Runs routed rows through their experts and sums them per token.
pub trait ExpertKernel: Debug + Send + Sync {
    /// `x [T, D]` to `[T, D]` f32: `y_t = Σ_routes weight · down(silu(gate x_t) ⊙ up x_t)`; zero for a token without a route.
    fn grouped(&self, x_td: &Tensor, plan: &DispatchPlan, experts: &Experts) -> Result<Tensor>;
}

/// The kernel for a device.
pub fn for_device(device: &Device) -> Arc<dyn ExpertKernel> {
    if runs_here(device) { Arc::new(CpuKernel::default()) } else { Arc::new(ReferenceKernel) }
}

#[cfg(test)]
mod tests;
