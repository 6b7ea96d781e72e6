//! `hardmax.v1.Inference`: each RPC converts, asks the engine, and converts back.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{self, Poll},
};

use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

use super::{
    call::Call,
    context::{Context, Input, encode},
    convert,
    proto::{self, inference_server::Inference},
    trace,
    traced::{TracedEvents, submit},
};
use crate::{
    engine::{self, Event, Finished, ShadowChoice, Task, Tokens},
    error::{Error, Result},
    jobs::Jobs,
    moe::policy::LayerChoices,
};

/// The implementation of [`Inference`] over an engine.
#[derive(Clone, Debug)]
pub struct InferenceService {
    context: Arc<Context>,
}

/// The engine's events as messages. Dropping it cancels the request.
#[derive(Debug)]
pub struct GenerateStream {
    events: TracedEvents,
    call: Call,
    /// Choices that have not finished.
    choices: usize,
    trace: proto::TraceOptions,
    /// Messages that come before the next event.
    pending: VecDeque<proto::GenerateResponse>,
}

/// What is asked of a text that is given.
pub(super) struct Scoring {
    pub(super) input: Option<Input>,
    pub(super) routing: LayerChoices,
    pub(super) alternatives: Option<u32>,
    pub(super) shadow: ShadowChoice,
    pub(super) priority: i32,
    pub(super) timeout_seconds: Option<f64>,
}

// === impl InferenceService ===

impl InferenceService {
    pub(super) fn new(context: Arc<Context>) -> Self {
        Self { context }
    }

    async fn start_generation(&self, call: &Call, request: proto::GenerateRequest) -> Result<GenerateStream> {
        let context = &*self.context;
        context.check_model(&request.model)?;
        let routing = context.routing(request.routing)?;
        let input = request.prompt.map(Input::from);
        let deadline = call.due(request.timeout_seconds)?;
        let prompt = context.prompt(input, "prompt").await?;
        let params = convert::generate_params(request.sampling, &context.config.sampling);
        let (choices, trace) = (params.n, request.trace.is_some());
        let (id, trace_id, task, priority) = (call.id.clone(), call.trace_id(), Task::Generate(params), request.priority);
        let shadow = convert::shadow(request.shadow)?;
        let request_options = request.trace;
        let request = engine::Request { id, trace_id, prompt, task, routing, trace, shadow, deadline, priority };
        let events = submit(context, call, request)?;
        Ok(GenerateStream { events, call: call.clone(), choices, trace: request_options.unwrap_or_default(), pending: VecDeque::new() })
    }

    async fn score_request(&self, call: &Call, request: proto::ScoreRequest) -> Result<Finished> {
        self.context.check_model(&request.model)?;
        let input = request.input.map(Input::from);
        let scoring = Scoring {
            input,
            routing: self.context.routing(request.routing)?,
            alternatives: request.alternatives,
            shadow: convert::shadow(request.shadow)?,
            priority: request.priority,
            timeout_seconds: request.timeout_seconds,
        };
        score(&self.context, call, scoring).await
    }

    async fn tokenize_request(&self, request: proto::TokenizeRequest) -> Result<proto::TokenizeResponse> {
        self.context.check_model(&request.model)?;
        let (bytes, limit) = (request.text.len(), self.context.config.max_tokenize_bytes);
        if bytes > limit {
            return Err(Error::out_of_range(
                "text",
                format!("{bytes} bytes are more than {limit}, the limit of this server: send it in parts"),
            ));
        }
        let (engine, text, add_special) = (self.context.engine.clone(), request.text, request.add_special_tokens.unwrap_or(true));
        let encoding = self.context.work(text.len(), move || encode(&engine, &text, add_special, "text")).await??;
        let tokens = encoding.get_ids().iter().zip(encoding.get_tokens()).zip(encoding.get_offsets());
        let tokens = tokens.map(|((&id, token), &(start, end))| proto::tokenize_response::Token {
            id,
            token: token.clone(),
            start: convert::saturate(start),
            end: convert::saturate(end),
        });
        Ok(proto::TokenizeResponse { tokens: tokens.collect() })
    }

