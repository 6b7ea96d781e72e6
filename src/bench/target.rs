//! A server to measure: one in this process on ports of its own, or one that runs elsewhere.

use std::{
    fmt,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    sync::oneshot,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tonic::transport::{Channel, Endpoint};

use super::subject::Subject;
use crate::{
    engine::{EngineConfig, FIRST_GENERATION},
    error::{Error, Result},
    model::CacheShape,
    moe::policy::RoutingChoice,
    server::{self, DrainConfig, Listeners, Loaded},
    service::{
        SamplingDefaults, ServiceConfig,
        proto::{self, inference_client::InferenceClient},
    },
    telemetry::otel::Tracer,
};

/// How long to wait for a connection, and for an answer of the observers' port.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often the server is asked whether it has become idle.
const IDLE_POLL: Duration = Duration::from_millis(20);

/// Largest message either way: a score of a long text with alternatives is the only large one.
const MESSAGE_BYTES: usize = 64 << 20;

/// Limits of the server in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerLimits {
    /// Requests in one batch.
    pub max_batch_requests: usize,
    /// Requests that may wait.
    pub max_queue_requests: usize,
    /// Tokens of one step.
    pub step_tokens: usize,
    /// Tokens that one request may generate.
    pub max_new_tokens: usize,
    /// Size of the cache.
    pub cache: CacheShape,
}

/// A real server on threads of its own, in this process. It ends with this value.
#[derive(Debug)]
pub struct LocalServer {
    target: Target,
    shutdown: Option<oneshot::Sender<()>>,
    running: Option<JoinHandle<Result<()>>>,
    runtime: Runtime,
}

/// Where to reach a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// `http://host:port` of the gRPC port.
    pub url: String,
    /// `host:port` of the port with `/metrics`.
    pub observers: Option<String>,
}

/// What a server says about its model, as far as a load generator needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its name.
    pub model: String,
    /// Element type of its weights.
    pub dtype: String,
    /// Tokens that exist.
    pub vocab_size: u32,
    /// Longest sequence.
    pub max_context: usize,
    /// Most tokens of one request.
    pub max_new_tokens: usize,
    /// Requests in one batch.
    pub max_batch_requests: usize,
}

/// One reading of `/metrics`.
#[derive(Clone, Debug, Default)]
pub struct Page(String);

impl LocalServer {
    /// Starts a server over a model of `subject`, and waits until it serves.
    pub fn start(subject: &Subject, limits: ServerLimits) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name(server::IO_THREADS).build();
        let runtime = runtime.map_err(|error| Error::Internal(format!("no runtime: {error}")))?;
        let loaded = loaded(subject, limits)?;
        let bind = |name: &str| {
            let socket = runtime.block_on(TcpListener::bind("127.0.0.1:0")).map_err(|error| Error::io(format!("{name} port"), error))?;
            let address = socket.local_addr().map_err(|error| Error::io(format!("{name} port"), error))?;
            Ok::<(TcpListener, SocketAddr), Error>((socket, address))
        };
        let ((grpc, grpc_address), (metrics, metrics_address)) = (bind("gRPC")?, bind("metrics")?);
        let (shutdown, stopped) = oneshot::channel::<()>();
        let drain = DrainConfig { grace: Duration::ZERO, timeout: PATIENCE };
        let listeners = Listeners { grpc, metrics: Some(metrics), live_page: Default::default() };
        let running = runtime.spawn(server::run(listeners, drain, Tracer::default(), move || Ok(loaded), async {
            let _ = stopped.await;
        }));
        let target = Target { url: format!("http://{grpc_address}"), observers: Some(metrics_address.to_string()) };
        let mut server = Self { target, shutdown: Some(shutdown), running: Some(running), runtime };
        server.wait_until_serving()?;
        Ok(server)
    }

    /// Where it is.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// The first answer, or why there is none.
    fn wait_until_serving(&mut self) -> Result<()> {
        let Some(running) = self.running.as_mut() else { return Ok(()) };
        let target = &self.target;
        let ended = self.runtime.block_on(async {
            tokio::select! {
                facts = target.facts() => facts.map(|_| None),
                ended = running => Ok(Some(ended)),
            }
        })?;
        match ended {
            None => Ok(()),
            Some(Ok(Err(error))) => Err(error),
            Some(_) => Err(Error::Internal("the server ended before it served".into())),
        }
    }

    /// Drains it; fails where serving failed.
    pub fn stop(mut self) -> Result<()> {
        drop(self.shutdown.take());
        let Some(running) = self.running.take() else { return Ok(()) };
        self.runtime.block_on(running).map_err(|error| Error::Internal(format!("the server failed: {error}")))?
    }
}

