//! `hardmax.v1.Routing`: how the model routes, seen and steered.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{self, Poll},
};

use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::{
    call::Call,
    context::{Context, Input},
    convert,
    fidelity::FidelityStream,
    inference::{Scoring, engine_stopped, score},
    proto::{self, routing_server::Routing},
    trace,
    traced::{TracedEvents, submit},
};
use crate::{
    engine::{self, Event, Finished, ShadowChoice, Task},
    error::{Error, Result},
    moe::{
        policy::{LayerChoices, Replay},
        trace::RoutingTrace,
    },
    telemetry::metrics::Scope,
};

/// The implementation of [`Routing`] over an engine.
#[derive(Clone, Debug)]
pub struct RoutingService {
    context: Arc<Context>,
}

/// The routing of a text as messages. Dropping it cancels the request.
#[derive(Debug)]
pub struct TraceStream {
    events: TracedEvents,
    call: Call,
    options: proto::TraceOptions,
    /// The text.
    tokens: Vec<u32>,
    /// Messages that come before the next event.
    pending: VecDeque<proto::TraceRoutingResponse>,
    done: bool,
}

// === impl RoutingService ===

impl RoutingService {
    pub(super) fn new(context: Arc<Context>) -> Self {
        Self { context }
    }

    async fn start_trace(&self, call: &Call, request: proto::TraceRoutingRequest) -> Result<TraceStream> {
        let context = &*self.context;
        context.check_model(&request.model)?;
        let routing = context.routing(request.routing)?;
        let input = request.input.map(Input::from);
        let deadline = call.due(request.timeout_seconds)?;
        let prompt = context.prompt(input, "input").await?;
        let tokens = prompt.clone();
        let (id, trace_id, task, priority) = (call.id.clone(), call.trace_id(), Task::Read, request.priority);
        let (trace, shadow) = (true, ShadowChoice::Never);
        let events = submit(context, call, engine::Request { id, trace_id, prompt, task, routing, trace, shadow, deadline, priority })?;
        let options = request.options.unwrap_or_default();
        Ok(TraceStream { events, call: call.clone(), options, tokens, pending: VecDeque::new(), done: false })
    }

    async fn replay(&self, call: &Call, request: proto::ReplayRoutingRequest) -> Result<Finished> {
        self.context.check_model(&request.model)?;
        let form = request.weight_form.map_or(Ok(None), |form| convert::weight_form("weight_form", form))?;
        let replay =
            Replay { trace: trace::joined("traces", &request.traces)?, weight_form: form, rest: self.context.routing(request.routing)? };
        let input = request.input.map(Input::from);
        let scoring = Scoring {
            input,
            routing: LayerChoices::Replay { replay: Arc::new(replay), first: 0 },
            alternatives: request.alternatives,
            // It says nothing about the routing of anyone else.
            shadow: ShadowChoice::Never,
            priority: request.priority,
            timeout_seconds: request.timeout_seconds,
        };
        score(&self.context, call, scoring).await
    }

    fn policy(&self, request: &proto::GetRoutingPolicyRequest) -> Result<proto::GetRoutingPolicyResponse> {
        self.context.check_model(&request.model)?;
        let (serving, spec) = (self.context.serving(), self.context.engine.spec());
        let layer = |(layer, moe): (usize, &crate::model::MoeSpec)| {
            let policy = moe.resolve(serving.choices.at(layer), spec.reference)?;
            Ok(proto::get_routing_policy_response::LayerPolicy {
                layer: convert::saturate(layer),
                num_experts: convert::saturate(moe.num_experts),
                policy: Some(convert::policy(policy)),
            })
        };
        Ok(proto::GetRoutingPolicyResponse {
            serving: Some(convert::routing_message(&serving.rule)),
            reference: Some(convert::routing_message(&spec.reference.choice().into())),
            layers: spec.moe_layers().map(layer).collect::<Result<_>>()?,
        })
    }

    fn set_policy(&self, request: proto::SetRoutingPolicyRequest) -> Result<proto::SetRoutingPolicyResponse> {
        self.context.check_model(&request.model)?;
        let serving = request.serving.ok_or_else(|| Error::invalid("serving", "it is not set: say which routing to serve"))?;
        let previous = self.context.set_serving(convert::routing_rule(serving, "serving")?)?;
        Ok(proto::SetRoutingPolicyResponse { previous: Some(convert::routing_message(&previous)) })
    }

    fn expert_load(&self, request: &proto::GetExpertLoadRequest) -> Result<proto::GetExpertLoadResponse> {
        use proto::get_expert_load_request::Scope as Asked;
        self.context.check_model(&request.model)?;
        let scope = match Asked::try_from(request.scope) {
            Ok(Asked::Window) => Scope::Window,
            Ok(Asked::Total) => Scope::Total,
            Err(_) => {
                return Err(Error::invalid("scope", format!("{} is not a value of hardmax.v1.GetExpertLoadRequest.Scope", request.scope)));
            }
        };
        let engine = &self.context.engine;
        let load = engine.metrics().expert_load(scope);
        Ok(proto::GetExpertLoadResponse {
            layers: load.layers.iter().map(convert::layer_load).collect(),
            seconds: load.seconds,
            generation: engine.status().generation,
        })
    }