    async fn detokenize_request(&self, request: proto::DetokenizeRequest) -> Result<proto::DetokenizeResponse> {
        self.context.check_model(&request.model)?;
        let vocabulary = self.context.engine.spec().vocab_size;
        let (count, limit) = (request.token_ids.len(), self.context.config.max_tokenize_bytes);
        if count > limit {
            let message = format!("{count} tokens are more than {limit}, the limit of this server: send them in parts");
            return Err(Error::out_of_range("token_ids", message));
        }
        if let Some((at, id)) = request.token_ids.iter().enumerate().find(|(_, id)| **id as usize >= vocabulary) {
            return Err(Error::invalid(format!("token_ids[{at}]"), format!("{id} is not below {vocabulary}, the size of the vocabulary")));
        }
        let engine = self.context.engine.clone();
        let skip = request.skip_special_tokens.unwrap_or(true);
        let ids = request.token_ids;
        let text = self.context.work(ids.len() * size_of::<u32>(), move || engine.tokenizer().decode(&ids, skip)).await?;
        let text = text.map_err(|error| Error::invalid("token_ids", format!("cannot be decoded: {error}")))?;
        Ok(proto::DetokenizeResponse { text })
    }

    fn model_info(&self, request: &proto::GetModelInfoRequest) -> Result<proto::GetModelInfoResponse> {
        self.context.check_model(&request.model)?;
        let (handle, config) = (&self.context.engine, &self.context.config);
        let (spec, engine, cache) = (handle.spec(), handle.config(), handle.cache());
        let jobs = self.context.jobs.as_ref();
        let (moe_layers, (parameters, active_parameters)) = convert::moe_layers(spec, &self.context.serving().choices)?;
        Ok(proto::GetModelInfoResponse {
            model: config.model_name.clone(),
            family: spec.family.clone(),
            dtype: config.dtype.clone(),
            device: config.device.clone(),
            generation: handle.status().generation,
            parameters,
            active_parameters,
            vocab_size: convert::saturate(spec.vocab_size),
            hidden_size: convert::saturate(spec.hidden_size),
            num_layers: convert::saturate(spec.layers.len()),
            num_attention_heads: convert::saturate(spec.num_heads),
            num_key_value_heads: convert::saturate(spec.num_kv_heads),
            eos_token_ids: handle.eos_token_ids().to_vec(),
            moe_layers,
            reference_routing: Some(convert::routing_message(&spec.reference.choice().into())),
            trained_with: spec.estimator.clone(),
            limits: Some(proto::get_model_info_response::Limits {
                max_context_tokens: convert::saturate(spec.max_context),
                max_new_tokens: convert::saturate(engine.max_new_tokens),
                max_batch_requests: convert::saturate(engine.max_batch_requests),
                max_queue_requests: convert::saturate(engine.max_queue_requests),
                max_step_tokens: convert::saturate(engine.max_step_tokens),
                max_receive_message_bytes: config.max_receive_bytes as u64,
                max_choices: convert::saturate(engine.max_choices),
                max_tokenize_bytes: config.max_tokenize_bytes as u64,
                max_queue_tokens: engine.max_queue_tokens as u64,
                cache_tokens: cache.tokens() as u64,
                cache_block_tokens: convert::saturate(cache.block_tokens),
            }),
            server_version: env!("CARGO_PKG_VERSION").to_owned(),
            mode: convert::mode(handle.status().mode).into(),
            tuning_job: jobs.and_then(Jobs::running).map(|job| job.to_string()).unwrap_or_default(),
            previous_generation: jobs.and_then(Jobs::previous),
        })
    }
}

/// The log-probabilities of a text.
pub(super) async fn score(context: &Context, call: &Call, scoring: Scoring) -> Result<Finished> {
    let Scoring { input, routing, alternatives, shadow, priority, timeout_seconds } = scoring;
    let deadline = call.due(timeout_seconds)?;
    let prompt = context.prompt(input, "input").await?;
    let task = Task::Score { alternatives: alternatives.unwrap_or(0) as usize };
    let (id, trace_id) = (call.id.clone(), call.trace_id());
    let request = engine::Request { id, trace_id, prompt, task, routing, trace: false, shadow, deadline, priority };
    let answer = scored(submit(context, call, request)?);
    match deadline {
        None => answer.await,
        // A step of the engine may take longer than is left.
        Some(due) => match tokio::time::timeout_at(due.into(), answer).await {
            Ok(answer) => answer,
            Err(_) => Err(Error::DeadlineExceeded { phase: "waiting for the answer" }),
        },
    }
}

async fn scored(mut events: TracedEvents) -> Result<Finished> {
    while let Some(event) = events.next().await {
        match event {
            Event::Tokens(_) => {}
            Event::Finished(finished) => return Ok(*finished),
            Event::Failed(error) => return Err(error),
        }
    }
    Err(engine_stopped())
}

