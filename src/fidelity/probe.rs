//! Looks into the MoE layers while several routings run side by side: the gap of each layer for equal input (local), where the
//! routings part when each keeps its own hidden state (free-running), and what every expert gets.
//!
//! A forward that is probed has one span for each case, all with the same new tokens; the first case is the reference.

use super::{
    case::Case,
    experts::ExpertUse,
    measure::{OutputGap, RouteAgreement, disagreement, margin, missed_mass, mix},
    summary::Values,
};
use crate::{
    error::{Error, Result},
    model::ModelSpec,
    moe::{
        SparseRouting,
        observe::{MoeObserver, ObservedLayer},
        policy::{RoutingPolicy, WeightForm},
        route::route_rows,
    },
};

/// A margin below this, in units of the temperature, is a boundary.
const BOUNDARY: f64 = 1.0;

/// What the layers showed, over all probed forwards.
#[derive(Debug)]
pub struct Probe {
    /// In order of depth.
    pub layers: Vec<LayerProbe>,
    /// Of each served case: tokens whose experts are not those of the reference run, in any layer.
    pub flipped: Vec<u64>,
    /// Tokens seen.
    pub tokens: u64,
    cases: usize,
    /// New tokens of the forward that runs.
    current: Vec<u32>,
    /// Of the forward that runs, `[served cases, new tokens]`.
    parted: Vec<bool>,
    /// MoE layers of the forward that runs that were seen.
    seen: usize,
}

/// One MoE layer.
#[derive(Debug)]
pub struct LayerProbe {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// Experts, E.
    pub experts: usize,
    /// Of each served case.
    pub gaps: Vec<LayerGap>,
    /// Local gap of hard top-k with the layer's own weights, at k = 1, 2, ...; pooled.
    pub ladder: Vec<OutputGap>,
    /// Sums over tokens of `‖Y_i - Y_j‖` and `‖Y_i‖` of the two experts that the router puts first.
    pub pair: (f64, f64),
    /// Of each case, the reference first.
    pub loads: Vec<Load>,
    /// Which experts go together, and which tokens each takes, under the case that was asked for; of none in [`Probe::of_gaps`].
    pub usage: ExpertUse,
    policies: Vec<RoutingPolicy>,
    weight_form: WeightForm,
    watched: Option<usize>,
}

/// The gap of one served case in one layer.
#[derive(Clone, Debug, Default)]
pub struct LayerGap {
    /// Local: sums over all tokens.
    pub pooled: OutputGap,
    /// Local, per token: [`OutputGap::l2_rel`].
    pub l2_rel: Values,
    /// Local, per token: [`OutputGap::cosine_distance`].
    pub cosine: Values,
    /// Local, per token: [`OutputGap::norm_ratio`].
    pub norm_ratio: Values,
    /// Per token: reference weight outside the served experts.
    pub missed_mass: Values,
    /// Per token, in units of the temperature; none where all experts are served.
    pub margin: Values,
    /// Tokens with a margin below 1.
    pub boundary: u64,
    /// Free-running, per token: experts in both runs over experts served.
    pub overlap: Values,
    /// Free-running: tokens with the same experts.
    pub exact: u64,
    /// Free-running: tokens whose first expert is another.
    pub argmax_disagree: u64,
    /// Free-running: sums over what the layer was given.
    pub drift: OutputGap,
}

/// What the experts of a layer were given.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Load {
    /// Tokens of each expert, `[E]`.
    pub tokens: Vec<u64>,
    /// Sum of their weights, `[E]`.
    pub weights: Vec<f64>,
}

impl Probe {
    /// For forwards whose spans are `cases`, the reference first. `ladder`: the largest k of [`LayerProbe::ladder`]. `watched`: the
    /// case whose use of experts is told, with the tokens that are followed one by one.
    pub fn new(spec: &ModelSpec, cases: &[Case], ladder: usize, watched: usize, followed: &[u32]) -> Result<Self> {
        Self::build(spec, cases, ladder, Some((watched, followed)))
    }

    /// Of gaps and loads only: as little as can be while requests are served.
    pub fn of_gaps(spec: &ModelSpec, cases: &[Case]) -> Result<Self> {
        Self::build(spec, cases, 0, None)
    }

