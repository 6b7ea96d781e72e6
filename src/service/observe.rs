//! What every RPC goes through first: its span begins and ends, its final status is counted, and a panic in its handler becomes INTERNAL.
//!
//! The status of a stream is in its trailers, so the response body is watched to its end; a body that is dropped
//! before that was cancelled.

use std::{
    future::{Future, poll_fn},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
};

use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::{
    Code, Status,
    body::Body,
    codegen::{BoxFuture, Bytes, Service, http},
};
use tower::Layer;

use super::{code_name, to_status};
use crate::{
    error::Error,
    telemetry::{
        metrics::{self, Method, Metrics},
        otel::{RequestSpan, Tracer},
    },
};

/// Makes an [`ObserveService`].
#[derive(Clone, Debug)]
pub struct ObserveLayer {
    metrics: Arc<Metrics>,
    tracer: Tracer,
}

/// Traces the RPCs of `hardmax.v1`, counts them by method and final code, and contains panics of all. The handler finds its [`RequestSpan`] in
/// the extensions of its request.
#[derive(Clone, Debug)]
pub struct ObserveService<S> {
    inner: S,
    metrics: Arc<Metrics>,
    tracer: Tracer,
}

/// Counts one RPC, and ends its span, when it is dropped.
#[derive(Debug)]
struct Outcome {
    metrics: Arc<Metrics>,
    /// `None` for health and reflection, which are not counted and not traced.
    method: Option<Method>,
    /// `None`: no status was sent, so the client went away.
    code: Option<Code>,
    /// Why it failed, for a span that is exported.
    message: String,
    span: RequestSpan,
}

/// A response body whose trailers tell the outcome.
#[derive(Debug)]
struct ObservedBody {
    inner: Body,
    outcome: Outcome,
}

// === impl ObserveLayer ===

impl ObserveLayer {
    /// Counts into `metrics`, and makes the spans of `tracer`.
    pub fn new(metrics: Arc<Metrics>, tracer: Tracer) -> Self {
        Self { metrics, tracer }
    }
}

impl<S> Layer<S> for ObserveLayer {
    type Service = ObserveService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        ObserveService { inner, metrics: self.metrics.clone(), tracer: self.tracer.clone() }
    }
}

// === impl ObserveService ===

impl<S> Service<http::Request<Body>> for ObserveService<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let method = method(request.uri().path());
        let span = method.map_or_else(RequestSpan::default, |_| begin(&self.tracer, &request));
        request.extensions_mut().insert(span.clone());
        let mut outcome = Outcome { metrics: self.metrics.clone(), method, code: None, message: String::new(), span };
        let response = self.inner.call(request);
        Box::pin(async move {
            let response = match contained(response).await {
                Some(response) => response?,
                None => panicked().into_http(),
            };
            if outcome.see(response.headers()) {
                return Ok(response);
            }
            let (parts, inner) = response.into_parts();
            Ok(http::Response::from_parts(parts, Body::new(ObservedBody { inner, outcome })))
        })
    }
}

/// The output of `future`, or `None` if it panics.
async fn contained<F: Future>(future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
        Ok(poll) => poll.map(Some),
        Err(_) => Poll::Ready(None),
    })
    .await
}

fn panicked() -> Status {
    to_status(&Error::Internal("the handler panicked".into()))
}

fn code(headers: &http::HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|status| Code::from_bytes(status.as_bytes()))
}

/// The span of a request for a method that is known.
fn begin(tracer: &Tracer, request: &http::Request<Body>) -> RequestSpan {
    let text = |name| request.headers().get(name).and_then(|value| value.to_str().ok());
    tracer.begin(request.uri().path().trim_start_matches('/'), text("traceparent"), text("tracestate"))
}

/// What the conventions for RPC servers call a failure of the server, and a client that went away: a span of either is marked.
fn fails(code: Code) -> bool {
    use Code::{Cancelled, DataLoss, DeadlineExceeded, Internal, Unavailable, Unimplemented, Unknown};
    matches!(code, Cancelled | DataLoss | DeadlineExceeded | Internal | Unavailable | Unimplemented | Unknown)
}

