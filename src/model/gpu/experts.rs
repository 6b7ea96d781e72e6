//! Routing, dispatch and routed experts.

use std::{cell::RefCell, fmt, ops::Range};

use hardmax_kernels::{
    Buffer, Stream, View, bf16,
    combine::{Combine, Shared},
    experts::{Dispatch, Down, GateUp},
    grouped::{GatherRows, Gemm, Grouped, SiluMul},
    linear::Linear,
    plan::{Plan, report_len},
    routing::{Route, RouterLogits},
};

use super::{
    Machine, Step,
    arena::{Arena, Cutter},
    profile::Class,
    step::POLICY_WORDS,
    values::ExpertValues,
    watch::{SeenLayer, Watch, routing_of, slots_of},
    weights::{Layer, Moe},
};
use crate::{
    error::Result,
    moe::{
        Routed, SparseRouting,
        observe::{ExpertOutputs, ObservedLayer},
    },
};

/// Tokens up to which router logits are made by the kernel for few: it reads the router once for eight of them.
const FEW_TOKENS: usize = 64;

/// Rows of an expert, on average, up to which its products are the reading of its weights.
const STREAMED_ROWS: usize = 32;

/// Routes that are computed at once for an observer.
const OBSERVED_ROUTES: usize = 1 << 12;

/// Whether so many routes go to experts by [`Experts::streamed`]. The host does not know which experts they go to.
pub(super) fn streams(routes: usize, experts: usize) -> bool {
    routes.div_ceil(experts) <= STREAMED_ROWS
}

/// Tokens with the slots of their routes.
#[derive(Clone, Copy, Debug)]
struct Slots<'a> {
    /// `[tokens, D]`.
    x: View<'a, bf16>,
    /// `[tokens, slots]`.
    expert_ids: View<'a, u32>,
    /// `[tokens, slots]`.
    weights: View<'a, f32>,
    /// `[tokens, 2]`.
    notes: View<'a, u32>,
    tokens: usize,
    slots: usize,
}

impl Machine {
    /// Adds what the routed experts, and the shared one, make of the residual stream to it.
    pub(super) fn moe(&mut self, index: usize, layer: &Layer, moe: &Moe, step: &Step<'_>, watch: &mut Watch<'_>) -> Result<()> {
        let place = step.spec.moe_layers().take_while(|(other, _)| *other < index).count();
        let (set, slots) = step.policies.layers[place];
        let tokens = step.sizes.tokens;
        self.norm(layer.feed_forward_norm.view(), tokens > FEW_TOKENS, step)?;
        self.router_logits(moe, step)?;
        if watch.on_host {
            self.route_on_host(index, moe, slots, step, watch)?;
        } else {
            self.route(moe, set, slots, step)?;
            if watch.looks() {
                watch.saw(self.look(moe, slots, step)?);
            }
        }
        self.clock.mark(self.stream, Class::Routing)?;
        if let Some(shared) = &moe.shared {
            self.mlp(&shared.expert, shared.width, step.values.shared, false, step)?;
            self.shared_gate(shared.gate.view(), step)?;
            self.clock.mark(self.stream, Class::Dense)?;
        }
        let at_once = step.values.parts[place];
        for (part, first) in (0..tokens).step_by(at_once).enumerate() {
            let load = step.values.report.loads[place][part].clone();
            self.part(moe, slots, first..(first + at_once).min(tokens), load, step)?;
        }
        self.show(index, moe, step, watch)
    }

    /// `[T, E]` of the normed rows.
    fn router_logits(&mut self, moe: &Moe, step: &Step<'_>) -> Result<()> {
        let (values, tokens, width, experts) = (step.values, step.sizes.tokens, step.spec.hidden_size, moe.spec.num_experts);
        let Self { stream, blas, arena, .. } = self;
        let (router, logits) = (moe.router.view(), arena.view(values.router_logits));
        if tokens <= FEW_TOKENS {
            return Ok(RouterLogits { x: arena.view(values.normed), router, logits, tokens, width, experts }.launch(*stream)?);
        }
        let x = arena.view(values.wide);
        Ok(blas.linear(Linear { x, weight: router, y: logits, stride: experts, rows: tokens, n: experts, k: width, add: false })?)
    }

