//! The dispatch plan: slots sorted by expert, stable in token order, and the way back.

use std::ffi::c_void;

use crate::{
    Error, Result, Stream, View,
    error::{check, expect_aligned, expect_len, int},
    routing::MAX_EXPERTS,
};

/// Slots that one block plans alone.
pub(crate) const SMALL_SLOTS: usize = 2048;
/// Most blocks that share a plan.
const MAX_BLOCKS: usize = 256;

#[repr(C)]
pub(crate) struct PlanArgs {
    expert_ids: *const u32,
    weights: *const f32,
    notes: *const u32,
    offsets: *mut u32,
    rows: *mut u32,
    positions: *mut u32,
    active: *mut u32,
    report: *mut u32,
    workspace: *mut u32,
    tokens: i32,
    slots: i32,
    experts: i32,
    blocks: i32,
}

unsafe extern "C" {
    fn hm_plan(args: *const PlanArgs, stream: *mut c_void) -> i32;
}

/// Sorts slots by expert, and sums up the layer's load.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// `[tokens, slots]`. What is not below `experts` is unused.
    pub expert_ids: View<'a, u32>,
    /// `[tokens, slots]`.
    pub weights: View<'a, f32>,
    /// `[tokens, 2]`, of [`Route`](crate::routing::Route).
    pub notes: View<'a, u32>,
    /// `[experts + 1]`: sorted rows of expert e are `offsets[e] .. offsets[e + 1]`.
    pub offsets: View<'a, u32>,
    /// `[tokens · slots]`: slot of each sorted row; its token is that over `slots`. Behind the last row it is not written.
    pub rows: View<'a, u32>,
    /// `[tokens, slots]`: sorted row of each slot, `u32::MAX` of unused ones.
    pub positions: View<'a, u32>,
    /// `[experts, 4]`: expert, first row, end of its rows, 0. Experts with rows, ascending; behind them `u32::MAX`, 0, 0, 0.
    pub active: View<'a, u32>,
    /// [`report_len`]: see [`Report`].
    pub report: View<'a, u32>,
    /// [`workspace_len`].
    pub workspace: View<'a, u32>,
    /// Tokens.
    pub tokens: usize,
    /// Slots of a token.
    pub slots: usize,
    /// Up to [`MAX_EXPERTS`].
    pub experts: usize,
}

/// Elements of the workspace of a plan; 0 where one block does it.
pub fn workspace_len(tokens: usize, slots: usize, experts: usize) -> usize {
    match blocks(tokens * slots) {
        1 => 0,
        blocks => blocks * experts,
    }
}

fn blocks(slots: usize) -> usize {
    slots.div_ceil(SMALL_SLOTS).clamp(1, MAX_BLOCKS)
}

/// Elements of a layer's report: `[experts]` tokens, `[experts]` sums of weights (f32), entropy (f32), non-finite tokens, near ties.
pub fn report_len(experts: usize) -> usize {
    2 * experts + 3
}

/// What the routing of a layer did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Tokens that each expert received.
    pub expert_tokens: Vec<u32>,
    /// Sum of the weights that each expert received.
    pub expert_weights: Vec<f32>,
    /// Sum over tokens of the entropy of `softmax(logits)`, in nats; 0 of tokens that were not routed.
    pub entropy_sum: f32,
    /// Tokens with a logit that is not finite.
    pub non_finite: u32,
    /// Tokens whose last chosen and first refused logit are less than 0.01 apart.
    pub near_ties: u32,
}

impl Report {
    /// Of the copy of a device's report, [`report_len`].
    pub fn read(words: &[u32], experts: usize) -> Result<Self> {
        expect_len("report", "the copy", words.len(), report_len(experts))?;
        let (tokens, rest) = words.split_at(experts);
        let (weights, rest) = rest.split_at(experts);
        Ok(Self {
            expert_tokens: tokens.to_vec(),
            expert_weights: weights.iter().copied().map(f32::from_bits).collect(),
            entropy_sum: f32::from_bits(rest[0]),
            non_finite: rest[1],
            near_ties: rest[2],
        })
    }
}

impl Plan<'_> {
    /// Launches it. Without tokens there is nothing to launch, and nothing is written.
    pub fn launch(self, stream: Stream) -> Result<()> {
        if self.tokens == 0 {
            return Ok(());
        }
        let args = self.args()?;
        // SAFETY: the views are as long as the shapes say.
        check("plan", unsafe { hm_plan(&args, stream.raw()) })
    }

    pub(crate) fn args(&self) -> Result<PlanArgs> {
        const KERNEL: &str = "plan";
        let Self { expert_ids, weights, notes, offsets, rows, positions, active, report, workspace, tokens, slots, experts } = *self;
        if experts == 0 || experts > MAX_EXPERTS || slots == 0 {
            return Err(Error::shape(KERNEL, format!("{slots} slots of {experts} experts: there may be 1 to {MAX_EXPERTS} experts")));
        }
        let count = tokens * slots;
        int(KERNEL, "tokens times slots", count)?;
        expect_len(KERNEL, "expert_ids", expert_ids.len(), count)?;
        expect_len(KERNEL, "weights", weights.len(), count)?;
        expect_len(KERNEL, "notes", notes.len(), 2 * tokens)?;
        expect_len(KERNEL, "offsets", offsets.len(), experts + 1)?;
        expect_len(KERNEL, "rows", rows.len(), count)?;
        expect_len(KERNEL, "positions", positions.len(), count)?;
        expect_len(KERNEL, "active", active.len(), 4 * experts)?;
        expect_aligned(KERNEL, "active", active)?;
        expect_len(KERNEL, "report", report.len(), report_len(experts))?;
        expect_len(KERNEL, "workspace", workspace.len(), workspace_len(tokens, slots, experts))?;
        Ok(PlanArgs {
            expert_ids: expert_ids.as_ptr(),
            weights: weights.as_ptr(),
            notes: notes.as_ptr(),
            offsets: offsets.as_mut_ptr(),
            rows: rows.as_mut_ptr(),
            positions: positions.as_mut_ptr(),
            active: active.as_mut_ptr(),
            report: report.as_mut_ptr(),
            workspace: workspace.as_mut_ptr(),
            tokens: int(KERNEL, "tokens", tokens)?,
            slots: int(KERNEL, "slots", slots)?,
            experts: int(KERNEL, "experts", experts)?,
            blocks: int(KERNEL, "blocks", blocks(count))?,
        })
    }
}
