//! The values of a step, and where in the arena they are.

use hardmax_kernels::{bf16, grouped::Gemm, plan};

use super::{
    super::{FeedForwardSpec, MoeSpec},
    arena::{Cutter, Place},
    attention::Launch,
    experts::streams,
    layer::heads,
    report::Report,
    step::{Policies, Sizes},
    weights::GpuWeights,
};
use crate::error::Result;

/// Routes that go through experts at once: more are done in parts, so that soft routing of a long prompt needs no more memory than hard routing.
const MOST_ROUTES: usize = 1 << 16;

/// Rows of logits that are made at once.
const MOST_ROWS: usize = 256;

/// Lists of one step. D model width, T tokens, K slots of a token, R routes of a part.
#[derive(Debug)]
pub(super) struct Values {
    /// `[T, D]`: the residual stream.
    pub(super) x: Place<f32>,
    /// `[T, D]`: what a norm makes of it.
    pub(super) normed: Place<bf16>,
    /// The same in f32, for the product of the router.
    pub(super) wide: Place<f32>,
    /// `[T, (H + 2 KV) hd]`.
    pub(super) qkv: Place<bf16>,
    /// `[T, H hd]`.
    pub(super) query: Place<bf16>,
    /// `[T, H hd]`.
    pub(super) attended: Place<bf16>,
    pub(super) attention_workspace: Place<f32>,
    /// `[T, E]`.
    pub(super) router_logits: Place<f32>,
    /// `[T, K]`.
    pub(super) expert_ids: Place<u32>,
    /// `[T, K]`.
    pub(super) weights: Place<f32>,
    /// `[T, 2]`.
    pub(super) notes: Place<u32>,
    /// Of a part of the tokens.
    pub(super) experts: ExpertValues,
    /// Of dense layers and of shared experts: `[T, 2F]`.
    pub(super) gate_up: Place<bf16>,
    /// `[T, F]`.
    pub(super) hidden: Place<bf16>,
    /// `[T, D]`: what a shared expert makes.
    pub(super) shared: Place<bf16>,
    /// `[T]`.
    pub(super) shared_gate: Place<f32>,
    /// `[rows, D]`: rows whose logits are made.
    pub(super) head: Place<bf16>,
    /// `[rows, V]`.
    pub(super) logits: Place<f32>,
    /// Rows of logits that are made at once.
    pub(super) head_rows: usize,
    /// For each MoE layer, tokens that go through it at once.
    pub(super) parts: Vec<usize>,
    pub(super) report: Report,
    /// All of it.
    pub(super) bytes: usize,
}

/// Lists of tokens on their way through experts.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExpertValues {
    /// `[E + 1]`.
    pub(super) offsets: Place<u32>,
    /// `[R]`.
    pub(super) rows: Place<u32>,
    /// `[R]`.
    pub(super) positions: Place<u32>,
    /// `[E, 4]`.
    pub(super) active: Place<u32>,
    pub(super) plan_workspace: Place<u32>,
    /// `[R, D]`: rows in the order of experts.
    pub(super) gathered: Place<bf16>,
    /// `[R, 2F]`.
    pub(super) gate_up: Place<bf16>,
    /// `[R, F]`.
    pub(super) hidden: Place<bf16>,
    /// `[R, D]`.
    pub(super) y: Place<bf16>,
    pub(super) gemm_workspace: Place<u8>,
    /// Weights of one product in bf16, where they are held in 8 bits.
    pub(super) widened: Place<bf16>,
}

