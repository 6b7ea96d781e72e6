use super::{Bench, Random, Tolerance};
use crate::{
    Buffer, Result, Stream,
    plan::{Plan, Report, report_len, workspace_len},
    reference::{self, moe},
    routing::{Route, RouterLogits, TokenPolicy, WeightForm},
};

pub(super) fn check(bench: &mut Bench) -> Result<()> {
    for (tokens, width, experts) in [(1, 8, 8), (3, 136, 60), (8, 1028, 2), (9, 128, 64), (2, 2048, 1)] {
        logits(bench, tokens, width, experts)?;
    }
    let shapes = [
        (1, 1, 2),
        (1, 2, 8),
        (7, 2, 8),
        (70, 2, 8),
        (33, 8, 8),
        (5, 8, 60),
        (32, 8, 64),
        (3, 64, 64),
        (70, 64, 64),
        (2, 33, 128),
        (31, 8, 128),
        (3, 8, 200),
        (9, 16, 512),
        (3, 4, 1000),
        (2, 1000, 1000),
        (1, 1024, 1024),
    ];
    for (tokens, slots, experts) in shapes {
        for logits in [Logits::Normal, Logits::Ties] {
            route(bench, tokens, slots, experts, logits)?;
        }
    }
    let large: &[_] = if bench.quick { &[] } else { &[(16_384, 8, 64), (2048, 64, 64), (16_384, 8, 128), (4096, 2, 8), (3000, 40, 1024)] };
    for &(tokens, slots, experts) in [(1, 1, 1), (256, 8, 64), (257, 8, 3), (700, 8, 60), (2100, 2, 1024)].iter().chain(large) {
        for spread in [1, experts, 2 * experts] {
            plan(bench, tokens, slots, experts, spread)?;
        }
    }
    Ok(())
}

fn logits(bench: &mut Bench, tokens: usize, width: usize, experts: usize) -> Result<()> {
    let (stream, shape) = (bench.stream, format!("[{tokens}, {width}] x [{experts}, {width}]"));
    let mut random = Random::new(17);
    let (x, router) = (random.bf16s(tokens * width, 1.0), random.normals(experts * width, 0.1));
    let expected = reference::linear(&x, &router, width);
    let router = Buffer::from_slice(stream, &router, "router")?;
    let out = Buffer::<f32>::new(stream, tokens * experts, "logits")?;
    let (wide, narrow) = (Buffer::from_slice(stream, &x, "x")?, Buffer::from_slice(stream, &super::narrow(&x), "x")?);
    let tolerance = Tolerance { absolute: 3e-5, relative: 1e-5 };
    RouterLogits { x: wide.view(), router: router.view(), logits: out.view(), tokens, width, experts }.launch(stream)?;
    bench.compare("router_logits", &shape, &out.to_vec()?, &expected, tolerance);
    out.view().fill(0xff, stream)?;
    RouterLogits { x: narrow.view(), router: router.view(), logits: out.view(), tokens, width, experts }.launch(stream)?;
    bench.compare("router_logits bf16", &shape, &out.to_vec()?, &expected, tolerance);
    Ok(())
}

#[derive(Clone, Copy, Debug)]
enum Logits {
    Normal,
    /// Multiples of a quarter, -0 among them.
    Ties,
}

impl Logits {
    fn make(self, tokens: usize, experts: usize) -> Vec<f32> {
        let mut logits = Random::new(19).normals(tokens * experts, 1.5);
        if matches!(self, Self::Ties) {
            logits.iter_mut().for_each(|z| *z = (*z * 4.0).round() / 4.0);
        }
        // Tokens that cannot be routed, and one whose logits are as far apart as they can be.
        for (token, bad) in [(2, f32::NAN), (4, f32::INFINITY), (6, f32::NEG_INFINITY), (8, f32::MAX)] {
            if token < tokens {
                logits[token * experts + token % experts] = bad;
                logits[token * experts + experts - 1] = if bad == f32::MAX { f32::MIN } else { bad };
            }
        }
        logits
    }
}

