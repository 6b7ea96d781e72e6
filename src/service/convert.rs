//! Between the messages of `hardmax.v1` and the engine's types. Ranges are checked by the engine; here is only what the
//! types cannot hold: unknown enum values, and a oneof without a choice.

use super::{SamplingDefaults, proto};
use crate::{
    engine::{FinishReason, Finished, GenerateParams, Mode, ShadowChoice, Timing, TokenLogprob},
    error::{Error, Result},
    model::{FeedForwardSpec, ModelSpec},
    moe::policy::{LayerChoices, RoutingChoice, RoutingPolicy, RoutingRule, WeightForm},
    telemetry::metrics::LayerLoadSnapshot,
};

/// What a message asks of the model. Errors name `field` and what is below it.
pub(super) fn routing_rule(policy: proto::RoutingPolicy, field: &str) -> Result<RoutingRule> {
    use proto::routing_policy::Policy;
    let form = |name: &str, value: Option<i32>| value.map_or(Ok(None), |value| weight_form(&format!("{field}.{name}.weight_form"), value));
    Ok(match policy.policy {
        None => return Err(Error::invalid(format!("{field}.policy"), "none of top_k, soft, native, layer_top_k, mass is set")),
        Some(Policy::Native(_)) => RoutingChoice::Native.into(),
        Some(Policy::Soft(soft)) => RoutingChoice::Soft { temperature: soft.temperature }.into(),
        Some(Policy::TopK(top_k)) => RoutingChoice::TopK { k: top_k.k as usize, weight_form: form("top_k", top_k.weight_form)? }.into(),
        Some(Policy::Mass(mass)) => RoutingChoice::Mass {
            threshold: mass.threshold,
            max_k: mass.max_k.map(|k| k as usize),
            weight_form: form("mass", mass.weight_form)?,
        }
        .into(),
        Some(Policy::LayerTopK(layers)) => RoutingRule::LayerTopK {
            k: layers.k.iter().map(|&k| k as usize).collect(),
            weight_form: form("layer_top_k", layers.weight_form)?,
        },
    })
}

pub(super) fn weight_form(field: &str, value: i32) -> Result<Option<WeightForm>> {
    match proto::WeightForm::try_from(value) {
        Ok(proto::WeightForm::Unspecified) => Ok(None),
        Ok(proto::WeightForm::Raw) => Ok(Some(WeightForm::Raw)),
        Ok(proto::WeightForm::Renorm) => Ok(Some(WeightForm::Renorm)),
        Ok(proto::WeightForm::Unit) => Ok(Some(WeightForm::Unit)),
        Err(_) => Err(Error::invalid(field, format!("{value} is not a value of hardmax.v1.WeightForm"))),
    }
}

fn weight_form_message(form: WeightForm) -> i32 {
    match form {
        WeightForm::Raw => proto::WeightForm::Raw,
        WeightForm::Renorm => proto::WeightForm::Renorm,
        WeightForm::Unit => proto::WeightForm::Unit,
    }
    .into()
}

/// Whether a request is measured against the reference routing.
pub(super) fn shadow(value: i32) -> Result<ShadowChoice> {
    match proto::Shadow::try_from(value) {
        Ok(proto::Shadow::Sampled) => Ok(ShadowChoice::Sampled),
        Ok(proto::Shadow::Always) => Ok(ShadowChoice::Always),
        Ok(proto::Shadow::Never) => Ok(ShadowChoice::Never),
        Err(_) => Err(Error::invalid("shadow", format!("{value} is not a value of hardmax.v1.Shadow"))),
    }
}

/// What a layer does, as a message.
pub(super) fn policy(policy: RoutingPolicy) -> proto::RoutingPolicy {
    let choice = match policy {
        RoutingPolicy::TopK { k, weight_form } => RoutingChoice::TopK { k, weight_form: Some(weight_form) },
        RoutingPolicy::Mass { threshold, max_k, weight_form } => {
            RoutingChoice::Mass { threshold, max_k: Some(max_k), weight_form: Some(weight_form) }
        }
        RoutingPolicy::Soft { temperature } => RoutingChoice::Soft { temperature: Some(temperature) },
        // No checkpoint or request resolves to one; what a client could ask for instead is its hard form.
        RoutingPolicy::Estimator(estimator) => RoutingChoice::TopK { k: estimator.k(), weight_form: Some(estimator.serve) },
    };
    routing_message(&choice.into())
}

