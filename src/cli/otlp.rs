//! The flags of tracing, and the standard variables that stand in for them.

use std::str::FromStr;

use clap::{Args, builder::NonEmptyStringValueParser};

use crate::{
    error::{Error, Result},
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
    #[command(flatten)]
    standard: StandardArgs,
}

/// Variables that OpenTelemetry defines for all programs. They may be set for many at once, so nothing in them is an error here.
#[derive(Args, Clone, Debug)]
struct StandardArgs {
    /// There for its variable: what OpenTelemetry calls --otlp-endpoint.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL", hide = true)]
    otel_exporter_otlp_endpoint: Option<String>,
    /// There for its variable: how the collector at that endpoint is spoken to.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_PROTOCOL", value_name = "PROTOCOL", hide = true)]
    otel_exporter_otlp_protocol: Option<String>,
    /// There for its variable: what OpenTelemetry calls --otlp-service-name.
    #[arg(long, env = "OTEL_SERVICE_NAME", value_name = "NAME", hide = true)]
    otel_service_name: Option<String>,
    /// There for its variable: `none` turns traces off, unless --otlp-endpoint is given.
    #[arg(long, env = "OTEL_TRACES_EXPORTER", value_name = "NAME", hide = true)]
    otel_traces_exporter: Option<String>,
    /// There for its variable: `true` turns traces off.
    #[arg(long, env = "OTEL_SDK_DISABLED", value_name = "BOOL", hide = true)]
    otel_sdk_disabled: Option<String>,
}

/// Where traces go; `None` for nowhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtlpEndpoint(pub Option<String>);

impl OtlpArgs {
    /// Starts what the flags ask for. Call it on a tokio runtime.
    ///
    /// Fails where a flag of hardmax cannot be obeyed. A standard variable that cannot be is a warning.
    pub(super) fn tracer(&self) -> Result<Tracer> {
        let config = match self.config() {
            Ok(Some(config)) => config,
            Ok(None) => return Ok(Tracer::default()),
            Err(reason) => return Ok(no_traces(&reason)),
        };
        let tracer = match Tracer::start(&config) {
            Err(Error::InvalidArgument { message, .. }) if self.otlp_endpoint.is_none() => return Ok(no_traces(&unusable(&message))),
            started => started?,
        };
        let OtlpConfig { endpoint, sample_ratio, service_name } = config;
        tracing::info!(endpoint, sample_ratio, service_name, "traces are exported");
        Ok(tracer)
    }

    /// What to export, if anything; or why a standard variable that asks for it is not obeyed.
    fn config(&self) -> Result<Option<OtlpConfig>, String> {
        let disabled = self.standard.disabled();
        let endpoint = match &self.otlp_endpoint {
            Some(own) => own.clone(),
            None if disabled => OtlpEndpoint(None),
            None => self.standard.endpoint()?,
        };
        let Some(endpoint) = endpoint.0 else { return Ok(None) };
        if disabled {
            return Err("OTEL_SDK_DISABLED is true, which goes before --otlp-endpoint".into());
        }
        let service_name = self.otlp_service_name.clone().or(set(&self.standard.otel_service_name).map(str::to_owned));
        Ok(Some(OtlpConfig {
            endpoint,
            sample_ratio: self.otlp_sample_ratio,
            service_name: service_name.unwrap_or_else(|| SERVICE_NAME.into()),
        }))
    }
}

impl StandardArgs {
    /// Fails with a reason where the endpoint is none that can be sent to from here.
    fn endpoint(&self) -> Result<OtlpEndpoint, String> {
        let exporter = set(&self.otel_traces_exporter);
        let wanted = set(&self.otel_exporter_otlp_endpoint).filter(|_| exporter != Some("none"));
        let Some(text) = wanted else { return Ok(OtlpEndpoint(None)) };
        let endpoint = text.parse().map_err(|error: String| unusable(&format!("'{text}': {error}")))?;
        match set(&self.otel_exporter_otlp_protocol) {
            None | Some("grpc") => Ok(endpoint),
            Some(other) => {
                let advice = "only grpc is spoken here: name a port for that, usually 4317, in --otlp-endpoint, or say 'off' there";
                Err(format!("OTEL_EXPORTER_OTLP_PROTOCOL is '{other}', and {advice}"))
            }
        }
    }

    fn disabled(&self) -> bool {
        set(&self.otel_sdk_disabled).is_some_and(|value| value.eq_ignore_ascii_case("true"))
    }
}

/// A tracer that makes none, although a standard variable asks for them.
fn no_traces(reason: &str) -> Tracer {
    tracing::warn!(reason, "traces are not exported");
    Tracer::default()
}

fn unusable(why: &str) -> String {
    format!("OTEL_EXPORTER_OTLP_ENDPOINT cannot be used: {why}")
}

/// The value of a variable. An empty one is as good as unset: so says the convention.
fn set(variable: &Option<String>) -> Option<&str> {
    variable.as_deref().map(str::trim).filter(|value| !value.is_empty())
}

impl FromStr for OtlpEndpoint {
    type Err = String;

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

