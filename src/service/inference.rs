//! `hardmax.v1.Inference`: each RPC converts, asks the engine, and converts back.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::sync::Semaphore;
use tokio_stream::Stream;
use tonic::{
    Extensions, Request, Response, Status,
    metadata::{MetadataMap, MetadataValue},
};

use super::{
    Deadline, convert,
    proto::{self, inference_server::Inference},
    to_status,
};
use crate::{
    checkpoint::GenerationDefaults,
    engine::{self, Engine, Event, EventStream, Finished, Task, Tokens},
    error::{Error, ErrorKind, Result},
    model::{ModelSpec, MoeSpec},
    moe::policy::RoutingChoice,
    telemetry::metrics::MetricsConfig,
};

/// Longer texts are tokenised away from the threads that serve sockets, and only so many at once as there are cores.
const INLINE_TEXT: usize = 64 * 1024;

/// How much longer each part of a long text is than the one before, until the whole text is tokenised.
const PART_GROWTH: usize = 4;

/// Longest request id, in bytes: it comes back in every message and in a header.
const MAX_REQUEST_ID: usize = 128;

/// The metadata key of a request id, both ways.
const REQUEST_ID: &str = "x-request-id";

/// What the service says about itself, and what it does where a request says nothing.
#[derive(Clone, Debug)]
pub struct ServiceConfig {
    /// The name that clients may give, and that responses carry.
    pub model_name: String,
    /// As `cpu`, for people.
    pub device: String,
    /// As `f32`, for people.
    pub dtype: String,
    /// Routing of requests that choose none.
    pub routing: RoutingChoice,
    /// Sampling of requests that choose none.
    pub sampling: SamplingDefaults,
    /// Largest request message, in bytes; larger ones are refused before they are read.
    pub max_receive_bytes: usize,
    /// Longest text of a Tokenize, in bytes, and most tokens of a Detokenize.
    pub max_tokenize_bytes: usize,
    /// Largest response message, in bytes.
    pub max_send_bytes: usize,
}

/// Sampling parameters of requests that choose none. The default is greedy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingDefaults {
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// 0: off.
    pub top_k: usize,
    /// 1: off.
    pub top_p: f32,
    /// 1: off.
    pub repetition_penalty: f32,
}

/// The implementation of [`Inference`] over an [`Engine`].
#[derive(Clone, Debug)]
pub struct InferenceService {
    engine: Engine,
    config: Arc<ServiceConfig>,
    /// Permits for long tokenisations.
    tokenizing: Arc<Semaphore>,
}

/// What a request says about itself, outside its message.
#[derive(Clone, Debug)]
struct Call {
    id: String,
    arrived: Instant,
    /// By `grpc-timeout`.
    deadline: Option<Instant>,
}

/// The engine's events as messages. Dropping it cancels the request.
#[derive(Debug)]
pub struct GenerateStream {
    events: EventStream,
    call: Call,
    /// Choices that have not finished.
    choices: usize,
}

// === impl ServiceConfig ===

impl ServiceConfig {
    /// The facts about this server that its metrics show.
    ///
    /// Fails where a layer of the model cannot follow [`ServiceConfig::routing`].
    pub fn metrics(&self, spec: &ModelSpec) -> Result<MetricsConfig> {
        let experts_per_token = |moe: &MoeSpec| Ok(moe.resolve(self.routing, spec.reference)?.experts_per_token(moe.num_experts));
        let top_k = spec.moe_layers().map(|(_, moe)| experts_per_token(moe)).collect::<Result<Vec<_>>>()?;
        Ok(MetricsConfig {
            model: self.model_name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            git: env!("HARDMAX_GIT").into(),
            device: self.device.clone(),
            dtype: self.dtype.clone(),
            estimator: spec.estimator.clone(),
            serving: self.routing.to_string(),
            reference: spec.reference.choice().to_string(),
            generation: 1,
            num_layers: spec.layers.len(),
            layers: spec.moe_layers().map(|(layer, moe)| (layer, moe.num_experts)).collect(),
            top_k: top_k.into_iter().max().unwrap_or(0),
            max_context: spec.max_context,
            ..MetricsConfig::default()
        })
    }
}

// === impl SamplingDefaults ===

impl Default for SamplingDefaults {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0 }
    }
}

