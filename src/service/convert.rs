//! Between the messages of `hardmax.v1` and the engine's types. Ranges are checked by the engine; here is only what the
//! types cannot hold: unknown enum values, and a oneof without a choice.

use super::{SamplingDefaults, proto};
use crate::{
    engine::{FinishReason, Finished, GenerateParams, Timing, TokenLogprob},
    error::{Error, Result},
    model::{FeedForwardSpec, ModelSpec},
    moe::policy::{RoutingChoice, RoutingPolicy, WeightForm},
};

/// The routing of a request; `default` if it says nothing.
pub(super) fn routing_choice(policy: Option<proto::RoutingPolicy>, default: RoutingChoice) -> Result<RoutingChoice> {
    use proto::routing_policy::Policy;
    let Some(policy) = policy else { return Ok(default) };
    match policy.policy {
        None => Err(Error::invalid("routing.policy", "none of top_k, soft, native is set")),
        Some(Policy::Native(_)) => Ok(RoutingChoice::Native),
        Some(Policy::Soft(soft)) => Ok(RoutingChoice::Soft { temperature: soft.temperature }),
        Some(Policy::TopK(top_k)) => {
            let weight_form = top_k.weight_form.map_or(Ok(None), weight_form)?;
            Ok(RoutingChoice::TopK { k: top_k.k as usize, weight_form })
        }
    }
}

fn weight_form(value: i32) -> Result<Option<WeightForm>> {
    match proto::WeightForm::try_from(value) {
        Ok(proto::WeightForm::Unspecified) => Ok(None),
        Ok(proto::WeightForm::Raw) => Ok(Some(WeightForm::Raw)),
        Ok(proto::WeightForm::Renorm) => Ok(Some(WeightForm::Renorm)),
        Ok(proto::WeightForm::Unit) => Ok(Some(WeightForm::Unit)),
        Err(_) => Err(Error::invalid("routing.top_k.weight_form", format!("{value} is not a value of hardmax.v1.WeightForm"))),
    }
}

/// What a layer does, as a message.
pub(super) fn policy(policy: RoutingPolicy) -> proto::RoutingPolicy {
    match policy {
        RoutingPolicy::TopK { k, weight_form } => choice(RoutingChoice::TopK { k, weight_form: Some(weight_form) }),
        RoutingPolicy::Soft { temperature } => choice(RoutingChoice::Soft { temperature: Some(temperature) }),
        // No checkpoint or request resolves to one; what a client could ask for instead is its hard form.
        RoutingPolicy::Estimator(estimator) => choice(RoutingChoice::TopK { k: estimator.k(), weight_form: Some(estimator.serve) }),
    }
}

/// A routing choice as a message: what a client sends.
pub fn choice(choice: RoutingChoice) -> proto::RoutingPolicy {
    use proto::routing_policy::{Native, Policy, Soft, TopK};
    let policy = match choice {
        RoutingChoice::Native => Policy::Native(Native {}),
        RoutingChoice::Soft { temperature } => Policy::Soft(Soft { temperature }),
        RoutingChoice::TopK { k, weight_form } => {
            let weight_form = weight_form.map(|form| match form {
                WeightForm::Raw => proto::WeightForm::Raw,
                WeightForm::Renorm => proto::WeightForm::Renorm,
                WeightForm::Unit => proto::WeightForm::Unit,
            });
            Policy::TopK(TopK { k: saturate(k), weight_form: weight_form.map(i32::from) })
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

/// The MoE layers under `serving`, and the parameters: (all, used by one token).
///
/// Fails where a layer cannot follow `serving`.
pub(super) fn moe_layers(spec: &ModelSpec, serving: RoutingChoice) -> Result<(Vec<proto::get_model_info_response::MoeLayer>, (u64, u64))> {
    let mut layers = Vec::new();
    let mut served = spec.clone();
    for (index, layer) in served.layers.iter_mut().enumerate() {
        let FeedForwardSpec::Moe(moe) = &mut layer.feed_forward else { continue };
        let resolved = moe.resolve(serving, spec.reference)?;
        layers.push(proto::get_model_info_response::MoeLayer {
            layer: saturate(index),
            num_experts: saturate(moe.num_experts),
            serving_routing: Some(policy(resolved)),
        });
        moe.top_k = resolved.experts_per_token(moe.num_experts);
    }
    Ok((layers, served.parameters()))
}

/// Counts on the wire are 32 bits.
pub(super) fn saturate(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::routing_policy::{Policy, TopK};

    fn top_k(k: u32, weight_form: Option<i32>) -> Option<proto::RoutingPolicy> {
        Some(proto::RoutingPolicy { policy: Some(Policy::TopK(TopK { k, weight_form })) })
    }

    #[test]
    fn routing_defaults_and_overrides() {
        let default = RoutingChoice::TopK { k: 1, weight_form: None };
        assert_eq!(routing_choice(None, default).unwrap(), default);
        assert_eq!(routing_choice(top_k(2, None), default).unwrap(), RoutingChoice::TopK { k: 2, weight_form: None });
        assert_eq!(routing_choice(top_k(2, Some(0)), default).unwrap(), RoutingChoice::TopK { k: 2, weight_form: None });
        let unit = RoutingChoice::TopK { k: 1, weight_form: Some(WeightForm::Unit) };
        assert_eq!(routing_choice(top_k(1, Some(3)), default).unwrap(), unit);
    }

    #[test]
    fn every_choice_survives_the_wire() {
        let choices = ["native", "top-1", "top-2:raw", "top-1:renorm", "top-3:unit", "soft", "soft:0.5"];
        for sent in choices.map(|text| text.parse::<RoutingChoice>().unwrap()) {
            assert_eq!(routing_choice(Some(choice(sent)), RoutingChoice::Native).unwrap(), sent);
        }
    }

    #[test]
    fn what_no_type_can_hold_is_refused() {
        let field = |policy| match routing_choice(policy, RoutingChoice::Native) {
            Err(Error::InvalidArgument { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(field(Some(proto::RoutingPolicy { policy: None })), "routing.policy");
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