    fn reset_statistics(&self, request: &proto::ResetStatisticsRequest) -> Result<proto::ResetStatisticsResponse> {
        self.context.check_model(&request.model)?;
        self.context.engine.metrics().reset_statistics();
        Ok(proto::ResetStatisticsResponse {})
    }
}

fn replay_response(request_id: String, finished: Finished) -> proto::ReplayRoutingResponse {
    let (logprob_sum, perplexity) = convert::likelihood(&finished.prompt_logprobs);
    proto::ReplayRoutingResponse {
        request_id,
        logprob_sum,
        perplexity,
        timing: Some(convert::timing(&finished.timing)),
        generation: finished.generation,
        tokens: convert::logprobs(finished.prompt_logprobs),
    }
}

#[tonic::async_trait]
impl Routing for RoutingService {
    type MeasureFidelityStream = FidelityStream;
    type TraceRoutingStream = TraceStream;

    async fn measure_fidelity(&self, request: Request<proto::MeasureFidelityRequest>) -> Result<Response<FidelityStream>, Status> {
        let (metadata, extensions, message) = request.into_parts();
        let call = Call::new(&message.request_id, &metadata, &extensions)?;
        let stream = FidelityStream::start(&self.context, &call, message).await;
        stream.map(|stream| call.response(stream)).map_err(|error| call.status(&error))
    }

    async fn trace_routing(&self, request: Request<proto::TraceRoutingRequest>) -> Result<Response<TraceStream>, Status> {
        let (metadata, extensions, message) = request.into_parts();
        let call = Call::new(&message.request_id, &metadata, &extensions)?;
        let stream = self.start_trace(&call, message).await;
        stream.map(|stream| call.response(stream)).map_err(|error| call.status(&error))
    }

    async fn replay_routing(
        &self,
        request: Request<proto::ReplayRoutingRequest>,
    ) -> Result<Response<proto::ReplayRoutingResponse>, Status> {
        let (metadata, extensions, message) = request.into_parts();
        let call = Call::new(&message.request_id, &metadata, &extensions)?;
        let finished = self.replay(&call, message).await.map_err(|error| call.status(&error))?;
        Ok(call.response(replay_response(call.id.clone(), finished)))
    }

    async fn get_routing_policy(
        &self,
        request: Request<proto::GetRoutingPolicyRequest>,
    ) -> Result<Response<proto::GetRoutingPolicyResponse>, Status> {
        let call = Call::new("", request.metadata(), request.extensions())?;
        self.policy(request.get_ref()).map(|answer| call.response(answer)).map_err(|error| call.status(&error))
    }

    async fn set_routing_policy(
        &self,
        request: Request<proto::SetRoutingPolicyRequest>,
    ) -> Result<Response<proto::SetRoutingPolicyResponse>, Status> {
        let call = Call::new("", request.metadata(), request.extensions())?;
        self.set_policy(request.into_inner()).map(|answer| call.response(answer)).map_err(|error| call.status(&error))
    }

    async fn get_expert_load(
        &self,
        request: Request<proto::GetExpertLoadRequest>,
    ) -> Result<Response<proto::GetExpertLoadResponse>, Status> {
        let call = Call::new("", request.metadata(), request.extensions())?;
        self.expert_load(request.get_ref()).map(|answer| call.response(answer)).map_err(|error| call.status(&error))
    }

    async fn reset_statistics(
        &self,
        request: Request<proto::ResetStatisticsRequest>,
    ) -> Result<Response<proto::ResetStatisticsResponse>, Status> {
        let call = Call::new("", request.metadata(), request.extensions())?;
        RoutingService::reset_statistics(self, request.get_ref()).map(|answer| call.response(answer)).map_err(|error| call.status(&error))
    }
}

// === impl TraceStream ===

impl TraceStream {
    fn push(&mut self, trace: Option<Box<RoutingTrace>>, generation: Option<u64>) {
        for part in trace.iter().flat_map(|trace| trace::messages(trace, self.options)) {
            let tokens = part.first_position as usize..(part.first_position + part.num_tokens) as usize;
            self.pending.push_back(proto::TraceRoutingResponse {
                request_id: self.call.id.clone(),
                token_ids: self.tokens.get(tokens).unwrap_or_default().to_vec(),
                trace: Some(part),
                generation: None,
            });
        }
        if generation.is_some() {
            let empty = || proto::TraceRoutingResponse { request_id: self.call.id.clone(), ..proto::TraceRoutingResponse::default() };
            let mut last = self.pending.pop_back().unwrap_or_else(empty);
            last.generation = generation;
            self.pending.push_back(last);
        }
    }
}

impl Stream for TraceStream {
    type Item = Result<proto::TraceRoutingResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(message) = this.pending.pop_front() {
                return Poll::Ready(Some(Ok(message)));
            }
            if this.done {
                return Poll::Ready(None);
            }
            match task::ready!(Pin::new(&mut this.events).poll_next(cx)) {
                Some(Event::Tokens(tokens)) => this.push(tokens.trace, None),
                Some(Event::Finished(finished)) => {
                    this.done = true;
                    this.push(finished.tail.trace, Some(finished.generation));
                }
                Some(Event::Failed(error)) => {
                    this.done = true;
                    return Poll::Ready(Some(Err(this.call.status(&error))));
                }
                None => {
                    this.done = true;
                    return Poll::Ready(Some(Err(this.call.status(&engine_stopped()))));
                }
            }
        }
    }
}