fn method(path: &str) -> Option<Method> {
    match path {
        "/hardmax.v1.Inference/Generate" => Some(Method::Generate),
        "/hardmax.v1.Inference/Score" => Some(Method::Score),
        "/hardmax.v1.Inference/Tokenize" => Some(Method::Tokenize),
        "/hardmax.v1.Inference/Detokenize" => Some(Method::Detokenize),
        "/hardmax.v1.Inference/GetModelInfo" => Some(Method::GetModelInfo),
        "/hardmax.v1.Routing/MeasureFidelity" => Some(Method::MeasureFidelity),
        "/hardmax.v1.Routing/TraceRouting" => Some(Method::TraceRouting),
        "/hardmax.v1.Routing/ReplayRouting" => Some(Method::ReplayRouting),
        "/hardmax.v1.Routing/GetExpertLoad" => Some(Method::GetExpertLoad),
        "/hardmax.v1.Routing/ResetStatistics" => Some(Method::ResetStatistics),
        "/hardmax.v1.Routing/GetRoutingPolicy" => Some(Method::GetRoutingPolicy),
        "/hardmax.v1.Routing/SetRoutingPolicy" => Some(Method::SetRoutingPolicy),
        "/hardmax.v1.Tuning/StartTuning" => Some(Method::StartTuning),
        "/hardmax.v1.Tuning/WatchTuning" => Some(Method::WatchTuning),
        "/hardmax.v1.Tuning/PauseTuning" => Some(Method::PauseTuning),
        "/hardmax.v1.Tuning/ResumeTuning" => Some(Method::ResumeTuning),
        "/hardmax.v1.Tuning/StopTuning" => Some(Method::StopTuning),
        "/hardmax.v1.Tuning/ListTunings" => Some(Method::ListTunings),
        "/hardmax.v1.Tuning/GetTuning" => Some(Method::GetTuning),
        "/hardmax.v1.Tuning/Publish" => Some(Method::Publish),
        "/hardmax.v1.Tuning/Rollback" => Some(Method::Rollback),
        "/hardmax.v1.Tuning/ListGenerations" => Some(Method::ListGenerations),
        "/hardmax.v1.Tuning/ExportGeneration" => Some(Method::ExportGeneration),
        _ => None,
    }
}

// === impl Outcome ===

impl Outcome {
    /// Reads headers or trailers; `false` if the status is not among them.
    fn see(&mut self, headers: &http::HeaderMap) -> bool {
        let Some(code) = code(headers) else { return false };
        self.code = Some(code);
        if self.span.is_recorded() && fails(code) {
            self.message = Status::from_header_map(headers).map(|status| status.message().to_owned()).unwrap_or_default();
        }
        true
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        let code = self.code.unwrap_or(Code::Cancelled);
        if let Some(method) = self.method {
            self.metrics.request(method, metrics::Code::from_number(code.into()));
        }
        let message = match self.code {
            Some(_) => std::mem::take(&mut self.message),
            None => Error::Cancelled.to_string(),
        };
        self.span.end(code_name(code), fails(code).then_some(message));
    }
}

// === impl ObservedBody ===

impl HttpBody for ObservedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let polled = catch_unwind(AssertUnwindSafe(|| Pin::new(&mut this.inner).poll_frame(cx)));
        let frame = match polled {
            Ok(poll) => ready!(poll),
            Err(_) => {
                this.inner = Body::empty();
                let mut trailers = http::HeaderMap::new();
                Some(panicked().add_header(&mut trailers).map(|()| Frame::trailers(trailers)))
            }
        };
        match &frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref() {
                    this.outcome.see(trailers);
                }
            }
            Some(Err(status)) => this.outcome.code = Some(status.code()),
            None => {
                this.outcome.code.get_or_insert(Code::Unknown);
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::MetricsConfig;

    /// Answers with `body`; panics instead if there is none.
    struct Handler(Option<Body>);

    /// Panics when it is read.
    struct Broken;

    impl Service<http::Request<Body>> for Handler {
        type Response = http::Response<Body>;
        type Error = Status;
        type Future = BoxFuture<Self::Response, Status>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: http::Request<Body>) -> Self::Future {
            let body = self.0.take();
            Box::pin(async move { Ok(http::Response::new(body.expect("this test panics here"))) })
        }
    }

    impl HttpBody for Broken {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            panic!("this test panics here");
        }
    }

    async fn call(handler: Handler) -> (http::Response<Body>, Arc<Metrics>) {
        let metrics = Arc::new(Metrics::new(&MetricsConfig::default()).unwrap());
        let request = http::Request::post("/hardmax.v1.Inference/Score").body(Body::empty()).unwrap();
        let response = ObserveLayer::new(metrics.clone(), Tracer::default()).layer(handler).call(request).await.unwrap();
        (response, metrics)
    }

    fn counted(metrics: &Metrics, code: &str) -> bool {
        let labels = ["method=\"Score\"".to_owned(), format!("code=\"{code}\"")];
        let page = metrics.render();
        let mut lines = page.lines().filter(|line| line.starts_with("hardmax_requests_total{"));
        lines.any(|line| labels.iter().all(|label| line.contains(label)) && line.ends_with(" 1"))
    }

    #[tokio::test]
    async fn a_panic_of_the_handler_is_internal() {
        let (response, metrics) = call(Handler(None)).await;
        assert_eq!(code(response.headers()), Some(Code::Internal));
        assert!(counted(&metrics, "INTERNAL"));
    }

    #[tokio::test]
    async fn a_panic_of_the_stream_is_internal_and_its_end() {
        let (response, metrics) = call(Handler(Some(Body::new(Broken)))).await;
        let mut body = response.into_body();
        let frame = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await.unwrap().unwrap();
        assert_eq!(code(frame.trailers_ref().unwrap()), Some(Code::Internal));
        assert!(poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await.is_none());
        drop(body);
        assert!(counted(&metrics, "INTERNAL"));
    }

    #[tokio::test]
    async fn a_body_that_nobody_reads_to_its_end_was_cancelled() {
        let (response, metrics) = call(Handler(Some(Body::new(Broken)))).await;
        drop(response);
        assert!(counted(&metrics, "CANCELLED"));
    }
}
