//! Which experts tokens were given, as a record that outlives the forward: to be told, and to be replayed.

use std::{ops::Range, sync::Arc};

use candle_core::{Device, Tensor};

use super::{LayerRouting, Routing, SparseRouting, route};
use crate::{
    error::{Error, Result},
    ops::cpu_slice,
};

/// The routing of consecutive tokens of one sequence. Rows are (token, layer): all MoE layers of the first token, then of the second.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoutingTrace {
    /// Position in the sequence of the first token.
    pub first_position: usize,
    /// The MoE layers, L, as decoder layers from 0, ascending.
    pub layers: Arc<[usize]>,
    /// `[T · L + 1]`, ascending from 0: the routes of row r are `offsets[r] .. offsets[r + 1]`. Empty where nothing was recorded.
    pub offsets: Vec<u32>,
    /// `[R]`, within a row as the routing has them: by descending logit.
    pub expert_ids: Vec<u16>,
    /// `[R]`, or empty where nobody knows them.
    pub weights: Vec<f32>,
    /// `[T · L]`: entropy of the softmax of the router logits, in nats. NaN where they are not finite. Empty in what a client gives.
    pub entropy: Vec<f32>,
    /// `[T · L]`: the least logit of a chosen expert less the largest of the others; infinite where all are chosen, or none. Empty in
    /// what a client gives.
    pub margin: Vec<f32>,
}

/// The routes of one row of a trace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TraceRow<'a> {
    /// By descending logit.
    pub experts: &'a [u16],
    /// As many, or none.
    pub weights: &'a [f32],
}

impl RoutingTrace {
    /// No token yet. `first_position` is where the first will be.
    pub fn new(first_position: usize, layers: Arc<[usize]>) -> Self {
        Self { first_position, layers, offsets: vec![0], ..Self::default() }
    }

    /// Rows, T · L.
    pub fn num_rows(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Tokens, T.
    pub fn num_tokens(&self) -> usize {
        self.num_rows() / self.layers.len().max(1)
    }

    /// The routes of the token at `position` in decoder layer `layer`; `None` where nothing was recorded of them.
    pub fn row(&self, position: usize, layer: usize) -> Option<TraceRow<'_>> {
        let token = position.checked_sub(self.first_position)?;
        let place = self.layers.binary_search(&layer).ok()?;
        let row = token.checked_mul(self.layers.len())? + place;
        let routes = *self.offsets.get(row)? as usize..*self.offsets.get(row + 1)? as usize;
        Some(TraceRow { experts: self.expert_ids.get(routes.clone())?, weights: self.weights.get(routes).unwrap_or_default() })
    }

    /// Bytes of its rows and routes.
    pub fn bytes(&self) -> usize {
        let rows = size_of_val(&self.offsets[..]) + size_of_val(&self.entropy[..]) + size_of_val(&self.margin[..]);
        rows + size_of_val(&self.expert_ids[..]) + size_of_val(&self.weights[..])
    }