    /// Chooses experts on the device.
    fn route(&mut self, moe: &Moe, set: usize, slots: usize, step: &Step<'_>) -> Result<()> {
        let (arena, values, tokens) = (&self.arena, step.values, step.sizes.tokens);
        let policies = self.words.device.view().part(step.layout.policies.clone());
        let words = tokens * POLICY_WORDS;
        let route = Route {
            logits: arena.view(values.router_logits),
            policies: policies.part(set * words..(set + 1) * words).cast()?,
            expert_ids: arena.view(values.expert_ids),
            weights: arena.view(values.weights),
            notes: arena.view(values.notes),
            tokens,
            slots,
            experts: moe.spec.num_experts,
        };
        Ok(route.launch(self.stream)?)
    }

    /// Chooses experts on the host, where sequences replay theirs.
    fn route_on_host(&mut self, index: usize, moe: &Moe, slots: usize, step: &Step<'_>, watch: &mut Watch<'_>) -> Result<()> {
        let (values, tokens, experts) = (step.values, step.sizes.tokens, moe.spec.num_experts);
        let router_logits = self.arena.view(values.router_logits).part(..tokens * experts).to_vec(self.stream)?;
        let mut routed = Routed::default();
        let runs = step.batch.spans.iter().map(|span| (&span.routing, span.new));
        routed.fill((index, &moe.spec), step.spec.reference, &router_logits, runs)?;
        let (expert_ids, weights) = slots_of(&routed.routing, routed.non_finite(), slots, experts)?;
        self.arena.view(values.expert_ids).write(&expert_ids, self.stream)?;
        self.arena.view(values.weights).write(&weights, self.stream)?;
        // The host has seen for itself.
        self.arena.view(values.notes).fill(0, self.stream)?;
        // What was written from may go.
        self.stream.synchronize()?;
        watch.saw(SeenLayer { router_logits, routing: routed.routing, stats: Some(routed.stats) });
        Ok(())
    }

    /// Routes and router logits of a layer, on the host.
    fn look(&self, moe: &Moe, slots: usize, step: &Step<'_>) -> Result<SeenLayer> {
        let (values, tokens, experts) = (step.values, step.sizes.tokens, moe.spec.num_experts);
        let router_logits = self.arena.view(values.router_logits).part(..tokens * experts).to_vec(self.stream)?;
        let expert_ids = self.arena.view(values.expert_ids).part(..tokens * slots).to_vec(self.stream)?;
        let weights = self.arena.view(values.weights).part(..tokens * slots).to_vec(self.stream)?;
        Ok(SeenLayer { router_logits, routing: routing_of(&expert_ids, &weights, slots, experts), stats: None })
    }

    /// Logits of the gate of the shared expert, `[T]`: those of a router with one expert.
    fn shared_gate(&mut self, router: View<'_, f32>, step: &Step<'_>) -> Result<()> {
        let (arena, values) = (&self.arena, step.values);
        let (x, logits) = (arena.view(values.normed), arena.view(values.shared_gate));
        let (tokens, width) = (step.sizes.tokens, step.spec.hidden_size);
        Ok(RouterLogits { x, router, logits, tokens, width, experts: 1 }.launch(self.stream)?)
    }

    /// Sends some tokens through their experts, and adds what comes of it to the residual stream.
    fn part(&mut self, moe: &Moe, slots: usize, tokens: Range<usize>, load: Range<usize>, step: &Step<'_>) -> Result<()> {
        let (values, d, first) = (step.values, step.spec.hidden_size, tokens.start);
        let Self { stream, arena, gemm, report, clock, .. } = self;
        let part = Slots {
            x: arena.view(values.normed).part(first * d..),
            expert_ids: arena.view(values.expert_ids).part(first * slots..),
            weights: arena.view(values.weights).part(first * slots..),
            notes: arena.view(values.notes).part(2 * first..),
            tokens: tokens.len(),
            slots,
        };
        let experts = Experts { stream: *stream, gemm: *gemm, arena, places: &values.experts, moe, d };
        experts.run(part, report.device.view().part(load))?;
        clock.mark(*stream, Class::Experts)?;
        let shared = |_| Shared { y: arena.view(values.shared).part(first * d..), gate: arena.view(values.shared_gate).part(first..) };
        let combine = Combine {
            x: arena.view(values.x).part(first * d..),
            y: arena.view(values.experts.y),
            positions: arena.view(values.experts.positions),
            weights: part.weights,
            shared: moe.shared.as_ref().map(shared),
            norm: None,
            tokens: part.tokens,
            slots,
            width: d,
        };
        combine.launch(*stream)?;
        clock.mark(*stream, Class::Combine)
    }

