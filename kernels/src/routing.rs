//! Routing: from router logits to slots, each token by its own policy.
//!
//! Every token has `slots` slots, as many as any token of the batch has experts at most. A slot holds an expert and its weight, in descending order of
//! logits; ties go to the lowest expert. Unused slots hold the number of experts, and weight 0. A token with a logit that is not finite has no experts,
//! and NaN for weights, by which [`Combine`](crate::combine::Combine) makes the token NaN.

use std::ffi::c_void;

use crate::{
    Error, Result, Stream, View,
    error::{check, expect_aligned, expect_len, int},
    linear::Float,
    plan::{Plan, PlanArgs, SMALL_SLOTS},
};

/// Most experts of a layer.
pub const MAX_EXPERTS: usize = 1024;

/// Tokens that one block routes and plans in one launch: more of them are routed by several blocks.
const FUSED_TOKENS: usize = 32;

/// What becomes of the probabilities of chosen experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum WeightForm {
    /// As they are.
    Raw = 0,
    /// Scaled to sum to 1.
    Renorm = 1,
    /// One over the number of the chosen.
    Unit = 2,
}

/// How one token is routed: an element of device memory.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct TokenPolicy {
    pub(crate) kind: i32,
    pub(crate) k: i32,
    pub(crate) value: f32,
    pub(crate) form: i32,
}

impl TokenPolicy {
    /// Not at all: padding. It has no experts and is counted nowhere.
    pub const NONE: Self = Self { kind: 0, k: 0, value: 0.0, form: 0 };

    /// The `k` experts with the largest logits. At least one and at most as many as there are slots are taken.
    pub fn top_k(k: usize, form: WeightForm) -> Self {
        Self { kind: 1, k: clamp(k), value: 0.0, form: form as i32 }
    }

    /// Experts by descending logit until their probabilities reach `threshold`; at most `max_k`.
    pub fn mass(threshold: f32, max_k: usize, form: WeightForm) -> Self {
        Self { kind: 2, k: clamp(max_k), value: threshold, form: form as i32 }
    }

    /// All experts, weighted by `softmax(logits / temperature)`. Needs as many slots as there are experts.
    pub fn soft(temperature: f32) -> Self {
        Self { kind: 3, k: 0, value: temperature, form: 0 }
    }
}

fn clamp(k: usize) -> i32 {
    k.min(MAX_EXPERTS) as i32
}

#[repr(C)]
struct LogitsArgs {
    x: *const c_void,
    router: *const f32,
    logits: *mut f32,
    tokens: i32,
    width: i32,
    experts: i32,
    x_f32: i32,
}

#[repr(C)]
struct RouteArgs {
    logits: *const f32,
    policies: *const TokenPolicy,
    expert_ids: *mut u32,
    weights: *mut f32,
    notes: *mut u32,
    tokens: i32,
    slots: i32,
    experts: i32,
}

unsafe extern "C" {
    fn hm_router_logits(args: *const LogitsArgs, stream: *mut c_void) -> i32;
    fn hm_route(args: *const RouteArgs, stream: *mut c_void) -> i32;
    fn hm_route_and_plan(route: *const RouteArgs, plan: *const PlanArgs, stream: *mut c_void) -> i32;
}

/// `logits [tokens, experts] = x [tokens, width] · router [experts, width]ᵀ` in f32, for few tokens: the router is read once for every 8 of them.
///
/// A row does not depend on the others. With one expert it makes the gate of a shared expert.
#[derive(Clone, Copy, Debug)]
pub struct RouterLogits<'a, X: Float> {
    /// `[tokens, width]`.
    pub x: View<'a, X>,
    /// `[experts, width]`.
    pub router: View<'a, f32>,
    /// `[tokens, experts]`.
    pub logits: View<'a, f32>,
    /// Rows of x.
    pub tokens: usize,
    /// Columns of x, a multiple of 4.
    pub width: usize,
    /// Rows of the router.
    pub experts: usize,
}

/// Slots of the experts of every token.
#[derive(Clone, Copy, Debug)]
pub struct Route<'a> {
    /// `[tokens, experts]`.
    pub logits: View<'a, f32>,
    /// `[tokens]`.
    pub policies: View<'a, TokenPolicy>,
    /// `[tokens, slots]`.
    pub expert_ids: View<'a, u32>,
    /// `[tokens, slots]`.
    pub weights: View<'a, f32>,
    /// `[tokens, 2]`: what [`Plan`] sums up for the report.
    pub notes: View<'a, u32>,
    /// Rows of logits.
    pub tokens: usize,
    /// Slots of a token, up to `experts`.
    pub slots: usize,
    /// Up to [`MAX_EXPERTS`].
    pub experts: usize,
}