    /// The standard variables that are not in `standard` are empty, whatever whoever runs the tests has.
    fn parse(flags: &[&str], standard: &[(&str, &str)]) -> Result<OtlpArgs, clap::Error> {
        let known = [
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            "OTEL_EXPORTER_OTLP_PROTOCOL",
            "OTEL_SERVICE_NAME",
            "OTEL_SDK_DISABLED",
            "OTEL_TRACES_EXPORTER",
        ];
        assert!(standard.iter().all(|(name, _)| known.contains(name)));
        let value = |name| standard.iter().find(|(known, _)| *known == name).map_or("", |(_, value)| value);
        let standard = known.map(|name| format!("--{}={}", name.to_lowercase().replace('_', "-"), value(name)));
        let line = std::iter::once("serve").chain(standard.iter().map(String::as_str)).chain(flags.iter().copied());
        Line::try_parse_from(line).map(|line| line.otlp)
    }

    fn config(flags: &[&str], standard: &[(&str, &str)]) -> Option<OtlpConfig> {
        parse(flags, standard).unwrap().config().unwrap()
    }

    fn known(endpoint: &str, service_name: &str) -> Option<OtlpConfig> {
        Some(OtlpConfig { endpoint: endpoint.into(), sample_ratio: 1.0, service_name: service_name.into() })
    }

    const STANDARD: [(&str, &str); 2] = [("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:1"), ("OTEL_SERVICE_NAME", "two")];

    #[test]
    fn own_settings_go_before_the_standard_ones() {
        assert_eq!(config(&[], &[]), None);
        assert_eq!(config(&[], &STANDARD[..1]), known("http://c:1", "hardmax"));
        assert_eq!(config(&[], &STANDARD), known("http://c:1", "two"));
        assert_eq!(config(&["--otlp-endpoint", "http://c:2", "--otlp-service-name", "own"], &STANDARD), known("http://c:2", "own"));
        assert_eq!(config(&["--otlp-endpoint", "off"], &STANDARD), None);
        let half = config(&["--otlp-endpoint", "http://c:1", "--otlp-sample-ratio", "0.5"], &[]);
        assert_eq!(half.unwrap().sample_ratio, 0.5);
    }

    #[tokio::test]
    async fn what_is_meant_for_others_is_no_error() {
        let endpoint = |url| ("OTEL_EXPORTER_OTLP_ENDPOINT", url);
        let protocol = ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf");
        let cases: [(&[(&str, &str)], &str); 3] = [
            (&[endpoint("https://c:4317")], "OTEL_EXPORTER_OTLP_ENDPOINT cannot be used: 'https://c:4317': there is no TLS"),
            (&[endpoint("c:4317")], "OTEL_EXPORTER_OTLP_ENDPOINT cannot be used: 'c:4317': not a URL"),
            (&[endpoint("http://c:4318"), protocol], "OTEL_EXPORTER_OTLP_PROTOCOL is 'http/protobuf'"),
        ];
        let own = ["--otlp-endpoint", "http://c:2"];
        for (standard, expected) in cases {
            let args = parse(&[], standard).unwrap();
            assert!(args.tracer().is_ok(), "{standard:?}");
            let reason = args.config().unwrap_err();
            assert!(reason.starts_with(expected), "{reason}");
            assert_eq!(config(&own, standard), known("http://c:2", "hardmax"), "it does not matter where hardmax is told");
            assert_eq!(config(&["--otlp-endpoint", "off"], standard), None);
        }
        let malformed = "http://a b";
        assert!(parse(&[], &[endpoint(malformed)]).unwrap().tracer().is_ok(), "which only the exporter finds");
        assert!(parse(&["--otlp-endpoint", malformed], &[]).unwrap().tracer().is_err());
    }

    #[test]
    fn all_traces_can_be_turned_off() {
        let [endpoint, _] = STANDARD;
        let disabled = ("OTEL_SDK_DISABLED", "True");
        assert_eq!(config(&[], &[endpoint, disabled]), None);
        assert_eq!(config(&["--otlp-endpoint", "off"], &[disabled]), None);
        let reason = parse(&["--otlp-endpoint", "http://c:2"], &[disabled]).unwrap().config().unwrap_err();
        assert!(reason.starts_with("OTEL_SDK_DISABLED"), "{reason}");
        let grpc = ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
        assert_eq!(config(&[], &[endpoint, grpc, ("OTEL_SDK_DISABLED", "false")]), known("http://c:1", "hardmax"));
    }

    #[test]
    fn values_are_checked_when_they_are_read() {
        for ratio in ["-0.1", "1.1", "NaN", "all"] {
            assert!(parse(&["--otlp-sample-ratio", ratio], &[]).is_err(), "{ratio}");
        }
        for endpoint in ["on", "http://", "localhost:4317", "https://c:1"] {
            let error = parse(&["--otlp-endpoint", endpoint], &[]).unwrap_err().to_string();
            assert!(error.contains("http://") && error.contains("off"), "{error}");
        }
        assert!(parse(&["--otlp-service-name", ""], &[]).is_err());
    }
}