    /// Shows a layer to who observes it.
    fn show(&mut self, index: usize, moe: &Moe, step: &Step<'_>, watch: &mut Watch<'_>) -> Result<()> {
        let d = step.spec.hidden_size;
        let Some((observer, seen)) = watch.observed() else { return Ok(()) };
        let normed = self.arena.view(step.values.normed).part(..step.sizes.tokens * d).to_vec(self.stream)?;
        let x: Vec<f32> = normed.iter().map(|x| x.to_f32()).collect();
        let outputs =
            Outputs { stream: self.stream, gemm: self.gemm, moe, normed: &normed, d, quantized: step.quantized, arena: RefCell::new(None) };
        observer.layer(&ObservedLayer {
            layer: index,
            spec: &moe.spec,
            x: &x,
            router_logits: &seen.router_logits,
            routing: &seen.routing,
            computed: None,
            experts: &outputs,
        })
    }
}

/// The routed experts of a layer, and where they work.
#[derive(Clone, Copy)]
struct Experts<'a> {
    stream: Stream,
    gemm: Gemm,
    arena: &'a Arena,
    places: &'a ExpertValues,
    moe: &'a Moe,
    d: usize,
}

impl Experts<'_> {
    /// Plans routes and runs them: outputs without weights, in the order of experts, in `places.y`.
    fn run(self, tokens: Slots<'_>, report: View<'_, u32>) -> Result<()> {
        let Self { stream, arena, places, moe, .. } = self;
        let experts = moe.spec.num_experts;
        let plan = Plan {
            expert_ids: tokens.expert_ids,
            weights: tokens.weights,
            notes: tokens.notes,
            offsets: arena.view(places.offsets),
            rows: arena.view(places.rows),
            positions: arena.view(places.positions),
            active: arena.view(places.active),
            report,
            workspace: arena.view(places.plan_workspace),
            tokens: tokens.tokens,
            slots: tokens.slots,
            experts,
        };
        plan.launch(stream)?;
        // With experts on several devices (`GpuWeights::placement`) rows of experts that live elsewhere would leave here, and come back below.
        if streams(tokens.tokens * tokens.slots, experts) { self.streamed(tokens) } else { self.grouped(tokens) }
    }

    /// Few rows: every weight is read once and used for all of them.
    fn streamed(self, tokens: Slots<'_>) -> Result<()> {
        let Self { stream, arena, places, moe, d, .. } = self;
        let (width, hidden) = (moe.spec.expert_width, arena.view(places.hidden));
        let dispatch = Dispatch {
            active: arena.view(places.active),
            rows: arena.view(places.rows),
            tokens: tokens.tokens,
            slots: tokens.slots,
            experts: moe.spec.num_experts,
        };
        let weights = moe.experts.gate_up.weights();
        GateUp { x: tokens.x, weights, hidden, dispatch, width: d, expert_width: width }.launch(stream)?;
        let weights = moe.experts.down.weights();
        Ok(Down { hidden, weights, y: arena.view(places.y), dispatch, width: d, expert_width: width }.launch(stream)?)
    }

    /// Many rows: tiles of rows and weights on tensor cores.
    fn grouped(self, tokens: Slots<'_>) -> Result<()> {
        let Self { stream, gemm, arena, places, moe, d } = self;
        let (experts, width, max_rows) = (moe.spec.num_experts, moe.spec.expert_width, tokens.tokens * tokens.slots);
        let (offsets, workspace) = (arena.view(places.offsets), arena.view(places.gemm_workspace));
        let scratch = arena.view(places.widened);
        let (gathered, gate_up, hidden) = (arena.view(places.gathered), arena.view(places.gate_up), arena.view(places.hidden));
        let gather = GatherRows {
            x: tokens.x,
            rows: arena.view(places.rows),
            offsets,
            out: gathered,
            experts,
            tokens: tokens.tokens,
            slots: tokens.slots,
            width: d,
        };
        gather.launch(stream)?;
        let product = Grouped {
            x: gathered,
            weight: moe.experts.gate_up.wide(offsets, scratch, stream)?,
            y: gate_up,
            offsets,
            workspace,
            experts,
            max_rows,
            n: 2 * width,
            k: d,
        };
        gemm.launch(product, stream)?;
        SiluMul { gate_up, offsets, out: hidden, experts, max_rows, width }.launch(stream)?;
        let (weight, y) = (moe.experts.down.wide(offsets, scratch, stream)?, arena.view(places.y));
        Ok(gemm.launch(Grouped { x: hidden, weight, y, offsets, workspace, experts, max_rows, n: d, k: width }, stream)?)
    }
}

