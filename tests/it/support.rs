//! A server over a fake model, and clients for it.
//!
//! The model reads nothing: the logits at position p say byte `p` of [`SCRIPT`], over and over. The tokenizer has one
//! token per byte, so characters beyond ASCII arrive in pieces.

use std::{
    future::Future,
    io::{Read as _, Write as _},
    net::SocketAddr,
    path::Path,
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::Duration,
};

use candle_core::{Device, Tensor};
use hardmax::{
    engine::{EngineConfig, FIRST_GENERATION},
    error::{Error, Result},
    jobs::{GuardConfig, Registry, Setup},
    model::{
        Batch, CacheShape, FeedForwardSpec, Forward, ForwardTime, LanguageModel, LayerSpec, LogitRows, ModelSpec, MoeSpec, QkNorm,
        ReferenceRouting, RopeScaling, RopeSpec, SharedWeights,
        load::{DeviceKind, ServingOptions, WeightType, load_to_serve},
    },
    moe::{
        LayerRouting, Routing, RoutingStats, SparseRouting,
        policy::{RoutingRule, WeightForm},
    },
    ops::cpu::Reduction,
    server::{self, DrainConfig, Listeners, Loaded},
    service::{
        SamplingDefaults, ServiceConfig,
        proto::{self, generate_request::Prompt, inference_client::InferenceClient},
    },
    telemetry::{
        metrics::SeriesOptions,
        otel::{OtlpConfig, Tracer},
        page::PageConfig,
    },
};
use tokenizers::{
    Tokenizer, decoders,
    models::bpe::{BPE, Vocab},
    pre_tokenizers::byte_level::ByteLevel,
};
use tokio::{
    net::TcpListener,
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tonic::{
    Code,
    codegen::http,
    transport::{Channel, Endpoint},
};

/// What the model says. 23 bytes, 18 characters; one of two and one of four bytes.
pub const SCRIPT: &str = "Größe 🙂 of a model; ";
/// Ends a generation.
pub const EOS: u32 = 256;
/// Tokens.
pub const VOCAB: usize = 257;
/// A prompt with this token gets logits that are not numbers.
pub const POISON: u32 = 255;
/// A prompt with this token makes the model panic.
pub const PANIC: u32 = 254;
/// Longest text of a Tokenize, in bytes.
pub const MAX_TOKENIZE: usize = 256 << 10;
/// The served name.
pub const MODEL: &str = "fake";

/// Far longer than any test; what fails by waiting fails here.
const PATIENCE: Duration = Duration::from_secs(20);

/// `future`, or a failed test.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("this takes too long")
}

// === the model ===

/// Holds the model's steps back while it is closed.
#[derive(Debug)]
pub struct Gate {
    /// Steps that may pass, counted from the start.
    allowed: Mutex<usize>,
    opened: Condvar,
    steps: watch::Sender<usize>,
}

impl Gate {
    fn new(open: bool) -> Arc<Self> {
        let allowed = if open { usize::MAX } else { 0 };
        Arc::new(Self { allowed: Mutex::new(allowed), opened: Condvar::new(), steps: watch::Sender::new(0) })
    }

    /// Lets all steps pass from now on.
    pub fn open(&self) {
        self.allow(usize::MAX);
    }

    /// Lets the first `n` steps pass.
    pub fn allow(&self, n: usize) {
        *self.allowed.lock().unwrap() = n;
        self.opened.notify_all();
    }

    /// Waits until the model is in its `n`-th step.
    pub async fn step(&self, n: usize) {
        soon(self.steps.subscribe().wait_for(|&steps| steps >= n)).await.unwrap();
    }

    fn pass(&self) {
        self.steps.send_modify(|steps| *steps += 1);
        let step = *self.steps.borrow();
        let allowed = self.allowed.lock().unwrap_or_else(PoisonError::into_inner);
        // A test that failed does not leave the engine's thread behind.
        let _ = self.opened.wait_timeout_while(allowed, PATIENCE, |allowed| *allowed < step);
    }
}

