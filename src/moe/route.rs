//! From router logits to a [`SparseRouting`], as serving does it: on host slices, in f32, each token with its own
//! policy, soft being E routes. Training routes in [`super::estimator`].

use super::{
    SparseRouting,
    draw::Draw,
    estimator::{Estimator, StepContext},
    policy::{Replayed, RoutingPolicy, WeightForm},
};

/// Router logits closer than this are near a tie: sums in another order, or in bf16, may choose the other expert.
pub const NEAR_TIE: f32 = 0.01;

impl SparseRouting {
    /// Tokens, T.
    pub fn num_tokens(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Routes of a token: a range into `expert_ids` and `weights`.
    pub fn routes(&self, token: usize) -> std::ops::Range<usize> {
        self.offsets[token] as usize..self.offsets[token + 1] as usize
    }
}

/// Routes each row of `logits [T, E]` by its own policy. `policies` gives one for each token.
///
/// A row with a non-finite logit gets no route and is listed in the second result.
pub fn route_rows(logits: &[f32], num_experts: usize, policies: impl Iterator<Item = RoutingPolicy>) -> (SparseRouting, RowReport) {
    let (mut routing, mut report) = (SparseRouting::default(), RowReport::default());
    let mut router = RowRouter::new(&mut routing, &mut report);
    logits.chunks_exact(num_experts).zip(policies).for_each(|(row, policy)| router.route(row, policy));
    (routing, report)
}

/// Routes row after row into results of an earlier use, for their memory.
pub(super) struct RowRouter<'a> {
    routing: &'a mut SparseRouting,
    report: &'a mut RowReport,
}

impl<'a> RowRouter<'a> {
    pub(super) fn new(routing: &'a mut SparseRouting, report: &'a mut RowReport) -> Self {
        routing.offsets.clear();
        routing.offsets.push(0);
        routing.expert_ids.clear();
        routing.weights.clear();
        report.non_finite.clear();
        (report.entropy_sum, report.near_ties) = (0.0, 0);
        Self { routing, report }
    }

    /// The next token, `[E]`, by a policy.
    pub(super) fn route(&mut self, row: &[f32], policy: RoutingPolicy) {
        let first = self.routing.expert_ids.len();
        self.row(row, |routing, scratch| route_row(row, policy, scratch, routing));
        self.report.near_ties += u64::from(near_tie(row, &self.routing.expert_ids[first..]));
    }

    /// The next token, `[E]`, to given experts. Without weights of their own these are the experts' probabilities in `weight_form`.
    pub(super) fn replay(&mut self, row: &[f32], replayed: Replayed<'_>, weight_form: WeightForm) {
        self.row(row, |routing, scratch| {
            let first = routing.expert_ids.len();
            routing.expert_ids.extend(replayed.experts.iter().map(|&expert| u32::from(expert)));
            if replayed.weights.is_empty() {
                softmax(row, 1.0, scratch);
                weigh(first, weight_form, scratch, routing);
            } else {
                routing.weights.extend_from_slice(replayed.weights);
            }
        });
    }

    fn row(&mut self, row: &[f32], route: impl FnOnce(&mut SparseRouting, &mut Vec<f32>)) {
        let Self { routing, report } = self;
        if row.iter().all(|z| z.is_finite()) {
            report.entropy_sum += entropy(row, &mut report.scratch);
            route(routing, &mut report.scratch);
        } else {
            report.non_finite.push(routing.num_tokens() as u32);
        }
        routing.offsets.push(routing.expert_ids.len() as u32);
    }
}

/// What [`route_rows`] saw besides the routes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowReport {
    /// Tokens with a non-finite router logit, ascending.
    pub non_finite: Vec<u32>,
    /// Sum over finite tokens of the entropy of `softmax(z)`, in nats.
    pub entropy_sum: f64,
    /// Finite tokens, replayed ones apart, whose last chosen and first refused logit are less than [`NEAR_TIE`] apart.
    pub near_ties: u64,
    /// Probabilities of a row, for their memory.
    scratch: Vec<f32>,
}