/// The experts of a layer with the rows that they read, for an observer. In memory of its own, which goes with it.
struct Outputs<'a> {
    stream: Stream,
    gemm: Gemm,
    moe: &'a Moe,
    /// `[T, D]`.
    normed: &'a [bf16],
    d: usize,
    /// Experts are held in 8 bits.
    quantized: bool,
    arena: RefCell<Option<Arena>>,
}

impl ExpertOutputs for Outputs<'_> {
    /// Each route is a token of its own.
    fn outputs(&self, routing: &SparseRouting) -> Result<Vec<f32>> {
        let tokens = (0..routing.num_tokens()).flat_map(|token| std::iter::repeat_n(token, routing.routes(token).len()));
        let tokens: Vec<usize> = tokens.collect();
        let mut outputs = Vec::with_capacity(tokens.len() * self.d);
        for (tokens, expert_ids) in tokens.chunks(OBSERVED_ROUTES).zip(routing.expert_ids.chunks(OBSERVED_ROUTES)) {
            outputs.extend(self.some(tokens, expert_ids)?);
        }
        Ok(outputs)
    }
}

impl Outputs<'_> {
    /// What experts make of tokens, `[routes, D]`.
    fn some(&self, tokens: &[usize], expert_ids: &[u32]) -> Result<Vec<f32>> {
        let Self { stream, gemm, moe, normed, d, quantized, .. } = self;
        let (stream, gemm, d) = (*stream, *gemm, *d);
        let (routes, spec) = (tokens.len(), &moe.spec);
        let mut cutter = Cutter::default();
        let widened = if *quantized { spec.num_experts * 2 * spec.expert_width * d } else { 0 };
        let places = ExpertValues::new(&mut cutter, d, spec.num_experts, spec.expert_width, routes, widened, gemm)?;
        let mut arena = self.arena.borrow_mut();
        let arena = match &mut *arena {
            Some(arena) => arena,
            none => none.insert(Arena::new(stream)?),
        };
        arena.reserve(cutter.bytes())?;
        let x: Vec<bf16> = tokens.iter().flat_map(|&token| &normed[token * d..(token + 1) * d]).copied().collect();
        let x = Buffer::from_slice(stream, &x, "rows of an observed layer")?;
        let expert_ids = Buffer::from_slice(stream, expert_ids, "experts of an observed layer")?;
        let weights = Buffer::from_slice(stream, &vec![1f32; routes], "weights of an observed layer")?;
        let notes = Buffer::zeros(stream, 2 * routes, "notes of an observed layer")?;
        let report = Buffer::new(stream, report_len(spec.num_experts), "the load of an observed layer")?;
        let slots =
            Slots { x: x.view(), expert_ids: expert_ids.view(), weights: weights.view(), notes: notes.view(), tokens: routes, slots: 1 };
        Experts { stream, gemm, arena, places: &places, moe, d }.run(slots, report.view())?;
        let (y, positions) = (arena.view(places.y).to_vec(stream)?, arena.view(places.positions).to_vec(stream)?);
        let rows = positions.iter().take(routes).map(|&row| &y[row as usize * d..][..d]);
        Ok(rows.flatten().map(|y| y.to_f32()).collect())
    }
}

impl fmt::Debug for Experts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Experts").field("spec", &self.moe.spec).finish_non_exhaustive()
    }
}
