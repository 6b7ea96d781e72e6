//! Traces: a span for each RPC with its phases, sent to an OpenTelemetry collector over OTLP, and the trace ids of log lines.
//!
//! Names and attributes are those of OpenTelemetry's conventions for RPC servers and for generative AI; `docs/tracing.md` lists them.
//! Spans are made where a request begins and where it ends, never per token, and wait in a bounded queue for a thread that sends
//! them: a collector that is slow or gone costs spans, not time.

mod context;
mod export;

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use opentelemetry::{
    Context, KeyValue,
    trace::{Span as _, SpanBuilder, SpanKind, Status, TraceContextExt as _, Tracer as _, TracerProvider as _},
};
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};

use self::export::Backlog;
use crate::error::Result;

/// Where spans go, and how many.
#[derive(Clone, Debug, PartialEq)]
pub struct OtlpConfig {
    /// `http://HOST:PORT` of a collector that speaks OTLP with gRPC.
    pub endpoint: String,
    /// Share of the traces that begin here, 0 to 1. A caller's decision goes before it.
    pub sample_ratio: f64,
    /// `service.name` of all spans.
    pub service_name: String,
}

/// Makes the spans of requests. The default makes none, and only reads the callers' trace ids. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Tracer {
    export: Option<Export>,
}

#[derive(Clone, Debug)]
struct Export {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    backlog: Arc<Backlog>,
}

/// The span of a request. Clones are the same; the default is none, and belongs to no trace.
#[derive(Clone, Debug, Default)]
pub struct RequestSpan {
    trace_id: Option<Arc<str>>,
    recorded: Option<Arc<Recorded>>,
}

/// A span that is exported, after [`RequestSpan::end`].
#[derive(Debug)]
struct Recorded {
    tracer: SdkTracer,
    /// Holds the span, as the parent of others.
    context: Context,
    /// The same moment on both clocks: durations are those of the first, dates those of the second.
    began: (Instant, SystemTime),
}

/// What came of a request, as far as it came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub input_tokens: usize,
    /// Those of them that were in the cache.
    pub cached_tokens: usize,
    /// Tokens generated, over all choices.
    pub output_tokens: usize,
    /// Of the weights.
    pub generation: u64,
}

/// The moments that divide a request's time in the engine. What it did not come to is `None`.
#[derive(Clone, Copy, Debug)]
pub struct Phases {
    /// It was put in the queue.
    pub submitted: Instant,
    /// The first step that worked on it began.
    pub first_step: Option<Instant>,
    /// It had its first token. A score has none.
    pub first_token: Option<Instant>,
    /// It was over.
    pub ended: Instant,
}

// === impl Tracer ===

impl Tracer {
    /// Starts the thread that sends spans. Call it on a tokio runtime.
    ///
    /// Fails with `InvalidArgument` where the endpoint is no URL, or asks for TLS. Whether a collector is there shows only when spans are
    /// sent.
    pub fn start(config: &OtlpConfig) -> Result<Self> {
        let backlog = Arc::new(Backlog::default());
        let provider = export::provider(config, &backlog)?;
        let tracer = provider.tracer(env!("CARGO_PKG_NAME"));
        Ok(Self { export: Some(Export { provider, tracer, backlog }) })
    }

    /// Begins the span of an RPC. `method` is `package.Service/Method`, a name that this server knows; the others are metadata of the
    /// call, which are ignored where they are malformed.
    pub fn begin(&self, method: &str, traceparent: Option<&str>, tracestate: Option<&str>) -> RequestSpan {
        let parent = traceparent.and_then(|parent| context::parent(parent, tracestate.unwrap_or_default()));
        let Some(Export { tracer, .. }) = &self.export else {
            return RequestSpan { trace_id: parent.map(|parent| parent.trace_id().to_string().into()), recorded: None };
        };
        let began = (Instant::now(), SystemTime::now());
        let around = parent.map_or_else(Context::new, |parent| Context::new().with_remote_span_context(parent));
        let attributes = [KeyValue::new("rpc.system.name", "grpc"), KeyValue::new("rpc.method", method.to_owned())];
        let builder = SpanBuilder::from_name(method.to_owned()).with_kind(SpanKind::Server).with_start_time(began.1);
        let span = tracer.build_with_context(builder.with_attributes(attributes), &around);
        let known = span.span_context();
        let trace_id = known.is_valid().then(|| known.trace_id().to_string().into());
        let recorded = |span| Arc::new(Recorded { tracer: tracer.clone(), context: Context::new().with_span(span), began });
        RequestSpan { trace_id, recorded: span.is_recording().then(|| recorded(span)) }
    }