    fn build(spec: &ModelSpec, cases: &[Case], ladder: usize, watched: Option<(usize, &[u32])>) -> Result<Self> {
        let policies: Vec<Vec<RoutingPolicy>> = cases.iter().map(|case| case.policies(spec)).collect::<Result<_>>()?;
        let served = cases.len().saturating_sub(1);
        let layers = spec.moe_layers().enumerate().map(|(index, (layer, moe))| LayerProbe {
            layer,
            experts: moe.num_experts,
            gaps: vec![LayerGap::default(); served],
            ladder: vec![OutputGap::default(); ladder.min(moe.num_experts)],
            pair: (0.0, 0.0),
            loads: vec![Load { tokens: vec![0; moe.num_experts], weights: vec![0.0; moe.num_experts] }; cases.len()],
            usage: watched.map_or_else(|| ExpertUse::new(0, &[]), |(_, followed)| ExpertUse::new(moe.num_experts, followed)),
            policies: policies.iter().map(|policies| policies[index]).collect(),
            weight_form: moe.weight_form,
            watched: watched.map(|(case, _)| case),
        });
        let layers = layers.collect();
        Ok(Self { layers, flipped: vec![0; served], tokens: 0, cases: cases.len(), current: Vec::new(), parted: Vec::new(), seen: 0 })
    }

    /// The next forward has these new tokens in every span.
    pub fn begin(&mut self, tokens: &[u32]) {
        self.current.clear();
        self.current.extend_from_slice(tokens);
        self.parted.clear();
        self.parted.resize(self.flipped.len() * tokens.len(), false);
        self.seen = 0;
    }

    /// The forward has ended.
    pub fn end(&mut self) {
        let n = self.current.len();
        self.tokens += n as u64;
        for (flipped, parted) in self.flipped.iter_mut().zip(self.parted.chunks(n.max(1))) {
            *flipped += parted.iter().filter(|&&parted| parted).count() as u64;
        }
    }
}

impl MoeObserver for Probe {
    fn layer(&mut self, seen: &ObservedLayer<'_>) -> Result<()> {
        let tokens = &self.current;
        let Some(layer) = self.layers.get_mut(self.seen).filter(|layer| layer.layer == seen.layer) else {
            return Err(Error::Internal(format!("a probe did not expect layer {}", seen.layer)));
        };
        if seen.routing.num_tokens() != self.cases * tokens.len() {
            return Err(Error::Internal("a probed forward has other rows than one span for each case".into()));
        }
        self.seen += 1;
        let order = layer.order(seen, tokens.len());
        layer.local(seen, tokens.len(), &order)?;
        layer.free(seen, tokens.len(), &order, &mut self.parted);
        layer.count(seen, tokens);
        Ok(())
    }
}

impl LayerProbe {
    /// The experts of the reference rows by descending logit, as many as any case or measure looks at; the other rows have none.
    fn order(&self, seen: &ObservedLayer<'_>, n: usize) -> SparseRouting {
        let most = self.policies.iter().map(|policy| policy.experts_per_token(self.experts)).max().unwrap_or(0);
        let k = most.max(self.ladder.len()).max(2).min(self.experts);
        let policy = RoutingPolicy::TopK { k, weight_form: WeightForm::Raw };
        let mut order = self.route(seen, n, policy);
        let routes = order.expert_ids.len() as u32;
        order.offsets.resize(seen.routing.num_tokens() + 1, routes);
        order
    }

    /// The reference rows under a policy.
    fn route(&self, seen: &ObservedLayer<'_>, n: usize, policy: RoutingPolicy) -> SparseRouting {
        route_rows(&seen.router_logits[..n * self.experts], self.experts, std::iter::repeat_n(policy, n)).0
    }