/// A routing as a message: what a client sends.
pub fn routing_message(rule: &RoutingRule) -> proto::RoutingPolicy {
    use proto::routing_policy::{LayerTopK, Mass, Native, Policy, Soft, TopK};
    let form = |form: Option<WeightForm>| form.map(weight_form_message);
    let policy = match rule {
        RoutingRule::Same(RoutingChoice::Native) => Policy::Native(Native {}),
        RoutingRule::Same(RoutingChoice::Soft { temperature }) => Policy::Soft(Soft { temperature: *temperature }),
        RoutingRule::Same(RoutingChoice::TopK { k, weight_form }) => {
            Policy::TopK(TopK { k: saturate(*k), weight_form: form(*weight_form) })
        }
        RoutingRule::Same(RoutingChoice::Mass { threshold, max_k, weight_form }) => {
            Policy::Mass(Mass { threshold: *threshold, max_k: max_k.map(saturate), weight_form: form(*weight_form) })
        }
        RoutingRule::LayerTopK { k, weight_form } => {
            Policy::LayerTopK(LayerTopK { k: k.iter().copied().map(saturate).collect(), weight_form: form(*weight_form) })
        }
    };
    proto::RoutingPolicy { policy: Some(policy) }
}

/// Sampling parameters with the server's defaults filled in. Without a seed one is drawn.
pub(super) fn generate_params(sampling: Option<proto::SamplingParams>, defaults: &SamplingDefaults) -> GenerateParams {
    let sampling = sampling.unwrap_or_default();
    GenerateParams {
        n: sampling.n.map_or(1, |n| n as usize),
        max_new_tokens: sampling.max_new_tokens.map(|n| n as usize),
        min_new_tokens: sampling.min_new_tokens.map_or(0, |n| n as usize),
        temperature: sampling.temperature.unwrap_or(defaults.temperature),
        top_k: sampling.top_k.map_or(defaults.top_k, |k| k as usize),
        top_p: sampling.top_p.unwrap_or(defaults.top_p),
        min_p: sampling.min_p.unwrap_or(0.0),
        seed: sampling.seed.unwrap_or_else(rand::random),
        stop: sampling.stop,
        stop_token_ids: sampling.stop_token_ids,
        repetition_penalty: sampling.repetition_penalty.unwrap_or(defaults.repetition_penalty),
        presence_penalty: sampling.presence_penalty.unwrap_or(0.0),
        frequency_penalty: sampling.frequency_penalty.unwrap_or(0.0),
        logit_bias: sampling.logit_bias.into_iter().map(|entry| (entry.token_id, entry.bias)).collect(),
        allowed_token_ids: sampling.allowed_token_ids,
        logprobs: sampling.logprobs.map(|n| n as usize),
        ignore_eos: sampling.ignore_eos.unwrap_or(false),
    }
}

/// The last word on a choice.
pub(super) fn finish(finished: &Finished) -> proto::Finish {
    use proto::finish::Matched;
    let (reason, matched) = match &finished.reason {
        FinishReason::EndOfSequence(id) | FinishReason::StopToken(id) => (proto::FinishReason::Stop, Some(Matched::StopTokenId(*id))),
        FinishReason::StopString(text) => (proto::FinishReason::Stop, Some(Matched::StopString(text.clone()))),
        FinishReason::Length => (proto::FinishReason::Length, None),
    };
    proto::Finish {
        reason: reason.into(),
        matched,
        usage: Some(proto::Usage {
            prompt_tokens: saturate(finished.prompt_tokens),
            generated_tokens: saturate(finished.generated_tokens),
            cached_prompt_tokens: saturate(finished.cached_prompt_tokens),
        }),
        timing: Some(timing(&finished.timing)),
        generation: finished.generation,
    }
}

pub(super) fn timing(timing: &Timing) -> proto::Timing {
    proto::Timing {
        queue_seconds: timing.queue.as_secs_f64(),
        prefill_seconds: timing.prefill.as_secs_f64(),
        decode_seconds: timing.decode.as_secs_f64(),
    }
}

pub(super) fn logprobs(logprobs: Vec<TokenLogprob>) -> Vec<proto::TokenLogprob> {
    let alternative = |(token_id, logprob)| proto::token_logprob::Alternative { token_id, logprob };
    logprobs
        .into_iter()
        .map(|entry| proto::TokenLogprob {
            token_id: entry.token,
            logprob: entry.logprob,
            alternatives: entry.alternatives.into_iter().map(alternative).collect(),
        })
        .collect()
}

/// Sum of the log-probabilities, and the perplexity. A single token has no log-probability: the empty product has perplexity 1.
pub(super) fn likelihood(tokens: &[TokenLogprob]) -> (f64, f64) {
    let scored = || tokens.iter().filter_map(|token| token.logprob).map(f64::from);
    let sum = scored().sum::<f64>();
    (sum, (-sum / scored().count().max(1) as f64).exp())
}