impl From<&GenerationDefaults> for SamplingDefaults {
    /// A checkpoint that does not say that it wants to be sampled is greedy; its other numbers are for clients that
    /// ask for a temperature.
    fn from(checkpoint: &GenerationDefaults) -> Self {
        let greedy = Self::default();
        let sampled = checkpoint.do_sample == Some(true);
        Self {
            temperature: if sampled { checkpoint.temperature.unwrap_or(1.0) } else { greedy.temperature },
            top_k: checkpoint.top_k.unwrap_or(greedy.top_k),
            top_p: checkpoint.top_p.unwrap_or(greedy.top_p),
            repetition_penalty: checkpoint.repetition_penalty.unwrap_or(greedy.repetition_penalty),
        }
    }
}

// === impl Call ===

impl Call {
    /// The request id is `field`, else the metadata's, else a new one.
    fn new(field: &str, metadata: &MetadataMap, extensions: &Extensions) -> Result<Self, Status> {
        let id = if !field.is_empty() {
            checked_id("request_id", field.as_bytes())
        } else if let Some(value) = metadata.get(REQUEST_ID) {
            checked_id(REQUEST_ID, value.as_bytes())
        } else {
            Ok(format!("{:016x}", rand::random::<u64>()))
        };
        let deadline = extensions.get::<Deadline>().map(|deadline| deadline.0);
        Ok(Self { id: id.map_err(|error| to_status(&error))?, arrived: Instant::now(), deadline })
    }

    /// When the answer is due: the earlier of `grpc-timeout` and the field of the message.
    fn due(&self, timeout_seconds: Option<f64>) -> Result<Option<Instant>> {
        let Some(seconds) = timeout_seconds else { return Ok(self.deadline) };
        if !(seconds.is_finite() && seconds > 0.0) {
            return Err(Error::invalid("timeout_seconds", format!("{seconds} is not a finite number above 0")));
        }
        // A timeout beyond the clock's range is none.
        let due = Duration::try_from_secs_f64(seconds).ok().and_then(|timeout| self.arrived.checked_add(timeout));
        Ok(due.into_iter().chain(self.deadline).min())
    }

    fn status(&self, error: &Error) -> Status {
        if error.kind() == ErrorKind::Internal {
            tracing::error!(request_id = %self.id, error = ?error, "request failed");
        } else {
            tracing::debug!(request_id = %self.id, %error, "request refused");
        }
        let mut status = to_status(error);
        self.stamp(status.metadata_mut());
        status
    }

    fn response<T>(&self, message: T) -> Response<T> {
        let mut response = Response::new(message);
        self.stamp(response.metadata_mut());
        response
    }

    fn stamp(&self, metadata: &mut MetadataMap) {
        if let Ok(id) = MetadataValue::try_from(&self.id) {
            metadata.insert(REQUEST_ID, id);
        }
    }
}

fn checked_id(field: &str, id: &[u8]) -> Result<String> {
    match str::from_utf8(id) {
        Ok(text) if (1..=MAX_REQUEST_ID).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic) => Ok(text.to_owned()),
        _ => Err(Error::invalid(field, format!("not 1 to {MAX_REQUEST_ID} visible ASCII characters"))),
    }
}

// === impl InferenceService ===

impl InferenceService {
    /// Serves `engine`. Fails where a layer of the model cannot follow `config.routing`.
    pub fn new(engine: Engine, config: ServiceConfig) -> Result<Self> {
        engine.spec().check_routing(config.routing)?;
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        Ok(Self { engine, config: Arc::new(config), tokenizing: Arc::new(Semaphore::new(cores)) })
    }

    fn check_model(&self, model: &str) -> Result<()> {
        if model.is_empty() || model == self.config.model_name {
            return Ok(());
        }
        Err(Error::NotFound(format!("model: this server has '{}' only", self.config.model_name)))
    }

