//! Traces: what a collector is sent, what happens where there is none, and the trace ids of log lines.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use hardmax::{
    service::proto::{GenerateRequest, ScoreRequest, TokenIds, generate_request::Prompt, score_request::Input},
    telemetry::otel::OtlpConfig,
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use tokio::net::TcpListener;
use tonic::{Code, Request, Response, Status, transport::server::TcpIncoming};

use crate::support::{MODEL, Options, POISON, TestServer, collect, generate, soon};

const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT_ID: &str = "00f067aa0ba902b7";

/// A collector in this process.
pub struct Collector {
    /// As `http://HOST:PORT`.
    pub endpoint: String,
    spans: Spans,
}

#[derive(Clone, Default)]
struct Spans(Arc<Mutex<Received>>);

/// What came, with the resource that it came from.
#[derive(Default)]
struct Received {
    resource: Vec<KeyValue>,
    spans: Vec<Span>,
}

#[tonic::async_trait]
impl TraceService for Spans {
    async fn export(&self, request: Request<ExportTraceServiceRequest>) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut received = self.0.lock().unwrap();
        for from in request.into_inner().resource_spans {
            received.resource = from.resource.unwrap_or_default().attributes;
            received.spans.extend(from.scope_spans.into_iter().flat_map(|scope| scope.spans));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let spans = Spans::default();
        let service = TraceServiceServer::new(spans.clone());
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(TcpIncoming::from(listener)));
        Self { endpoint, spans }
    }

    /// `service.name` of the sender.
    pub fn service_name(&self) -> Option<Value> {
        attribute(&self.spans.0.lock().unwrap().resource, "service.name")
    }

    /// Spans of RPCs, in the order of their ends.
    fn servers(&self) -> Vec<Span> {
        let received = self.spans.0.lock().unwrap();
        received.spans.iter().filter(|span| span.kind() == SpanKind::Server).cloned().collect()
    }

    /// The only span of an RPC.
    pub fn server(&self) -> Span {
        let servers = self.servers();
        assert_eq!(servers.len(), 1, "{servers:?}");
        servers[0].clone()
    }

    /// Names of the phases of `parent`, which follow each other without gaps within it.
    pub fn phases(&self, parent: &Span) -> Vec<String> {
        let received = self.spans.0.lock().unwrap();
        let mut phases: Vec<&Span> = received.spans.iter().filter(|span| span.parent_span_id == parent.span_id).collect();
        phases.sort_by_key(|phase| (phase.start_time_unix_nano, phase.end_time_unix_nano));
        let mut at = None;
        for phase in &phases {
            assert_eq!((phase.kind(), &phase.trace_id), (SpanKind::Internal, &parent.trace_id));
            assert_eq!(at.unwrap_or(phase.start_time_unix_nano), phase.start_time_unix_nano, "a gap before {}", phase.name);
            assert!(parent.start_time_unix_nano <= phase.start_time_unix_nano && phase.end_time_unix_nano <= parent.end_time_unix_nano);
            at = Some(phase.end_time_unix_nano);
        }
        phases.iter().map(|phase| phase.name.clone()).collect()
    }
}

fn attribute(attributes: &[KeyValue], key: &str) -> Option<Value> {
    attributes.iter().find(|attribute| attribute.key == key)?.value.clone()?.value
}

fn text(span: &Span, key: &str) -> Option<String> {
    match attribute(&span.attributes, key)? {
        Value::StringValue(text) => Some(text),
        other => panic!("{key} is {other:?}"),
    }
}

fn number(span: &Span, key: &str) -> Option<i64> {
    match attribute(&span.attributes, key)? {
        Value::IntValue(number) => Some(number),
        other => panic!("{key} is {other:?}"),
    }
}

/// Status code of the RPC, and whether and how the span is marked as failed.
fn outcome(span: &Span) -> (String, Option<String>, Option<String>) {
    let status = span.status.clone().unwrap_or_default();
    let message = (status.code() == StatusCode::Error).then_some(status.message);
    (text(span, "rpc.response.status_code").unwrap(), text(span, "error.type"), message)
}