struct FakeModel {
    spec: ModelSpec,
    cache_blocks: usize,
    gate: Arc<Gate>,
}

impl LanguageModel for FakeModel {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn cache(&self) -> CacheShape {
        CacheShape { block_tokens: 16, num_blocks: self.cache_blocks }
    }

    fn forward(&mut self, batch: &Batch) -> Result<Forward> {
        self.gate.pass();
        assert!(!batch.tokens.contains(&PANIC), "the prompt asks for a panic");
        let mut logits = Vec::new();
        let mut start = 0;
        for span in &batch.spans {
            let rows = match span.logits {
                LogitRows::None => 0..0,
                LogitRows::Last => span.new - 1..span.new,
                LogitRows::All => 0..span.new,
            };
            let poisoned = batch.tokens[start..start + span.new].contains(&POISON);
            for row in rows {
                let said = SCRIPT.as_bytes()[(span.past + row) % SCRIPT.len()];
                let blank = if poisoned { f32::NAN } else { 0.0 };
                logits.extend((0..VOCAB).map(|token| if token == usize::from(said) { blank + 8.0 } else { blank }));
            }
            start += span.new;
        }
        let rows = logits.len() / VOCAB;
        Ok(Forward {
            logits: Tensor::from_vec(logits, (rows, VOCAB), &Device::Cpu)?,
            drawn: Vec::new(),
            layers: self.spec.moe_layers().map(|_| routing(&batch.tokens)).collect::<Result<_>>()?,
            time: ForwardTime::default(),
        })
    }

    fn exchange(&mut self, _: SharedWeights) -> Result<SharedWeights> {
        Err(Error::FailedPrecondition("the fake has no weights".into()))
    }
}

/// Every token takes expert 0 of layer 0, after some doubt; a poisoned one has no logits that are numbers.
fn routing(tokens: &[u32]) -> Result<LayerRouting> {
    let mut stats = RoutingStats::new(4);
    stats.non_finite = tokens.iter().filter(|&&token| token == POISON).count() as u64;
    let tokens = tokens.len();
    (stats.entropy_sum, stats.near_ties) = (0.5 * tokens as f64, tokens as u64);
    (stats.tokens, stats.routes) = (tokens as u64, tokens as u64);
    (stats.expert_tokens[0], stats.expert_weights[0]) = (tokens as u64, tokens as f64);
    let routing = SparseRouting { offsets: (0..=tokens as u32).collect(), expert_ids: vec![0; tokens], weights: vec![1.0; tokens] };
    let router_logits = Tensor::zeros((tokens, 4), candle_core::DType::F32, &Device::Cpu)?;
    Ok(LayerRouting { layer: 0, router_logits, routing: Routing::Sparse(routing), stats })
}

fn spec(max_context: usize, dense: bool) -> ModelSpec {
    let moe = MoeSpec { num_experts: 4, expert_width: 8, top_k: 2, weight_form: WeightForm::Renorm, shared_expert_width: None };
    let feed_forward = if dense { FeedForwardSpec::Dense { width: 8 } } else { FeedForwardSpec::Moe(moe) };
    ModelSpec {
        family: "fake_moe".into(),
        vocab_size: VOCAB,
        hidden_size: 4,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 2,
        qkv_bias: false,
        out_bias: false,
        qk_norm: QkNorm::None,
        clip_qkv: None,
        rms_norm_eps: 1e-6,
        rope: RopeSpec { theta: 1e4, scaling: RopeScaling::None },
        max_context,
        tied_head: true,
        layers: vec![LayerSpec { sliding_window: None, feed_forward }],
        reference: ReferenceRouting::Soft { temperature: 0.5 },
        estimator: "gumbel_softmax".into(),
    }
}

/// One token per byte, id = byte, and `<eos>`.
fn tokenizer() -> Tokenizer {
    let bytes = byte_characters();
    let vocab: Vocab = bytes.iter().enumerate().map(|(byte, c)| (c.to_string(), byte as u32)).collect();
    let bpe = BPE::builder().vocab_and_merges(vocab, vec![]).build().unwrap();
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, false, false)));
    tokenizer.with_decoder(Some(decoders::byte_level::ByteLevel::default()));
    tokenizer.add_special_tokens([tokenizers::AddedToken::from("<eos>", true)]).unwrap();
    assert_eq!(tokenizer.token_to_id("<eos>"), Some(EOS));
    tokenizer
}