fn route_row(row: &[f32], policy: RoutingPolicy, scratch: &mut Vec<f32>, routing: &mut SparseRouting) {
    match policy {
        RoutingPolicy::TopK { k, weight_form } => {
            softmax(row, 1.0, scratch);
            let first = routing.expert_ids.len();
            top_k(row, k, &mut routing.expert_ids);
            weigh(first, weight_form, scratch, routing);
        }
        RoutingPolicy::Mass { threshold, max_k, weight_form } => {
            softmax(row, 1.0, scratch);
            let first = routing.expert_ids.len();
            top_k(row, max_k, &mut routing.expert_ids);
            routing.expert_ids.truncate(first + enough(&routing.expert_ids[first..], scratch, threshold));
            weigh(first, weight_form, scratch, routing);
        }
        RoutingPolicy::Soft { temperature } => {
            softmax(row, temperature, scratch);
            top_k(row, row.len(), &mut routing.expert_ids);
            let first = routing.weights.len();
            routing.weights.extend(routing.expert_ids[first..].iter().map(|&e| scratch[e as usize]));
        }
        RoutingPolicy::Estimator(estimator) => route_as_in_evaluation(row, &estimator, routing),
    }
}

/// Weights of the experts from `first` on, of their probabilities.
fn weigh(first: usize, weight_form: WeightForm, probabilities: &[f32], routing: &mut SparseRouting) {
    let chosen = &routing.expert_ids[first..];
    let total: f32 = match weight_form {
        // The experts of a replay may all be too unlikely to have a probability in f32.
        WeightForm::Renorm => chosen.iter().map(|&e| probabilities[e as usize]).sum::<f32>().max(f32::MIN_POSITIVE),
        WeightForm::Raw | WeightForm::Unit => 1.0,
    };
    let weight = |&e: &u32| match weight_form {
        WeightForm::Unit => 1.0 / chosen.len() as f32,
        WeightForm::Raw | WeightForm::Renorm => probabilities[e as usize] / total,
    };
    routing.weights.extend(chosen.iter().map(weight));
}

/// How many of `experts`, taken in order, hold `threshold` of the probability; at least one, all where they hold less.
fn enough(experts: &[u32], probabilities: &[f32], threshold: f32) -> usize {
    let mut held = 0.0;
    let reached = experts.iter().position(|&expert| {
        held += probabilities[expert as usize];
        held >= threshold
    });
    reached.map_or(experts.len(), |last| last + 1)
}

/// Appends what `estimator` makes of one row without noise, exploration and capacity.
fn route_as_in_evaluation(row: &[f32], estimator: &Estimator, routing: &mut SparseRouting) {
    let z: Vec<f64> = row.iter().map(|&z| f64::from(z)).collect();
    let routed = estimator.route(&z, row.len(), &StepContext::evaluate(Draw::new(0, 0, 0)));
    routing.expert_ids.extend_from_slice(&routed.chosen);
    routing.weights.extend(routed.chosen.iter().map(|&e| routed.weights[e as usize] as f32));
}

/// Indices of the k largest, descending, ties by lowest index. Finite input; k up to `row.len()`.
fn top_k(row: &[f32], k: usize, out: &mut Vec<u32>) {
    let first = out.len();
    if k <= 4 {
        for _ in 0..k {
            let taken = &out[first..];
            let best = (0..row.len()).filter(|&e| !taken.contains(&(e as u32))).reduce(|best, e| if row[e] > row[best] { e } else { best });
            out.extend(best.map(|e| e as u32));
        }
        return;
    }
    out.extend(0..row.len() as u32);
    // Adding 0 makes -0 and 0 one value, as they are for `>` above.
    let key = |e: u32| row[e as usize] + 0.0;
    out[first..].sort_by(|&a, &b| key(b).total_cmp(&key(a)).then(a.cmp(&b)));
    out.truncate(first + k);
}

/// Whether another expert than the chosen, which have the largest logits, is less than [`NEAR_TIE`] below the last of them.
fn near_tie(row: &[f32], chosen: &[u32]) -> bool {
    let last = chosen.iter().map(|&e| row[e as usize]).fold(f32::INFINITY, f32::min);
    row.iter().filter(|&&z| last - z < NEAR_TIE).count() > chosen.len()
}

/// `softmax(row / temperature)` into `out`.
fn softmax(row: &[f32], temperature: f32, out: &mut Vec<f32>) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    out.clear();
    out.extend(row.iter().map(|z| ((z - max) / temperature).exp()));
    let sum: f32 = out.iter().sum();
    out.iter_mut().for_each(|p| *p /= sum);
}

/// Of `softmax(row)`, in nats.
pub(super) fn entropy(row: &[f32], scratch: &mut Vec<f32>) -> f64 {
    softmax(row, 1.0, scratch);
    scratch.iter().map(|&p| if p > 0.0 { -f64::from(p) * f64::from(p).ln() } else { 0.0 }).sum()
}