impl<X: Float> RouterLogits<'_, X> {
    /// Launches it.
    pub fn launch(self, stream: Stream) -> Result<()> {
        const KERNEL: &str = "router_logits";
        let Self { x, router, logits, tokens, width, experts } = self;
        if tokens == 0 || experts == 0 {
            return Ok(());
        }
        if !width.is_multiple_of(4) {
            return Err(Error::shape(KERNEL, format!("a width of {width}: it has to be a multiple of 4")));
        }
        expect_len(KERNEL, "x", x.len(), tokens * width)?;
        expect_len(KERNEL, "router", router.len(), experts * width)?;
        expect_len(KERNEL, "logits", logits.len(), tokens * experts)?;
        expect_aligned(KERNEL, "x", x)?;
        expect_aligned(KERNEL, "router", router)?;
        let args = LogitsArgs {
            x: x.as_ptr().cast(),
            router: router.as_ptr(),
            logits: logits.as_mut_ptr(),
            tokens: int(KERNEL, "tokens", tokens)?,
            width: int(KERNEL, "width", width)?,
            experts: int(KERNEL, "experts", experts)?,
            x_f32: X::IS_F32.into(),
        };
        // SAFETY: the views are as long as the shapes say.
        check(KERNEL, unsafe { hm_router_logits(&args, stream.raw()) })
    }
}

impl Route<'_> {
    /// Launches it.
    pub fn launch(self, stream: Stream) -> Result<()> {
        if self.tokens == 0 {
            return Ok(());
        }
        let args = self.args()?;
        // SAFETY: the views are as long as the shapes say.
        check("route", unsafe { hm_route(&args, stream.raw()) })
    }

    /// This and the plan of what it makes: one launch where tokens are few.
    pub fn launch_with_plan(self, plan: Plan<'_>, stream: Stream) -> Result<()> {
        const KERNEL: &str = "route_and_plan";
        let same = (plan.tokens, plan.slots, plan.experts) == (self.tokens, self.slots, self.experts)
            && (plan.expert_ids.as_ptr(), plan.weights.as_ptr(), plan.notes.as_ptr())
                == (self.expert_ids.as_ptr(), self.weights.as_ptr(), self.notes.as_ptr());
        if !same {
            return Err(Error::shape(KERNEL, "the plan is of other slots than the routing"));
        }
        if self.tokens == 0 || self.tokens > FUSED_TOKENS || self.tokens * self.slots > SMALL_SLOTS {
            self.launch(stream)?;
            return plan.launch(stream);
        }
        let (route, plan) = (self.args()?, plan.args()?);
        // SAFETY: the views are as long as the shapes say.
        check(KERNEL, unsafe { hm_route_and_plan(&route, &plan, stream.raw()) })
    }

    fn args(&self) -> Result<RouteArgs> {
        const KERNEL: &str = "route";
        let Self { logits, policies, expert_ids, weights, notes, tokens, slots, experts } = *self;
        if experts == 0 || experts > MAX_EXPERTS || slots == 0 || slots > experts {
            let message = format!("{slots} slots of {experts} experts: there may be up to {MAX_EXPERTS} experts, and one slot for each");
            return Err(Error::shape(KERNEL, message));
        }
        expect_len(KERNEL, "logits", logits.len(), tokens * experts)?;
        expect_len(KERNEL, "policies", policies.len(), tokens)?;
        expect_len(KERNEL, "expert_ids", expert_ids.len(), tokens * slots)?;
        expect_len(KERNEL, "weights", weights.len(), tokens * slots)?;
        expect_len(KERNEL, "notes", notes.len(), 2 * tokens)?;
        Ok(RouteArgs {
            logits: logits.as_ptr(),
            policies: policies.as_ptr(),
            expert_ids: expert_ids.as_mut_ptr(),
            weights: weights.as_mut_ptr(),
            notes: notes.as_mut_ptr(),
            tokens: int(KERNEL, "tokens", tokens)?,
            slots: int(KERNEL, "slots", slots)?,
            experts: int(KERNEL, "experts", experts)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Buffer;

    #[test]
    fn what_does_not_fit_is_refused() {
        let stream = Stream::create().unwrap();
        let (words, floats) = (Buffer::<u32>::zeros(stream, 64, "words").unwrap(), Buffer::<f32>::zeros(stream, 64, "floats").unwrap());
        let policies = Buffer::from_slice(stream, &[TokenPolicy::NONE; 8], "policies").unwrap();
        let route = |tokens, slots, experts| {
            let (logits, policies, expert_ids, weights, notes) =
                (floats.view(), policies.view(), words.view().part(..32), floats.view(), words.view().part(32..));
            Route { logits, policies, expert_ids, weights, notes, tokens, slots, experts }.launch(stream).map_err(|e| e.to_string())
        };
        assert_eq!((route(8, 2, 8), route(0, 2, 8)), (Ok(()), Ok(())));
        assert_eq!(route(9, 2, 4).unwrap_err(), "route: policies has 8 elements, its shape has 9");
        let message = "route: 9 slots of 8 experts: there may be up to 1024 experts, and one slot for each";
        assert_eq!(route(1, 9, 8).unwrap_err(), message);
    }
}