impl Values {
    pub(super) fn new(weights: &GpuWeights, sizes: Sizes, policies: &Policies, attention: &[Launch], gemm: Gemm) -> Result<Self> {
        let spec = &*weights.spec;
        let mut cutter = Cutter::default();
        let (t, d) = (sizes.tokens, spec.hidden_size);
        let heads = heads(spec);
        let slots = policies.layers.iter().map(|layer| layer.1).max().unwrap_or(0);
        let parts: Vec<usize> = policies.layers.iter().map(|layer| part(t, layer.1)).collect();
        let routes = policies.layers.iter().zip(&parts).map(|(layer, part)| layer.1 * part).max().unwrap_or(0);
        let most = |of: fn(&MoeSpec) -> usize| spec.moe_layers().map(|(_, moe)| of(moe)).max().unwrap_or(0);
        let (experts, width) = (most(|moe| moe.num_experts), most(|moe| moe.expert_width));
        let dense = spec.layers.iter().map(|layer| match &layer.feed_forward {
            FeedForwardSpec::Dense { width } => *width,
            FeedForwardSpec::Moe(moe) => moe.shared_expert_width.unwrap_or(0),
        });
        let dense = dense.max().unwrap_or(0);
        let shared = if most(|moe| moe.shared_expert_width.unwrap_or(0)) > 0 { t } else { 0 };
        // Of 8-bit experts that go through tiles, one product's at a time.
        let mut widened = 0;
        for ((_, moe), (&(_, slots), &part)) in spec.moe_layers().zip(policies.layers.iter().zip(&parts)) {
            if weights.quantized && !streams(slots * part, moe.num_experts) {
                widened = widened.max(moe.num_experts * 2 * moe.expert_width * d);
            }
        }
        let head_rows = sizes.rows.min(MOST_ROWS);
        let loads = spec.moe_layers().zip(&parts).map(|((_, moe), part)| (moe.num_experts, t.div_ceil(*part)));
        let report = Report::new(sizes.rows, loads);
        let mut values = Self {
            x: cutter.cut(t * d),
            normed: cutter.cut(t * d),
            wide: cutter.cut(if experts > 0 { t * d } else { 0 }),
            qkv: cutter.cut(t * heads.qkv_width()),
            query: cutter.cut(t * heads.width()),
            attended: cutter.cut(t * heads.width()),
            attention_workspace: cutter.cut(attention.iter().map(|launch| launch.workspace_len(heads)).max().unwrap_or(0)),
            router_logits: cutter.cut(t * experts),
            expert_ids: cutter.cut(t * slots),
            weights: cutter.cut(t * slots),
            notes: cutter.cut(if experts > 0 { 2 * t } else { 0 }),
            experts: ExpertValues::new(&mut cutter, d, experts, width, routes, widened, gemm)?,
            gate_up: cutter.cut(t * 2 * dense),
            hidden: cutter.cut(t * dense),
            shared: cutter.cut(shared * d),
            shared_gate: cutter.cut(shared),
            head: cutter.cut(head_rows * d),
            logits: cutter.cut(head_rows * spec.vocab_size),
            head_rows,
            parts,
            report,
            bytes: 0,
        };
        values.bytes = cutter.bytes();
        Ok(values)
    }
}

impl ExpertValues {
    /// For `routes` routes through up to `experts` experts of up to `width` hidden columns, with `widened` elements for what is 8-bit.
    pub(super) fn new(
        cutter: &mut Cutter,
        d: usize,
        experts: usize,
        width: usize,
        routes: usize,
        widened: usize,
        gemm: Gemm,
    ) -> Result<Self> {
        Ok(Self {
            offsets: cutter.cut(experts + 1),
            rows: cutter.cut(routes),
            positions: cutter.cut(routes),
            active: cutter.cut(4 * experts),
            plan_workspace: cutter.cut(if experts > 0 { plan::workspace_len(routes, 1, experts) } else { 0 }),
            gathered: cutter.cut(routes * d),
            gate_up: cutter.cut(routes * 2 * width),
            hidden: cutter.cut(routes * width),
            y: cutter.cut(routes * d),
            widened: cutter.cut(widened),
            gemm_workspace: cutter.cut(if experts > 0 { gemm.workspace_bytes(experts)? } else { 0 }),
        })
    }
}

/// Tokens of `tokens` that go through experts at once, with `slots` slots each.
fn part(tokens: usize, slots: usize) -> usize {
    (MOST_ROUTES / slots.max(1)).clamp(1, tokens.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_hold_what_fits() {
        assert_eq!((part(1, 8), part(8192, 8), part(16384, 8)), (1, 8192, 8192));
        assert_eq!((part(8192, 128), part(8192, 1), part(4, 1 << 20), part(0, 2)), (512, 8192, 1, 1));
    }
}
