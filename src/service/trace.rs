//! Routing traces on the wire: packed, in messages of bounded size, and back.

use std::ops::Range;

use super::{convert::saturate, proto};
use crate::{
    error::{Error, Result},
    moe::{route::NEAR_TIE, trace::RoutingTrace},
};

/// Routes in one message: about 600 kB.
const MESSAGE_ROUTES: usize = 1 << 17;

/// The messages of a trace, in order: each has at least one token, and no more routes than fit.
pub(super) fn messages(trace: &RoutingTrace, options: proto::TraceOptions) -> impl Iterator<Item = proto::RoutingTrace> {
    stretches(trace).into_iter().map(move |tokens| message(&trace.part(tokens), options))
}

/// Stretches of tokens that fit into one message each.
fn stretches(trace: &RoutingTrace) -> Vec<Range<usize>> {
    let routes = |token: usize| trace.offsets[token * trace.layers.len()] as usize;
    let (mut stretches, mut start) = (Vec::new(), 0);
    for token in 1..=trace.num_tokens() {
        if token == trace.num_tokens() || routes(token + 1) - routes(start) > MESSAGE_ROUTES {
            stretches.push(start..token);
            start = token;
        }
    }
    stretches
}

fn message(trace: &RoutingTrace, options: proto::TraceOptions) -> proto::RoutingTrace {
    let counts = || trace.offsets.windows(2).map(|pair| (pair[1] - pair[0]) as u16);
    let first = counts().next().unwrap_or(0);
    let uniform = first > 0 && counts().all(|count| count == first);
    let wide = trace.expert_ids.iter().any(|&id| id > u16::from(u8::MAX));
    let experts = trace.expert_ids.iter();
    proto::RoutingTrace {
        first_position: saturate(trace.first_position),
        num_tokens: saturate(trace.num_tokens()),
        layers: trace.layers.iter().copied().map(saturate).collect(),
        experts_per_token: if uniform { first.into() } else { 0 },
        counts: if uniform { Vec::new() } else { counts().flat_map(u16::to_le_bytes).collect() },
        expert_bytes: if wide { 2 } else { 1 },
        experts: if wide { experts.flat_map(|id| id.to_le_bytes()).collect() } else { experts.map(|&id| id as u8).collect() },
        weights: if options.omit_weights { Vec::new() } else { floats(&trace.weights) },
        entropy: if options.omit_entropy { Vec::new() } else { floats(&trace.entropy) },
        near_ties: if options.omit_near_ties { Vec::new() } else { bits(trace.margin.iter().map(|&margin| margin < NEAR_TIE)) },
    }
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// The first is the lowest bit of the first byte.
fn bits(values: impl Iterator<Item = bool>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (place, value) in values.enumerate() {
        if place % 8 == 0 {
            bytes.push(0);
        }
        if let Some(byte) = bytes.last_mut() {
            *byte |= u8::from(value) << (place % 8);
        }
    }
    bytes
}

/// The routes of consecutive messages as one trace, without entropy and margins.
///
/// Fails with `InvalidArgument` on the field of `field` that does not fit. That the experts are those of the model is not checked here.
pub fn joined(field: &str, messages: &[proto::RoutingTrace]) -> Result<RoutingTrace> {
    let Some(first) = messages.first() else {
        return Err(Error::invalid(field, "none is given: send those that TraceRouting or Generate gave"));
    };
    let layers = first.layers.iter().map(|&layer| layer as usize).collect();
    let mut whole = RoutingTrace::new(first.first_position as usize, layers);
    for (index, message) in messages.iter().enumerate() {
        let part = unpacked(&format!("{field}[{index}]"), message)?;
        let (next, at) = (whole.first_position + whole.num_tokens(), part.first_position);
        if at != next {
            return Err(Error::invalid(format!("{field}[{index}].first_position"), format!("{at} does not follow on: {next} is next")));
        }
        if part.layers != whole.layers {
            return Err(Error::invalid(format!("{field}[{index}].layers"), "other layers than in the first trace"));
        }
        if whole.num_tokens() > 0 && part.weights.is_empty() != whole.weights.is_empty() {
            return Err(Error::invalid(format!("{field}[{index}].weights"), "give the weights of all traces or of none"));
        }
        whole.append(&part);
    }
    Ok(whole)
}

fn unpacked(field: &str, message: &proto::RoutingTrace) -> Result<RoutingTrace> {
    let wrong = |name: &str, message: String| Err(Error::invalid(format!("{field}.{name}"), message));
    let layers = message.layers.len();
    if message.num_tokens == 0 || layers == 0 {
        return wrong(if layers == 0 { "layers" } else { "num_tokens" }, "empty".into());
    }
    if !message.layers.is_sorted_by(|a, b| a < b) {
        return wrong("layers", "not ascending".into());
    }
    let Some(rows) = (message.num_tokens as usize).checked_mul(layers).filter(|&rows| rows <= u32::MAX as usize) else {
        return wrong("num_tokens", "too many".into());
    };
    let counts = match message.experts_per_token {
        0 if message.counts.len() != 2 * rows => {
            return wrong("counts", format!("{} bytes for {rows} rows: 2 for each, or experts_per_token", message.counts.len()));
        }
        0 => message.counts.chunks_exact(2).map(|pair| usize::from(u16::from_le_bytes([pair[0], pair[1]]))).collect(),
        // Before anything is allocated: the experts of a message are bytes of it.
        k if (k as usize).saturating_mul(rows) > message.experts.len() => {
            return wrong("experts", format!("{} bytes are fewer than {k} experts for each of {rows} rows", message.experts.len()));
        }
        k => vec![k as usize; rows],
    };
    let mut offsets = vec![0u32];
    let mut routes = 0usize;
    for count in counts {
        routes += count;
        offsets.push(u32::try_from(routes).or_else(|_| wrong("counts", "too many".into()).map(|_: RoutingTrace| 0))?);
    }
    let expert_ids: Vec<u16> = match message.expert_bytes {
        1 => message.experts.iter().copied().map(u16::from).collect(),
        2 if message.experts.len().is_multiple_of(2) => {
            message.experts.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect()
        }
        2 => return wrong("experts", "an odd number of bytes".into()),
        other => return wrong("expert_bytes", format!("{other} is neither 1 nor 2")),
    };
    if expert_ids.len() != routes {
        return wrong("experts", format!("{} experts for {routes} routes", expert_ids.len()));
    }
    if !message.weights.is_empty() && message.weights.len() != 4 * routes {
        return wrong("weights", format!("{} bytes for {routes} routes: 4 for each, or none", message.weights.len()));
    }
    let weights = message.weights.chunks_exact(4).map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).collect();
    let layers = message.layers.iter().map(|&layer| layer as usize).collect();
    let first_position = message.first_position as usize;
    Ok(RoutingTrace { first_position, layers, offsets, expert_ids, weights, ..RoutingTrace::default() })
}