fn loaded(subject: &Subject, limits: ServerLimits) -> Result<Loaded> {
    let service = ServiceConfig {
        model_name: subject.name.clone(),
        device: subject.device.to_string(),
        dtype: subject.dtype.to_owned(),
        routing: RoutingChoice::Native.into(),
        runtime_routing: false,
        sampling: SamplingDefaults::default(),
        max_receive_bytes: MESSAGE_BYTES,
        max_tokenize_bytes: MESSAGE_BYTES,
        max_send_bytes: MESSAGE_BYTES,
        series: Default::default(),
    };
    let engine = EngineConfig {
        max_batch_requests: limits.max_batch_requests,
        max_queue_requests: limits.max_queue_requests,
        max_step_tokens: limits.step_tokens,
        max_new_tokens: limits.max_new_tokens,
        ..EngineConfig::default()
    };
    Ok(Loaded {
        model: subject.model(limits.cache)?,
        generation: FIRST_GENERATION,
        background: None,
        tokenizer: Arc::clone(&subject.tokenizer),
        eos_token_ids: Vec::new(),
        engine,
        service,
        tuning: None,
    })
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

impl Target {
    /// A server elsewhere; `http://` may be left out.
    pub fn elsewhere(url: &str, observers: Option<String>) -> Self {
        let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        Self { url, observers }
    }

    /// A client with a connection of its own.
    pub async fn client(&self) -> Result<InferenceClient<Channel>> {
        let wrong = |error: tonic::transport::Error| Error::invalid("--endpoint", format!("'{}': {error}", self.url));
        let endpoint = Endpoint::from_shared(self.url.clone()).map_err(wrong)?.tcp_nodelay(true).connect_timeout(PATIENCE);
        let channel = endpoint.connect().await;
        let channel = channel.map_err(|error| Error::FailedPrecondition(format!("no server at {}: {error}", self.url)))?;
        Ok(InferenceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES))
    }

    /// What the server says about itself.
    pub async fn facts(&self) -> Result<Facts> {
        let info = self.client().await?.get_model_info(proto::GetModelInfoRequest::default()).await;
        let info = info.map_err(|status| Error::FailedPrecondition(format!("{} says: {}", self.url, status.message())))?.into_inner();
        let limits = info.limits.unwrap_or_default();
        Ok(Facts {
            model: info.model,
            dtype: info.dtype,
            vocab_size: info.vocab_size,
            max_context: limits.max_context_tokens as usize,
            max_new_tokens: limits.max_new_tokens as usize,
            max_batch_requests: limits.max_batch_requests as usize,
        })
    }

    /// Reads `/metrics`; `None` where the port is not known.
    pub async fn page(&self) -> Result<Option<Page>> {
        let Some(address) = &self.observers else { return Ok(None) };
        let failed = |error| Error::io(format!("http://{address}/metrics"), error);
        let read = async {
            let mut socket = TcpStream::connect(address).await?;
            let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
            socket.write_all(request.as_bytes()).await?;
            let mut answer = String::new();
            socket.read_to_string(&mut answer).await?;
            Ok(answer)
        };
        let answer = timeout(PATIENCE, read).await.map_err(|_| failed(std::io::ErrorKind::TimedOut.into()))?.map_err(failed)?;
        match answer.split_once("\r\n\r\n") {
            Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(Some(Page(body.to_owned()))),
            _ => Err(Error::FailedPrecondition(format!("http://{address}/metrics is not a page of metrics"))),
        }
    }

    /// Waits until no request runs or waits; the last page read, whether or not it says so in time.
    pub async fn idle_page(&self) -> Result<Option<Page>> {
        let start = Instant::now();
        loop {
            let Some(page) = self.page().await? else { return Ok(None) };
            let busy = page.sum("hardmax_requests_running").unwrap_or(0.0) + page.sum("hardmax_requests_waiting").unwrap_or(0.0);
            if busy == 0.0 || start.elapsed() > PATIENCE {
                return Ok(Some(page));
            }
            sleep(IDLE_POLL).await;
        }
    }
}

impl Page {
    /// The sum over all series of this name; `None` if there is none.
    pub fn sum(&self, name: &str) -> Option<f64> {
        self.sum_where(name, "")
    }

    /// The sum over all series of this name whose labels contain `label`, as `reason="length"`.
    pub fn sum_where(&self, name: &str, label: &str) -> Option<f64> {
        let mut sum = None;
        for line in self.0.lines() {
            let Some(rest) = line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' '])) else { continue };
            let Some((labels, value)) = rest.rsplit_once(' ') else { continue };
            if let Ok(value) = value.parse::<f64>()
                && labels.contains(label)
            {
                *sum.get_or_insert(0.0) += value;
            }
        }
        sum
    }

    /// Mean of a histogram between two readings; `None` where nothing was observed.
    pub fn mean_since(&self, earlier: &Self, histogram: &str) -> Option<f64> {
        let difference = |suffix: &str| {
            let name = format!("{histogram}{suffix}");
            Some(self.sum(&name)? - earlier.sum(&name)?)
        };
        let (sum, count) = (difference("_sum")?, difference("_count")?);
        (count > 0.0).then(|| sum / count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_read() {
        let page = |sum: f64, count: f64| {
            Page(format!(
                "# HELP a_total Things.\na_total{{x=\"1\",y=\"b c\"}} 2\na_total{{x=\"2\"}} 3\na_total_more 100\nt_sum{{}} {sum}\nt_count {count}\n"
            ))
        };
        let (before, after) = (page(1.0, 2.0), page(4.0, 4.0));
        assert_eq!((before.sum("a_total"), before.sum("a")), (Some(5.0), None));
        assert_eq!(before.sum_where("a_total", "x=\"1\""), Some(2.0));
        assert_eq!(after.mean_since(&before, "t"), Some(1.5));
        assert_eq!(after.mean_since(&after, "t"), None);
    }

    #[test]
    fn endpoints_may_leave_the_scheme_out() {
        assert_eq!(Target::elsewhere("a:1", None).url, "http://a:1");
        assert_eq!(Target::elsewhere("http://a:1", None).url, "http://a:1");
    }
}