/// The printable characters by which byte-level BPE spells bytes.
fn byte_characters() -> Vec<char> {
    let mut next = 256;
    (0..=255u8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => {
                next += 1;
                char::from_u32(next - 1).unwrap()
            }
        })
        .collect()
}

// === the server ===

/// What a test may want otherwise.
#[derive(Clone, Debug)]
pub struct Options {
    pub engine: EngineConfig,
    pub max_context: usize,
    /// Of 16 tokens.
    pub cache_blocks: usize,
    pub max_receive_bytes: usize,
    pub routing: RoutingRule,
    pub runtime_routing: bool,
    pub series: SeriesOptions,
    pub drain: DrainConfig,
    pub otlp: Option<OtlpConfig>,
    /// Whether the model may run from the start.
    pub gate_open: bool,
    pub load_fails: bool,
    pub live_page: PageConfig,
    /// The fake has no experts.
    pub dense: bool,
    /// The shipped model instead of the fake.
    pub demo: bool,
    /// Where, and how far, the shipped model may be tuned.
    pub tuning: Option<Setup>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            engine: EngineConfig {
                max_batch_requests: 4,
                max_queue_requests: 8,
                max_step_tokens: 64,
                max_new_tokens: 1 << 20,
                max_choices: 4,
                event_buffer: 64,
                reader_timeout: PATIENCE,
                ..EngineConfig::default()
            },
            max_context: 256,
            cache_blocks: 1 << 23,
            max_receive_bytes: 4 << 20,
            routing: RoutingRule::default(),
            runtime_routing: true,
            series: SeriesOptions::default(),
            drain: DrainConfig { grace: Duration::ZERO, timeout: PATIENCE },
            otlp: None,
            gate_open: true,
            load_fails: false,
            live_page: PageConfig::default(),
            dense: false,
            demo: false,
            tuning: None,
        }
    }
}

impl Options {
    /// The shipped model.
    pub fn demo() -> Self {
        Self { demo: true, ..Self::default() }
    }

    /// The shipped model, which can be tuned: jobs are in `dir`, texts may be read below `data`.
    pub fn tuning(dir: &Path, data: &[&Path]) -> Self {
        let guard = GuardConfig { watch: Duration::ZERO, max_gap_ratio: 1.5, max_error_rate: 0.05 };
        let data = data.iter().map(|path| path.to_path_buf()).collect();
        let setup = Setup { dir: dir.join("tuning"), data, max_tokens: 4096, max_memory: None, keep: 16, guard };
        Self { tuning: Some(setup), ..Self::demo() }
    }

    /// A context that no test comes to the end of: a generation goes on until something ends it.
    pub fn endless() -> Self {
        Self { max_context: 1 << 24, ..Self::default() }
    }
}

/// A running server.
pub struct TestServer {
    pub grpc: SocketAddr,
    pub observers: SocketAddr,
    pub gate: Arc<Gate>,
    shutdown: Option<oneshot::Sender<()>>,
    running: JoinHandle<Result<()>>,
}

impl TestServer {
    pub async fn start(options: Options) -> Self {
        let grpc = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let observers = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (grpc_address, observers_address) = (grpc.local_addr().unwrap(), observers.local_addr().unwrap());
        let gate = Gate::new(options.gate_open);
        let (shutdown, stopped) = oneshot::channel();
        let tracer = options.otlp.as_ref().map_or_else(Tracer::default, |config| Tracer::start(config).unwrap());
        let (drain, model_gate) = (options.drain, gate.clone());
        let listeners = Listeners { grpc, metrics: Some(observers), live_page: options.live_page.clone() };
        let load = move || load(options, model_gate);
        let running = tokio::spawn(server::run(listeners, drain, tracer, load, async {
            let _ = stopped.await;
        }));
        Self { grpc: grpc_address, observers: observers_address, gate, shutdown: Some(shutdown), running }
    }