#[cfg(test)]
mod tests {
    use rand::{
        Rng as _, SeedableRng as _,
        rngs::StdRng,
        seq::{IndexedMutRandom as _, IndexedRandom as _},
    };

    use super::*;

    /// Two layers; the rows of `counts` have experts in a pattern that goes up to `most`.
    fn trace(counts: &[u32], most: u16) -> RoutingTrace {
        let mut offsets = vec![0];
        counts.iter().for_each(|count| offsets.push(offsets[offsets.len() - 1] + count));
        let routes = offsets[offsets.len() - 1];
        RoutingTrace {
            first_position: 3,
            layers: [1, 4].into(),
            offsets,
            expert_ids: (0..routes).map(|route| (route * 7) as u16 % (most + 1)).collect(),
            weights: (0..routes).map(|route| route as f32 / 8.0).collect(),
            entropy: vec![0.5; counts.len()],
            margin: (0..counts.len()).map(|row| if row % 3 == 0 { 0.005 } else { 1.0 }).collect(),
        }
    }

    /// What comes back has no entropy and no margins.
    fn plain(trace: RoutingTrace) -> RoutingTrace {
        RoutingTrace { entropy: Vec::new(), margin: Vec::new(), ..trace }
    }

    #[test]
    fn what_is_packed_comes_back() {
        for (counts, most) in [(&[2, 2, 2, 2][..], 7), (&[1, 2, 0, 3], 255), (&[1, 1], 256), (&[0, 0], 3)] {
            let sent = trace(counts, most);
            let packed: Vec<_> = messages(&sent, proto::TraceOptions::default()).collect();
            assert_eq!(packed.len(), 1);
            assert_eq!(packed[0].expert_bytes, if most > 255 && sent.expert_ids.iter().any(|&id| id > 255) { 2 } else { 1 });
            assert_eq!(joined("traces", &packed).unwrap(), plain(sent));
        }
    }

