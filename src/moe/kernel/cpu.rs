//! Experts on the CPU: weights stacked once, routed rows sorted by expert, register tiles spread over rayon's threads.

use candle_core::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::{ExpertKernel, Experts};
use crate::{
    error::{Error, Result},
    moe::plan::DispatchPlan,
    ops::{
        cpu::{Group, Grouped, Isa, Weight},
        cpu_slice,
    },
};

/// Grouped expert execution for f32 or bf16 weights and f32 activations.
#[derive(Clone, Copy, Debug)]
pub struct CpuKernel {
    isa: Isa,
}

impl Default for CpuKernel {
    fn default() -> Self {
        Self { isa: Isa::detect() }
    }
}

impl CpuKernel {
    /// With plain Rust loops, whatever the CPU has.
    pub fn portable() -> Self {
        Self { isa: Isa::Portable }
    }

    fn run<W: Weight>(&self, x_td: &[f32], plan: &DispatchPlan, gate_up: &[W], down: &[W], d: usize, f: usize) -> Vec<f32> {
        let groups: Vec<Group> = plan.active().map(|(expert, rows)| Group { rows, matrix: expert }).collect();
        let hidden_rf = Grouped { isa: self.isa, x: x_td, source: Some(&plan.tokens), groups: &groups, weights: gate_up, k: d }.swiglu(f);
        let out_rd = Grouped { isa: self.isa, x: &hidden_rf, source: None, groups: &groups, weights: down, k: f }.linear(d);
        combine(&out_rd, plan, d)
    }
}

impl ExpertKernel for CpuKernel {
    fn grouped(&self, x_td: &Tensor, plan: &DispatchPlan, experts: &Experts) -> Result<Tensor> {
        let (t, d) = x_td.dims2()?;
        let f = experts.down.dim(2)?;
        let x_td = x_td.contiguous()?;
        let out = cpu_slice::<f32, _>(&x_td, |x| match experts.gate_up.dtype() {
            DType::F32 => cpu_slice::<f32, _>(&experts.gate_up, |gate_up| {
                cpu_slice::<f32, _>(&experts.down, |down| Ok(self.run(x, plan, gate_up, down, d, f)))
            }),
            DType::BF16 => cpu_slice::<bf16, _>(&experts.gate_up, |gate_up| {
                cpu_slice::<bf16, _>(&experts.down, |down| Ok(self.run(x, plan, gate_up, down, d, f)))
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
