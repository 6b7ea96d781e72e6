//! The flags of tracing, and the standard variables that stand in for them.

use std::str::FromStr;

use clap::{Args, builder::NonEmptyStringValueParser};

use crate::{
    error::Result,
    telemetry::otel::{OtlpConfig, Tracer},
};

/// `service.name` of a server that is not told one.
const SERVICE_NAME: &str = "hardmax";

/// Tracing.
#[derive(Args, Clone, Debug)]
pub struct OtlpArgs {
    /// Send a trace of every request to an OpenTelemetry collector, as OTLP over gRPC without TLS: `http://HOST:PORT`, or `off`.
    /// Default: the variable OTEL_EXPORTER_OTLP_ENDPOINT, else off.
    #[arg(long, env = "HARDMAX_OTLP_ENDPOINT", value_name = "URL|off")]
    pub otlp_endpoint: Option<OtlpEndpoint>,
    /// Share of the requests that are traced, 0 to 1. A `traceparent` in a request's metadata decides for that request.
    #[arg(long, env = "HARDMAX_OTLP_SAMPLE_RATIO", value_name = "RATIO", default_value = "1", value_parser = ratio)]
    pub otlp_sample_ratio: f64,
    /// The name of this service in its traces. Default: the variable OTEL_SERVICE_NAME, else hardmax.
    #[arg(long, env = "HARDMAX_OTLP_SERVICE_NAME", value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub otlp_service_name: Option<String>,
    /// There for its variable: what OpenTelemetry calls --otlp-endpoint.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL", hide = true)]
    otel_exporter_otlp_endpoint: Option<OtlpEndpoint>,
    /// There for its variable: what OpenTelemetry calls --otlp-service-name.
    #[arg(long, env = "OTEL_SERVICE_NAME", value_name = "NAME", hide = true)]
    otel_service_name: Option<String>,
}

/// Where traces go; `None` for nowhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtlpEndpoint(pub Option<String>);

impl OtlpArgs {
    /// Starts what the flags ask for. Call it on a tokio runtime.
    pub(super) fn tracer(&self) -> Result<Tracer> {
        let Some(config) = self.config() else { return Ok(Tracer::default()) };
        let tracer = Tracer::start(&config)?;
        let OtlpConfig { endpoint, sample_ratio, service_name } = config;
        tracing::info!(endpoint, sample_ratio, service_name, "traces are exported");
        Ok(tracer)
    }

    fn config(&self) -> Option<OtlpConfig> {
        let endpoint = self.otlp_endpoint.as_ref().or(self.otel_exporter_otlp_endpoint.as_ref())?;
        let standard_name = self.otel_service_name.clone().filter(|name| !name.is_empty());
        Some(OtlpConfig {
            endpoint: endpoint.0.clone()?,
            sample_ratio: self.otlp_sample_ratio,
            service_name: self.otlp_service_name.clone().or(standard_name).unwrap_or_else(|| SERVICE_NAME.into()),
        })
    }
}

impl FromStr for OtlpEndpoint {
    type Err = String;

    /// Empty is as good as unset: so says the convention for the standard variable.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" | "off" => Ok(Self(None)),
            _ if text.strip_prefix("http://").is_some_and(|rest| !rest.is_empty()) => Ok(Self(Some(text.into()))),
            _ if text.starts_with("https://") => {
                Err("there is no TLS here: name a collector on this machine or in this pod with http://, or say 'off'".into())
            }
            _ => Err("not a URL such as http://localhost:4317, and not 'off'".into()),
        }
    }
}

fn ratio(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(ratio),
        _ => Err("not a number from 0 to 1".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        otlp: OtlpArgs,
    }

    /// With the two standard variables, in the order of their fields.
    fn config(flags: &[&str], standard: [&str; 2]) -> Result<Option<OtlpConfig>, clap::Error> {
        let [endpoint, name] = standard;
        let line = ["serve", "--otel-exporter-otlp-endpoint", endpoint, "--otel-service-name", name];
        Line::try_parse_from(line.iter().chain(flags)).map(|line| line.otlp.config())
    }

    fn known(endpoint: &str, service_name: &str) -> Option<OtlpConfig> {
        Some(OtlpConfig { endpoint: endpoint.into(), sample_ratio: 1.0, service_name: service_name.into() })
    }

    #[test]
    fn own_settings_go_before_the_standard_ones() {
        assert_eq!(config(&[], ["", ""]).unwrap(), None);
        assert_eq!(config(&[], ["http://c:1", ""]).unwrap(), known("http://c:1", "hardmax"));
        assert_eq!(config(&[], ["http://c:1", "two"]).unwrap(), known("http://c:1", "two"));
        let own = ["--otlp-endpoint", "http://c:2", "--otlp-service-name", "own"];
        assert_eq!(config(&own, ["http://c:1", "two"]).unwrap(), known("http://c:2", "own"));
        assert_eq!(config(&["--otlp-endpoint", "off"], ["http://c:1", ""]).unwrap(), None);
        let half = config(&["--otlp-endpoint", "http://c:1", "--otlp-sample-ratio", "0.5"], ["", ""]).unwrap();
        assert_eq!(half.unwrap().sample_ratio, 0.5);
    }

    #[test]
    fn values_are_checked_when_they_are_read() {
        for ratio in ["-0.1", "1.1", "NaN", "all"] {
            assert!(config(&["--otlp-sample-ratio", ratio], ["", ""]).is_err(), "{ratio}");
        }
        for endpoint in ["on", "http://", "localhost:4317", "https://c:1"] {
            let error = config(&["--otlp-endpoint", endpoint], ["", ""]).unwrap_err().to_string();
            assert!(error.contains("http://") && error.contains("off"), "{error}");
        }
        assert!(config(&["--otlp-service-name", ""], ["", ""]).is_err());
    }
}
