//! The oracle: plain candle, one expert after the other. Any device, any dtype, no tricks.

use candle_core::Tensor;

use super::{ExpertKernel, Experts};
use crate::{error::Result, moe::plan::DispatchPlan};

/// Plain candle operations.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReferenceKernel;

impl ExpertKernel for ReferenceKernel {
    fn grouped(&self, x_td: &Tensor, plan: &DispatchPlan, experts: &Experts) -> Result<Tensor> {
        let device = x_td.device();
        let f = experts.down.dim(2)?;
        let mut y_td = x_td.zeros_like()?;
        for (expert, rows) in plan.active() {
            let n = rows.len();
            let tokens = Tensor::from_slice(&plan.tokens[rows.clone()], n, device)?;
            let weights = Tensor::from_slice(&plan.weights[rows], (n, 1), device)?.to_dtype(x_td.dtype())?;
            let x_nd = x_td.index_select(&tokens, 0)?;
            let gate_up = experts.gate_up.get(expert)?.to_dtype(x_td.dtype())?;
            let down = experts.down.get(expert)?.to_dtype(x_td.dtype())?;
            let hidden = x_nd.matmul(&gate_up.t()?)?;
            let hidden = (hidden.narrow(1, 0, f)?.silu()? * hidden.narrow(1, f, f)?)?;
            let out_nd = hidden.matmul(&down.t()?)?.broadcast_mul(&weights)?;
            y_td = y_td.index_add(&tokens, &out_nd, 0)?;
        }
        Ok(y_td)
    }
}
