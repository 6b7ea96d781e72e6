//! The oracle: plain candle, one expert after the other. Any device, any dtype, no tricks: products in the dtype of x, all else in f32.

use candle_core::{DType, Tensor};

use super::{ExpertKernel, Experts};
use crate::{error::Result, moe::plan::DispatchPlan};

/// Plain candle operations.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReferenceKernel;

impl ExpertKernel for ReferenceKernel {
    fn grouped(&self, x_td: &Tensor, plan: &DispatchPlan, experts: &Experts) -> Result<Tensor> {
        let device = x_td.device();
        let f = experts.down.dim(2)?;
        let mut y_td = Tensor::zeros(x_td.shape(), DType::F32, device)?;
        for (expert, rows) in plan.active() {
            let n = rows.len();
            let tokens = Tensor::from_slice(&plan.tokens[rows.clone()], n, device)?;
            let weights = Tensor::from_slice(&plan.weights[rows], (n, 1), device)?;
            let x_nd = x_td.index_select(&tokens, 0)?;
            let gate_up = experts.gate_up.get(expert)?.to_dtype(x_td.dtype())?;
            let down = experts.down.get(expert)?.to_dtype(x_td.dtype())?;
            let hidden = x_nd.matmul(&gate_up.t()?)?.to_dtype(DType::F32)?;
            let hidden = (hidden.narrow(1, 0, f)?.silu()? * hidden.narrow(1, f, f)?)?.to_dtype(x_td.dtype())?;
            let out_nd = hidden.matmul(&down.t()?)?.to_dtype(DType::F32)?.broadcast_mul(&weights)?;
            y_td = y_td.index_add(&tokens, &out_nd, 0)?;
        }
        Ok(y_td)
    }
}