/// The engine's end of a stream is gone, and it said nothing.
pub(super) fn engine_stopped() -> Error {
    Error::Internal("the engine stopped before the request was done".into())
}

fn score_response(request_id: String, finished: Finished) -> proto::ScoreResponse {
    let (logprob_sum, perplexity) = convert::likelihood(&finished.prompt_logprobs);
    proto::ScoreResponse {
        request_id,
        logprob_sum,
        perplexity,
        timing: Some(convert::timing(&finished.timing)),
        generation: finished.generation,
        tokens: convert::logprobs(finished.prompt_logprobs),
    }
}

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStream = GenerateStream;

    async fn generate(&self, request: Request<proto::GenerateRequest>) -> Result<Response<GenerateStream>, Status> {
        let (metadata, extensions, message) = request.into_parts();
        let call = Call::new(&message.request_id, &metadata, &extensions)?;
        match self.start_generation(&call, message).await {
            Ok(stream) => Ok(call.response(stream)),
            Err(error) => Err(call.status(&error)),
        }
    }

    async fn score(&self, request: Request<proto::ScoreRequest>) -> Result<Response<proto::ScoreResponse>, Status> {
        let (metadata, extensions, message) = request.into_parts();
        let call = Call::new(&message.request_id, &metadata, &extensions)?;
        match self.score_request(&call, message).await {
            Ok(finished) => Ok(call.response(score_response(call.id.clone(), finished))),
            Err(error) => Err(call.status(&error)),
        }
    }

    async fn tokenize(&self, request: Request<proto::TokenizeRequest>) -> Result<Response<proto::TokenizeResponse>, Status> {
        let call = Call::new("", request.metadata(), request.extensions())?;
        let answer = self.tokenize_request(request.into_inner()).await;
        answer.map(|answer| call.response(answer)).map_err(|error| call.status(&error))
    }

    async fn detokenize(&self, request: Request<proto::DetokenizeRequest>) -> Result<Response<proto::DetokenizeResponse>, Status> {
        let call = Call::new("", request.metadata(), request.extensions())?;
        let answer = self.detokenize_request(request.into_inner()).await;
        answer.map(|answer| call.response(answer)).map_err(|error| call.status(&error))
    }

    async fn get_model_info(&self, request: Request<proto::GetModelInfoRequest>) -> Result<Response<proto::GetModelInfoResponse>, Status> {
        let call = Call::new("", request.metadata(), request.extensions())?;
        let answer = self.model_info(request.get_ref());
        answer.map(|answer| call.response(answer)).map_err(|error| call.status(&error))
    }
}

// === impl GenerateStream ===

impl GenerateStream {
    /// The messages of `tokens`, the last of them with `finish`: a long trace comes in parts.
    fn push(&mut self, tokens: Tokens, choice: usize, finish: Option<proto::Finish>) {
        let message = || proto::GenerateResponse {
            request_id: self.call.id.clone(),
            index: convert::saturate(choice),
            ..proto::GenerateResponse::default()
        };
        let mut parts: VecDeque<_> = tokens.trace.iter().flat_map(|trace| trace::messages(trace, self.trace)).collect();
        let last = parts.pop_back();
        self.pending.extend(parts.into_iter().map(|part| proto::GenerateResponse { trace: Some(part), ..message() }));
        self.pending.push_back(proto::GenerateResponse {
            text: tokens.text,
            token_ids: tokens.ids,
            logprobs: convert::logprobs(tokens.logprobs),
            finish,
            trace: last,
            ..message()
        });
    }
}

impl Stream for GenerateStream {
    type Item = Result<proto::GenerateResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(message) = this.pending.pop_front() {
                return Poll::Ready(Some(Ok(message)));
            }
            if this.choices == 0 {
                return Poll::Ready(None);
            }
            match task::ready!(Pin::new(&mut this.events).poll_next(cx)) {
                Some(Event::Tokens(tokens)) => {
                    let choice = tokens.choice;
                    this.push(tokens, choice, None);
                }
                Some(Event::Finished(finished)) => {
                    this.choices -= 1;
                    let finish = convert::finish(&finished);
                    this.push(finished.tail, finished.choice, Some(finish));
                }
                Some(Event::Failed(error)) => {
                    this.choices = 0;
                    return Poll::Ready(Some(Err(this.call.status(&error))));
                }
                None => {
                    this.choices = 0;
                    return Poll::Ready(Some(Err(this.call.status(&engine_stopped()))));
                }
            }
        }
    }
}
