//! What the commands that talk to a server share.

use std::time::Duration;

use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use crate::{
    error::{Error, Result},
    service::code_name,
};

/// Where a server listens unless told otherwise.
pub(super) const DEFAULT_URL: &str = "http://127.0.0.1:50051";

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection to the server at `url`; `http://` may be left out.
pub(super) async fn connect(url: &str) -> Result<Channel> {
    connect_to(url, "--url").await
}

/// The same of an address that `flag` names.
pub(super) async fn connect_to(url: &str, flag: &str) -> Result<Channel> {
    let full = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
    if !full.starts_with("http://") {
        return Err(Error::invalid(flag, format!("'{url}': only http:// is supported; put a proxy in front for TLS")));
    }
    let endpoint = Endpoint::from_shared(full).map_err(|error| Error::invalid(flag, format!("'{url}': {error}")))?;
    let endpoint = endpoint.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true).user_agent(concat!("hardmax/", env!("CARGO_PKG_VERSION")));
    let endpoint = endpoint.map_err(|error| Error::Internal(format!("user agent: {error}")))?;
    endpoint.connect().await.map_err(|error| {
        let cause = innermost(&error);
        Error::FailedPrecondition(format!("no server at {url}: {cause}. Start one with `hardmax serve`, or name another with {flag}"))
    })
}

/// The answer of a server that said no.
pub(super) fn refused(status: &Status) -> Error {
    Error::FailedPrecondition(format!("the server answered {}: {}", code_name(status.code()), status.message()))
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Runs one command's worth of async work on this thread.
pub(super) fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| Error::Internal(format!("no runtime: {error}")))?.block_on(work)
}
