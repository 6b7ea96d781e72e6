//! Experts on the CPU: weights stacked once, routed rows sorted by expert, all experts in one list of tasks.

use candle_core::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::{ExpertKernel, Experts};
use crate::{
    error::{Error, Result},
    moe::plan::DispatchPlan,
    ops::{
        cpu::{Arithmetic, Data, Expert, Input, Matrix, Scratch},
        cpu_slice,
    },
};

/// Grouped expert execution for f32 or bf16 weights and f32 activations.
#[derive(Clone, Copy, Debug)]
pub struct CpuKernel {
    arithmetic: Arithmetic,
}

impl Default for CpuKernel {
    fn default() -> Self {
        Self::new(Arithmetic::exact())
    }
}

impl CpuKernel {
    /// With this arithmetic.
    pub fn new(arithmetic: Arithmetic) -> Self {
        Self { arithmetic }
    }

    fn run<'a>(&self, x_td: &[f32], plan: &DispatchPlan, gate_up: Data<'a>, down: Data<'a>, (e, d, f): (usize, usize, usize)) -> Vec<f32> {
        let (gate_up, down) = (Matrix::new(gate_up, e * 2 * f, d), Matrix::new(down, e * d, f));
        let experts: Vec<Expert<'_>> = plan
            .active()
            .map(|(expert, rows)| Expert { gate_up: gate_up.part(expert * 2 * f, 2 * f), down: down.part(expert * d, d), rows })
            .collect();
        let mut out_rd = vec![0f32; plan.tokens.len() * d];
        let input = Input { x: x_td, k: d, source: Some(&plan.tokens) };
        self.arithmetic.experts(&mut Scratch::default(), input, &experts, &mut out_rd);
        combine(&out_rd, plan, d)
    }
}

impl ExpertKernel for CpuKernel {
    fn grouped(&self, x_td: &Tensor, plan: &DispatchPlan, experts: &Experts) -> Result<Tensor> {
        let (t, d) = x_td.dims2()?;
        let sizes = (experts.down.dim(0)?, d, experts.down.dim(2)?);
        let x_td = x_td.contiguous()?;
        let out = cpu_slice::<f32, _>(&x_td, |x| match experts.gate_up.dtype() {
            DType::F32 => cpu_slice::<f32, _>(&experts.gate_up, |gate_up| {
                cpu_slice::<f32, _>(&experts.down, |down| Ok(self.run(x, plan, Data::F32(gate_up), Data::F32(down), sizes)))
            }),
            DType::BF16 => cpu_slice::<bf16, _>(&experts.gate_up, |gate_up| {
                cpu_slice::<bf16, _>(&experts.down, |down| Ok(self.run(x, plan, Data::Bf16(gate_up), Data::Bf16(down), sizes)))
            }),
            other => Err(Error::Internal(format!("the cpu kernel has no {other:?} weights"))),
        })?;
        Ok(Tensor::from_vec(out, (t, d), x_td.device())?)
    }
}

/// Puts expert outputs `[R, D]` back in token order, weighted and summed in the order of the token's routes.
fn combine(out_rd: &[f32], plan: &DispatchPlan, d: usize) -> Vec<f32> {
    let mut y_td = vec![0f32; plan.num_tokens() * d];
    y_td.par_chunks_mut(d).enumerate().with_min_len(16).for_each(|(token, y)| {
        for (row, weight) in plan.routes(token) {
            y.iter_mut().zip(&out_rd[row * d..(row + 1) * d]).for_each(|(y, out)| *y += weight * out);
        }
    });
    y_td
}
