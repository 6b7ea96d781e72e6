//! The fidelity gap of a text, as messages.

use std::{
    pin::Pin,
    task::{self, Poll},
};

use tokio_stream::Stream;
use tonic::Status;

use super::{
    call::Call,
    context::{Context, Input},
    convert::{routing_message, routing_rule, saturate},
    proto,
};
use crate::{
    engine::{LayerFidelity, MAX_MEASURE_POLICIES, MeasureProgress, MeasureRequest, MeasureStream, PolicyFidelity},
    error::{Error, Result},
    fidelity::{case::Case, run::OutputGaps, summary::Summary},
    moe::policy::RoutingRule,
};

/// The progress of a measurement as messages. Dropping it cancels the measurement.
#[derive(Debug)]
pub struct FidelityStream {
    progress: MeasureStream,
    call: Call,
    reference: RoutingRule,
    /// What is measured, in the order of the request.
    policies: Vec<RoutingRule>,
}

impl FidelityStream {
    pub(super) async fn start(context: &Context, call: &Call, request: proto::MeasureFidelityRequest) -> Result<Self> {
        context.check_model(&request.model)?;
        let asked = request.policies.len();
        if asked > MAX_MEASURE_POLICIES {
            return Err(Error::out_of_range("policies", format!("{asked} are above {MAX_MEASURE_POLICIES}, the limit")));
        }
        let spec = context.engine.spec();
        let reference = match request.reference {
            None => spec.reference.choice().into(),
            Some(policy) => routing_rule(policy, "reference")?,
        };
        let mut policies = Vec::new();
        for (index, policy) in request.policies.into_iter().enumerate() {
            policies.push(routing_rule(policy, &format!("policies[{index}]"))?);
        }
        if policies.is_empty() {
            policies.push(context.serving().rule);
        }
        let case =
            |rule: &RoutingRule, field: &str| Ok::<_, Error>(Case { name: rule.to_string(), choices: context.layer_choices(rule, field)? });
        let cases = policies.iter().enumerate().map(|(index, rule)| case(rule, &format!("policies[{index}]"))).collect::<Result<_>>()?;
        let input = request.input.map(Input::from);
        let deadline = call.due(request.timeout_seconds)?;
        let reference_case = Some(case(&reference, "reference")?);
        // Before the text is tokenised: that takes seconds of a core where it is long.
        let slot = context.engine.measure_slot()?;
        let measure = MeasureRequest {
            id: call.id.clone(),
            tokens: context.long_text(input, "input").await?,
            cases,
            reference: reference_case,
            window_tokens: request.window_tokens.map(|tokens| tokens as usize),
            deadline,
        };
        let progress = context.engine.measure(slot, measure)?;
        Ok(Self { progress, call: call.clone(), reference, policies })
    }

    fn message(&self, progress: &MeasureProgress) -> proto::MeasureFidelityResponse {
        let policies = self.policies.iter().zip(&progress.policies);
        proto::MeasureFidelityResponse {
            request_id: self.call.id.clone(),
            tokens_done: saturate(progress.tokens_done),
            tokens_total: saturate(progress.tokens_total),
            reference: Some(routing_message(&self.reference)),
            policies: policies.map(|(rule, fidelity)| policy(rule, fidelity)).collect(),
            done: progress.done,
            generation: progress.generation,
        }
    }
}

impl Stream for FidelityStream {
    type Item = Result<proto::MeasureFidelityResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Option<Self::Item>> {
        let progress = task::ready!(Pin::new(&mut self.progress).poll_next(cx));
        Poll::Ready(progress.map(|progress| match progress {
            Ok(progress) => Ok(self.message(&progress)),
            Err(error) => Err(self.call.status(&error)),
        }))
    }
}

fn policy(rule: &RoutingRule, fidelity: &PolicyFidelity) -> proto::PolicyFidelity {
    proto::PolicyFidelity {
        policy: Some(routing_message(rule)),
        output: Some(output(&fidelity.output)),
        layers: fidelity.layers.iter().map(layer).collect(),
    }
}

fn output(gaps: &OutputGaps) -> proto::OutputFidelity {
    let perplexity = Some(gaps.perplexity).filter(|perplexity| perplexity.tokens > 0);
    proto::OutputFidelity {
        tokens: gaps.tokens,
        non_finite: gaps.non_finite,
        kl: Some(distribution(&gaps.kl)),
        js: Some(distribution(&gaps.js)),
        logit_l2: Some(distribution(&gaps.logit_l2)),
        top1_agree: gaps.top1_agree,
        reference_perplexity: perplexity.map_or(0.0, |perplexity| perplexity.reference),
        served_perplexity: perplexity.map_or(0.0, |perplexity| perplexity.served),
        perplexity_gap: perplexity.map_or(0.0, |perplexity| perplexity.gap),
    }
}

fn layer(layer: &LayerFidelity) -> proto::LayerFidelity {
    proto::LayerFidelity {
        layer: saturate(layer.layer),
        l2_rel: Some(distribution(&layer.l2_rel)),
        cosine_distance: Some(distribution(&layer.cosine_distance)),
        missed_mass: Some(distribution(&layer.missed_mass)),
        overlap: layer.overlap,
        exact: layer.exact,
    }
}

fn distribution(summary: &Summary) -> proto::Distribution {
    let Summary { count: _, mean, p50, p95, p99, max } = *summary;
    proto::Distribution { mean, p50, p95, p99, max }
}