    pub async fn channel(&self) -> Channel {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.grpc)).unwrap();
        soon(endpoint.connect()).await.unwrap()
    }

    pub async fn client(&self) -> InferenceClient<Channel> {
        InferenceClient::new(self.channel().await)
    }

    /// Tells the server to stop.
    pub fn signal(&mut self) {
        let _ = self.shutdown.take().expect("signalled once").send(());
    }

    /// What the server returned.
    pub async fn ended(mut self) -> Result<()> {
        soon(&mut self.running).await.unwrap()
    }

    /// `GET path` on the observers' port: status line and body.
    pub async fn get(&self, path: &str) -> (String, String) {
        let (address, path) = (self.observers, path.to_owned());
        let work = tokio::task::spawn_blocking(move || {
            let mut socket = std::net::TcpStream::connect(address).unwrap();
            write!(socket, "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").unwrap();
            let mut response = String::new();
            socket.read_to_string(&mut response).unwrap();
            response
        });
        let response = soon(work).await.unwrap();
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        (head.lines().next().unwrap().to_owned(), body.to_owned())
    }

    /// The value of the series `name` with all of `labels`; `None` if there is none.
    pub async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let (_, page) = self.get("/metrics").await;
        let labels: Vec<_> = labels.iter().map(|(key, value)| format!("{key}=\"{value}\"")).collect();
        page.lines()
            .find(|line| {
                line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])) && labels.iter().all(|l| line.contains(l))
            })
            .and_then(|line| line.rsplit(' ').next()?.parse().ok())
    }

    /// Waits until the series has at least this value: counts follow the answer, not the other way round.
    pub async fn metric_reaches(&self, name: &str, labels: &[(&str, &str)], value: f64) {
        let reached = async {
            while self.metric(name, labels).await.is_none_or(|found| found < value) {
                tokio::task::yield_now().await;
            }
        };
        soon(reached).await;
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        // A step that waits would keep the engine's thread, and the test that joins it.
        self.gate.open();
    }
}

fn load(options: Options, gate: Arc<Gate>) -> Result<Loaded> {
    if options.load_fails {
        return Err(Error::NotFound("no such checkpoint".into()));
    }
    let service = ServiceConfig {
        model_name: MODEL.into(),
        device: "cpu".into(),
        dtype: "f32".into(),
        routing: options.routing,
        runtime_routing: options.runtime_routing,
        sampling: SamplingDefaults::default(),
        max_receive_bytes: options.max_receive_bytes,
        max_tokenize_bytes: MAX_TOKENIZE,
        max_send_bytes: 64 << 20,
        series: options.series,
    };
    if options.demo {
        return load_demo(options.engine, service, options.tuning);
    }
    let (spec, cache_blocks) = (spec(options.max_context, options.dense), options.cache_blocks);
    let model: Box<dyn LanguageModel> = Box::new(FakeModel { spec, cache_blocks, gate });
    let (tokenizer, eos_token_ids, engine) = (Arc::new(tokenizer()), vec![EOS], options.engine);
    Ok(Loaded { model, generation: FIRST_GENERATION, background: None, tokenizer, eos_token_ids, engine, service, tuning: None })
}

/// The shipped model, whose sums do not depend on who else is there.
fn load_demo(engine: EngineConfig, service: ServiceConfig, setup: Option<Setup>) -> Result<Loaded> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    let options = ServingOptions { device: DeviceKind::Cpu, weights: WeightType::F32, reduction: Reduction::BatchInvariant };
    let (checkpoint, weights) = load_to_serve(&folder, options, false)?;
    let tokenizer = Arc::new(checkpoint.tokenizer()?);
    let eos_token_ids = checkpoint.generation().eos_token_ids.clone();
    let tuning = setup.map(|setup| Registry::open(setup, checkpoint, weights.clone())).transpose()?;
    let (generation, weights) = tuning.as_ref().map_or((FIRST_GENERATION, weights), Registry::current);
    let model = weights.start(CacheShape { block_tokens: 16, num_blocks: 256 })?;
    Ok(Loaded { model, generation, background: Some(Box::new(weights)), tokenizer, eos_token_ids, engine, service, tuning })
}