/// All policies in one batch, padding among them; one that is native to the shape comes first.
fn policies(tokens: usize, slots: usize, experts: usize) -> Vec<TokenPolicy> {
    let mut table = vec![
        TokenPolicy::top_k(slots, WeightForm::Renorm),
        TokenPolicy::mass(0.7, slots, WeightForm::Raw),
        TokenPolicy::top_k(slots, WeightForm::Unit),
        TokenPolicy::NONE,
        TokenPolicy::top_k(1, WeightForm::Raw),
        TokenPolicy::mass(0.31, slots.div_ceil(2), WeightForm::Renorm),
        TokenPolicy::mass(1.0, slots, WeightForm::Unit),
    ];
    if slots == experts {
        table.insert(1, TokenPolicy::soft(1.0));
        table.insert(0, TokenPolicy::soft(0.6));
    }
    (0..tokens).map(|token| table[token % table.len()]).collect()
}

fn route(bench: &mut Bench, tokens: usize, slots: usize, experts: usize, logits: Logits) -> Result<()> {
    let (stream, shape) = (bench.stream, format!("[{tokens}, {experts}], {slots} slots, {logits:?}"));
    let (logits, policies) = (logits.make(tokens, experts), policies(tokens, slots, experts));
    let expected = moe::route(&logits, &policies, slots, experts);
    let logits = Buffer::from_slice(stream, &logits, "logits")?;
    let policies = Buffer::from_slice(stream, &policies, "policies")?;
    let memory = Memory::new(stream, tokens, slots, experts)?;
    let route = Route {
        logits: logits.view(),
        policies: policies.view(),
        expert_ids: memory.expert_ids.view(),
        weights: memory.weights.view(),
        notes: memory.notes.view(),
        tokens,
        slots,
        experts,
    };
    route.launch(stream)?;
    let routed = memory.routed(bench, "route", &shape, &expected)?;
    memory.expert_ids.view().fill(0xff, stream)?;
    memory.weights.view().fill(0xff, stream)?;
    route.launch_with_plan(memory.plan(), stream)?;
    let again = memory.routed(bench, "route_and_plan", &shape, &expected)?;
    let bits = |routing: &moe::Routing| routing.weights.iter().map(|w| w.to_bits()).collect::<Vec<_>>();
    bench.same("route_and_plan: as route", &shape, &(&again.expert_ids, bits(&again)), &(&routed.expert_ids, bits(&routed)));
    memory.planned(bench, "route_and_plan: plan", &shape, &moe::plan(&expected, experts))
}

/// `spread` experts are drawn; what is not below `experts` is unused.
fn plan(bench: &mut Bench, tokens: usize, slots: usize, experts: usize, spread: usize) -> Result<()> {
    let (stream, shape) = (bench.stream, format!("[{tokens}, {slots}] of {experts} experts, {spread} drawn"));
    let mut random = Random::new(23);
    let routing = moe::Routing {
        expert_ids: (0..tokens * slots).map(|_| random.below(spread) as u32 + u32::from(spread == 1 && experts > 1)).collect(),
        weights: (0..tokens * slots).map(|_| random.unit()).collect(),
        entropies: (0..tokens).map(|_| random.unit()).collect(),
        flags: (0..tokens).map(|_| random.below(3) as u32).collect(),
    };
    let memory = Memory::new(stream, tokens, slots, experts)?;
    let notes: Vec<u32> = routing.entropies.iter().zip(&routing.flags).flat_map(|(entropy, &flags)| [entropy.to_bits(), flags]).collect();
    memory.expert_ids.view().write(&routing.expert_ids, stream)?;
    memory.weights.view().write(&routing.weights, stream)?;
    memory.notes.view().write(&notes, stream)?;
    memory.plan().launch(stream)?;
    memory.planned(bench, "plan", &shape, &moe::plan(&routing, experts))
}