    /// Adds the next tokens: rows `tokens` of a forward, whose layers are those of this trace.
    pub fn record(&mut self, layers: &[TracedLayer<'_>], tokens: Range<usize>) -> Result<()> {
        let mut scratch = Scratch::default();
        for token in tokens {
            for TracedLayer { routing, router_logits, experts } in layers {
                let row = token * experts..(token + 1) * experts;
                cpu_slice::<f32, _>(router_logits, |logits| self.record_row(routing, token, &logits[row], &mut scratch))?;
            }
        }
        Ok(())
    }

    fn record_row(&mut self, routing: &SparseRouting, token: usize, logits: &[f32], scratch: &mut Scratch) -> Result<()> {
        let first = self.expert_ids.len();
        for route in routing.routes(token) {
            let expert = routing.expert_ids[route];
            self.expert_ids.push(u16::try_from(expert).map_err(|_| Error::Internal(format!("expert {expert} has no place in a trace")))?);
            self.weights.push(routing.weights[route]);
        }
        self.offsets.push(self.expert_ids.len() as u32);
        let finite = logits.iter().all(|z| z.is_finite());
        self.entropy.push(if finite { route::entropy(logits, &mut scratch.probabilities) as f32 } else { f32::NAN });
        self.margin.push(margin(logits, &self.expert_ids[first..], &mut scratch.chosen));
        Ok(())
    }

    /// Adds the tokens of `next`, which follow on those of this trace.
    pub fn append(&mut self, next: &Self) {
        let base = self.offsets.last().copied().unwrap_or(0);
        self.offsets.extend(next.offsets.iter().skip(1).map(|offset| base + offset));
        self.expert_ids.extend_from_slice(&next.expert_ids);
        self.weights.extend_from_slice(&next.weights);
        self.entropy.extend_from_slice(&next.entropy);
        self.margin.extend_from_slice(&next.margin);
    }

    /// What it has of its tokens `tokens`, counted from its first.
    pub fn part(&self, tokens: Range<usize>) -> Self {
        let rows = tokens.start * self.layers.len()..tokens.end * self.layers.len();
        let offsets = &self.offsets[rows.start..=rows.end];
        let base = offsets[0];
        let routes = base as usize..offsets[offsets.len() - 1] as usize;
        let of_rows = |values: &Vec<f32>| values.get(rows.clone()).unwrap_or_default().to_vec();
        Self {
            first_position: self.first_position + tokens.start,
            layers: Arc::clone(&self.layers),
            offsets: offsets.iter().map(|offset| offset - base).collect(),
            expert_ids: self.expert_ids[routes.clone()].to_vec(),
            weights: self.weights.get(routes).unwrap_or_default().to_vec(),
            entropy: of_rows(&self.entropy),
            margin: of_rows(&self.margin),
        }
    }
}

/// What traces read of one MoE layer of a forward.
#[derive(Debug)]
pub struct TracedLayer<'a> {
    routing: &'a SparseRouting,
    /// `[T, E]` f32, contiguous, on the CPU.
    router_logits: Tensor,
    /// E.
    experts: usize,
}

/// Memory for what is computed of one row after the other.
#[derive(Default)]
struct Scratch {
    /// `[E]`.
    probabilities: Vec<f32>,
    /// `[E]`.
    chosen: Vec<bool>,
}

/// The MoE layers of a forward as traces read them: copied only from a device other than the CPU, once for all sequences.
///
/// Fails where the forward was one of training, or does not have the routes of all its `tokens`.
pub fn traced_layers(forward: &[LayerRouting], tokens: usize) -> Result<Vec<TracedLayer<'_>>> {
    forward.iter().map(|layer| TracedLayer::new(layer, tokens)).collect()
}

impl<'a> TracedLayer<'a> {
    fn new(layer: &'a LayerRouting, tokens: usize) -> Result<Self> {
        let Routing::Sparse(routing) = &layer.routing else {
            return Err(Error::Internal("a forward of training cannot be traced".into()));
        };
        let router_logits = layer.router_logits.to_device(&Device::Cpu)?.contiguous()?;
        let ((rows, experts), routed) = (router_logits.dims2()?, routing.offsets.len().saturating_sub(1));
        if (rows, routed) != (tokens, tokens) {
            let found = format!("{rows} rows of router logits and the routes of {routed}");
            return Err(Error::Internal(format!("layer {} has {found} for {tokens} tokens", layer.layer)));
        }
        Ok(Self { routing, experts, router_logits })
    }
}