    /// Runs `work` here if `bytes` is small, else on a thread that serves no socket.
    async fn work<T: Send + 'static>(&self, bytes: usize, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        if bytes <= INLINE_TEXT {
            return Ok(work());
        }
        let permit = self.tokenizing.clone().acquire_owned().await;
        let permit = permit.map_err(|_| Error::Internal("the tokenising semaphore is closed".into()))?;
        let task = tokio::task::spawn_blocking(move || {
            let result = work();
            drop(permit);
            result
        });
        task.await.map_err(|error| Error::Internal(format!("tokenising failed: {error}")))
    }

    async fn prompt(&self, input: Option<Input>, field: &'static str) -> Result<Vec<u32>> {
        match input {
            None => Err(Error::invalid(field, "neither text nor token_ids is set")),
            Some(Input::Ids(ids)) => Ok(ids),
            Some(Input::Text(text)) => {
                let engine = self.engine.clone();
                self.work(text.len(), move || encode_prompt(&engine, &text, field)).await?
            }
        }
    }

    async fn start_generation(&self, call: &Call, request: proto::GenerateRequest) -> Result<GenerateStream> {
        use proto::generate_request::Prompt;
        self.check_model(&request.model)?;
        let routing = convert::routing_choice(request.routing, self.config.routing)?;
        let input = request.prompt.map(|prompt| match prompt {
            Prompt::Text(text) => Input::Text(text),
            Prompt::TokenIds(ids) => Input::Ids(ids.ids),
        });
        let deadline = call.due(request.timeout_seconds)?;
        let prompt = self.prompt(input, "prompt").await?;
        let params = convert::generate_params(request.sampling, &self.config.sampling);
        let choices = params.n;
        let task = Task::Generate(params);
        let request = engine::Request { id: call.id.clone(), prompt, task, routing, deadline, priority: request.priority };
        Ok(GenerateStream { events: self.engine.submit(request)?, call: call.clone(), choices })
    }

    async fn score_request(&self, call: &Call, request: proto::ScoreRequest) -> Result<Finished> {
        use proto::score_request::Input as Prompt;
        self.check_model(&request.model)?;
        let routing = convert::routing_choice(request.routing, self.config.routing)?;
        let input = request.input.map(|input| match input {
            Prompt::Text(text) => Input::Text(text),
            Prompt::TokenIds(ids) => Input::Ids(ids.ids),
        });
        let deadline = call.due(request.timeout_seconds)?;
        let prompt = self.prompt(input, "input").await?;
        let task = Task::Score { alternatives: request.alternatives.unwrap_or(0) as usize };
        let request = engine::Request { id: call.id.clone(), prompt, task, routing, deadline, priority: request.priority };
        let answer = scored(self.engine.submit(request)?);
        match deadline {
            None => answer.await,
            // A step of the engine may take longer than is left.
            Some(due) => match tokio::time::timeout_at(due.into(), answer).await {
                Ok(answer) => answer,
                Err(_) => Err(Error::DeadlineExceeded { phase: "waiting for the answer" }),
            },
        }
    }

    async fn tokenize_request(&self, request: proto::TokenizeRequest) -> Result<proto::TokenizeResponse> {
        self.check_model(&request.model)?;
        let (bytes, limit) = (request.text.len(), self.config.max_tokenize_bytes);
        if bytes > limit {
            return Err(Error::out_of_range(
                "text",
                format!("{bytes} bytes are more than {limit}, the limit of this server: send it in parts"),
            ));
        }
        let (engine, text, add_special) = (self.engine.clone(), request.text, request.add_special_tokens.unwrap_or(true));
        let encoding = self.work(text.len(), move || encode(&engine, &text, add_special, "text")).await??;
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
        self.check_model(&request.model)?;
        let vocabulary = self.engine.spec().vocab_size;
        let (count, limit) = (request.token_ids.len(), self.config.max_tokenize_bytes);
        if count > limit {
            let message = format!("{count} tokens are more than {limit}, the limit of this server: send them in parts");
            return Err(Error::out_of_range("token_ids", message));
        }
        if let Some((at, id)) = request.token_ids.iter().enumerate().find(|(_, id)| **id as usize >= vocabulary) {
            return Err(Error::invalid(format!("token_ids[{at}]"), format!("{id} is not below {vocabulary}, the size of the vocabulary")));
        }
        let engine = self.engine.clone();
        let skip = request.skip_special_tokens.unwrap_or(true);
        let ids = request.token_ids;
        let text = self.work(ids.len() * size_of::<u32>(), move || engine.tokenizer().decode(&ids, skip)).await?;
        let text = text.map_err(|error| Error::invalid("token_ids", format!("cannot be decoded: {error}")))?;
        Ok(proto::DetokenizeResponse { text })
    }

    fn model_info(&self, request: &proto::GetModelInfoRequest) -> Result<proto::GetModelInfoResponse> {
        self.check_model(&request.model)?;
        let (spec, config, engine, cache) = (self.engine.spec(), &self.config, self.engine.config(), self.engine.cache());
        let (moe_layers, (parameters, active_parameters)) = convert::moe_layers(spec, config.routing)?;
        Ok(proto::GetModelInfoResponse {
            model: config.model_name.clone(),
            family: spec.family.clone(),
            dtype: config.dtype.clone(),
            device: config.device.clone(),
            generation: self.engine.status().generation,
            parameters,
            active_parameters,
            vocab_size: convert::saturate(spec.vocab_size),
            hidden_size: convert::saturate(spec.hidden_size),
            num_layers: convert::saturate(spec.layers.len()),
            num_attention_heads: convert::saturate(spec.num_heads),
            num_key_value_heads: convert::saturate(spec.num_kv_heads),
            eos_token_ids: self.engine.eos_token_ids().to_vec(),
            moe_layers,
            reference_routing: Some(convert::choice(spec.reference.choice())),
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
        })
    }
}

