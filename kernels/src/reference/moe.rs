//! Routing, plan, experts and their sum.

use crate::{plan::Report, routing::TokenPolicy};

const NEAR_TIE: f32 = 0.01;

/// Slots of all tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routing {
    /// `[tokens, slots]`.
    pub expert_ids: Vec<u32>,
    /// `[tokens, slots]`.
    pub weights: Vec<f32>,
    /// `[tokens]`: entropy of the router, in nats.
    pub entropies: Vec<f32>,
    /// `[tokens]`: 1 for a non-finite logit, 2 for a near tie.
    pub flags: Vec<u32>,
}

/// Routes `logits [tokens, experts]`.
pub fn route(logits: &[f32], policies: &[TokenPolicy], slots: usize, experts: usize) -> Routing {
    let mut routing = Routing::default();
    for (row, policy) in logits.chunks_exact(experts).zip(policies) {
        let finite = row.iter().all(|z| z.is_finite());
        let routed = policy.kind != 0 && finite;
        let (chosen, weights) = if routed { choose(row, policy, slots) } else { Default::default() };
        let unused = if policy.kind != 0 && !finite { f32::NAN } else { 0.0 };
        let near = chosen.last().is_some_and(|&last| {
            let refused = (0..experts).filter(|e| !chosen.contains(e));
            refused.into_iter().any(|e| row[last] - row[e] < NEAR_TIE)
        });
        routing.expert_ids.extend((0..slots).map(|slot| chosen.get(slot).map_or(experts, |&e| e) as u32));
        routing.weights.extend((0..slots).map(|slot| weights.get(slot).copied().unwrap_or(unused)));
        routing.entropies.push(if routed { entropy(row) } else { 0.0 });
        routing.flags.push(if policy.kind != 0 && !finite { 1 } else { 2 * u32::from(near) });
    }
    routing
}

fn choose(row: &[f32], policy: &TokenPolicy, slots: usize) -> (Vec<usize>, Vec<f32>) {
    let soft = policy.kind == 3;
    let probabilities = softmax(row, if soft { policy.value } else { 1.0 });
    let mut order: Vec<usize> = (0..row.len()).collect();
    // -0 and 0 are equal.
    order.sort_by(|&a, &b| (row[b] + 0.0).total_cmp(&(row[a] + 0.0)).then(a.cmp(&b)));
    let limit = if soft { row.len() } else { policy.k as usize };
    order.truncate(limit.min(slots));
    if policy.kind == 2 {
        let mut held = 0.0;
        let reached = order.iter().position(|&e| {
            held += probabilities[e];
            held >= f64::from(policy.value)
        });
        order.truncate(reached.map_or(order.len(), |last| last + 1));
    }
    let total = match (soft, policy.form) {
        (false, 1) => order.iter().map(|&e| probabilities[e]).sum::<f64>().max(f64::from(f32::MIN_POSITIVE)),
        _ => 1.0,
    };
    let unit = !soft && policy.form == 2;
    let weights = order.iter().map(|&e| if unit { 1.0 / order.len() as f32 } else { (probabilities[e] / total) as f32 }).collect();
    (order, weights)
}

fn softmax(row: &[f32], temperature: f32) -> Vec<f64> {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let numerators: Vec<f64> = row.iter().map(|z| ((f64::from(*z) - f64::from(largest)) / f64::from(temperature)).exp()).collect();
    let sum: f64 = numerators.iter().sum();
    numerators.iter().map(|e| e / sum).collect()
}

fn entropy(row: &[f32]) -> f32 {
    softmax(row, 1.0).iter().map(|&p| if p > 0.0 { -p * p.ln() } else { 0.0 }).sum::<f64>() as f32
}

/// What a plan writes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// `[experts + 1]`.
    pub offsets: Vec<u32>,
    /// Slot of each sorted row.
    pub rows: Vec<u32>,
    /// Sorted row of each slot.
    pub positions: Vec<u32>,
    /// `[experts, 4]`.
    pub active: Vec<u32>,
    /// The load.
    pub report: Report,
}

/// Sorts the slots of a routing by expert.
pub fn plan(routing: &Routing, experts: usize) -> Plan {
    let mut plan = Plan { offsets: vec![0], positions: vec![u32::MAX; routing.expert_ids.len()], ..Plan::default() };
    for expert in 0..experts as u32 {
        let first = plan.rows.len() as u32;
        let slots = || routing.expert_ids.iter().enumerate().filter(move |(_, id)| **id == expert).map(|(slot, _)| slot);
        for slot in slots() {
            plan.positions[slot] = plan.rows.len() as u32;
            plan.rows.push(slot as u32);
        }
        let end = plan.rows.len() as u32;
        plan.offsets.push(end);
        if end > first {
            plan.active.extend([expert, first, end, 0]);
        }
        plan.report.expert_tokens.push(end - first);
        plan.report.expert_weights.push(slots().map(|slot| f64::from(routing.weights[slot])).sum::<f64>() as f32);
    }
    while plan.active.len() < 4 * experts {
        plan.active.extend([u32::MAX, 0, 0, 0]);
    }
    plan.report.entropy_sum = routing.entropies.iter().map(|&e| f64::from(e)).sum::<f64>() as f32;
    plan.report.non_finite = routing.flags.iter().filter(|flags| **flags & 1 != 0).count() as u32;
    plan.report.near_ties = routing.flags.iter().filter(|flags| **flags & 2 != 0).count() as u32;
    plan
}

/// `x · weightᵀ` of each row by the weights of its expert, sorted as `offsets` say. `weight [experts, n, k]`.
pub fn grouped_linear(x: &[f32], weight: &[f32], offsets: &[u32], k: usize) -> Vec<f32> {
    let of_expert = weight.len() / (offsets.len() - 1);
    let groups = offsets.windows(2).zip(weight.chunks_exact(of_expert));
    groups.flat_map(|(rows, weight)| super::linear(&x[rows[0] as usize * k..rows[1] as usize * k], weight, k)).collect()
}

/// `silu(gate) · up` of rows that hold the gate and then up.
pub fn silu_mul(rows: &[f32], width: usize) -> Vec<f32> {
    let row = |row: &[f32]| {
        let (gate, up) = row.split_at(width);
        gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect::<Vec<_>>()
    };
    rows.chunks_exact(2 * width).flat_map(row).collect()
}

/// The residual stream `x [tokens, width]` with the weighted rows of each token's slots, and `sigmoid(gate) · shared`.
pub fn combine(x: &[f32], y: &[f32], plan: &Plan, routing: &Routing, shared: Option<(&[f32], &[f32])>, width: usize) -> Vec<f32> {
    let slots = plan.positions.len() / (x.len() / width);
    let value = |(at, x): (usize, &f32)| {
        let (token, column) = (at / width, at % width);
        let term = |slot: usize| match (plan.positions[slot], f64::from(routing.weights[slot])) {
            (u32::MAX, weight) => weight * 0.0,
            (row, weight) => weight * f64::from(y[row as usize * width + column]),
        };
        let routed: f64 = (token * slots..(token + 1) * slots).map(term).sum();
        let shared = shared.map_or(0.0, |(y, gate)| f64::from(y[at]) / (1.0 + (-f64::from(gate[token])).exp()));
        (f64::from(*x) + routed + shared) as f32
    };
    x.iter().enumerate().map(value).collect()
}