/// What routing and plan write.
pub(super) struct Memory {
    tokens: usize,
    slots: usize,
    experts: usize,
    expert_ids: Buffer<u32>,
    weights: Buffer<f32>,
    notes: Buffer<u32>,
    offsets: Buffer<u32>,
    rows: Buffer<u32>,
    positions: Buffer<u32>,
    active: Buffer<u32>,
    report: Buffer<u32>,
    workspace: Buffer<u32>,
}

impl Memory {
    pub(super) fn new(stream: Stream, tokens: usize, slots: usize, experts: usize) -> Result<Self> {
        let words = |len: usize, what: &'static str| Buffer::new(stream, len, what);
        Ok(Self {
            tokens,
            slots,
            experts,
            expert_ids: words(tokens * slots, "expert_ids")?,
            weights: Buffer::new(stream, tokens * slots, "weights")?,
            notes: words(tokens * 2, "notes")?,
            offsets: words(experts + 1, "offsets")?,
            rows: words(tokens * slots, "rows")?,
            positions: words(tokens * slots, "positions")?,
            active: words(experts * 4, "active")?,
            report: words(report_len(experts), "report")?,
            workspace: words(workspace_len(tokens, slots, experts), "workspace")?,
        })
    }

    pub(super) fn plan(&self) -> Plan<'_> {
        Plan {
            expert_ids: self.expert_ids.view(),
            weights: self.weights.view(),
            notes: self.notes.view(),
            offsets: self.offsets.view(),
            rows: self.rows.view(),
            positions: self.positions.view(),
            active: self.active.view(),
            report: self.report.view(),
            workspace: self.workspace.view(),
            tokens: self.tokens,
            slots: self.slots,
            experts: self.experts,
        }
    }

    fn routed(&self, bench: &mut Bench, kernel: &'static str, shape: &str, expected: &moe::Routing) -> Result<moe::Routing> {
        let notes = self.notes.to_vec()?;
        let found = moe::Routing {
            expert_ids: self.expert_ids.to_vec()?,
            weights: self.weights.to_vec()?,
            entropies: notes.iter().step_by(2).copied().map(f32::from_bits).collect(),
            flags: notes.iter().skip(1).step_by(2).copied().collect(),
        };
        bench.same(kernel, format!("{shape}: experts"), &found.expert_ids, &expected.expert_ids);
        bench.same(kernel, format!("{shape}: flags"), &found.flags, &expected.flags);
        let weights = Tolerance { absolute: 1e-7, relative: 1e-5 };
        bench.compare(kernel, format!("{shape}: weights"), &found.weights, &expected.weights, weights);
        bench.compare(kernel, format!("{shape}: entropies"), &found.entropies, &expected.entropies, Tolerance::F32);
        Ok(found)
    }

    fn planned(&self, bench: &mut Bench, kernel: &'static str, shape: &str, expected: &moe::Plan) -> Result<()> {
        let rows = self.rows.to_vec()?;
        let found = (self.offsets.to_vec()?, &rows[..expected.rows.len()], self.positions.to_vec()?, self.active.to_vec()?);
        bench.same(kernel, format!("{shape}: offsets"), &found.0, &expected.offsets);
        bench.same(kernel, format!("{shape}: rows"), found.1, &expected.rows[..]);
        bench.same(kernel, format!("{shape}: positions"), &found.2, &expected.positions);
        bench.same(kernel, format!("{shape}: active"), &found.3, &expected.active);
        let (report, wanted) = (Report::read(&self.report.to_vec()?, self.experts)?, &expected.report);
        bench.same(kernel, format!("{shape}: tokens"), &report.expert_tokens, &wanted.expert_tokens);
        let counts = |report: &Report| (report.non_finite, report.near_ties);
        bench.same(kernel, format!("{shape}: counts"), &counts(&report), &counts(wanted));
        bench.compare(kernel, format!("{shape}: weights"), &report.expert_weights, &wanted.expert_weights, Tolerance::F32);
        bench.compare(kernel, format!("{shape}: entropy"), &[report.entropy_sum], &[wanted.entropy_sum], Tolerance::F32);
        Ok(())
    }
}