/// As [`RoutingTrace::margin`] says; NaN logits make it infinite, as they have no route.
fn margin(logits: &[f32], experts: &[u16], chosen: &mut Vec<bool>) -> f32 {
    if experts.is_empty() {
        return f32::INFINITY;
    }
    chosen.clear();
    chosen.resize(logits.len(), false);
    experts.iter().for_each(|&expert| chosen[usize::from(expert)] = true);
    let (mut least, mut largest) = (f32::INFINITY, f32::NEG_INFINITY);
    for (&logit, &chosen) in logits.iter().zip(&*chosen) {
        if chosen {
            least = least.min(logit);
        } else {
            largest = largest.max(logit);
        }
    }
    least - largest
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::moe::{
        RoutingStats,
        policy::{RoutingPolicy, WeightForm},
        route::route_rows,
    };

    const LOGITS: [[f32; 4]; 3] = [[0.0, 2.0, 1.0, 1.995], [5.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]];

    /// Layer 1 under top-1 and layer 3 under soft routing, three tokens.
    fn forward() -> Vec<LayerRouting> {
        let layer = |layer, policy| LayerRouting {
            layer,
            router_logits: Tensor::new(&LOGITS, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap(),
            routing: Routing::Sparse(route_rows(LOGITS.as_flattened(), 4, std::iter::repeat_n(policy, 3)).0),
            stats: RoutingStats::new(4),
        };
        vec![layer(1, RoutingPolicy::TopK { k: 1, weight_form: WeightForm::Raw }), layer(3, RoutingPolicy::Soft { temperature: 1.0 })]
    }

    fn record(trace: &mut RoutingTrace, tokens: Range<usize>) {
        trace.record(&traced_layers(&forward(), 3).unwrap(), tokens).unwrap();
    }

    #[test]
    fn records_what_the_routers_did() {
        let mut trace = RoutingTrace::new(7, [1, 3].into());
        record(&mut trace, 0..2);
        record(&mut trace, 2..3);
        assert_eq!((trace.num_tokens(), trace.num_rows()), (3, 6));
        assert_eq!(trace.row(7, 1).unwrap().experts, [1]);
        assert_eq!(trace.row(8, 3).unwrap().experts, [0, 3, 2, 1]);
        assert_eq!(trace.row(9, 1).unwrap().experts, [0]);
        assert!((trace.row(9, 3).unwrap().weights[3] - 0.25).abs() < 1e-7);
        assert!(trace.row(6, 1).is_none() && trace.row(10, 1).is_none() && trace.row(7, 2).is_none());
        assert!((trace.margin[0] - 0.005).abs() < 1e-6 && trace.margin[0] < route::NEAR_TIE, "1.995 was nearly chosen");
        assert_eq!((trace.margin[1], trace.margin[2], trace.margin[4]), (f32::INFINITY, 2.0, 0.0));
        assert!((trace.entropy[4] - 4f32.ln()).abs() < 1e-6);
        assert_eq!(trace.bytes(), 4 * 7 + 6 * (3 + 12) + 8 * 6, "offsets, routes, and what is told of rows");
    }

    #[test]
    fn the_margin_is_between_the_chosen_and_the_others() {
        let mut chosen = vec![true; 9];
        for (experts, expected) in [
            (&[1][..], 0.005),
            (&[1, 3], 0.995),
            // Given by a replay, whatever the router prefers.
            (&[2, 0], -2.0),
            (&[3, 0, 1, 2], f32::INFINITY),
            (&[], f32::INFINITY),
        ] {
            let found = margin(&LOGITS[0], experts, &mut chosen);
            assert!(found == expected || (found - expected).abs() < 1e-6, "{experts:?}: {found}");
        }
    }

    #[test]
    fn a_forward_without_all_routes_cannot_be_traced() {
        let mut layers = forward();
        assert!(matches!(traced_layers(&layers, 4), Err(Error::Internal(_))));
        layers[1].routing = Routing::Sparse(SparseRouting::default());
        let refused = traced_layers(&layers, 3).unwrap_err().to_string();
        assert!(refused.contains("layer 3 has 3 rows of router logits and the routes of 0 for 3 tokens"), "{refused}");
    }

    #[test]
    fn parts_and_wholes_are_the_same() {
        let mut whole = RoutingTrace::new(0, [1, 3].into());
        record(&mut whole, 0..3);
        let mut joined = whole.part(0..1);
        joined.append(&whole.part(1..3));
        assert_eq!(joined, whole);
        assert_eq!(whole.part(2..3).first_position, 2);
        assert_eq!(whole.part(2..3).row(2, 3), whole.row(2, 3));
    }
}