    #[test]
    fn near_ties_are_bits() {
        let packed = message(&trace(&[1; 10], 3), proto::TraceOptions::default());
        assert_eq!(packed.near_ties, [0b0100_1001, 0b10]);
        let bare = message(&trace(&[1; 10], 3), proto::TraceOptions { omit_weights: true, omit_entropy: true, omit_near_ties: true });
        assert!(bare.weights.is_empty() && bare.entropy.is_empty() && bare.near_ties.is_empty());
        assert_eq!((bare.experts_per_token, bare.counts.len(), bare.experts.len()), (1, 0, 10));
    }

    #[test]
    fn long_traces_come_in_parts_that_follow_on() {
        let sent = trace(&[9000; 40], 250);
        let packed: Vec<_> = messages(&sent, proto::TraceOptions::default()).collect();
        assert!(packed.len() > 2 && packed.iter().all(|part| part.experts.len() <= MESSAGE_ROUTES));
        assert_eq!(joined("traces", &packed).unwrap(), plain(sent));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let good = message(&trace(&[2, 2, 2, 2], 7), proto::TraceOptions::default());
        let refused = |change: &dyn Fn(&mut proto::RoutingTrace)| {
            let mut bad = good.clone();
            change(&mut bad);
            match joined("traces", &[bad]) {
                Err(Error::InvalidArgument { field, .. }) => field,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(refused(&|t| t.experts_per_token = 0), "traces[0].counts");
        assert_eq!(refused(&|t| t.experts_per_token = u32::MAX), "traces[0].experts");
        assert_eq!(refused(&|t| t.experts_per_token = 1), "traces[0].experts");
        assert_eq!(refused(&|t| t.num_tokens = 0), "traces[0].num_tokens");
        assert_eq!(refused(&|t| t.num_tokens = u32::MAX), "traces[0].num_tokens");
        assert_eq!(refused(&|t| t.layers.clear()), "traces[0].layers");
        assert_eq!(refused(&|t| t.layers.reverse()), "traces[0].layers");
        assert_eq!(refused(&|t| t.expert_bytes = 3), "traces[0].expert_bytes");
        assert_eq!(refused(&|t| t.weights.truncate(4)), "traces[0].weights");
        let field = |messages: &[proto::RoutingTrace]| match joined("traces", messages) {
            Err(Error::InvalidArgument { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(field(&[]), "traces");
        assert_eq!(field(&[good.clone(), good.clone()]), "traces[1].first_position");
    }

    /// Changes one field.
    fn damage(part: &mut proto::RoutingTrace, random: &mut StdRng) {
        let number = *[0, 1, 2, 3, 4, 8, 255, 1 << 16, u32::MAX].choose(random).unwrap();
        let (length, byte) = (random.random_range(0..40), random.random());
        match random.random_range(0..9) {
            0 => part.first_position = number,
            1 => part.num_tokens = number,
            2 => part.layers.resize(length / 8, number),
            3 => part.experts_per_token = number,
            4 => part.counts.resize(length, byte),
            5 => part.expert_bytes = number,
            6 => part.experts.resize(length, byte),
            7 => part.weights.resize(length, byte),
            _ => part.experts.fill(byte),
        }
    }

    #[test]
    fn whatever_is_sent_is_refused_or_consistent() {
        let mut random = StdRng::seed_from_u64(4);
        let (mut accepted, mut refused) = (0, 0);
        for round in 0..20_000 {
            let counts = if round % 2 == 0 { [2, 2, 2, 2] } else { [1, 2, 0, 3] };
            let mut parts = vec![message(&trace(&counts, 300), proto::TraceOptions::default()); random.random_range(1..3)];
            parts.iter_mut().skip(1).for_each(|part| part.first_position += 2);
            for _ in 0..random.random_range(1..3) {
                damage(parts.choose_mut(&mut random).unwrap(), &mut random);
            }
            match joined("traces", &parts) {
                Ok(whole) => {
                    let (routes, weights) = (whole.expert_ids.len(), whole.weights.len());
                    assert_eq!(whole.num_rows(), whole.num_tokens() * whole.layers.len(), "{parts:?}");
                    assert!(whole.offsets.is_sorted() && whole.offsets.last() == Some(&(routes as u32)), "{parts:?}");
                    assert!(weights == 0 || weights == routes, "{parts:?}");
                    accepted += 1;
                }
                Err(Error::InvalidArgument { field, .. }) => {
                    assert!(field.starts_with("traces["), "{field}");
                    refused += 1;
                }
                Err(other) => panic!("{other}"),
            }
        }
        assert!(accepted > 1000 && refused > 10_000, "{accepted} accepted, {refused} refused");
    }
}