    /// Every case on the rows of the reference run, with this layer's own router and experts.
    fn local(&mut self, seen: &ObservedLayer<'_>, n: usize, order: &SparseRouting) -> Result<()> {
        let d = seen.width();
        let outputs = seen.expert_outputs(order)?;
        let routings: Vec<SparseRouting> = self.policies.iter().map(|&policy| self.route(seen, n, policy)).collect();
        let steps = (1..=self.ladder.len()).map(|k| RoutingPolicy::TopK { k, weight_form: self.weight_form });
        let ladder: Vec<SparseRouting> = steps.map(|policy| self.route(seen, n, policy)).collect();
        let temperature = match self.policies[0] {
            RoutingPolicy::Soft { temperature } => f64::from(temperature),
            _ => 1.0,
        };
        let (mut reference, mut served) = (vec![0f64; d], vec![0f64; d]);
        for token in 0..n {
            let places = order.routes(token);
            if places.is_empty() {
                continue;
            }
            let ids = &order.expert_ids[places.clone()];
            let rows = || outputs[places.start * d..places.end * d].chunks_exact(d);
            // Every policy takes experts by descending logit: its own are the first of `ids`.
            let mixed = |routing: &SparseRouting, out: &mut [f64]| {
                let weights = &routing.weights[routing.routes(token)];
                mix(weights.iter().map(|&weight| f64::from(weight)), rows(), out);
            };
            mixed(&routings[0], &mut reference);
            if let (Some(first), Some(second)) = (rows().next(), rows().nth(1)) {
                let (distance, norm) = disagreement(first, second);
                self.pair = (self.pair.0 + distance, self.pair.1 + norm);
            }
            for (sum, routing) in self.ladder.iter_mut().zip(&ladder) {
                mixed(routing, &mut served);
                sum.add(&OutputGap::new(&reference, &served));
            }
            let reference_weights = &routings[0].weights[routings[0].routes(token)];
            let logits = &seen.router_logits[token * self.experts..(token + 1) * self.experts];
            for (gap, routing) in self.gaps.iter_mut().zip(&routings[1..]) {
                mixed(routing, &mut served);
                let chosen = &routing.expert_ids[routing.routes(token)];
                let missed = missed_mass(ids.iter().zip(reference_weights), chosen);
                gap.add_local(OutputGap::new(&reference, &served), missed, margin(logits, ids, chosen.len(), temperature));
            }
        }
        Ok(())
    }

    /// The routings as they ran, each on its own hidden state.
    fn free(&mut self, seen: &ObservedLayer<'_>, n: usize, order: &SparseRouting, parted: &mut [bool]) {
        let d = seen.width();
        let x = |row: usize| &seen.x[row * d..(row + 1) * d];
        for (case, gap) in self.gaps.iter_mut().enumerate() {
            for token in 0..n {
                let row = (case + 1) * n + token;
                let served = &seen.routing.expert_ids[seen.routing.routes(row)];
                let reference = &order.expert_ids[order.routes(token)];
                let agreement = RouteAgreement::new(&reference[..served.len().min(reference.len())], served);
                gap.overlap.push(agreement.overlap);
                gap.exact += u64::from(agreement.exact);
                gap.argmax_disagree += u64::from(!agreement.first);
                gap.drift.add(&OutputGap::new(x(token), x(row)));
                parted[case * n + token] |= !agreement.exact;
            }
        }
    }

    fn count(&mut self, seen: &ObservedLayer<'_>, tokens: &[u32]) {
        let n = tokens.len();
        for (case, load) in self.loads.iter_mut().enumerate() {
            for route in (case * n..(case + 1) * n).flat_map(|row| seen.routing.routes(row)) {
                let expert = seen.routing.expert_ids[route] as usize;
                load.tokens[expert] += 1;
                load.weights[expert] += f64::from(seen.routing.weights[route]);
            }
        }
        let Some(watched) = self.watched else { return };
        for (place, &token) in tokens.iter().enumerate() {
            let row = watched * n + place;
            let logits = &seen.router_logits[row * self.experts..(row + 1) * self.experts];
            self.usage.add(token, &seen.routing.expert_ids[seen.routing.routes(row)], logits);
        }
    }
}

impl LayerGap {
    fn add_local(&mut self, gap: OutputGap, missed: f64, margin: Option<f64>) {
        self.pooled.add(&gap);
        self.l2_rel.push(gap.l2_rel());
        self.cosine.push(gap.cosine_distance());
        self.norm_ratio.push(gap.norm_ratio());
        self.missed_mass.push(missed);
        if let Some(margin) = margin {
            self.margin.push(margin);
            self.boundary += u64::from(margin < BOUNDARY);
        }
    }
}

impl Load {
    /// Load over fair share, `[E]`: 1 is fair, 0 is dead.
    pub fn utilization(&self) -> Vec<f64> {
        let fair = self.tokens.iter().sum::<u64>() as f64 / self.tokens.len() as f64;
        self.tokens.iter().map(|&tokens| if fair > 0.0 { tokens as f64 / fair } else { 0.0 }).collect()
    }
}