    /// Sends what has ended, for at most `limit`, and makes no spans any more.
    pub async fn shutdown(&self, limit: Duration) {
        let Some(Export { provider, backlog, .. }) = self.export.clone() else { return };
        // The sending thread is waited for, while the connection needs this one.
        let flushed = tokio::task::spawn_blocking(move || {
            let flushed = provider.shutdown_with_timeout(limit);
            backlog.report();
            flushed
        });
        match flushed.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the last spans may not have reached the collector"),
            Err(error) => tracing::error!(%error, "the export of spans did not shut down"),
        }
    }
}

// === impl RequestSpan ===

impl RequestSpan {
    /// The trace id, in hexadecimal: the caller's; if it gave none, one made here where spans are exported.
    pub fn trace_id(&self) -> Option<&Arc<str>> {
        self.trace_id.as_ref()
    }

    /// Whether the span is exported. Otherwise nothing else here has an effect.
    pub fn is_recorded(&self) -> bool {
        self.recorded.is_some()
    }

    /// The id that the request's answers and log lines carry.
    pub fn request_id(&self, id: &str) {
        self.set(|| [KeyValue::new("hardmax.request_id", id.to_owned())]);
    }

    /// What a request asks of the model. `operation` is one of the values of `gen_ai.operation.name`, or
    /// a word of our own.
    pub fn asks(&self, operation: &'static str, model: &str, routing: impl FnOnce() -> String) {
        self.set(|| {
            [
                KeyValue::new("gen_ai.operation.name", operation),
                KeyValue::new("gen_ai.provider.name", env!("CARGO_PKG_NAME")),
                KeyValue::new("gen_ai.request.model", model.to_owned()),
                KeyValue::new("gen_ai.response.model", model.to_owned()),
                KeyValue::new("hardmax.routing", routing()),
            ]
        });
    }

    /// What it used.
    pub fn used(&self, usage: &Usage) {
        let count = |name, tokens: usize| KeyValue::new(name, i64::try_from(tokens).unwrap_or(i64::MAX));
        self.set(|| {
            [
                count("gen_ai.usage.input_tokens", usage.input_tokens),
                count("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens),
                count("gen_ai.usage.output_tokens", usage.output_tokens),
                KeyValue::new("hardmax.generation", i64::try_from(usage.generation).unwrap_or(i64::MAX)),
            ]
        });
    }

    /// Adds a span for each phase that it came to, without gaps, and the event of the first token.
    pub fn phases(&self, phases: &Phases) {
        let Some(span) = &self.recorded else { return };
        let Phases { submitted, first_step, first_token, ended } = *phases;
        span.child("queue", submitted, first_step.unwrap_or(ended));
        if let Some(first_step) = first_step {
            span.child("prefill", first_step, first_token.unwrap_or(ended));
        }
        if let Some(first_token) = first_token {
            span.context.span().add_event_with_timestamp("first_token", span.date(first_token), Vec::new());
            span.child("decode", first_token, ended);
        }
    }

    /// The RPC is over with the status `code`, as gRPC spells it; `failure` says why, if that is a failure of this server or a client that
    /// went away.
    pub fn end(&self, code: &'static str, failure: Option<String>) {
        let Some(span) = &self.recorded else { return };
        let own = span.context.span();
        own.set_attribute(KeyValue::new("rpc.response.status_code", code));
        if let Some(failure) = failure {
            own.set_attribute(KeyValue::new("error.type", code));
            own.set_status(Status::error(failure));
        }
        own.end_with_timestamp(span.date(Instant::now()));
    }

    fn set<const N: usize>(&self, attributes: impl FnOnce() -> [KeyValue; N]) {
        if let Some(span) = &self.recorded {
            span.context.span().set_attributes(attributes());
        }
    }
}

// === impl Recorded ===

impl Recorded {
    fn date(&self, instant: Instant) -> SystemTime {
        let (then, date) = self.began;
        date + instant.saturating_duration_since(then)
    }

    fn child(&self, name: &'static str, began: Instant, ended: Instant) {
        let builder = SpanBuilder::from_name(name).with_start_time(self.date(began));
        let mut child = self.tracer.build_with_context(builder, &self.context);
        child.end_with_timestamp(self.date(ended.max(began)));
    }
}