fn failed(code: &str, message: &str) -> (String, Option<String>, Option<String>) {
    (code.into(), Some(code.into()), Some(message.into()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn to(endpoint: &str, sample_ratio: f64) -> Option<OtlpConfig> {
    Some(OtlpConfig { endpoint: endpoint.into(), sample_ratio, service_name: "test".into() })
}

async fn traced(options: Options) -> (Collector, TestServer) {
    let collector = Collector::start().await;
    let server = TestServer::start(Options { otlp: to(&collector.endpoint, 1.0), ..options }).await;
    (collector, server)
}

/// Ends the server, which sends what it has.
async fn flush(mut server: TestServer) {
    server.signal();
    server.ended().await.unwrap();
}

fn within<T>(message: T, traceparent: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("traceparent", traceparent.parse().unwrap());
    request
}

#[tokio::test]
async fn a_generation_is_a_span_of_its_callers_trace_with_its_phases() {
    let (collector, server) = traced(Options::default()).await;
    let mut request = within(generate("ab", 5), &format!("00-{TRACE_ID}-{PARENT_ID}-01"));
    request.metadata_mut().insert("tracestate", "vendor=value".parse().unwrap());
    request.get_mut().request_id = "mine".into();
    collect(server.client().await.generate(request).await.unwrap().into_inner()).await;
    flush(server).await;

    let span = collector.server();
    assert_eq!(span.name, "hardmax.v1.Inference/Generate");
    assert_eq!(
        (hex(&span.trace_id), hex(&span.parent_span_id), span.trace_state.as_str()),
        (TRACE_ID.into(), PARENT_ID.into(), "vendor=value")
    );
    assert_eq!(outcome(&span), ("OK".into(), None, None));
    let texts = [
        ("rpc.system.name", "grpc"),
        ("rpc.method", "hardmax.v1.Inference/Generate"),
        ("gen_ai.operation.name", "text_completion"),
        ("gen_ai.provider.name", "hardmax"),
        ("gen_ai.request.model", MODEL),
        ("gen_ai.response.model", MODEL),
        ("hardmax.routing", "native"),
        ("hardmax.request_id", "mine"),
    ];
    for (key, expected) in texts {
        assert_eq!(text(&span, key).as_deref(), Some(expected), "{key}");
    }
    let numbers = [
        ("gen_ai.usage.input_tokens", 2),
        ("gen_ai.usage.cache_read.input_tokens", 0),
        ("gen_ai.usage.output_tokens", 5),
        ("hardmax.generation", 1),
    ];
    for (key, expected) in numbers {
        assert_eq!(number(&span, key), Some(expected), "{key}");
    }
    assert_eq!(collector.phases(&span), ["queue", "prefill", "decode"]);
    let [first_token] = &span.events[..] else { panic!("{:?}", span.events) };
    assert_eq!(first_token.name, "first_token");
    assert_eq!(collector.service_name(), Some(Value::StringValue("test".into())));
}

#[tokio::test]
async fn choices_share_their_phases_and_add_up() {
    let (collector, server) = traced(Options::default()).await;
    let mut request = generate("abc", 4);
    request.sampling.as_mut().unwrap().n = Some(3);
    collect(server.client().await.generate(request).await.unwrap().into_inner()).await;
    flush(server).await;
    let span = collector.server();
    assert_eq!(collector.phases(&span), ["queue", "prefill", "decode"]);
    assert_eq!((number(&span, "gen_ai.usage.input_tokens"), number(&span, "gen_ai.usage.output_tokens")), (Some(3), Some(12)));
    assert_eq!(number(&span, "gen_ai.usage.cache_read.input_tokens"), Some(0), "that of the first choice");
}

#[tokio::test]
async fn a_failure_is_one() {
    let (collector, server) = traced(Options::default()).await;
    let request = GenerateRequest { prompt: Some(Prompt::TokenIds(TokenIds { ids: vec![POISON] })), ..generate("", 4) };
    let (_, end) = collect(server.client().await.generate(request).await.unwrap().into_inner()).await;
    assert_eq!(end.unwrap().code(), Code::Internal);
    flush(server).await;
    let span = collector.server();
    assert_eq!(outcome(&span), failed("INTERNAL", "the model produced non-finite logits for this input"));
    assert_eq!(collector.phases(&span), ["queue", "prefill"]);
    assert_eq!(number(&span, "gen_ai.usage.output_tokens"), None);
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_span() {
    let (collector, server) = traced(Options::endless()).await;
    let mut client = server.client().await;
    let mut stream = client.generate(generate("a", 1 << 20)).await.unwrap().into_inner();
    soon(stream.message()).await.unwrap();
    drop(stream);
    server.metric_reaches("hardmax_requests_total", &[("method", "Generate"), ("code", "CANCELLED")], 1.0).await;
    flush(server).await;
    let span = collector.server();
    assert_eq!(outcome(&span), failed("CANCELLED", "cancelled by the client"));
    assert_eq!(collector.phases(&span), ["queue", "prefill", "decode"]);
    assert_eq!(span.events.len(), 1);
}

#[tokio::test]
async fn a_deadline_ends_the_phase_that_it_passed_in() {
    let (collector, server) = traced(Options { gate_open: false, ..Options::default() }).await;
    let request = ScoreRequest { input: Some(Input::Text("abc".into())), timeout_seconds: Some(0.1), ..Default::default() };
    let status = server.client().await.score(request).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    server.gate.open();
    flush(server).await;
    let span = collector.server();
    assert_eq!((span.name.as_str(), text(&span, "gen_ai.operation.name").unwrap().as_str()), ("hardmax.v1.Inference/Score", "score"));
    assert_eq!(outcome(&span), failed("DEADLINE_EXCEEDED", "deadline exceeded while waiting for the answer"));
    assert_eq!(collector.phases(&span), ["queue", "prefill"]);
    assert!(span.events.is_empty());
}

#[tokio::test]
async fn what_the_client_did_wrong_is_no_failure_of_the_server() {
    let (collector, server) = traced(Options::default()).await;
    server.client().await.generate(generate("", 5)).await.unwrap_err();
    flush(server).await;
    let span = collector.server();
    assert_eq!(outcome(&span), ("INVALID_ARGUMENT".into(), None, None));
    assert!(collector.phases(&span).is_empty());
}

#[tokio::test]
async fn without_a_parent_that_is_one_a_trace_begins_here() {
    let (collector, server) = traced(Options::default()).await;
    let mut client = server.client().await;
    let ask = || generate("a", 1);
    collect(client.generate(ask()).await.unwrap().into_inner()).await;
    for malformed in ["", "nonsense", &format!("00-{}-{PARENT_ID}-01", "0".repeat(32)), &format!("00-{TRACE_ID}-{PARENT_ID}")] {
        collect(client.generate(within(ask(), malformed)).await.unwrap().into_inner()).await;
    }
    flush(server).await;
    let spans = collector.servers();
    assert_eq!(spans.len(), 5);
    for span in spans {
        assert!(span.parent_span_id.is_empty() && hex(&span.trace_id) != TRACE_ID, "{span:?}");
        assert!(span.trace_id.len() == 16 && span.trace_id.iter().any(|&byte| byte != 0), "{span:?}");
    }
}

#[tokio::test]
async fn the_caller_decides_what_is_sampled_and_the_ratio_the_rest() {
    let collector = Collector::start().await;
    let server = TestServer::start(Options { otlp: to(&collector.endpoint, 0.0), ..Options::default() }).await;
    let mut client = server.client().await;
    collect(client.generate(generate("a", 1)).await.unwrap().into_inner()).await;
    for flags in ["01", "00"] {
        let request = within(generate("a", 1), &format!("00-{TRACE_ID}-{PARENT_ID}-{flags}"));
        collect(client.generate(request).await.unwrap().into_inner()).await;
    }
    flush(server).await;
    assert_eq!(hex(&collector.server().trace_id), TRACE_ID, "the one that its caller traces");
}

/// Answers, and a drain that takes less than `most`.
async fn serves_without(endpoint: &str, most: Duration) {
    let mut server = TestServer::start(Options { otlp: to(endpoint, 1.0), ..Options::default() }).await;
    let mut client = server.client().await;
    for _ in 0..8 {
        let (messages, end) = collect(client.generate(generate("a", 4)).await.unwrap().into_inner()).await;
        assert!(end.is_none() && messages.last().unwrap().finish.is_some());
    }
    drop(client);
    server.signal();
    let signalled = Instant::now();
    server.ended().await.unwrap();
    assert!(signalled.elapsed() < most, "{:?}", signalled.elapsed());
}

#[tokio::test]
async fn a_collector_that_is_down_delays_nothing() {
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    serves_without(&format!("http://{nobody}"), Duration::from_secs(8)).await;
}

#[tokio::test]
async fn a_collector_that_hangs_delays_the_end_by_a_bounded_time() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    serves_without(&format!("http://{}", silent.local_addr().unwrap()), Duration::from_secs(8)).await;
}

/// Log lines of this thread, as long as the guard lives.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn listen(&self) -> tracing::subscriber::DefaultGuard {
        let log = self.clone();
        let lines = tracing_subscriber::fmt().json().with_max_level(tracing::Level::DEBUG).with_writer(move || log.clone());
        tracing::subscriber::set_default(lines.finish())
    }

    /// Trace ids of the lines that say that a request was refused.
    fn refused(&self) -> Vec<Option<String>> {
        let log = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["fields"].clone());
        let refused = lines.filter(|fields| fields["message"] == "request refused");
        refused.map(|fields| fields["trace_id"].as_str().map(str::to_owned)).collect()
    }
}

#[tokio::test]
async fn log_lines_carry_the_trace_id_sampled_or_not() {
    let log = Log::default();
    let _guard = log.listen();
    let ask = async |server: &TestServer, unsampled: bool| {
        let mut request = Request::new(generate("", 1));
        if unsampled {
            request.metadata_mut().insert("traceparent", format!("00-{TRACE_ID}-{PARENT_ID}-00").parse().unwrap());
        }
        server.client().await.generate(request).await.unwrap_err();
    };
    let server = TestServer::start(Options::default()).await;
    ask(&server, false).await;
    ask(&server, true).await;
    assert_eq!(log.refused(), [None, Some(TRACE_ID.into())], "without an endpoint only the caller's");
    flush(server).await;

    let collector = Collector::start().await;
    let server = TestServer::start(Options { otlp: to(&collector.endpoint, 0.0), ..Options::default() }).await;
    ask(&server, false).await;
    ask(&server, true).await;
    flush(server).await;
    let [.., Some(made), Some(given)] = &log.refused()[..] else { panic!("{:?}", log.refused()) };
    assert!(made.len() == 32 && made != TRACE_ID && given == TRACE_ID, "{made} {given}");
    assert!(collector.servers().is_empty());
}