/// What the experts of a layer were given.
pub(super) fn layer_load(load: &LayerLoadSnapshot) -> proto::get_expert_load_response::LayerLoad {
    let stats = &load.stats;
    proto::get_expert_load_response::LayerLoad {
        layer: saturate(load.layer),
        tokens: stats.tokens,
        expert_tokens: stats.expert_tokens.clone(),
        expert_weights: stats.expert_weights.clone(),
        utilization: stats.utilization(),
        balancedness: stats.balancedness(),
        load_cv: stats.load_cv(),
        dead_experts: if stats.routes == 0 { 0 } else { saturate(stats.dead()) },
        router_entropy: stats.router_entropy(),
        near_ties: stats.near_ties,
    }
}

/// The MoE layers under `serving`, and the parameters: (all, used by one token).
///
/// Fails where a layer cannot follow `serving`.
pub(super) fn moe_layers(spec: &ModelSpec, serving: &LayerChoices) -> Result<(Vec<proto::get_model_info_response::MoeLayer>, (u64, u64))> {
    let mut layers = Vec::new();
    let mut served = spec.clone();
    for (index, layer) in served.layers.iter_mut().enumerate() {
        let FeedForwardSpec::Moe(moe) = &mut layer.feed_forward else { continue };
        let resolved = moe.resolve(serving.at(index), spec.reference)?;
        layers.push(proto::get_model_info_response::MoeLayer {
            layer: saturate(index),
            num_experts: saturate(moe.num_experts),
            serving_routing: Some(policy(resolved)),
        });
        moe.top_k = resolved.experts_per_token(moe.num_experts);
    }
    Ok((layers, served.parameters()))
}

/// What the machine does.
pub(super) fn mode(mode: Mode) -> proto::get_model_info_response::Mode {
    use proto::get_model_info_response::Mode as Told;
    match mode {
        Mode::Serve => Told::Serve,
        Mode::Tune => Told::Tune,
        Mode::TuneExclusive => Told::TuneExclusive,
    }
}

/// Counts on the wire are 32 bits.
pub(super) fn saturate(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::routing_policy::{Policy, TopK};

    fn top_k(k: u32, weight_form: Option<i32>) -> proto::RoutingPolicy {
        proto::RoutingPolicy { policy: Some(Policy::TopK(TopK { k, weight_form })) }
    }

    fn rule(policy: proto::RoutingPolicy) -> Result<RoutingRule> {
        routing_rule(policy, "routing")
    }

    #[test]
    fn an_unspecified_weight_form_is_none() {
        let expected: RoutingRule = RoutingChoice::TopK { k: 2, weight_form: None }.into();
        assert_eq!(rule(top_k(2, None)).unwrap(), expected);
        assert_eq!(rule(top_k(2, Some(0))).unwrap(), expected);
    }

    #[test]
    fn every_rule_survives_the_wire() {
        let rules = ["native", "top-1", "top-2:raw", "top-1:renorm", "top-3:unit", "soft", "soft:0.5", "mass-0.9", "mass-0.5:2:raw"];
        for text in rules.into_iter().chain(["top-1,2,1", "top-2,1:raw"]) {
            let sent: RoutingRule = text.parse().unwrap();
            assert_eq!(sent.to_string(), text);
            assert_eq!(rule(routing_message(&sent)).unwrap(), sent);
        }
    }

    #[test]
    fn what_no_type_can_hold_is_refused() {
        let field = |policy| match rule(policy) {
            Err(Error::InvalidArgument { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(field(proto::RoutingPolicy { policy: None }), "routing.policy");
        assert_eq!(field(top_k(1, Some(99))), "routing.top_k.weight_form");
        assert_eq!(field(top_k(1, Some(-1))), "routing.top_k.weight_form");
    }

    #[test]
    fn sampling_falls_back_to_the_checkpoint() {
        let defaults = SamplingDefaults { temperature: 0.7, top_k: 40, top_p: 0.9, repetition_penalty: 1.1 };
        let params = generate_params(None, &defaults);
        assert_eq!((params.temperature, params.top_k, params.top_p, params.repetition_penalty), (0.7, 40, 0.9, 1.1));
        let greedy = proto::SamplingParams { temperature: Some(0.0), top_k: Some(0), seed: Some(7), ..Default::default() };
        let params = generate_params(Some(greedy), &defaults);
        assert_eq!((params.temperature, params.top_k, params.seed), (0.0, 0, 7));
        let silent = GenerateParams { seed: params.seed, ..GenerateParams::default() };
        assert_eq!(
            generate_params(Some(proto::SamplingParams { seed: Some(7), ..Default::default() }), &SamplingDefaults::default()),
            silent
        );
    }
}
