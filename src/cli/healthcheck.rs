//! `hardmax healthcheck`: the probe of containers that have no other tool.

use std::time::Duration;

use clap::Args;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use super::client::{DEFAULT_URL, block_on, connect, refused};
use crate::error::{Error, Result};

/// Ask a server for its health: exit status 0 if it is SERVING, else 1.
#[derive(Args, Clone, Debug)]
pub struct HealthcheckArgs {
    /// Address of the server.
    #[arg(long, env = "HARDMAX_URL", default_value = DEFAULT_URL)]
    pub url: String,
    /// Ask about one service, for example `hardmax.v1.Inference`. Empty: the server as a whole.
    #[arg(long, value_name = "NAME", default_value = "")]
    pub service: String,
    /// Seconds to wait for the answer.
    #[arg(long, value_name = "SECONDS", default_value = "3", value_parser = super::serve::seconds)]
    pub timeout: Duration,
}

/// Fails unless the server is SERVING.
pub fn run(args: HealthcheckArgs) -> Result<()> {
    block_on(async {
        let answer = tokio::time::timeout(args.timeout, check(&args)).await;
        match answer {
            Ok(Ok(ServingStatus::Serving)) => {
                tracing::debug!("SERVING");
                Ok(())
            }
            Ok(Ok(status)) => Err(Error::FailedPrecondition(status.as_str_name().to_owned())),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::FailedPrecondition(format!("no answer from {} within {:?}", args.url, args.timeout))),
        }
    })
}

async fn check(args: &HealthcheckArgs) -> Result<ServingStatus> {
    let mut client = HealthClient::new(connect(&args.url).await?);
    let request = HealthCheckRequest { service: args.service.clone() };
    let response = client.check(request).await.map_err(|status| refused(&status))?;
    Ok(response.get_ref().status())
}