// === requests ===

/// Continue `text` by `tokens` tokens.
pub fn generate(text: &str, tokens: u32) -> proto::GenerateRequest {
    proto::GenerateRequest {
        prompt: Some(Prompt::Text(text.into())),
        sampling: Some(proto::SamplingParams { max_new_tokens: Some(tokens), ..Default::default() }),
        ..Default::default()
    }
}

/// What the model says after a prompt of `prompt` tokens, `tokens` tokens long.
pub fn said(prompt: usize, tokens: usize) -> Vec<u8> {
    SCRIPT.bytes().cycle().skip(prompt - 1).take(tokens).collect()
}

/// All messages of a stream, and the status that ended it.
pub async fn collect(mut stream: tonic::Streaming<proto::GenerateResponse>) -> (Vec<proto::GenerateResponse>, Option<tonic::Status>) {
    let mut messages = Vec::new();
    loop {
        match soon(stream.message()).await {
            Ok(Some(message)) => messages.push(message),
            Ok(None) => return (messages, None),
            Err(status) => return (messages, Some(status)),
        }
    }
}

// === the raw client ===

/// A call below tonic: any bytes, any headers, and no timer of its own.
#[derive(Clone, Debug)]
pub struct RawCall {
    method: String,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

/// Headers or trailers with the status.
#[derive(Debug)]
pub struct RawAnswer(http::HeaderMap);

impl RawCall {
    pub fn new(method: &str, message: &impl prost::Message) -> Self {
        Self::raw(method, message.encode_to_vec())
    }

    /// `message` framed as one message, whatever it is. The method is one of Inference, or has its service before it, as in
    /// `Routing/TraceRouting`.
    pub fn raw(method: &str, message: Vec<u8>) -> Self {
        let length = u32::try_from(message.len()).unwrap().to_be_bytes();
        let body = [&[0], &length[..], &message].concat();
        Self { method: method.into(), headers: Vec::new(), body }
    }

    /// Without the frame.
    pub fn unframed(mut self) -> Self {
        self.body.drain(..5);
        self
    }

    pub fn header(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// Calls on a connection of its own, and waits for the end.
    pub async fn send(self, server: &TestServer) -> RawAnswer {
        soon(self.exchange(server.grpc)).await
    }

    async fn exchange(self, address: SocketAddr) -> RawAnswer {
        let socket = tokio::net::TcpStream::connect(address).await.unwrap();
        let (mut requests, connection) = h2::client::handshake(socket).await.unwrap();
        let connection = tokio::spawn(connection);
        let service = if self.method.contains('/') { "" } else { "Inference/" };
        let uri = format!("http://{address}/hardmax.v1.{service}{}", self.method);
        let mut request = http::Request::post(uri).header("content-type", "application/grpc").header("te", "trailers");
        for (name, value) in &self.headers {
            request = request.header(*name, value);
        }
        let (response, mut body) = requests.send_request(request.body(()).unwrap(), false).unwrap();
        // Refused while it is sent: the answer says why.
        let _ = body.send_data(self.body.into(), true);
        let response = response.await.unwrap();
        let headers = response.headers().clone();
        let mut body = response.into_body();
        while let Some(data) = body.data().await {
            let _ = body.flow_control().release_capacity(data.unwrap().len());
        }
        let answer = body.trailers().await.unwrap().unwrap_or(headers);
        connection.abort();
        RawAnswer(answer)
    }
}

impl RawAnswer {
    pub fn code(&self) -> Option<Code> {
        self.0.get("grpc-status").map(|status| Code::from_bytes(status.as_bytes()))
    }

    pub fn message(&self) -> &str {
        self.0.get("grpc-message").and_then(|message| message.to_str().ok()).unwrap_or_default()
    }
}
