//! From the end of a span to the collector: a bounded queue, a thread that sends batches, and the count of what is lost on the way.

use std::{
    fmt::Display,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::WithExportConfig as _;
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracerProvider, Span, SpanData, SpanExporter, SpanProcessor},
};

use super::OtlpConfig;
use crate::error::{Error, Result};

/// Spans that may wait for the collector; a request has four. One more is dropped.
const MAX_WAITING: usize = 4096;

/// How often the log says that spans are lost, while they are.
const REPORT_EVERY: Duration = Duration::from_secs(60);

/// Makes the exporter and its thread. Needs a tokio runtime, on which the connection lives; connects when there is something to send.
pub(super) fn provider(config: &OtlpConfig, backlog: &Arc<Backlog>) -> Result<SdkTracerProvider> {
    let exporter = opentelemetry_otlp::SpanExporter::builder().with_tonic().with_endpoint(&config.endpoint).build();
    let exporter = exporter.map_err(|error| Error::invalid("--otlp-endpoint", format!("'{}': {error}", config.endpoint)))?;
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let resource = Resource::builder().with_service_name(config.service_name.clone()).with_attribute(version);
    Ok(SdkTracerProvider::builder()
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(config.sample_ratio))))
        .with_resource(resource.build())
        .with_span_processor(Bounded::new(exporter, backlog.clone()))
        .build())
}

/// Spans that have ended and are not sent yet, and how many never will be.
#[derive(Debug)]
pub(super) struct Backlog {
    limit: usize,
    waiting: AtomicUsize,
    lost: Mutex<Lost>,
}

#[derive(Debug, Default)]
struct Lost {
    /// Since the log last said so.
    spans: usize,
    reported: Option<Instant>,
}

/// Lets spans into the queue as long as there is room. The queue of the SDK is as long, so it never drops one uncounted.
#[derive(Debug)]
struct Bounded {
    queue: BatchSpanProcessor,
    backlog: Arc<Backlog>,
}

/// Counts what leaves the queue, and what the collector does not take.
#[derive(Debug)]
struct Counted<E> {
    exporter: E,
    backlog: Arc<Backlog>,
}

// === impl Backlog ===

impl Default for Backlog {
    fn default() -> Self {
        Self { limit: MAX_WAITING, waiting: AtomicUsize::new(0), lost: Mutex::default() }
    }
}

impl Backlog {
    /// Takes a place in the queue; `false` if it is full.
    fn enter(&self) -> bool {
        let more = |waiting| (waiting < self.limit).then_some(waiting + 1);
        self.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    fn leave(&self, spans: usize) {
        self.waiting.fetch_sub(spans, Ordering::Relaxed);
    }

    fn lose(&self, spans: usize, reason: &dyn Display) {
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        lost.spans += spans;
        if lost.reported.is_none_or(|at| at.elapsed() >= REPORT_EVERY) {
            lost.report(reason);
        }
    }

    /// Says what has not been said yet.
    pub(super) fn report(&self) {
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        if lost.spans > 0 {
            lost.report(&"more of the same");
        }
    }
}

impl Lost {
    fn report(&mut self, reason: &dyn Display) {
        tracing::warn!(spans = self.spans, %reason, "spans are lost; requests are not affected");
        *self = Self { spans: 0, reported: Some(Instant::now()) };
    }
}

// === impl Bounded ===

impl Bounded {
    fn new(exporter: impl SpanExporter + 'static, backlog: Arc<Backlog>) -> Self {
        let config = BatchConfigBuilder::default().with_max_queue_size(backlog.limit).build();
        let exporter = Counted { exporter, backlog: backlog.clone() };
        Self { queue: BatchSpanProcessor::builder(exporter).with_batch_config(config).build(), backlog }
    }
}

impl SpanProcessor for Bounded {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.queue.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        if self.backlog.enter() {
            self.queue.on_end(span);
        } else {
            self.backlog.lose(1, &"the collector does not keep up, and the queue is full");
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.queue.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.queue.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.queue.set_resource(resource);
    }
}

// === impl Counted ===

impl<E: SpanExporter> SpanExporter for Counted<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let result = self.exporter.export(batch).await;
        self.backlog.leave(spans);
        if let Err(error) = &result {
            self.backlog.lose(spans, error);
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use opentelemetry::trace::{Tracer as _, TracerProvider as _};
    use opentelemetry_sdk::error::OTelSdkError;

    use super::*;

    /// A collector that answers each batch once it is told how, and refuses when nobody tells it any more.
    #[derive(Debug)]
    struct Collector(Mutex<mpsc::Receiver<OTelSdkResult>>);

    impl SpanExporter for Collector {
        async fn export(&self, _: Vec<SpanData>) -> OTelSdkResult {
            let refused = || OTelSdkError::InternalFailure("refused".into());
            self.0.lock().unwrap().recv().unwrap_or_else(|_| Err(refused()))
        }
    }

    fn lost(backlog: &Backlog) -> (usize, bool) {
        let lost = backlog.lost.lock().unwrap();
        (lost.spans, lost.reported.is_some())
    }

    #[test]
    fn a_full_queue_loses_spans_and_delays_nobody() {
        let (answers, receiver) = mpsc::sync_channel(1);
        let backlog = Arc::new(Backlog { limit: 8, ..Backlog::default() });
        let provider =
            SdkTracerProvider::builder().with_span_processor(Bounded::new(Collector(Mutex::new(receiver)), backlog.clone())).build();
        let tracer = provider.tracer("test");
        for _ in 0..20 {
            drop(tracer.start("span"));
        }
        assert_eq!(backlog.waiting.load(Ordering::Relaxed), 8, "what is being sent counts");
        assert_eq!(lost(&backlog), (11, true), "12 are lost, and the first was told at once");

        answers.send(Ok(())).unwrap();
        drop(answers);
        provider.shutdown_with_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(backlog.waiting.load(Ordering::Relaxed), 0);
        backlog.report();
        assert_eq!(lost(&backlog), (0, true));
    }

    #[test]
    fn what_the_collector_refuses_is_lost() {
        let (answers, receiver) = mpsc::sync_channel(1);
        let backlog = Arc::new(Backlog::default());
        let provider =
            SdkTracerProvider::builder().with_span_processor(Bounded::new(Collector(Mutex::new(receiver)), backlog.clone())).build();
        drop(answers);
        drop(provider.tracer("test").start("span"));
        let _ = provider.shutdown_with_timeout(Duration::from_secs(20));
        assert_eq!(backlog.waiting.load(Ordering::Relaxed), 0);
        assert_eq!(lost(&backlog), (0, true), "lost and told");
    }
}