/// The prompt of a generation or the input of a score.
enum Input {
    Text(String),
    Ids(Vec<u32>),
}

/// The tokens of `text`, with byte offsets.
fn encode(engine: &Engine, text: &str, add_special: bool, field: &str) -> Result<tokenizers::Encoding> {
    let encoding = engine.tokenizer().encode(text, add_special);
    encoding.map_err(|error| Error::invalid(field, format!("cannot be tokenised: {error}")))
}

/// The tokens of a prompt. One that is far too long is refused after its beginning: tokenising megabytes takes many seconds.
pub(super) fn encode_prompt(engine: &Engine, text: &str, field: &str) -> Result<Vec<u32>> {
    let mut part = INLINE_TEXT;
    while part < text.len() {
        // A cut changes the tokens beside it; those of another whole context are beyond doubt.
        let beginning = &text[..text.floor_char_boundary(part)];
        if encode(engine, beginning, true, field)?.len() > 2 * engine.spec().max_context {
            return Err(engine.refuse_too_long(field));
        }
        part = part.saturating_mul(PART_GROWTH);
    }
    Ok(encode(engine, text, true, field)?.get_ids().to_vec())
}

async fn scored(mut events: EventStream) -> Result<Finished> {
    while let Some(event) = events.recv().await {
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
    let scored = || finished.prompt_logprobs.iter().filter_map(|token| token.logprob).map(f64::from);
    let logprob_sum = scored().sum::<f64>();
    // A single token has no log-probability: the empty product has perplexity 1.
    let perplexity = (-logprob_sum / scored().count().max(1) as f64).exp();
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
    fn message(&self, choice: usize, tokens: Tokens, finish: Option<proto::Finish>) -> proto::GenerateResponse {
        proto::GenerateResponse {
            request_id: self.call.id.clone(),
            index: convert::saturate(choice),
            text: tokens.text,
            token_ids: tokens.ids,
            logprobs: convert::logprobs(tokens.logprobs),
            finish,
        }
    }
}

impl Stream for GenerateStream {
    type Item = Result<proto::GenerateResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.choices == 0 {
            return Poll::Ready(None);
        }
        let event = std::task::ready!(Pin::new(&mut self.events).poll_next(cx));
        match event {
            Some(Event::Tokens(_)) => {}
            Some(Event::Finished(_)) => self.choices -= 1,
            Some(Event::Failed(_)) | None => self.choices = 0,
        }
        Poll::Ready(Some(match event {
            Some(Event::Tokens(tokens)) => Ok(self.message(tokens.choice, tokens, None)),
            Some(Event::Finished(finished)) => {
                let finish = convert::finish(&finished);
                Ok(self.message(finished.choice, finished.tail, Some(finish)))
            }
            Some(Event::Failed(error)) => Err(self.call.status(&error)),
            None => Err(self.call.status(&engine_stopped())),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_are_checked_before_they_are_echoed() {
        assert!(checked_id("request_id", b"a-1").is_ok());
        for bad in [&b""[..], b"a b", b"a\n", "\u{e9}".as_bytes(), b"\0", b"\xff", &[b'x'; 129]] {
            assert!(checked_id("request_id", bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_checkpoint_is_greedy_unless_it_says_otherwise() {
        let silent = GenerationDefaults::default();
        assert_eq!(SamplingDefaults::from(&silent), SamplingDefaults::default());
        let sampled = GenerationDefaults { do_sample: Some(true), top_k: Some(50), ..silent.clone() };
        assert_eq!(SamplingDefaults::from(&sampled), SamplingDefaults { temperature: 1.0, top_k: 50, ..Default::default() });
        let unsampled = GenerationDefaults { do_sample: Some(false), temperature: Some(0.6), ..silent };
        assert_eq!(SamplingDefaults::from(&unsampled).temperature, 0.0);
    }

    #[test]
    fn the_field_wins_over_the_metadata() {
        let mut metadata = MetadataMap::new();
        metadata.insert(REQUEST_ID, MetadataValue::from_static("from-metadata"));
        let id = |field, metadata| Call::new(field, metadata, &Extensions::new()).unwrap().id;
        assert_eq!(id("from-field", &metadata), "from-field");
        assert_eq!(id("", &metadata), "from-metadata");
        let (first, second) = (id("", &MetadataMap::new()), id("", &MetadataMap::new()));
        assert_ne!(first, second);
        assert_eq!(first.len(), 16);
    }
}
